"""Attention for packed sequences: each example is moved to a row of its own and back."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Bool, Float, Int

from minipref.batch import Inputs

Attend: TypeAlias = Callable[..., Array]
Move: TypeAlias = Callable[[Array], Array]


def by_example(attend: Attend, inputs: Inputs) -> Attend:
    """Attention along packed sequences [R, W, heads, k], by `attend` on rows [B, T, heads, k].

    Args:
        attend: Attention of queries, keys and values in rows, one example in each.
        inputs: The packed sequences.

    Returns:
        The same attention for queries, keys and values along the packed sequences.
    """
    to_rows, to_sequences = moves(inputs)

    def attend_packed(*heads: Float[Array, "R W _ k"]) -> Float[Array, "R W _ k"]:
        return to_sequences(attend(*map(to_rows, heads)))

    return attend_packed


def moves(inputs: Inputs) -> tuple[Move, Move]:
    """From packed sequences [R, W, heads, k] to rows [B, T, heads, k], and back."""
    (sequences, length), (rows, row_length) = inputs.tokens.shape, inputs.segment_ids.shape
    if sequences == rows:
        return (lambda x: x), (lambda x: x)
    real = inputs.segment_ids.reshape(sequences, -1) >= 0
    in_sequence, in_rows = _indices(real, length)

    def to_rows(x: Float[Array, "R W h k"]) -> Float[Array, "B T h k"]:
        return _move(x, in_sequence, in_rows).reshape(rows, row_length, *x.shape[2:])

    def to_sequences(x: Float[Array, "B T h k"]) -> Float[Array, "R W h k"]:
        return _move(x.reshape(sequences, -1, *x.shape[2:]), in_rows, in_sequence)

    return to_rows, to_sequences


def _indices(real: Bool[Array, "R S"], length: int) -> tuple[Int[Array, "R S"], Int[Array, "R W"]]:
    """For each token in rows its index in the packed sequence, and the inverse.

    Padding has an index beyond the end.
    """
    in_sequence = jnp.where(real, jnp.cumsum(real, 1) - 1, length)
    sequences, size = real.shape
    beyond = jnp.full((sequences, length), size)
    sequence = jnp.arange(sequences)[:, None]
    in_rows = beyond.at[sequence, in_sequence].set(jnp.arange(size), mode="drop")
    return in_sequence, in_rows


def _move(
    x: Float[Array, "R S h k"], indices: Int[Array, "R Z"], inverse: Int[Array, "R S"]
) -> Float[Array, "R Z h k"]:
    """x at `indices`, 0 beyond its end. The gradient moves back by `inverse`, without any sum."""
    take = jax.vmap(lambda x, i: jnp.take(x, i, axis=0, mode="fill", fill_value=0))
    return linear_call(
        lambda residuals, x: take(x, residuals[0]),
        lambda residuals, cotangent: take(cotangent, residuals[1]),
        (indices, inverse),
        x,
    )
