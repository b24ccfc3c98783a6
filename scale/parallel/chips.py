"""The hardware that `plan` and MFU know: TPU chips, and the peak FLOP/s of GPUs."""

from dataclasses import dataclass

from scale.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU chip. Bandwidths are in bytes per second, one way.

    Attributes:
        flops: Peak bfloat16 FLOP/s.
        hbm_bytes: The size of its memory.
        hbm_bandwidth: The bandwidth of its memory.
        link_bandwidth: The bandwidth of one link between chips; a chip has two links in every
            dimension of the torus, one for each neighbour.
        dcn_bandwidth: The bandwidth between slices, through the data-centre network: the chip's
            share of its host's.
        devices: JAX devices of a chip, which share it evenly; v4 and v5p join their two cores into
            one (megacore).
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    devices: int = 1


CHIPS = {
    "v3": Chip(123e12, 32 * GIB, 900e9, 70e9, 3.125e9, devices=2),
    "v4": Chip(275e12, 32 * GIB, 1200e9, 50e9, 6.25e9),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 50e9, 3.125e9),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 100e9, 6.25e9),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 100e9, 12.5e9),
}
"""FLOP/s and HBM: Google's Cloud TPU pages (docs.cloud.google.com/tpu/docs/v4 and so on). Links: v3
and v4 from Jouppi et al., arXiv 2304.01433, table 4 (4 links of 70 GB/s, 6 of 50); the others from
the same pages: two-way totals of a chip over links and directions (v5e 400 GB/s over 4 links, v5p
1200 over 6, v6e 800 over 4). Between slices: v5p 50 Gbit/s for a chip, v5e two 100 Gbit/s cards for
8 chips, v6e four of 200 (same pages); v3 and v4 are assumed: 100 and 200 Gbit/s for a host of 4
chips."""

GENERATIONS = {
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
}
"""The generation of each kind of TPU that JAX reports."""

GPU_FLOPS = {"NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12}
"""Dense bfloat16 FLOP/s, from NVIDIA's data sheets."""


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v4:12x16x16`.

    Raises:
        InputError: `CHIPS` does not have its generation.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        known = ", ".join(CHIPS)
        raise InputError(f"topology {topology!r}: unknown TPU generation; known are {known}")
    return CHIPS[generation]


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device, by the kind that JAX reports; None where it is not known."""
    if device_kind in GENERATIONS:
        chip = CHIPS[GENERATIONS[device_kind]]
        return chip.flops / chip.devices
    return next((flops for name, flops in GPU_FLOPS.items() if device_kind.startswith(name)), None)
