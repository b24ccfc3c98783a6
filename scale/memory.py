"""Memory of this process, and bounds for foreign code in it.

Freed memory stays in the process: a step on a CPU then takes a third less time.

XLA on a CPU allocates the buffers of every step anew. By default glibc gives blocks of that size
back to the kernel, which clears each page before it hands the page out again: a third of the time
of the miniature's step (`benchmarks/LOG.md`).
"""

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

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


@contextmanager
def bounded(seconds: float, more: int) -> Iterator[None]:
    """Bound what runs inside: foreign code, such as a chat template.

    Args:
        seconds: Of the processor, in this thread; not outside the main thread, since Python has
            signals in that one alone.
        more: Bytes beyond those that this process has; on Linux alone.

    Raises:
        TimeoutError: It takes longer.
        MemoryError: It takes more.
    """
    with ExitStack() as stack:
        if sys.platform == "linux":
            stack.enter_context(_bounded_memory(more))
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_bounded_time(seconds))
        yield


@contextmanager
def _bounded_memory(more: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    if before[0] == resource.RLIM_INFINITY or most < before[0]:
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _bounded_time(seconds: float) -> Iterator[None]:
    end = time.thread_time() + seconds

    def look(*_: object) -> None:  # the timer counts all threads of the process
        if time.thread_time() > end:
            raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
