"""Token log-probabilities from a language model's hidden states, without all positions' logits at once."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLogps(NamedTuple):
    """Log-probabilities of labels (nats), and log Z: the log of the softmax's denominator at each position."""

    logps: Float[Array, "*R N"]
    log_normalizers: Float[Array, "*R N"]


def token_logps(
    hidden: Float[Array, "*R N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "*R N"],
    *,
    chunk: int = 1024,
) -> Float[Array, "*R N"]:
    """The log-probability of each position's label under the softmax over the vocabulary.

    log softmax(hidden_n . unembedding')[label_n]

    At most `chunk` of the N positions have logits at a time: with more than that, they are recomputed in the
    backward pass rather than kept. Products of bfloat16 inputs are accumulated in float32, and so is the
    unembedding's gradient over the chunks. `chunk` changes memory and speed, not the result, so
    `reference.logps.token_logps` has no such argument.

    Shapes: hidden [*R, N, D], unembedding [V, D], labels [*R, N] in 0..V-1 -> float32 [*R, N] (float64 for
    float64), nats.
    """
    return token_logps_and_normalizers(hidden, unembedding, labels, chunk=chunk).logps


def token_logps_and_normalizers(
    hidden: Float[Array, "*R N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "*R N"],
    *,
    chunk: int = 1024,
) -> TokenLogps:
    """`token_logps`, and the log-normalizers that a z-loss reads."""
    axis, n = labels.ndim - 1, labels.shape[-1]
    if n <= chunk:
        return _logps(hidden, unembedding, labels)
    wide = unembedding.astype(
        _at_least_float32(unembedding)
    )  # so that the chunks' gradients add up in float32
    one = jax.checkpoint(lambda part: _logps(part[0], wide, part[1]))
    return _joined(jax.lax.map(one, _in_chunks((hidden, labels), axis, chunk)), axis, n)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_logp(
    hidden: Float[Array, "*R N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, "*R N"],
    weights: Float[Array, "*R N"],
    chunk: int = 1024,
) -> Float[Array, ""]:
    """sum_n weight_n log softmax(hidden_n . unembedding')[label_n], in nats; shapes as in `token_logps`.

    Weights known beforehand (supervised fine-tuning) allow what a margin's loss does not: the gradient is formed in
    the forward pass, up to the factor that the backward pass brings, so that no chunk's logits are computed twice.
    """
    return jnp.sum(weights * token_logps(hidden, unembedding, labels, chunk=chunk))


def _weighted_forward(hidden, unembedding, labels, weights, chunk):
    def one(total, part):
        hidden, labels, weights = part
        found, residuals = _logps_forward(hidden, unembedding, labels)
        slopes, more, _ = _logps_backward(residuals, TokenLogps(weights, jnp.zeros_like(weights)))
        return total + more, (found.logps, slopes)

    axis, n = labels.ndim - 1, labels.shape[-1]
    nothing = jnp.zeros_like(unembedding, dtype=_at_least_float32(unembedding))
    total, found = jax.lax.scan(one, nothing, _in_chunks((hidden, labels, weights), axis, chunk))
    logps, slopes = _joined(found, axis, n)
    return jnp.sum(weights * logps), (slopes, total.astype(unembedding.dtype), logps)


def _weighted_backward(chunk, residuals, slope):
    slopes, total, logps = residuals
    return (slope * slopes).astype(slopes.dtype), (slope * total).astype(total.dtype), None, slope * logps


weighted_logp.defvjp(_weighted_forward, _weighted_backward)


def _in_chunks(arrays: Any, axis: int, chunk: int) -> Any:
    """The axis of each array [..., N, ...], padded at its end, in parts as few and as even as can be: [chunks, ...]."""

    def cut(array: Array) -> Array:
        n = array.shape[axis]
        chunks = max(1, -(-n // chunk))
        padding = [(0, -n % chunks if i == axis else 0) for i in range(array.ndim)]
        shape = *array.shape[:axis], chunks, -1, *array.shape[axis + 1 :]
        return jnp.moveaxis(jnp.pad(array, padding).reshape(shape), axis, 0)

    return jax.tree.map(cut, arrays)


def _joined(parts: Any, axis: int, n: int) -> Any:
    """The inverse of `_in_chunks`, for an axis of n."""

    def join(array: Array) -> Array:
        array = jnp.moveaxis(array, 0, axis)
        whole = array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])
        return jax.lax.slice_in_dim(whole, 0, n, axis=axis)

    return jax.tree.map(join, parts)


@jax.custom_vjp
def _logps(
    hidden: Float[Array, "*R N D"], unembedding: Float[Array, "V D"], labels: Int[Array, "*R N"]
) -> TokenLogps:
    """The same, with all of the logits, which the backward pass turns into their gradient in one sweep."""
    return _logps_forward(hidden, unembedding, labels)[0]


def _logps_forward(hidden, unembedding, labels):
    narrow = unembedding.astype(hidden.dtype)
    logits = jnp.einsum("...nd,vd->...nv", hidden, narrow, preferred_element_type=_at_least_float32(hidden))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return TokenLogps(at_label - log_z, log_z), (hidden, unembedding, labels, logits, log_z)


def _logps_backward(residuals, slopes):
    """d logp_n / d logits_n is e_label - softmax; d log Z_n / d logits_n is softmax."""
    hidden, unembedding, labels, logits, log_z = residuals
    softmax = jnp.exp(logits - log_z[..., None])
    is_label = labels[..., None] == jnp.arange(len(unembedding))
    at_label = slopes.logps[..., None]
    slope = jnp.where(is_label, at_label, 0.0) + (slopes.log_normalizers[..., None] - at_label) * softmax
    slope = slope.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=_at_least_float32(hidden))
    to_hidden = product("...nv,vd->...nd", slope, unembedding.astype(hidden.dtype))
    lines = math.prod(labels.shape[:-1])
    to_unembedding = product("rnv,rnd->vd", *(a.reshape(lines, *a.shape[-2:]) for a in (slope, hidden)))
    return to_hidden.astype(hidden.dtype), to_unembedding.astype(unembedding.dtype), None


_logps.defvjp(_logps_forward, _logps_backward)


def _at_least_float32(array: Float[Array, "..."]) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)
