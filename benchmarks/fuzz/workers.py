"""Cases in processes of their own, with bounds on time and memory."""

import multiprocessing
import os
import random
import resource
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 20.0  # of a case, before its process is ended
SLOW = 5.0  # seconds of a processor that a case may take
MEMORY = 2**30  # bytes that a case may take
Case = Callable[[random.Random, Path], str]


def prepare(kind: str, base: Path) -> Case:
    """What runs a case of rows or of folders, in a process of its own."""
    base.mkdir(parents=True)
    if kind == "rows":
        case: Case = import_module("benchmarks.fuzz.rows").rows_case
        return case
    return import_module("benchmarks.fuzz.folders").maker(base)


def outcomes(make: Callable[[Path], Case], seeds: range) -> Iterator[tuple[int, str]]:
    """The outcome of each seed, in order.

    Args:
        make: Prepares a folder, in the process of the cases, and returns what runs one.
        seeds: The seeds.
    """
    while seeds:
        with Served(make, seeds) as connection:
            for seed in seeds:
                outcome = received(connection)
                seeds = seeds[1:]
                yield seed, outcome
                if outcome.startswith(("slow: no answer", "traceback: the process")):
                    break


class Served:
    """A process that runs the cases of some seeds and sends their outcomes."""

    def __init__(self, make: Callable[[Path], Case], seeds: range):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.home = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.process = context.Process(target=serve, args=(make, seeds, theirs, self.home))
        self.process.start()
        theirs.close()

    def __enter__(self) -> Connection:
        self.connection.recv()  # it is ready
        return self.connection

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.home, ignore_errors=True)


def received(connection: Connection) -> str:
    if not connection.poll(SECONDS):
        return f"slow: no answer in {SECONDS:g} s"
    try:
        return connection.recv()
    except EOFError:
        return "traceback: the process died"


def serve(make: Callable[[Path], Case], seeds: range, connection: Connection, home: Path) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    case = make(home / "base")
    connection.send("ready")
    for seed in seeds:
        folder = home / str(seed)
        folder.mkdir()
        connection.send(outcome_of(case, seed, folder))
        shutil.rmtree(folder)


def outcome_of(case: Case, seed: int, folder: Path) -> str:
    """The outcome of a case: its own, a traceback, or that it took too much."""
    begun, before = seconds(), limit_memory()
    try:
        outcome = case(random.Random(seed), folder)
    except MemoryError:
        outcome = f"slow: more than {MEMORY >> 20} MiB"
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:200]
        outcome = f"traceback: {type(error).__name__} in {Path(place.filename).name}: {reason}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    taken = seconds() - begun
    return f"slow: {taken:.0f} s" if taken > SLOW else outcome


def seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def limit_memory() -> tuple[int, int]:
    """Bound what this process may take beyond what it has; returns the bounds before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    return before
