"""TODO scale.parallel.chips."""

from dataclasses import dataclass

from scale.errors import InputError


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
    """The chip of a topology such as `v4:12x16x16`. InputError for a generation that is not in the table."""
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise InputError(f"topology {topology!r}: unknown TPU generation; known are {', '.join(CHIPS)}")
    return CHIPS[generation]


KINDS = {"TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}


GPUS = {"NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12}  # NVIDIA's data sheets, dense bfloat16


def peak_flops(kind: str) -> float | None:
    """bfloat16 FLOP/s of a device by the kind that JAX reports, or None where it is not known."""
    if kind in KINDS:
        chip = CHIPS[KINDS[kind]]
        return chip.flops / chip.devices
    return next((flops for name, flops in GPUS.items() if kind.startswith(name)), None)
