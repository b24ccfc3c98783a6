"""Attention for packed sequences: each example is moved to a row of its own and back."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Bool, Float, Int

from minipref.batch import Inputs

Attend: TypeAlias = Callable[..., Array]


def by_example(attend: Attend, inputs: Inputs) -> Attend:
    """Attention along packed sequences [R, W, heads, k], by `attend` on rows [B, T, heads, k].

    Args:
        attend: Attention of queries, keys and values in rows, one example in each.
        inputs: The packed sequences.

    Returns:
        The same attention for queries, keys and values along the packed sequences.
    """
    (sequences, length), (rows, row_length) = inputs.tokens.shape, inputs.segment_ids.shape
    if sequences == rows:
        return attend
    real = inputs.segment_ids.reshape(sequences, -1) >= 0
    to_sequence, to_rows = _indices(real, length)

    def attend_packed(*heads: Float[Array, "R W _ k"]) -> Float[Array, "R W _ k"]:
        in_rows = [
            _move(x, to_sequence, to_rows).reshape(rows, row_length, *x.shape[2:]) for x in heads
        ]
        attended = attend(*in_rows)
        flat = attended.reshape(sequences, -1, *attended.shape[2:])
        return _move(flat, to_rows, to_sequence)

    return attend_packed


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
