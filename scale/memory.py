"""Keep freed memory in the process.

XLA on a CPU allocates a step's buffers anew each time; by default glibc gives blocks of that size back to the kernel,
which then clears every page again: a third of the time of the miniature's step (`benchmarks/README.md`). glibc counts
its arenas when a second thread first allocates, so this must come before the imports of numpy and jax.
"""

import ctypes
import os
import sys

KEPT, ALONE = 2**30, 2**26  # bytes; larger blocks go back: among kept ones they leave holes that raise the peak
SETTINGS = {"MALLOC_TRIM_THRESHOLD_": (-1, KEPT), "MALLOC_MMAP_THRESHOLD_": (-3, ALONE), "MALLOC_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> None:
    """For this process and those that it starts; does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    for name, (parameter, value) in SETTINGS.items():
        mallopt(parameter, value)
        os.environ[name] = str(value)
