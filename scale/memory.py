"""Keep freed memory in the process.

XLA on a CPU allocates a step's buffers anew each time; by default glibc gives blocks of that size back to the kernel,
which then clears every page again: a third of the time of the miniature's step (`benchmarks/README.md`).
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 2**30


def keep_freed_memory() -> None:
    """Does nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(MMAP_THRESHOLD, LARGE)
        mallopt(TRIM_THRESHOLD, LARGE)
