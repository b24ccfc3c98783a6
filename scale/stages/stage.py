"""What every stage shares.

A stage writes one folder. A complete folder is skipped, an incomplete one resumed, and one that
was begun with other options or inputs is refused.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from jax.experimental import multihost_utils

from scale.console import console, shown
from scale.data.hub_rows import row_files
from scale.errors import InputError, option_name
from scale.files import (
    fingerprint,
    read_json,
    read_json_object,
    remove_temporaries,
    write_json,
)
from scale.health import WARNINGS, warn
from scale.io.model_folder import identity, located
from scale.parallel.processes import is_main
from scale.stages.bounds import require_bounds

ROWS = ("--data", "--validation")  # options that name rows; other paths are models
# options that do not change the result: of the runtime only its dtype does, of a judge its model
NO_RESULT = ("runtime", "log", "shape_seeds", "workers", "judge", "accumulation")
TOKENS = "tokens"  # folder of samples and log-probabilities, kept until the stage is complete
MEMBERS = "members"  # folder of the reward models that are trained one after another
SCRATCH = ("checkpoints", TOKENS, MEMBERS)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that writes one folder. Its options of type `Path` are its inputs."""

    EXTENDS: ClassVar[tuple[str, ...]] = ()
    """Options that may differ from those that the folder was begun with."""
    out: Path
    """Folder that the stage writes. A complete one is skipped, an incomplete one resumed."""

    @property
    def record(self) -> dict[str, Any]:
        """What identifies the run: its options, and hashes of its inputs."""
        return read_json(self.out / "stage.json")

    def run(self) -> dict[str, Any]:
        """Do the work; returns the findings, which are printed and recorded."""
        raise NotImplementedError


def execute(stage: Stage) -> dict[str, Any]:
    """Run a stage unless its folder is complete.

    Args:
        stage: The stage.

    Returns:
        Its findings.

    Raises:
        InputError: An option or an input cannot be used, or the folder is another run's.
    """
    require_bounds(stage)
    refuse_foreign(stage.out)
    begun = dates(stage)
    path, record = stage.out / "stage.json", describe(stage)
    resumes = path.exists()
    old = recorded(path) if resumes else record
    refuse_other(stage, old, record)
    if "findings" in old and not differing_options(old, record):
        console.print(f"{stage.out}: complete", markup=False)
        return old["findings"]
    with alone(stage.out):
        if is_main():
            remove_temporaries(stage.out)
        write_json(path, record)
        multihost_utils.sync_global_devices(f"{path} is written")
        console.print(str(stage.out), style="bold", markup=False)
        try:
            findings = stage.run()
            require_unchanged(stage, begun, record)
        except InputError:
            if not resumes:
                discard_unstarted(stage.out)
            raise
        write_json(path, record | {"findings": findings})
        if is_main():
            for name in SCRATCH:
                shutil.rmtree(stage.out / name, ignore_errors=True)
        multihost_utils.sync_global_devices(f"{path} is complete")
    show(findings)
    return findings


