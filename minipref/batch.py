"""The shared-prefix row: `[prompt | response_1 | ... | response_n]`, one row an example (house rule 7).

The prompt is encoded once; the responses do not see each other and each is positioned right after the prompt.
The first token of EVERY response is predicted by the last prompt position.

    slot        0  1  2 | 3  4  5 | 6  7
    token       p  p  p | a  b  # | c  #
    segment     0  0  0 | 1  1  1 | 2  2      (-1 where padded)
    position    0  1  2 | 3  4  5 | 3  4
    label               | a  b  # | c  #
    predictor           | 2  3  4 | 2  6      the slot whose hidden state predicts the label
    owner               | 0  0  0 | 1  1      the response that the label belongs to
    last                        5      7      each response's last slot, where a reward model reads

Rows that share a line stand in it end to end; only attention sees each in a row of its own:

    line  [ p p p a b # c # | p p a # b c d # | p p p p a # b # - - ]    tokens, positions: [R W]
    rows  [ 0 0 0 1 1 1 2 2 ]                                            segments: [B T]
          [ 0 0 1 1 2 2 2 2 ]         slots, logit_positions and last count along the line,
          [ 0 0 0 0 1 1 2 2 ]         response_ids through the responses of all of its rows

So short rows cost what they need, however long the longest is. R lines hold B / R rows each, in order; with R = B and
W = T lines and rows are the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import linear_call
from jaxtyping import Array, Bool, Float, Int

from minipref.logps import token_logps_and_normalizers, weighted_logp
from minipref.objectives import sequence_logp


class Batch(NamedTuple):
    """B shared-prefix rows of n responses in R lines of W slots and L labels, with the rows' precomputed columns.

    `ref_logps` are log pi_ref of the n responses (nats); `scores` the rewards of the first two, chosen and
    rejected, by K reward models. Either may be empty (n or K of 0) where a loss does not need it.
    """

    tokens: Int[Array, "R W"]
    positions: Int[Array, "R W"]
    segments: Int[Array, "B T"]
    labels: Int[Array, "R L"]
    logit_positions: Int[Array, "R L"]
    response_ids: Int[Array, "R L"]
    last: Int[Array, "B n"]
    ref_logps: Float[Array, "B m"]
    scores: Float[Array, "B 2 K"]

    @property
    def response_mask(self) -> Bool[Array, "R L"]:
        """Which labels are a response's token, and no padding."""
        return self.response_ids < self.last.size // len(self.response_ids)


def attention_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which keys (last axis) a query sees: earlier slots of its own response and of the prompt, never padding."""
    slots = jnp.arange(segments.shape[1])
    causal = slots[:, None] >= slots[None, :]
    keys = segments[:, None, :]
    return causal & ((keys == 0) | (keys == segments[:, :, None])) & (keys >= 0)


def row_by_row(attend: Callable[..., Array], batch: Batch) -> Callable[..., Array]:
    """Attention along lines, [R W heads size], that `attend` computes in rows, [B T heads size]."""
    if len(batch.tokens) == len(batch.segments):
        return attend
    (lines, width), (rows, slots) = batch.tokens.shape, batch.segments.shape
    there, back = _places(batch.segments.reshape(lines, -1) >= 0, width)

    def on_lines(*heads: Float[Array, "R W _ k"]) -> Float[Array, "R W _ k"]:
        in_rows = [_move(x, there, back).reshape(rows, slots, *x.shape[2:]) for x in heads]
        found = attend(*in_rows)
        return _move(found.reshape(lines, -1, *found.shape[2:]), back, there)

    return on_lines


def _places(real: Bool[Array, "R S"], width: int) -> tuple[Int[Array, "R S"], Int[Array, "R W"]]:
    """Where in the line each slot of its rows stands, and the inverse; beyond the end where nowhere."""
    in_line = jnp.where(real, jnp.cumsum(real, 1) - 1, width)
    lines, slots = real.shape
    nowhere = jnp.full((lines, width), slots)
    in_rows = nowhere.at[jnp.arange(lines)[:, None], in_line].set(jnp.arange(slots), mode="drop")
    return in_line, in_rows


def _move(x: Float[Array, "R S h k"], there: Int[Array, "R Z"], back: Int[Array, "R S"]) -> Float[Array, "R Z h k"]:
    """x at `there`, and 0 beyond its end. The gradient goes `back`, without adding anything up."""
    take = jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="fill", fill_value=0))
    return linear_call(lambda at, x: take(x, at[0]), lambda at, g: take(g, at[1]), (there, back), x)


def pick(hidden: Float[Array, "R W D"], slots: Int[Array, "R L"]) -> Float[Array, "R L D"]:
    return jnp.take_along_axis(hidden, slots[:, :, None], axis=1)


class ResponseLogps(NamedTuple):
    """log pi(y_i | x) of each row's n responses (nats), and the log-normalizers of each label's position."""

    logps: Float[Array, "B n"]
    log_normalizers: Float[Array, "R L"]


def response_logps(
    hidden: Float[Array, "R W D"], unembedding: Float[Array, "V D"], batch: Batch, rows: int = 1024
) -> Float[Array, "B n"]:
    """log pi(y_i | x) of each row's n responses (nats, float32): only label positions meet the vocabulary."""
    return response_logps_and_normalizers(hidden, unembedding, batch, rows).logps


def response_logps_and_normalizers(
    hidden: Float[Array, "R W D"], unembedding: Float[Array, "V D"], batch: Batch, rows: int = 1024
) -> ResponseLogps:
    """`response_logps`, and what a z-loss reads; `rows` label positions at a time meet the vocabulary.

    Chunks are cut along the labels, not the lines, so that a batch split over devices stays split.
    """
    predicting = pick(hidden, batch.logit_positions)
    found = token_logps_and_normalizers(predicting, unembedding, batch.labels, chunk=_chunk(batch, rows))
    responses = jnp.arange(batch.last.size // len(batch.response_ids))
    response_mask = batch.response_ids[:, None, :] == responses[None, :, None]
    per_response = jax.vmap(jax.vmap(sequence_logp, in_axes=(None, 0)))(found.logps, response_mask)
    return ResponseLogps(per_response.reshape(batch.last.shape), found.log_normalizers)


def total_logp(
    hidden: Float[Array, "R W D"], unembedding: Float[Array, "V D"], batch: Batch, rows: int = 1024
) -> Float[Array, ""]:
    """The sum of `response_logps` over responses and rows, for less work (`minipref.logps.weighted_logp`)."""
    weights = batch.response_mask.astype(jnp.float32)
    return weighted_logp(pick(hidden, batch.logit_positions), unembedding, batch.labels, weights, _chunk(batch, rows))


def _chunk(batch: Batch, rows: int) -> int:
    return max(1, rows // len(batch.labels))


def response_rewards(
    hidden: Float[Array, "R W D"], head: Float[Array, " D"], batch: Batch
) -> Float[Array, "B n"]:
    """r(x, y_i) of each row's n responses: a linear read-out of each response's last slot, in float32."""
    last = batch.last.reshape(len(hidden), -1)
    return (pick(hidden, last).astype(jnp.float32) @ head).reshape(batch.last.shape)
