"""TODO scale.model.response_logps."""

from jaxtyping import Array, Float

from minipref.batch import Batch, ResponseLogps, response_logps_and_normalizers, total_logp
from scale.model.transformer import Transformer

LOGITS = {"cpu": 2**25, "gpu": 2**28, "tpu": 2**28}  # a device at a time


def logps(model: Transformer, batch: Batch) -> Float[Array, "B n"]:
    """log pi(y_i | x) of each row's responses."""
    return logps_and_normalizers(model, batch).logps


def logps_and_normalizers(model: Transformer, batch: Batch) -> ResponseLogps:
    return response_logps_and_normalizers(model(batch), model.unembedding, batch, rows_at_a_time(model))


def sum_of_logps(model: Transformer, batch: Batch) -> Float[Array, ""]:
    """The sum of `logps`, for a loss that reads no more."""
    return total_logp(model(batch), model.unembedding, batch, rows_at_a_time(model))


def rows_at_a_time(model: Transformer) -> int:
    """Label positions, of all devices, that meet the vocabulary at a time."""
    most = LOGITS[model.runtime.platform]
    return max(1, most // len(model.unembedding)) * model.runtime.batch_shards
