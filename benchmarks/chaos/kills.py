"""Runs that are killed at random moments of every stage, and started again until they end."""

import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.runs import Run, contents, differences, ended, wait_for

WAYS = ("kill", "kill all", "kill a worker", "SIGTERM", "Ctrl-C")
PYTHONS_START = "<frozen site>"  # in a traceback before any line of ours has run
NEXT = 3  # a stage is drawn among so many that are not complete


@dataclass
class Tally:
    """What came of it."""

    kills: int = 0
    resumed_equal: int = 0
    faults: int = 0
    tracebacks: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbs: its files, and the stages in order."""

    files: dict[str, bytes]
    stages: list[str]
    seconds: float

    @classmethod
    def of(cls, home: Path, name: str) -> "Undisturbed":
        """Run it, or read what an earlier call ran in this folder."""
        seconds = home / f"{name}.seconds"
        if not seconds.exists():
            run, begun = new_run(home, name, f"{name}-whole"), time.monotonic()
            code, output = run.finish()
            if code:
                raise RuntimeError(output)
            seconds.write_text(str(time.monotonic() - begun))
        run = Run(name, home / f"{name}-whole", home)
        stages = [name for name in run.records() if name != "."]
        return cls(contents(run.out), stages, float(seconds.read_text()))


def campaign(run: Run, whole: Undisturbed, rng: random.Random, most: int, tally: Tally) -> None:
    """Kill a run at most so often, each time in another moment, and compare its end."""
    done: dict[str, int] = {}
    kills, is_equal = 0, True
    while kills < most:
        process = run.start()
        way = rng.choice(WAYS)
        if not reached(run, whole, rng, process):
            is_equal &= judged(run, tally, "end", *ended(process), (0,))
            break
        hurt(run, process, way, rng)
        code, output = ended(process, 60)
        if code == 1 and PYTHONS_START in output:
            continue
        kills += 1
        is_equal &= judged(run, tally, way, code, output, (0, 2, 130, -9, -15, -2))
        is_equal &= no_orphans(run, tally, way)
        is_equal &= untouched(run, done, tally)
        done = run.complete()
    is_equal &= judged(run, tally, "end", *run.finish(), (0,))
    is_equal &= untouched(run, done, tally)
    wrong = differences(run.out, whole.files)
    for line in wrong[:5]:
        tally.note(f"{run.name} {run.folder.name}: {line}")
    tally.kills += kills
    if is_equal and not wrong:
        tally.resumed_equal += kills
    else:
        tally.lost += 1


def reached(
    run: Run, whole: Undisturbed, rng: random.Random, process: subprocess.Popen[str]
) -> bool:
    """Wait for a random moment of one of the next stages; False where the run ended before."""
    complete = run.complete() if run.out.exists() else {}
    waiting = [name for name in whole.stages if name not in complete]
    if not waiting or rng.random() < 0.1:
        moment = time.monotonic() + rng.uniform(0, whole.seconds)
        wait_for(lambda: process.poll() is not None or time.monotonic() > moment, 300)
    else:
        name = rng.choice(waiting[:NEXT])
        folder = run.out / name
        wait_for(lambda: process.poll() is not None or folder.exists(), 300)
        time.sleep(rng.choice((0, rng.uniform(0, 0.2), rng.uniform(0, 3))))
    return process.poll() is None


def hurt(run: Run, process: subprocess.Popen[str], way: str, rng: random.Random) -> None:
    workers = run.workers()
    if way == "kill all":
        os.killpg(process.pid, signal.SIGKILL)
    elif way == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif way == "SIGTERM":
        process.terminate()
    elif way == "kill a worker" and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    else:
        process.kill()


def judged(
    run: Run, tally: Tally, what: str, code: int, output: str, codes: tuple[int, ...]
) -> bool:
    """Whether a process ended as it may, with no traceback."""
    has_traceback = "Traceback" in output
    tally.tracebacks += has_traceback
    if has_traceback or code not in codes:
        tally.note(f"{run.name} {run.folder.name}: {what}: exit {code}: {output[-1500:]}")
    return not has_traceback and code in codes


def no_orphans(run: Run, tally: Tally, way: str) -> bool:
    left = wait_for(lambda: not run.processes(), 20)
    if not left:
        tally.note(f"{run.name} {run.folder.name}: {way}: orphans {run.processes()}")
    return bool(left)


def untouched(run: Run, done: dict[str, int], tally: Tally) -> bool:
    """Whether no complete stage ran again."""
    now = run.complete()
    again = [name for name in done if now.get(name) != done[name]]
    if again:
        tally.note(f"{run.name} {run.folder.name}: ran twice: {again}")
    return not again


def kill(home: Path, name: str, whole: Undisturbed, seed: int, most: int, tally: Tally) -> None:
    """One campaign in a folder of its own, in which the inputs are links."""
    run = new_run(home, name, f"{name}-{seed}")
    campaign(run, whole, random.Random(seed), most, tally)


def new_run(home: Path, name: str, folder: str) -> Run:
    path = home / folder
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for given in ("prefs.jsonl", "model"):
        (path / given).symlink_to(home / given)
    return Run(name, path, home)
