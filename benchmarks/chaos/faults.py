"""Disks, clocks, inputs and neighbours that fail while a run goes on.

Full and read-only disks are file systems in memory, where this process may mount them. Errors in
the middle of a write, and clocks that jump, come from a library that is preloaded (`shim.c`).
"""

import errno
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos.kills import Tally, Undisturbed, judged, new_run
from benchmarks.chaos.runs import Run, contents, differences, ended, wait_for

SIZES = (0, 0.1, 0.3, 0.6, 0.9)  # of what a run needs on its disk
SHIM = Path(__file__).with_name("shim.c")
YEAR = 366 * 86400


def faults(
    home: Path, whole: Mapping[str, Undisturbed], tally: Tally, seed: int, names: Sequence[str]
) -> None:
    """The faults of these names, for each command."""
    rng = random.Random(seed)
    for name, undisturbed in whole.items():
        for fault in names:
            begun, before = time.monotonic(), (tally.faults, tally.lost)
            FAULTS[fault](home, name, undisturbed, tally, rng)
            tried, lost = tally.faults - before[0], tally.lost - before[1]
            taken = f"{time.monotonic() - begun:.0f} s"
            print(f"{name}: {fault}: {tried - lost} of {tried} as it must, {taken}", flush=True)


def counted(run: Run, tally: Tally, what: str, is_good: bool, more: str = "") -> None:
    """One fault, which came out as it must or not."""
    tally.faults += 1
    if not is_good:
        tally.lost += 1
        tally.note(f"{run.name} {run.folder.name}: {what}: lost {more[-1500:]}")


def refused(run: Run, tally: Tally, what: str, code: int, output: str, *words: str) -> bool:
    """Whether a command ended with one line of error and exit code 2."""
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    is_named = bool(errors) and all(word in errors[-1] for word in words)
    if not is_named or len(errors) != 1:
        tally.note(f"{run.name} {run.folder.name}: {what}: exit {code}: {output[-1500:]}")
    return judged(run, tally, what, code, output, (2,)) and is_named and len(errors) == 1


def goes_on(run: Run, whole: Undisturbed, tally: Tally, what: str) -> bool:
    """Whether the same command then ends as if nothing had been."""
    is_good = judged(run, tally, f"{what}, then", *run.finish(), (0,))
    wrong = differences(run.out, whole.files)
    for line in wrong[:5]:
        tally.note(f"{run.name} {run.folder.name}: {what}, then: {line}")
    return is_good and not wrong


Fault = Callable[[Path, str, Undisturbed, Tally, random.Random], None]


def neighbour(
    home: Path, name: str, whole: Undisturbed, tally: Tally, rng: random.Random
) -> None:
    """A second command with the same --out: refused at once, with the process of the first."""
    run = new_run(home, name, f"{name}-neighbour")
    first = run.start()
    wait_for(lambda: (run.out / whole.stages[0]).exists(), 120)
    code, output = run.finish()
    is_running = first.poll() is None
    is_good = refused(run, tally, "neighbour", code, output, "another command", str(first.pid))
    is_good &= is_running and judged(run, tally, "first", *ended(first), (0,))
    counted(run, tally, "neighbour", is_good and not differences(run.out, whole.files))


def changed_input(
    home: Path, name: str, whole: Undisturbed, tally: Tally, rng: random.Random
) -> None:
    """A row more while the run goes on; `paper` reads none here."""
    if name != "tune":
        return
    run = new_run(home, name, f"{name}-changed")
    data = run.folder / "prefs.jsonl"
    rows = data.read_bytes()
    data.unlink()
    data.write_bytes(rows)
    process = run.start()
    wait_for(lambda: (run.out / rng.choice(whole.stages) / "stage.json").exists(), 120)
    data.write_bytes(rows + rows.splitlines()[0].replace(b"alpha", b"beta") + b"\n")
    is_good = refused(run, tally, "changed", *ended(process), "--data", "has changed")
    is_good &= refused(run, tally, "changed, again", *run.finish(), "contents of the inputs")
    counted(run, tally, "changed input", is_good)


