"""Independent stages side by side, one process on each core of a CPU.

A small model cannot use several cores well, so a process on each core does more in the same time.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

from scale.console import quiet, track
from scale.parallel.programs import keep_programs

interrupted = threading.Event()  # in a worker: a signal came
working = threading.Event()  # in a worker: a chain runs


def nothing() -> None:
    """Prepare nothing."""


def workers(limit: int, prepare: Callable[[], None] = nothing) -> ProcessPoolExecutor:
    """A pool of processes, each on a core of its own, which start at the first call.

    Args:
        limit: How many, at most.
        prepare: What each of them calls before its first work.

    Returns:
        The pool.
    """
    keep_programs()  # what one of them compiles, all can read
    cores = usable_cores()[:limit]
    context = multiprocessing.get_context("spawn")
    free_cores = context.Queue()
    for core in cores:
        free_cores.put(core)
    return Pool(len(cores), context, initialise_worker, (free_cores, prepare))


class Pool(ProcessPoolExecutor):
    """A pool whose processes can be interrupted when they are ready, and not while they import:
    Ctrl-C reaches all processes of a terminal."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it
        try:
            return super().submit(fn, *args, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def initialise_worker(free_cores: Queue, prepare: Callable[[], None]) -> None:
    """Pin this process to a core before JAX counts cores, make it quiet, end it with its parent."""
    core = free_cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    quiet()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=exit_with_parent, daemon=True).start()
    prepare()


def interrupt(number: int, frame: Any) -> None:
    """Interrupt the chain that runs; where none does, none will begin."""
    interrupted.set()
    if working.is_set():
        raise KeyboardInterrupt


def exit_with_parent() -> None:
    """Wait for the parent's end, then exit: two runs must never write one folder.

    Otherwise, when a killed run is started again, the workers of the first one still write.
    """
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def execute_all(
    pool: ProcessPoolExecutor | None,
    chains: Sequence[Sequence[Any]],
    label: str,
    run: Callable[[Any], Any],
    needs: Sequence[Set[int]] = (),
) -> list[list[Any]]:
    """Run chains of stages: each chain in order, different chains as soon as they can.

    The first error cancels the chains that have not started and is raised here; complete stages
    stay complete.

    Args:
        pool: The workers. None: this process runs the chains in their order.
        chains: The stages of each chain.
        label: What the progress bar shows.
        run: Runs one stage.
        needs: For each chain the indices of those that must be complete before it. Default: none.

    Returns:
        The results of `run` for each chain's stages.

    Raises:
        KeyboardInterrupt: On SIGTERM, here and in the workers, which save their current step.
    """
    if pool is None:
        return [run_chain(run, chain) for chain in chains]
    results: dict[int, list[Any]] = {}
    waiting = dict(enumerate(chains))
    running: dict[Future, int] = {}
    try:
        with sigterm_to_workers():
            for _ in track(chains, label):
                ready = [i for i in waiting if not needs or needs[i] <= results.keys()]
                running |= {pool.submit(run_in_worker, run, waiting.pop(i)): i for i in ready}
                done = next(as_completed(running))
                results[running.pop(done)] = done.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return [results[i] for i in range(len(chains))]


def run_chain(run: Callable[[Any], Any], chain: Sequence[Any]) -> list[Any]:
    """Run the stages of one chain in order."""
    return [run(stage) for stage in chain]


def run_in_worker(run: Callable[[Any], Any], chain: Sequence[Any]) -> list[Any]:
    """`run_chain`, unless an earlier one was interrupted: a pool cannot take back a chain that it
    has handed to its workers."""
    if interrupted.is_set():
        raise KeyboardInterrupt
    working.set()
    try:
        return run_chain(run, chain)
    except KeyboardInterrupt:
        interrupted.set()
        raise
    finally:
        working.clear()


@contextmanager
def sigterm_to_workers() -> Iterator[None]:
    """Pass SIGTERM on to the workers, and raise KeyboardInterrupt here."""

    def stop(*_: Any) -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise KeyboardInterrupt("SIGTERM")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
