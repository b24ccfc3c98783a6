"""TPU topologies without TPUs: libtpu, the real compiler, describes their devices and compiles for them."""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any

import jax
from jax.experimental import topologies

from scale.errors import InputError

HERE = {  # libtpu would look for a TPU and its metadata server, and lock the machine's
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


HOSTS: dict[str, dict[str, Any]] = {
    "v4": {"chips_per_host_bounds": (2, 2, 1), "chip_config_name": "megacore"},
    "v5p": {"chips_per_host_bounds": (2, 2, 1)},
}


@cache
def topology_devices(topology: str, slices: int = 1) -> Sequence[Any]:
    """Devices of `slices` slices of a topology such as `v4:12x16x16`, to compile for.

    Errors: InputError where libtpu is missing or knows no such topology.
    """
    if find_spec("libtpu") is None:
        raise InputError("plan needs the TPU compiler: pip install 'minipref[tpu]'")
    for name, value in HERE.items():
        os.environ.setdefault(name, value)
    options = HOSTS.get(topology.partition(":")[0], {}) | ({"num_slices": slices} if slices > 1 else {})
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise InputError(f"--topology {topology} --slices {slices}: {str(error).splitlines()[0]}") from error


def torus(topology: str) -> tuple[int, ...]:
    """Chips along each dimension of a topology."""
    _, _, sizes = topology.partition(":")
    if not all(size.isdigit() for size in sizes.split("x")):
        raise InputError(f"--topology {topology}: not a chip and its numbers along each dimension, such as v4:12x16x16")
    return tuple(int(size) for size in sizes.split("x"))


def spanned(size: int, dimensions: Sequence[int]) -> int:
    """How many dimensions of a torus an axis of the mesh lies along: the fewest whose product is its size, else 1."""
    for count in range(1, len(dimensions) + 1):
        if size in (prod(dimensions[i : i + count]) for i in range(len(dimensions) - count + 1)):
            return count
    return 1
