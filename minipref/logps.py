"""Token log-probabilities from a language model's hidden states, without all positions' logits at once."""

import math
from collections.abc import Callable
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
    backward pass rather than kept; kept ones become their gradient in one sweep. Products of bfloat16 inputs are
    accumulated in float32, and so is the unembedding's gradient over the chunks. `chunk` changes memory and speed, not
    the result, so `reference.logps.token_logps` has no such argument.

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
    return _logps(hidden, unembedding, labels, chunk)


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
    narrow = unembedding.astype(hidden.dtype)

    def one(total, part):
        hidden, labels, weights = part
        logits = _logits(hidden, narrow)
        found = _read(logits, labels)
        slopes = TokenLogps(weights, jnp.zeros_like(weights))
        to_hidden, more = _gradients(hidden, narrow, labels, logits, found.log_normalizers, slopes)
        return total + more, (found.logps, to_hidden)

    total, found = _over_chunks(one, _nothing(unembedding), (hidden, labels, weights), labels, chunk)
    logps, to_hidden = found
    return jnp.sum(weights * logps), (to_hidden, total.astype(unembedding.dtype), logps)


def _weighted_backward(chunk, residuals, slope):
    slopes, total, logps = residuals
    return (slope * slopes).astype(slopes.dtype), (slope * total).astype(total.dtype), None, slope * logps


weighted_logp.defvjp(_weighted_forward, _weighted_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logps(
    hidden: Float[Array, "*R N D"], unembedding: Float[Array, "V D"], labels: Int[Array, "*R N"], chunk: int
) -> TokenLogps:
    return _logps_forward(hidden, unembedding, labels, chunk)[0]


def _logps_forward(hidden, unembedding, labels, chunk):
    narrow = unembedding.astype(hidden.dtype)

    def one(_, part):
        logits = _logits(part[0], narrow)
        return None, (_read(logits, part[1]), logits if keeps else None)

    keeps = labels.shape[-1] <= chunk
    _, (found, logits) = _over_chunks(one, None, (hidden, labels), labels, chunk)
    return found, (hidden, unembedding, labels, found.log_normalizers, logits)


def _logps_backward(chunk, residuals, slopes):
    hidden, unembedding, labels, log_z, logits = residuals
    narrow = unembedding.astype(hidden.dtype)

    def one(total, part):
        hidden, labels, log_z, logits, slopes = part
        logits = _logits(hidden, narrow) if logits is None else logits
        to_hidden, more = _gradients(hidden, narrow, labels, logits, log_z, slopes)
        return total + more, to_hidden

    parts = hidden, labels, log_z, logits, slopes
    total, to_hidden = _over_chunks(one, _nothing(unembedding), parts, labels, chunk)
    return to_hidden, total.astype(unembedding.dtype), None


_logps.defvjp(_logps_forward, _logps_backward)


def _logits(hidden: Float[Array, "*R N D"], unembedding: Float[Array, "V D"]) -> Float[Array, "*R N V"]:
    return jnp.einsum("...nd,vd->...nv", hidden, unembedding, preferred_element_type=_at_least_float32(hidden))


def _read(logits: Float[Array, "*R N V"], labels: Int[Array, "*R N"]) -> TokenLogps:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    at_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return TokenLogps(at_label - log_z, log_z)


def _gradients(hidden, unembedding, labels, logits, log_z, slopes):
    """Of hidden states and unembedding: d logp_n / d logits_n is e_label - softmax, d log Z_n / d logits_n softmax."""
    softmax = jnp.exp(logits - log_z[..., None])
    is_label = labels[..., None] == jnp.arange(len(unembedding))
    at_label = slopes.logps[..., None]
    slope = jnp.where(is_label, at_label, 0.0) + (slopes.log_normalizers[..., None] - at_label) * softmax
    slope = slope.astype(hidden.dtype)
    product = partial(jnp.einsum, preferred_element_type=_at_least_float32(hidden))
    to_hidden = product("...nv,vd->...nd", slope, unembedding)
    lines = math.prod(labels.shape[:-1])
    shape = (lines,) * (lines > 1) + slope.shape[-2:-1]  # a CPU is twice as fast where there is one axis to sum over
    pattern = "rnv,rnd->vd" if lines > 1 else "nv,nd->vd"
    to_unembedding = product(pattern, *(a.reshape(*shape, a.shape[-1]) for a in (slope, hidden)))
    return to_hidden.astype(hidden.dtype), to_unembedding


def _nothing(unembedding: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """What the gradients of chunks, float32 at least, add up from."""
    return jnp.zeros_like(unembedding, dtype=_at_least_float32(unembedding))


def _over_chunks(one: Callable, start: Any, arrays: Any, labels: Int[Array, "*R N"], chunk: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over parts of the arrays [*R, N, ...] along N, of `chunk` at most."""
    axis, n = labels.ndim - 1, labels.shape[-1]
    last, found = jax.lax.scan(one, start, _in_chunks(arrays, axis, chunk))
    return last, _joined(found, axis, n)


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


def _at_least_float32(array: Float[Array, "..."]) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)
