"""How fast a run trains: tokens a second, and the share of the devices' peak (MFU)."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from scale.model.adapters import partition
from scale.model.flops import model_copies, model_flops
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.chips import peak_flops
from scale.train.metrics import Record


@dataclass
class Throughput:
    """Throughput over an interval of steps, by the wall clock."""

    flops_per_token: float
    """FLOPs of the model, forward and backward, for a token; recomputed ones do not count."""
    peak_flops: float | None = None
    """FLOP/s of all devices of the run; None where they are not known."""
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    start: float = 0.0

    def begin(self, step: int) -> None:
        """Start an interval after `step`, which is complete. A first step compiles: skip it."""
        self.step, self.start = step, self.clock()

    def measure(self, records: list[Record]) -> dict[str, float]:
        """`tokens_per_second`, and `mfu` where the peak is known, of the interval's records.

        The devices have completed these steps. `tokens` of a record are those of its batch without
        padding, on all devices; for an ensemble, a number for each model.
        """
        steps = [record for record in records if record["step"] > self.step]
        tokens = sum(float(np.sum(record.get("tokens", 0))) for record in steps)
        if not tokens:
            return {}
        rate = tokens / (self.clock() - self.start)
        mfu = {"mfu": rate * self.flops_per_token / self.peak_flops} if self.peak_flops else {}
        return {"tokens_per_second": rate} | mfu


def throughput_of(model: Transformer, row_length: float, labels: float) -> Throughput:
    """The stopwatch of a run with `model` and rows of these mean lengths.

    MFU counts the model's own FLOPs. PaLM's hardware utilisation (57.8% against 46.2%) also counts
    recomputation: 7.5 N + 16 L H Q T a token there.
    """
    trained, frozen = partition(model)
    adapters = None if frozen is None else parameter_count(trained)
    params = parameter_count(model if frozen is None else frozen) // model_copies(model)
    flops = model_flops(model.config, params, row_length, labels, adapters)
    peak = peak_flops(jax.devices()[0].device_kind)
    return Throughput(flops, peak and peak * model.runtime.devices)
