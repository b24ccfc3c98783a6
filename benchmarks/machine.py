"""What a number was measured on. JAX is imported by what needs it: it would count as memory of a program without it."""

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
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return (f"{date.today()}, {cores} cores ({platform.machine()}), {device.device_kind}, "
            f"Python {platform.python_version()}, jax {version('jax')}, equinox {version('equinox')}")


def matmul_flops(size: int = 2048, repeats: int = 8) -> float:
    """Best float32 matrix-product rate of this machine (FLOP/s): the peak that shares are of."""
    import jax.numpy as jnp

    a = jnp.ones((size, size))
    seconds = [timed(lambda: a @ a) for _ in range(repeats + 2)][2:]  # compiled once, by JAX itself
    return 2 * size**3 / min(seconds)


def timed(call: Callable[[], Any]) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def peak_memory_gib() -> float:
    """Largest resident size of this process so far. Linux's `ru_maxrss` starts at the size of the parent process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20
