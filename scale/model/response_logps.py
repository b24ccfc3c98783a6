"""Log-probabilities of responses; only positions that predict a label have logits."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minipref.batch import Inputs
from minipref.logps import gather, sum_by_response
from scale.model.fused_logps import fused_token_logps, weighted_logp
from scale.model.transformer import Transformer

LOGITS = {"cpu": 2**25, "gpu": 2**28, "tpu": 2**28}  # of one device at a time


class ResponseLogps(NamedTuple):
    """log pi(y_i | x) of the responses [B, n], and the log-normalizer of each label's position."""

    logps: Float[Array, "B n"]
    log_normalizers: Float[Array, "R L"]


def response_logps(model: Transformer, inputs: Inputs) -> ResponseLogps:
    """The log-probability of each response, and what a z-loss reads (nats, float32)."""
    hidden = gather(model(inputs), inputs.logit_positions)
    chunk = chunk_size(model, inputs)
    logps, normalizers = fused_token_logps(hidden, model.unembedding, inputs.labels, chunk)
    return ResponseLogps(sum_by_response(logps, inputs), normalizers)


def total_logp(model: Transformer, inputs: Inputs) -> Float[Array, ""]:
    """The sum of all responses' log-probabilities, for less work than `response_logps`."""
    hidden = gather(model(inputs), inputs.logit_positions)
    weights = inputs.response_mask.astype(jnp.float32)
    chunk = chunk_size(model, inputs)
    return weighted_logp(hidden, model.unembedding, inputs.labels, weights, chunk)


def chunk_size(model: Transformer, inputs: Inputs) -> int:
    """How many positions of each packed sequence have logits at a time.

    Chunks are cut along the labels, not the sequences: a batch split over devices stays split.
    """
    per_device = max(1, LOGITS[model.runtime.platform] // len(model.unembedding))
    return max(1, per_device * model.runtime.batch_shards // len(inputs.labels))
