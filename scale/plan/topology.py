"""TPU topologies without TPUs: libtpu, the real compiler, describes their devices."""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any

import jax
from jax.experimental import topologies

from scale.errors import InputError

ENVIRONMENT = {  # without it libtpu looks for a TPU and its metadata server, and takes a lock
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
    """Devices to compile for.

    Args:
        topology: That of a slice, such as `v4:12x16x16`.
        slices: How many of them.

    Returns:
        Devices that describe a TPU and compute nothing.

    Raises:
        InputError: libtpu is missing or knows no such topology.
    """
    if find_spec("libtpu") is None:
        raise InputError("plan needs the TPU compiler: pip install -e '.[tpu]'")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    several = {"num_slices": slices} if slices > 1 else {}
    options = HOSTS.get(topology.partition(":")[0], {}) | several
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise InputError(f"--topology {topology} --slices {slices}: {message}") from error


def torus(topology: str) -> tuple[int, ...]:
    """Chips along each dimension of a topology.

    Args:
        topology: Such as `v4:12x16x16`.

    Returns:
        Such as (12, 16, 16).

    Raises:
        InputError: The text has another form.
    """
    _, _, sizes = topology.partition(":")
    if not all(size.isdigit() for size in sizes.split("x")):
        form = "a chip and its numbers along each dimension, such as v4:12x16x16"
        raise InputError(f"--topology {topology}: not {form}")
    return tuple(int(size) for size in sizes.split("x"))


def spanned(size: int, dimensions: Sequence[int]) -> int:
    """How many dimensions of a torus an axis of the mesh lies along.

    Args:
        size: Devices along the axis.
        dimensions: Chips along each dimension of the torus.

    Returns:
        The fewest neighboring dimensions whose product is the size, 1 where there are none.
    """
    for count in range(1, len(dimensions) + 1):
        starts = range(len(dimensions) - count + 1)
        if size in (prod(dimensions[i : i + count]) for i in starts):
            return count
    return 1


def meshes(topology: str, slices: int) -> list[tuple[int, int, int]]:
    """The meshes that are worth a trial.

    Args:
        topology: That of a slice.
        slices: How many; each has one copy of the model.

    Returns:
        Devices along data, fsdp and tensor. `tensor` is 1, or lies along one dimension of the torus
        or two.
    """
    devices, sizes = len(topology_devices(topology, slices)) // slices, torus(topology)
    neighbors = (prod(sizes[i : i + 2]) for i in range(len(sizes) - 1))
    tensors = [t for t in sorted({1, *sizes, *neighbors}) if devices % t == 0]
    return [(slices, devices // tensor, tensor) for tensor in tensors]
