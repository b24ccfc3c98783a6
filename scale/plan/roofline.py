"""How fast a step could be at best, and what share of a machine's arithmetic the model needs (MFU).

Arithmetic only: the work comes from `scale.plan.hlo`, the machine from the tables here. Units: FLOP, bytes, seconds.
"""

import math
from dataclasses import dataclass

from scale.parallel.chips import Chip
from scale.plan.hlo import Counts


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
