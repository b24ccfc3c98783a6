"""How fast a step can be at best, and what share of a machine's arithmetic the model then uses.

Arithmetic only: the work comes from `scale.plan.hlo`, the machine from `scale.parallel.chips`.
"""

import math
from dataclasses import dataclass

from scale.parallel.chips import Chip
from scale.plan.hlo import Counts


@dataclass(frozen=True)
class Bound:
    """The time of a step in which every part of the machine works at its peak, all at once.

    Attributes:
        seconds: The time of `compute`, of `memory`, and of `network AXIS` for every mesh axis with
            traffic. `memory` is an estimate, rather too long, as `Counts.hbm_bytes` is.
        mfu: Model FLOPs utilization at this time: no step has a higher one.
    """

    seconds: dict[str, float]
    mfu: float

    @property
    def binding(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """The time of the part that takes longest."""
        return max(self.seconds.values())


def bound(
    counts: Counts, chip: Chip, mesh_shape: dict[str, int], flops: float,
    torus: dict[str, int], slow: str,
) -> Bound:
    """The roofline of a step. The devices of a chip share its memory and its links evenly.

    Args:
        counts: The work of one device.
        chip: The machine.
        mesh_shape: Devices along each axis.
        flops: Model FLOPs of all devices.
        torus: How many dimensions of the chips' torus an axis lies along (1 where not given). A
            dimension has two links, and a ring's traffic uses both.
        slow: The axis that runs over the data-center network, "" for none.

    Returns:
        The bound.
    """
    peak = chip.flops / chip.devices
    bandwidth = {axis: 2 * torus.get(axis, 1) * chip.link_bandwidth for axis in mesh_shape}
    bandwidth[slow] = chip.dcn_bandwidth
    sent = {axes: size * chip.devices for axes, size in counts.collective_bytes.items()}
    memory = counts.hbm_bytes * chip.devices / chip.hbm_bandwidth
    seconds = {"compute": counts.flops / peak, "memory": memory}
    seconds |= _network_seconds(sent, bandwidth, slow)
    return Bound(seconds, flops / (max(seconds.values()) * math.prod(mesh_shape.values()) * peak))


def _network_seconds(
    sent: dict[str, float], bandwidth: dict[str, float], slow: str
) -> dict[str, float]:
    """Traffic over several axes uses the links of all of them, or waits for the slow one."""
    seconds: dict[str, float] = {}
    for names, size in sent.items():
        axes = [slow] if slow in names.split("+") else names.split("+")
        time = size / sum(bandwidth[axis] for axis in axes)
        for axis in axes:
            seconds[f"network {axis}"] = seconds.get(f"network {axis}", 0.0) + time
    return seconds