@contextmanager
def disk(path: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system in memory of so many bytes; yields what mounts it again with options."""
    path.mkdir()
    options = f"size={max(size, 4096) // 4096 * 4096}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def full_disk(
    home: Path, name: str, whole: Undisturbed, tally: Tally, rng: random.Random
) -> None:
    """Disks that are too small by more or less; then there is room."""
    need = sum(map(len, whole.files.values())) + 4096 * len(whole.files)
    for share in SIZES:
        run = new_run(home, name, f"{name}-full-{share}")
        with disk(run.out, int(share * need)) as remount:
            code, output = run.finish()
            what = f"{share:g} of the disk"
            is_good = refused(run, tally, what, code, output)
            remount("size=1g")
            is_good &= goes_on(run, whole, tally, what)
            counted(run, tally, what, is_good, output)


def read_only(
    home: Path, name: str, whole: Undisturbed, tally: Tally, rng: random.Random
) -> None:
    """A folder that cannot be written, from the start and from the middle of the run on."""
    run = new_run(home, name, f"{name}-read-only")
    with disk(run.out, 2**30) as remount:
        remount("ro")
        is_good = refused(run, tally, "read-only", *run.finish(), "out")
        remount("rw")
        is_good &= goes_on(run, whole, tally, "read-only")
        counted(run, tally, "read-only", is_good)


def shim(home: Path) -> Path:
    """The library to preload, compiled."""
    path = home / "shim.so"
    if not path.exists():
        command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(path), str(SHIM), "-ldl"]
        subprocess.run(command, check=True)
    return path


def failed_write(
    home: Path, name: str, whole: Undisturbed, tally: Tally, rng: random.Random
) -> None:
    """A write of each process that fails, once or from then on; each error in turn."""
    for i, kind in enumerate((errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)):
        number, is_once = int(2 ** rng.uniform(0, 10)), rng.random() < 0.5
        what = f"write {number}{' alone' * is_once}: {errno.errorcode[kind]}"
        broken = {"CHAOS_AT": str(number), "CHAOS_ERRNO": str(kind)}
        broken |= {"CHAOS_ONCE": "1"} if is_once else {}
        with_broken_disk(new_run(home, name, f"{name}-write-{i}"), whole, tally, what, broken)


def with_broken_disk(
    run: Run, whole: Undisturbed, tally: Tally, what: str, broken: dict[str, str]
) -> None:
    """A run some of whose writes fail, by the preloaded library, and then none."""
    preloaded = {"LD_PRELOAD": str(shim(run.home)), "CHAOS_ROOT": str(run.out.resolve())}
    code, output = run.finish(**preloaded, **broken)
    is_good = code == 0 or refused(run, tally, what, code, output)
    print(f"{run.name} {what}: exit {code}")
    counted(run, tally, what, goes_on(run, whole, tally, what) and is_good, output)


def clock(home: Path, name: str, whole: Undisturbed, tally: Tally, rng: random.Random) -> None:
    """A wall clock that jumps by years at every look; and files of the future."""
    run = new_run(home, name, f"{name}-clock")
    code, output = run.finish(LD_PRELOAD=str(shim(home)), CHAOS_CLOCK=str(YEAR))
    is_good = judged(run, tally, "clock", code, output, (0,))
    is_good &= contents(run.out) == whole.files
    for file in run.out.rglob("*"):
        os.utime(file, (time.time() + YEAR,) * 2)
    is_good &= goes_on(run, whole, tally, "clock")
    counted(run, tally, "clock", is_good, output)


FAULTS: dict[str, Fault] = {
    "neighbour": neighbour, "changed-input": changed_input, "full-disk": full_disk,
    "read-only": read_only, "failed-write": failed_write, "clock": clock,
}  # fmt: skip
