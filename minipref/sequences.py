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
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minipref.logps import token_logps_and_normalizers
from minipref.objectives import sequence_logp


class Batch(NamedTuple):
    """B shared-prefix rows of T slots, L labels and n responses, with their precomputed columns.

    `ref_logps` are log pi_ref of the n responses (nats); `scores` the rewards of the first two, chosen and
    rejected, by K reward models. Either may be empty (n or K of 0) where a loss does not need it.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    labels: Int[Array, "B L"]
    predictors: Int[Array, "B L"]
    owners: Int[Array, "B L"]
    last: Int[Array, "B n"]
    ref_logps: Float[Array, "B m"]
    scores: Float[Array, "B 2 K"]


def attention_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which keys (last axis) a query sees: earlier slots of its own response and of the prompt, never padding."""
    slots = jnp.arange(segments.shape[1])
    causal = slots[:, None] >= slots[None, :]
    keys = segments[:, None, :]
    return causal & ((keys == 0) | (keys == segments[:, :, None])) & (keys >= 0)


def pick(hidden: Float[Array, "B T D"], slots: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    return jnp.take_along_axis(hidden, slots[:, :, None], axis=1)


class ResponseLogps(NamedTuple):
    """log pi(y_i | x) of each row's n responses (nats), and the log-normalizers of each label's position."""

    logps: Float[Array, "B n"]
    log_normalizers: Float[Array, "B L"]


def response_logps(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "V D"], batch: Batch, rows: int = 1024
) -> Float[Array, "B n"]:
    """log pi(y_i | x) of each row's n responses (nats, float32): only label positions meet the vocabulary."""
    return response_logps_and_normalizers(hidden, unembedding, batch, rows).logps


def response_logps_and_normalizers(
    hidden: Float[Array, "B T D"], unembedding: Float[Array, "V D"], batch: Batch, rows: int = 1024
) -> ResponseLogps:
    """`response_logps`, and what a z-loss reads; `rows` label positions at a time meet the vocabulary.

    Chunks are cut along the labels, not the rows, so that a batch split over devices stays split.
    """
    chunk = max(1, rows // len(hidden))
    tokens = jax.vmap(partial(token_logps_and_normalizers, chunk=chunk), (0, None, 0))
    found = tokens(pick(hidden, batch.predictors), unembedding, batch.labels)
    owned = batch.owners[:, None, :] == jnp.arange(batch.last.shape[1])[None, :, None]
    per_response = jax.vmap(sequence_logp, in_axes=(None, 0))
    return ResponseLogps(jax.vmap(per_response)(found.logps, owned), found.log_normalizers)


def response_rewards(
    hidden: Float[Array, "B T D"], head: Float[Array, " D"], batch: Batch
) -> Float[Array, "B n"]:
    """r(x, y_i) of each row's n responses: a linear read-out of each response's last slot, in float32."""
    return pick(hidden, batch.last).astype(jnp.float32) @ head
