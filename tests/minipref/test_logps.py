"""Chunked token log-probabilities: the reference's numbers, whatever the chunk, without the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference.logps as ref
from minipref.logps import token_logps, weighted_logp

N, D, V = 10, 4, 7
CHUNKS = [1, 4, 1024]


def example(dtype=jnp.float32, scale=1.0, n=N):
    rng = np.random.default_rng(0)
    hidden, unembedding = scale * rng.normal(size=(n, D)), rng.normal(size=(V, D))
    return jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype), jnp.asarray(rng.integers(V, size=n))


def test_by_hand():
    """Logits (0, ln 3): probabilities 1/4, 3/4. The hidden state's gradient is e_label - sum_v p_v e_v."""
    hidden, unembedding = jnp.ones((2, 1)), jnp.array([[0.0], [jnp.log(3.0)]])
    labels = jnp.array([0, 1])
    np.testing.assert_allclose(token_logps(hidden, unembedding, labels), np.log([0.25, 0.75]), rtol=1e-6)
    np.testing.assert_allclose(ref.token_logps(hidden, unembedding, labels), np.log([0.25, 0.75]), rtol=1e-6)
    gradient = jax.grad(lambda h: jnp.sum(token_logps(h, unembedding, labels, chunk=1)))(hidden)
    np.testing.assert_allclose(gradient, np.log(3) * np.array([[-0.75], [0.25]]), rtol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matches_the_reference(chunk, dtype):
    hidden, unembedding, labels = example(dtype)
    logps = token_logps(hidden, unembedding, labels, chunk=chunk)
    exact = ref.token_logps(np.asarray(hidden, float), np.asarray(unembedding, float), labels)
    assert logps.dtype == exact.dtype == np.float32
    np.testing.assert_allclose(logps, exact, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    hidden, unembedding, labels = example(scale=1e4)
    exact = ref.token_logps(np.asarray(hidden, float), np.asarray(unembedding, float), labels)
    assert np.min(exact) < -1e4
    np.testing.assert_allclose(token_logps(hidden, unembedding, labels), exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("chunk", CHUNKS[:-1])
def test_gradients_do_not_depend_on_the_chunk(chunk):
    hidden, unembedding, labels = example()
    weights = jnp.arange(N) - 3.0

    def loss(hidden, unembedding, chunk):
        return jnp.sum(weights * token_logps(hidden, unembedding, labels, chunk=chunk))

    whole = jax.grad(loss, (0, 1))(hidden, unembedding, 1024)
    for gradient, expected in zip(jax.grad(loss, (0, 1))(hidden, unembedding, chunk), whole, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_the_unembeddings_gradient_adds_up_in_float32():
    """512 equal terms: added one by one in bfloat16 they would stop growing at 256 times one of them."""
    hidden, unembedding = jnp.ones((512, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    labels = jnp.zeros(512, int)
    gradient = jax.grad(lambda u: jnp.sum(token_logps(hidden, u, labels, chunk=1)))(unembedding)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, float), [[256.0], [-256.0]])


@pytest.mark.parametrize("chunk", [3, 16])
def test_eager_jit_and_vmap_agree(chunk):
    hidden, unembedding, labels = example()
    eager = token_logps(hidden, unembedding, labels, chunk=chunk)
    one = jax.jit(lambda h, y: token_logps(h, unembedding, y, chunk=chunk))
    np.testing.assert_allclose(one(hidden, labels), eager, rtol=1e-6)
    batch = jax.vmap(one)(jnp.stack([hidden, 2 * hidden]), jnp.stack([labels, labels]))
    np.testing.assert_allclose(batch[0], eager, rtol=1e-5)


def test_no_rows():
    hidden, unembedding, labels = example(n=0)
    assert token_logps(hidden, unembedding, labels).shape == (0,)
    slope = jax.grad(lambda u: token_logps(hidden, u, labels).sum())(unembedding)
    np.testing.assert_array_equal(slope, jnp.zeros_like(unembedding))


def sizes(jaxpr):
    """The sizes of all intermediate arrays, in inner programs too."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(out.aval.shape)) for out in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from sizes(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(("chunk", "whole"), [(8, False), (1024, True)])
def test_full_logits_are_not_materialised(chunk, whole):
    """64 rows, a vocabulary of 100: no array of value and gradient has 64 * 100 entries but in one chunk."""
    hidden, unembedding, labels = jnp.ones((64, 2)), jnp.ones((100, 2)), jnp.zeros(64, int)

    def loss(hidden, unembedding):
        return jnp.sum(token_logps(hidden, unembedding, labels, chunk=chunk))

    program = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(hidden, unembedding)
    largest = max(sizes(program.jaxpr))
    assert largest == (64 * 100 if whole else 8 * 100)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_weighted_sum_and_its_gradients_are_those_of_the_log_probabilities(chunk):
    hidden, unembedding, labels = example()
    weights = jnp.arange(N) - 3.0

    def direct(hidden, unembedding, weights):
        return 2 * jnp.sum(weights * token_logps(hidden, unembedding, labels))

    def summed(hidden, unembedding, weights):
        return 2 * weighted_logp(hidden, unembedding, labels, weights, chunk)

    expected = jax.value_and_grad(direct, (0, 1, 2))(hidden, unembedding, weights)
    found = jax.value_and_grad(summed, (0, 1, 2))(hidden, unembedding, weights)
    np.testing.assert_allclose(summed(hidden, unembedding, weights), expected[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_computes_each_chunks_logits_once():
    """Matrix products that have the vocabulary's 100: logits and two gradients; 4 where they are recomputed."""
    hidden, unembedding, labels = jnp.ones((64, 2)), jnp.ones((100, 2)), jnp.zeros(64, int)
    total = jax.grad(lambda h, u: weighted_logp(h, u, labels, jnp.ones(64), 8), (0, 1))
    again = jax.grad(lambda h, u: token_logps(h, u, labels, chunk=8).sum(), (0, 1))
    counts = [str(jax.make_jaxpr(f)(hidden, unembedding)).count("dot_general[") for f in (total, again)]
    assert counts == [3, 4]
