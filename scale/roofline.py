"""How fast a step could be at best, and what share of a machine's arithmetic the model needs (MFU).

Arithmetic only: the work comes from `scale.hlo`, the machine from the tables here. Units: FLOP, bytes, seconds.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax

from scale.hlo import Counts
from scale.logs import Speed
from scale.model import ModelConfig, Transformer, parameter_count
from scale.rows import DataError


@dataclass(frozen=True)
class Chip:
    """One TPU chip. Bandwidths are per second and one way."""

    flops: float
    """Peak bfloat16 FLOP/s."""
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    """Of one link of the inter-chip network; every dimension of its torus has two, one for each neighbour."""
    dcn_bandwidth: float
    """Between slices, through the data-centre network: this chip's share of its host's."""
    devices: int = 1
    """JAX devices a chip, which share it evenly; v4 and v5p join their two cores into one (megacore)."""


GIB = 2**30

CHIPS = {
    "v3": Chip(123e12, 32 * GIB, 900e9, 70e9, 3.125e9, devices=2),
    "v4": Chip(275e12, 32 * GIB, 1200e9, 50e9, 6.25e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 50e9, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 100e9, 12.5e9),
}
"""FLOP/s and HBM: Google's Cloud TPU pages (docs.cloud.google.com/tpu/docs/v4 and so on). Links: v3 and v4 from
Jouppi et al., arXiv 2304.01433, table 4 (4 links of 70 GB/s, 6 of 50); the others from the same pages' two-way totals
a chip over links and directions (v5e 400 GB/s over 4 links, v5p 1200 over 6, v6e 800 over 4). Between slices: v5p 50
Gbit/s a chip, v5e two 100 Gbit/s cards for 8 chips, v6e four of 200 (same pages); v3 and v4 are assumed: 100 and 200
Gbit/s for a host of 4 chips."""


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v4:12x16x16`. DataError for a generation that is not in the table."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise DataError(f"topology {topology!r}: unknown TPU generation; known are {', '.join(CHIPS)}")
    return CHIPS[generation]


def model_flops(config: ModelConfig, params: int, row_length: int | float, labels: int | float | None = None) -> float:
    """FLOPs that training needs for a token of a row of `row_length`, without recomputation.

    PaLM, arXiv 2204.02311, appendix B: 6 N + 12 L H Q T; N all parameters (the embedding too), L layers, H heads, Q
    head size, T row length. Attention counts in full, as there, though a causal model needs half of it. Where only
    `labels` positions of a row meet the vocabulary, its 6 V D counts for those.
    """
    attention = 12 * config.layers * config.heads * config.head_size * row_length
    share = 0.0 if labels is None else 1 - labels / row_length
    return 6 * params + attention - 6 * config.vocab * config.d_model * share


def batch_flops(model: Transformer, lines: int, rows: int, width: Any, labels: Any, slots: Any) -> Any:
    """`model_flops` of all slots of a batch, padded ones too: `lines` of `width` slots and `labels` labels, and `rows`
    of `slots` in attention."""
    config, head = model.config, model.config.vocab * model.config.d_model
    attention = 12 * config.layers * config.heads * config.head_size * slots
    return 6 * lines * ((parameter_count(model) - head) * width + head * labels) + attention * rows * slots


KINDS = {"TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
GPUS = {"NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # NVIDIA's data sheets, dense bfloat16


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOP/s of a device by the kind that JAX reports, or None where it is not known."""
    if kind in KINDS:
        chip = CHIPS[KINDS[kind]]
        return chip.flops / chip.devices
    return next((flops for name, flops in GPUS.items() if kind.startswith(name)), None)


def speed_of(model: Transformer, row_length: int | float, labels: int | float) -> Speed:
    """What turns the tokens and seconds of a run with `model` into its throughput and MFU.

    MFU's FLOPs are the model's own; PaLM's hardware utilisation (57.8% against 46.2%) also counts what is computed
    again: there 7.5 N + 16 L H Q T a token.
    """
    params = parameter_count(model) // model_copies(model)
    peak = peak_flops(jax.devices()[0].device_kind)
    return Speed(model_flops(model.config, params, row_length, labels), peak and peak * model.execution.devices)


def model_copies(model: Transformer) -> int:
    """Members of an ensemble of trunks; 1 of a model."""
    return model.embedding.shape[0] if model.embedding.ndim == 3 else 1


@dataclass(frozen=True)
class Bound:
    """The least time that a step can take, were every part of the machine at its peak and all at once."""

    seconds: dict[str, float]
    """`compute`, `memory`, and `network AXIS` of every mesh axis with traffic."""
    mfu: float
    """The MFU that this time bounds from above."""

    @property
    def binding(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())


def bound(
    counts: Counts, chip: Chip, mesh_shape: dict[str, int], flops: int | float, torus: dict[str, int], slow: str
) -> Bound:
    """The roofline of a step whose work on one device is `counts` and whose model FLOPs, of all devices, are `flops`.

    `torus` is how many dimensions of the chips' torus a mesh axis spans (where not given, 1), each of two links that
    both carry a ring's traffic; the axis `slow` ("" for none) runs over the data-centre network. Traffic over several
    axes uses the links of all of them, or waits for the slow one. A chip's devices share its memory and links evenly.
    `compute`, `network` are bounds; `memory` is an estimate, rather too long, as `Counts.hbm_bytes` is.
    """
    peak = chip.flops / chip.devices
    bandwidth = {axis: 2 * torus.get(axis, 1) * chip.link_bandwidth for axis in mesh_shape} | {slow: chip.dcn_bandwidth}
    seconds = {"compute": counts.flops / peak, "memory": counts.hbm_bytes * chip.devices / chip.hbm_bandwidth}
    for names, sent in counts.collective_bytes.items():
        axes = [slow] if slow in names.split("+") else names.split("+")
        time = sent * chip.devices / sum(bandwidth[axis] for axis in axes)
        for axis in axes:
            seconds[f"network {axis}"] = seconds.get(f"network {axis}", 0.0) + time
    return Bound(seconds, flops / (max(seconds.values()) * math.prod(mesh_shape.values()) * peak))
