"""TODO scale.train.throughput."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from scale.model.flops import model_copies, model_flops
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.chips import peak_flops
from scale.train.metrics import Record


@dataclass
class Speed:
    """Throughput over an interval of steps, by the wall clock.

    `flops_a_token` are the model's floating-point operations, forward and backward, for a token (not recomputed ones);
    `peak_flops` what all the run's devices could do in a second, None where that is not known.
    """

    flops_a_token: float
    peak_flops: float | None = None
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    begun: float = 0.0

    def begin(self, step: int) -> None:
        """The interval begins after `step`, which the devices have completed. Not before a first step: it compiles."""
        self.step, self.begun = step, self.clock()

    def measured(self, records: list[Record]) -> dict[str, float]:
        """`tokens_per_second` and `mfu` (a share of 1) of the records' steps in the interval; {} where there are none.

        The devices have completed all these steps. A record's `tokens` are those of its batch that are no padding, on
        all devices; of an ensemble, a number for each member.
        """
        tokens = sum(float(np.sum(record.get("tokens", 0))) for record in records if record["step"] > self.step)
        if not tokens:
            return {}
        rate = tokens / (self.clock() - self.begun)
        mfu = {"mfu": rate * self.flops_a_token / self.peak_flops} if self.peak_flops else {}
        return {"tokens_per_second": rate} | mfu


def speed_of(model: Transformer, row_length: int | float, labels: int | float) -> Speed:
    """What turns the tokens and seconds of a run with `model` into its throughput and MFU.

    MFU's FLOPs are the model's own; PaLM's hardware utilisation (57.8% against 46.2%) also counts what is computed
    again: there 7.5 N + 16 L H Q T a token.
    """
    params = parameter_count(model) // model_copies(model)
    peak = peak_flops(jax.devices()[0].device_kind)
    return Speed(model_flops(model.config, params, row_length, labels), peak and peak * model.runtime.devices)
