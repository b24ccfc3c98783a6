"""What a number was measured on, and how.

JAX is imported by the functions that need it: in a program without JAX it would count as memory of
that program.
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe() -> str:
    """The date, the machine and the versions of the libraries."""
    import jax

    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
    device = jax.devices()[0]
    return (
        f"{date.today()}, {cores} cores ({platform.machine()}), {device.device_kind}, "
        f"Python {platform.python_version()}, jax {version('jax')}, equinox {version('equinox')}"
    )


def matmul_flops(size: int = 2048, repeats: int = 8) -> float:
    """The best rate of a float32 matrix product on this machine (FLOP/s)."""
    import jax.numpy as jnp

    a = jnp.ones((size, size))
    seconds = [timed(lambda: a @ a) for _ in range(repeats + 2)][2:]  # JAX compiles the first
    return 2 * size**3 / min(seconds)


def timed(call: Callable[[], Any]) -> float:
    """The seconds of a call, until its results are on the device."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def peak_memory_gib() -> float:
    """The largest resident size of this process so far, GiB.

    It is read from `/proc` where there is one: the `ru_maxrss` of Linux starts at the size of the
    parent process.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20
