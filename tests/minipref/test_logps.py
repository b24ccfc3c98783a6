"""Token log-probabilities, all logits at once: the numbers of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference.logps as ref
from minipref.logps import token_logps

N, D, V = 10, 4, 7


def example(dtype=jnp.float32, scale=1.0, n=N):
    rng = np.random.default_rng(0)
    hidden, unembedding = scale * rng.normal(size=(n, D)), rng.normal(size=(V, D))
    labels = jnp.asarray(rng.integers(V, size=n))
    return jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype), labels


def reference_logps(hidden, unembedding, labels):
    return ref.token_logps(np.asarray(hidden, float), np.asarray(unembedding, float), labels)


def test_by_hand():
    """Logits (0, ln 3): probabilities 1/4, 3/4. The gradient by the hidden state is
    e_label - sum_v p_v e_v."""
    hidden, unembedding = jnp.ones((2, 1)), jnp.array([[0.0], [jnp.log(3.0)]])
    labels, expected = jnp.array([0, 1]), np.log([0.25, 0.75])
    np.testing.assert_allclose(token_logps(hidden, unembedding, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(ref.token_logps(hidden, unembedding, labels), expected, rtol=1e-6)
    gradient = jax.grad(lambda h: jnp.sum(token_logps(h, unembedding, labels)))(hidden)
    np.testing.assert_allclose(gradient, np.log(3) * np.array([[-0.75], [0.25]]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matches_the_reference(dtype):
    hidden, unembedding, labels = example(dtype)
    logps = token_logps(hidden, unembedding, labels)
    exact = reference_logps(hidden, unembedding, labels)
    assert logps.dtype == exact.dtype == np.float32
    np.testing.assert_allclose(logps, exact, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, unembedding, labels = example(scale=1e4)
    exact = reference_logps(hidden, unembedding, labels)
    assert np.min(exact) < -1e4
    logps = token_logps(hidden, unembedding, labels)
    np.testing.assert_allclose(logps, exact, rtol=1e-5, atol=1e-2)


def test_eager_jit_and_vmap_agree():
    hidden, unembedding, labels = example()
    eager = token_logps(hidden, unembedding, labels)
    one = jax.jit(lambda h, y: token_logps(h, unembedding, y))
    np.testing.assert_allclose(one(hidden, labels), eager, rtol=1e-6)
    batch = jax.vmap(one)(jnp.stack([hidden, 2 * hidden]), jnp.stack([labels, labels]))
    np.testing.assert_allclose(batch[0], eager, rtol=1e-5)


def test_no_rows():
    hidden, unembedding, labels = example(n=0)
    assert token_logps(hidden, unembedding, labels).shape == (0,)
    slope = jax.grad(lambda u: token_logps(hidden, u, labels).sum())(unembedding)
    np.testing.assert_array_equal(slope, jnp.zeros_like(unembedding))
