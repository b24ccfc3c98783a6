"""Token log-probabilities in chunks: never all positions' logits at once.

These are `minipref.logps.token_logps` with gradients of their own. Products of bfloat16 arrays add
up in float32, and so does the gradient of the unembedding over the chunks. The size of a chunk
changes memory and speed, not the result.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLogps(NamedTuple):
    """Log-probabilities of labels, and log Z: the log of the softmax's denominator (both nats)."""

    logps: Float[Array, "*R N"]
    log_normalizers: Float[Array, "*R N"]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_token_logps(
    hidden: Float[Array, "*R N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "*R N"],
    chunk: int = 1024,
) -> TokenLogps:
    """The log-probability of the label of each position under the softmax over the vocabulary.

    log softmax(hidden_n . unembedding')[label_n]

    With more than `chunk` positions, the backward pass computes the logits again.

    Args:
        hidden: [*R, N, D].
        unembedding: [V, D].
        labels: Token ids [*R, N], in 0..V-1.
        chunk: How many of the N positions have logits at a time.

    Returns:
        Log-probabilities and log-normalizers [*R, N], nats, in float32 at least.
    """
    return _logps_forward(hidden, unembedding, labels, chunk)[0]


def _logps_forward(hidden, unembedding, labels, chunk):
    weights = unembedding.astype(hidden.dtype)
    one_chunk = labels.shape[-1] <= chunk

    def step(_, part):
        hidden, labels = part
        logps, logits = _chunk_logps(hidden, weights, labels)
        return None, (logps, logits if one_chunk else None)

    _, (logps, logits) = _scan_chunks(step, None, (hidden, labels), labels, chunk)
    return logps, (hidden, unembedding, labels, logps.log_normalizers, logits)


def _logps_backward(chunk, residuals, cotangents):
    hidden, unembedding, labels, log_z, logits = residuals
    weights = unembedding.astype(hidden.dtype)

    def step(total, part):
        hidden, labels, log_z, logits, cotangents = part
        logits = _logits(hidden, weights) if logits is None else logits
        by_hidden, by_weights = _gradients(hidden, weights, labels, logits, log_z, cotangents)
        return total + by_weights, by_hidden

    parts = hidden, labels, log_z, logits, cotangents
    total, by_hidden = _scan_chunks(step, _zeros(unembedding), parts, labels, chunk)
    return by_hidden, total.astype(unembedding.dtype), None


fused_token_logps.defvjp(_logps_forward, _logps_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_logp(
    hidden: Float[Array, "*R N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "*R N"],
    weights: Float[Array, "*R N"],
    chunk: int = 1024,
) -> Float[Array, ""]:
    """A weighted sum of token log-probabilities, whose gradient the forward pass computes.

    sum_n weight_n log softmax(hidden_n . unembedding')[label_n]

    In supervised fine-tuning the weights are known beforehand, unlike those of a margin's loss. So
    the forward pass can form the gradient, up to a factor, and no logits are computed twice.

    Args:
        hidden: [*R, N, D].
        unembedding: [V, D].
        labels: Token ids [*R, N], in 0..V-1.
        weights: [*R, N].
        chunk: How many of the N positions have logits at a time.

    Returns:
        Scalar, nats.
    """
    return jnp.sum(weights * fused_token_logps(hidden, unembedding, labels, chunk).logps)


def _weighted_forward(hidden, unembedding, labels, weights, chunk):
    narrow = unembedding.astype(hidden.dtype)

    def step(total, part):
        hidden, labels, weights = part
        (logps, log_z), logits = _chunk_logps(hidden, narrow, labels)
        cotangents = TokenLogps(weights, jnp.zeros_like(weights))
        by_hidden, by_weights = _gradients(hidden, narrow, labels, logits, log_z, cotangents)
        return total + by_weights, (logps, by_hidden)

    start, parts = _zeros(unembedding), (hidden, labels, weights)
    total, (logps, by_hidden) = _scan_chunks(step, start, parts, labels, chunk)
    return jnp.sum(weights * logps), (by_hidden, total.astype(unembedding.dtype), logps)


def _weighted_backward(chunk, residuals, cotangent):
    by_hidden, total, logps = residuals
    by_hidden = (cotangent * by_hidden).astype(by_hidden.dtype)
    by_unembedding = (cotangent * total).astype(total.dtype)
    return by_hidden, by_unembedding, None, cotangent * logps


weighted_logp.defvjp(_weighted_forward, _weighted_backward)


def _logits(
    hidden: Float[Array, "*R N D"], unembedding: Float[Array, "V D"]
) -> Float[Array, "*R N V"]:
    dtype = _at_least_float32(hidden)
    return jnp.einsum("...nd,vd->...nv", hidden, unembedding, preferred_element_type=dtype)


def _chunk_logps(hidden, unembedding, labels) -> tuple[TokenLogps, Float[Array, "*R N V"]]:
    logits = _logits(hidden, unembedding)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    logit = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return TokenLogps(logit - log_z, log_z), logits


def _gradients(hidden, unembedding, labels, logits, log_z, cotangents):
    """The gradients by hidden states and unembedding.

    d logp_n / d logits_n = onehot(label_n) - softmax_n;  d log Z_n / d logits_n = softmax_n
    """
    softmax = jnp.exp(logits - log_z[..., None])
    is_label = labels[..., None] == jnp.arange(len(unembedding))
    by_logp = cotangents.logps[..., None]
    by_softmax = cotangents.log_normalizers[..., None] - by_logp
    by_logits = (jnp.where(is_label, by_logp, 0.0) + by_softmax * softmax).astype(hidden.dtype)
    einsum = partial(jnp.einsum, preferred_element_type=_at_least_float32(hidden))
    by_hidden = einsum("...nv,vd->...nd", by_logits, unembedding)
    # One packed sequence: a CPU is twice as fast with one axis to sum over.
    rows = math.prod(labels.shape[:-1])
    lead, pattern = ((rows,), "rnv,rnd->vd") if rows > 1 else ((), "nv,nd->vd")
    flat = [a.reshape(*lead, *a.shape[-2:]) for a in (by_logits, hidden)]
    return by_hidden.astype(hidden.dtype), einsum(pattern, *flat)


def _zeros(unembedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """The start of the sum of the chunks' gradients, in float32 at least."""
    return jnp.zeros_like(unembedding, dtype=_at_least_float32(unembedding))


def _scan_chunks(
    step: Callable, carry: Any, arrays: Any, labels: Int[Array, "*R N"], chunk: int
) -> tuple[Any, Any]:
    """`jax.lax.scan` over chunks of the arrays [*R, N, ...] along N."""
    axis, size = labels.ndim - 1, labels.shape[-1]
    chunks = jax.tree.map(lambda array: _split(array, axis, chunk), arrays)
    carry, results = jax.lax.scan(step, carry, chunks)
    return carry, jax.tree.map(lambda array: _join(array, axis, size), results)


def _split(array: Array, axis: int, chunk: int) -> Array:
    """[..., N, ...] -> [chunks, ..., N / chunks, ...]: as few and as equal chunks as possible."""
    size = array.shape[axis]
    chunks = max(1, -(-size // chunk))
    padding = [(0, -size % chunks if i == axis else 0) for i in range(array.ndim)]
    shape = *array.shape[:axis], chunks, -1, *array.shape[axis + 1 :]
    return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)


def _join(array: Array, axis: int, size: int) -> Array:
    """The inverse of `_split` for an axis of `size`."""
    array = jnp.moveaxis(array, 0, axis)
    whole = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
    return jax.lax.slice_in_dim(whole, 0, size, axis=axis)


def _at_least_float32(array: Float[Array, "..."]) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)
