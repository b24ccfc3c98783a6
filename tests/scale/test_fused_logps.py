"""Log-probabilities in chunks: the numbers of the plain functions and of the reference, whatever
the
chunk, without the full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference.logps as ref
from minipref.logps import token_logps
from scale.model.fused_logps import fused_token_logps, weighted_logp

N, D, V = 10, 4, 7
CHUNKS = [1, 4, 1024]


def example(dtype=jnp.float32, scale=1.0, n=N):
    rng = np.random.default_rng(0)
    hidden, unembedding = scale * rng.normal(size=(n, D)), rng.normal(size=(V, D))
    labels = jnp.asarray(rng.integers(V, size=n))
    return jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype), labels


def fused(hidden, unembedding, labels, chunk=1024):
    return fused_token_logps(hidden, unembedding, labels, chunk).logps


def plain_normalizers(hidden, unembedding):
    return jax.nn.logsumexp(hidden @ unembedding.T, axis=1)


def reference_logps(hidden, unembedding, labels):
    return ref.token_logps(np.asarray(hidden, float), np.asarray(unembedding, float), labels)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_by_hand(chunk):
    """Logits (0, ln 3): probabilities 1/4, 3/4, log Z = ln 4. The gradients by the hidden state are
    e_label - sum_v p_v e_v, and sum_v p_v e_v of log Z."""
    hidden, unembedding = jnp.ones((2, 1)), jnp.array([[0.0], [jnp.log(3.0)]])
    labels = jnp.array([0, 1])
    logps, log_normalizers = fused_token_logps(hidden, unembedding, labels, chunk)
    np.testing.assert_allclose(logps, np.log([0.25, 0.75]), rtol=1e-6)
    np.testing.assert_allclose(log_normalizers, np.log([4.0, 4.0]), rtol=1e-6)

    def total(hidden):
        return jnp.sum(fused(hidden, unembedding, labels, chunk))

    expected = np.log(3) * np.array([[-0.75], [0.25]])
    np.testing.assert_allclose(jax.grad(total)(hidden), expected, rtol=1e-6)

    def normalizer(hidden):
        return jnp.sum(fused_token_logps(hidden, unembedding, labels, chunk).log_normalizers)

    expected = np.log(3) * np.array([[0.75], [0.75]])
    np.testing.assert_allclose(jax.grad(normalizer)(hidden), expected, rtol=1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matches_the_reference(chunk, dtype):
    hidden, unembedding, labels = example(dtype)
    logps, log_normalizers = fused_token_logps(hidden, unembedding, labels, chunk)
    exact = reference_logps(hidden, unembedding, labels)
    assert logps.dtype == log_normalizers.dtype == exact.dtype == np.float32
    np.testing.assert_allclose(logps, exact, rtol=1e-5, atol=1e-5)
    wide = hidden.astype(jnp.float32), unembedding.astype(jnp.float32)
    np.testing.assert_allclose(log_normalizers, plain_normalizers(*wide), rtol=1e-5)


def test_large_logits_stay_finite():
    hidden, unembedding, labels = example(scale=1e4)
    exact = reference_logps(hidden, unembedding, labels)
    assert np.min(exact) < -1e4
    np.testing.assert_allclose(fused(hidden, unembedding, labels), exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_and_gradients_are_those_of_the_plain_functions(chunk):
    """Of a weighted sum of log-probabilities and log-normalizers."""
    hidden, unembedding, labels = example()
    weights = jnp.arange(N) - 3.0

    def plain(hidden, unembedding):
        logps = token_logps(hidden, unembedding, labels)
        return weights @ logps + weights**2 @ plain_normalizers(hidden, unembedding)

    def chunked(hidden, unembedding):
        logps, log_normalizers = fused_token_logps(hidden, unembedding, labels, chunk)
        return weights @ logps + weights**2 @ log_normalizers

    expected, gradients = jax.value_and_grad(plain, (0, 1))(hidden, unembedding)
    value, chunked_gradients = jax.value_and_grad(chunked, (0, 1))(hidden, unembedding)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(chunked_gradients, gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-4)


def test_the_unembeddings_gradient_adds_up_in_float32():
    """512 equal terms: added one by one in bfloat16 they would stop growing at 256 of them."""
    hidden, unembedding = jnp.ones((512, 1), jnp.bfloat16), jnp.zeros((2, 1), jnp.bfloat16)
    labels = jnp.zeros(512, int)
    gradient = jax.grad(lambda u: jnp.sum(fused(hidden, u, labels, 1)))(unembedding)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, float), [[256.0], [-256.0]])


@pytest.mark.parametrize("chunk", [3, 16])
def test_eager_jit_and_vmap_agree(chunk):
    hidden, unembedding, labels = example()
    eager = fused(hidden, unembedding, labels, chunk)
    one = jax.jit(lambda h, y: fused(h, unembedding, y, chunk))
    np.testing.assert_allclose(one(hidden, labels), eager, rtol=1e-6)
    batch = jax.vmap(one)(jnp.stack([hidden, 2 * hidden]), jnp.stack([labels, labels]))
    np.testing.assert_allclose(batch[0], eager, rtol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_several_sequences_are_each_on_its_own(chunk):
    """Chunks are cut along the last axis of the labels."""
    hidden, unembedding, labels = example(n=12)
    hidden, labels = hidden.reshape(2, 6, D), labels.reshape(2, 6)
    weights = jnp.arange(12.0).reshape(2, 6) - 3

    def total(hidden, unembedding):
        return jnp.sum(weights * fused(hidden, unembedding, labels, chunk))

    def plain(hidden, unembedding):
        logps = token_logps(hidden.reshape(12, D), unembedding, labels.reshape(12))
        return weights.reshape(12) @ logps

    expected, gradients = jax.value_and_grad(plain, (0, 1))(hidden, unembedding)
    value, chunked_gradients = jax.value_and_grad(total, (0, 1))(hidden, unembedding)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, wanted in zip(chunked_gradients, gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_no_rows():
    hidden, unembedding, labels = example(n=0)
    assert fused(hidden, unembedding, labels).shape == (0,)
    slope = jax.grad(lambda u: fused(hidden, u, labels).sum())(unembedding)
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
    """64 rows, a vocabulary of 100: no array of value and gradient has 64 * 100 entries but in one
    chunk."""
    hidden, unembedding, labels = jnp.ones((64, 2)), jnp.ones((100, 2)), jnp.zeros(64, int)

    def loss(hidden, unembedding):
        return jnp.sum(fused(hidden, unembedding, labels, chunk))

    program = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(hidden, unembedding)
    largest = max(sizes(program.jaxpr))
    assert largest == (64 * 100 if whole else 8 * 100)


# ---- the weighted sum


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_weighted_sum_and_its_gradients_are_those_of_the_plain_functions(chunk):
    hidden, unembedding, labels = example()
    weights = jnp.arange(N) - 3.0

    def direct(hidden, unembedding, weights):
        return 2 * jnp.sum(weights * token_logps(hidden, unembedding, labels))

    def summed(hidden, unembedding, weights):
        return 2 * weighted_logp(hidden, unembedding, labels, weights, chunk)

    arguments = hidden, unembedding, weights
    expected, gradients = jax.value_and_grad(direct, (0, 1, 2))(*arguments)
    value, summed_gradients = jax.value_and_grad(summed, (0, 1, 2))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(summed(*arguments), expected, rtol=1e-5)
    for gradient, wanted in zip(summed_gradients, gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_a_weighted_sum_computes_the_logits_of_each_chunk_once():
    """Matrix products that have the vocabulary's 100: logits and two gradients; 4 where they are
    computed again."""
    hidden, unembedding, labels = jnp.ones((64, 2)), jnp.ones((100, 2)), jnp.zeros(64, int)
    once = jax.grad(lambda h, u: weighted_logp(h, u, labels, jnp.ones(64), 8), (0, 1))
    again = jax.grad(lambda h, u: fused(h, u, labels, 8).sum(), (0, 1))
    programs = [str(jax.make_jaxpr(f)(hidden, unembedding)) for f in (once, again)]
    assert [program.count("dot_general[") for program in programs] == [3, 4]