def show(findings: dict[str, Any]) -> None:
    for name, value in findings.items():
        if name != WARNINGS:
            console.print(f"  {name}: {shown(value)}", markup=False)
    warn(findings.get(WARNINGS, ()))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Refuse a folder that another command writes; the lock ends with this process at the latest.

    Of several processes of one run, process 0 has the lock.
    """
    if not is_main():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise InputError(f"--out {out}: another command writes it{holder(out)}") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def holder(folder: Path) -> str:
    """Which process has the lock of a folder, where Linux tells it."""
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[5].endswith(f":{folder.stat().st_ino}"):
                return f" (process {words[4]})"
    return ""


def dates(stage: Stage) -> list[tuple[str, int, int]]:
    """The name, size and time of change of each file that the stage reads."""
    paths = [
        file
        for option, path in input_paths(stage)
        for place in (row_files(path) if option in ROWS else [located(path)])
        for file in (sorted(place.rglob("*")) if place.is_dir() else [place])
        if file.is_file()
    ]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


def require_unchanged(
    stage: Stage, begun: list[tuple[str, int, int]], record: dict[str, Any]
) -> None:
    """Refuse results of inputs that were written while the stage read them.

    Files are hashed again only where their sizes or times are others.

    Args:
        stage: The stage.
        begun: Its `dates` when it began.
        record: What it was then, by `describe`.

    Raises:
        InputError: An input has other contents.
    """
    if dates(stage) == begun:
        return
    now = describe(stage)["inputs"]
    options = [old[0] for old, new in zip(record["inputs"], now, strict=True) if old != new]
    if options:
        raise InputError(
            f"{', '.join(options)}: has changed while {stage.out} was made of it; delete that "
            "folder, and start again"
        )


def refuse_foreign(out: Path) -> None:
    """Refuse a file, and a folder that no stage began: its files might be overwritten or removed.

    A process of the same run may be about to write `stage.json` under a hidden name.
    """
    if out.is_file():
        raise InputError(f"--out {out}: is a file")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    if "stage.json" not in names and not all(name.startswith(".") for name in names):
        raise InputError(f"--out {out}: is not empty, and no stage began it; name another --out")


def discard_unstarted(out: Path) -> None:
    """Remove a folder in which nothing was done: the corrected command may use it."""
    if [path.name for path in out.iterdir()] == ["stage.json"]:
        shutil.rmtree(out, ignore_errors=True)


def describe(stage: Stage) -> dict[str, Any]:
    """The stage's name and options, and the hashes of its inputs.

    Raises:
        InputError: An input does not exist.
    """
    hashes = []
    for option, path in input_paths(stage):
        is_rows = option in ROWS
        if not (row_files(path) if is_rows else located(path).exists()):
            raise InputError(f"{option} {path}: no such file or folder")
        contents = fingerprint(*row_files(path)) if is_rows else identity(path)
        hashes.append([option, contents])
    options = as_json({name: v for name, v in asdict(stage).items() if not is_path(v)})
    if runtime := getattr(stage, "runtime", None):
        options["runtime"] = {"dtype": runtime.dtype}
    return {"stage": type(stage).__name__, "options": options, "inputs": hashes}


def recorded(path: Path) -> dict[str, Any]:
    """What `execute` wrote when the folder was begun, or was complete.

    Raises:
        InputError: It is damaged, or another program's.
    """
    record = read_json_object(path)
    kinds = {"stage": str, "options": dict, "inputs": list, "findings": dict}
    for name, value in {"stage": "", "options": None, "inputs": None, **record}.items():
        if not isinstance(value, kinds.get(name, object)):
            raise InputError(f"{path}: {name!r} is not what a stage records")
    return record


def input_paths(stage: Stage) -> Iterator[tuple[str, Path]]:
    """The option and the path of each file or folder that the stage reads."""
    for field in fields(stage):
        value = getattr(stage, field.name)
        paths = value if isinstance(value, tuple) else (value,)
        if field.name != "out" and is_path(value):
            yield from ((option_name(field.name), path) for path in paths)


def needs(chains: Sequence[Sequence[Stage]]) -> list[set[int]]:
    """For each chain of stages, the other chains that write what it reads."""
    writers = {stage.out: i for i, chain in enumerate(chains) for stage in chain}
    return [
        {
            writers[folder]
            for stage in chain
            for _, path in input_paths(stage)
            for folder in (path, *path.parents)
            if folder in writers
        }
        - {i}
        for i, chain in enumerate(chains)
    ]


def is_path(value: Any) -> bool:
    """Paths are not compared, because a run may move; the contents of the inputs are."""
    return isinstance(value, Path) or (isinstance(value, tuple) and any(map(is_path, value)))


def as_json(value: Any) -> Any:
    """An option as JSON gives it back, without parts that do not change the result."""
    if isinstance(value, dict):
        return {str(k): as_json(item) for k, item in value.items() if k not in NO_RESULT}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value


def refuse_other(stage: Stage, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse a folder that another stage, other options or other inputs began."""
    if old.get("stage") != new["stage"]:
        raise InputError(
            f"--out {stage.out}: holds a {old.get('stage')} stage, not {new['stage']}; "
            "name another --out"
        )
    before, after = flat(old["options"]), flat(new["options"])
    other = [
        f"{name} ({before.get(name)}, not {after[name]})"
        for name in differing_options(old, new)
        if name not in stage.EXTENDS
    ]
    if old["inputs"] != new["inputs"]:
        other.append("contents of the inputs")
    if other:
        raise InputError(
            f"--out {stage.out}: was begun with other {', '.join(other)}; name another --out or "
            "delete it"
        )


def differing_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options of `new` that `old` lacks or has with other values."""
    before = flat(old["options"])
    return [name for name, value in flat(new["options"]).items() if before.get(name) != value]


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options without nesting, under names such as `training.steps`."""
    named: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, dict)
        named |= flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return named
