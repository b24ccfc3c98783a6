"""Token log-probabilities from a language model's hidden states, without all positions' logits at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLogps(NamedTuple):
    """Log-probabilities of labels (nats), and log Z: the log of the softmax's denominator at each position."""

    logps: Float[Array, " N"]
    log_normalizers: Float[Array, " N"]


def token_logps(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, " N"],
    *,
    chunk: int = 1024,
) -> Float[Array, " N"]:
    """The log-probability of each position's label under the softmax over the vocabulary.

    log softmax(hidden_n . unembedding')[label_n]

    At most `chunk` rows of logits exist at a time: with more rows than that, they are recomputed in the
    backward pass rather than kept. Products of bfloat16 inputs are accumulated in float32, and so is the
    unembedding's gradient over the chunks. `chunk` changes memory and speed, not the result, so
    `reference.logps.token_logps` has no such argument.

    Shapes: hidden [N, D], unembedding [V, D], labels [N] in 0..V-1 -> float32 [N] (float64 for float64),
    nats.
    """
    return token_logps_and_normalizers(hidden, unembedding, labels, chunk=chunk).logps


def token_logps_and_normalizers(
    hidden: Float[Array, "N D"],
    unembedding: Float[Array, "V D"],
    labels: Int[Array, " N"],
    *,
    chunk: int = 1024,
) -> TokenLogps:
    """`token_logps`, and the log-normalizers that a z-loss reads."""
    if len(hidden) <= chunk:
        return _chunk_logps(hidden, unembedding, labels)
    wide = unembedding.astype(
        _at_least_float32(unembedding)
    )  # so that the chunks' gradients add up in float32
    one = jax.checkpoint(lambda rows: _chunk_logps(rows[0], wide, rows[1]))
    found = jax.lax.map(one, _in_chunks(hidden, labels, chunk))
    return jax.tree.map(lambda a: a.reshape(-1)[: len(hidden)], found)


def _in_chunks(
    hidden: Float[Array, "N D"], labels: Int[Array, " N"], chunk: int
) -> tuple[Float[Array, "chunks C D"], Int[Array, "chunks C"]]:
    """Rows padded to a whole number of chunks, as few and as even as they can be."""
    chunks = -(-len(hidden) // chunk)
    padding = -len(hidden) % chunks
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    return hidden.reshape(chunks, -1, hidden.shape[1]), jnp.pad(labels, (0, padding)).reshape(chunks, -1)


def _chunk_logps(
    hidden: Float[Array, "N D"], unembedding: Float[Array, "V D"], labels: Int[Array, " N"]
) -> TokenLogps:
    """The same, with all of the logits."""
    narrow = unembedding.astype(hidden.dtype)
    logits = jnp.einsum("nd,vd->nv", hidden, narrow, preferred_element_type=_at_least_float32(hidden))
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return TokenLogps(jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0] - log_z, log_z)


def _at_least_float32(array: Float[Array, "..."]) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)
