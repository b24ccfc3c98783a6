"""Keep freed memory in the process: a step on a CPU then takes a third less time.

XLA on a CPU allocates the buffers of every step anew. By default glibc gives blocks of that size
back to the kernel, which clears each page before it hands the page out again: a third of the time
of the miniature's step (`benchmarks/LOG.md`).
"""

import ctypes
import os
import sys

KEPT_BYTES = 2**30
"""Free memory up to this size stays in the process."""
LARGE_BLOCK = 2**26
"""Larger blocks go back: between kept blocks they leave holes, which raise the peak."""
MALLOPT = {  # environment variable: (parameter of mallopt, value)
    "MALLOC_TRIM_THRESHOLD_": (-1, KEPT_BYTES),
    "MALLOC_MMAP_THRESHOLD_": (-3, LARGE_BLOCK),
    "MALLOC_ARENA_MAX": (-8, 1),
}


def keep_freed_memory() -> None:
    """Set the allocator of this process and of those that it starts.

    Call this before numpy and jax are imported: glibc fixes the number of its arenas when a second
    thread first allocates. Where the C library is not glibc, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for name, (parameter, value) in MALLOPT.items():
        mallopt(parameter, value)
        os.environ[name] = str(value)
