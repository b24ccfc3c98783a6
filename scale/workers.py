"""Independent stages side by side, one process a core: small models keep one core busy each, not two."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from scale.console import quiet, track
from scale.stages.base import Stage, execute


def execute_all(chains: Sequence[Sequence[Stage]], label: str) -> list[list[dict]]:
    """Findings of each chain's stages; a chain runs in order, the chains in any order, on every core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for core in cores:
        free.put(core)
    with ProcessPoolExecutor(min(len(cores), len(chains)), context, initializer=settle, initargs=(free,)) as pool:
        futures = [pool.submit(run_chain, chain) for chain in chains]
        try:
            return [future.result() for future in track(futures, label, 0, len(futures))]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def settle(free: multiprocessing.Queue) -> None:
    """Keep to one core before JAX counts them, and be silent."""
    core = free.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    quiet()


def run_chain(chain: Sequence[Stage]) -> list[dict]:
    return [execute(stage) for stage in chain]
