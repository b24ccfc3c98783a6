"""Independent stages side by side, one process a core: a small model keeps one core busier than half of two."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

from scale.console import quiet, track


def workers(most: int) -> ProcessPoolExecutor:
    """A process a core, `most` at most. They start at the first call, and keep what they have compiled."""
    cores = usable_cores()[:most]
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    return ProcessPoolExecutor(len(cores), context, settle, (free,))


def execute_all(
    pool: ProcessPoolExecutor,
    chains: Sequence[Sequence[Any]],
    label: str,
    run: Callable[[Any], Any],
) -> list[list[Any]]:
    """What `run` gives of each chain's stages. A chain runs in order, the chains in any order.

    The first error stops what has not begun and is raised here; what was complete stays complete. SIGTERM is
    KeyboardInterrupt, here and in the workers, which save the step that they are at.
    """
    futures = [pool.submit(run_chain, run, chain) for chain in chains]
    try:
        with terminated_together():
            return [future.result() for future in track(futures, label)]
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


@contextmanager
def terminated_together() -> Iterator[None]:
    """SIGTERM goes on to the workers."""

    def stop(*_: Any) -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise KeyboardInterrupt("SIGTERM")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def usable_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def settle(free: Queue) -> None:
    """Keep to one core before JAX counts them, be silent, and do not outlive the parent."""
    core = free.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent() -> None:
    """Two runs must never write one folder: a run that is started again would meet the first one's workers."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def run_chain(run: Callable[[Any], Any], chain: Sequence[Any]) -> list[Any]:
    return [run(stage) for stage in chain]
