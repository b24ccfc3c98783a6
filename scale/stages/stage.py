"""What every stage shares: one folder out, skipped when complete, resumed when not, refused when it differs."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from jax.experimental import multihost_utils

from scale.console import console
from scale.errors import InputError
from scale.files import fingerprint, read_json, write_json
from scale.io.model_folder import located
from scale.parallel.processes import is_main
from scale.stages.bounds import require_bounds

HOW = ("runtime", "log", "shape_seeds", "workers")  # options that do not change the result


TOKENS = "tokens"  # of the rows that a stage trains on, in its folder until it is complete


@dataclass(frozen=True, kw_only=True)
class Stage:
    EXTENDS: ClassVar[tuple[str, ...]] = ()
    """Options that may differ from those that the folder was begun with: what is there of the new ones stays."""
    out: Path
    """Folder that the stage writes. If it holds this stage complete, nothing is done; if part of it, it resumes."""

    @property
    def record(self) -> dict[str, Any]:
        """What identifies the run: its options, and hashes of its inputs."""
        return read_json(self.out / "stage.json")

    def inputs(self) -> list[Path]:
        """The files and folders that the stage reads: a run is the same run only if their contents are."""
        raise NotImplementedError

    def run(self) -> dict[str, Any]:
        """Do the work; returns the findings that the stage prints and records."""
        raise NotImplementedError


def execute(stage: Stage) -> dict[str, Any]:
    """Run the stage unless its folder says that exactly this was done; returns its findings."""
    require_bounds(stage)
    if stage.out.is_file():
        raise InputError(f"--out {stage.out}: is a file")
    path = stage.out / "stage.json"
    record = description(stage)
    old = read_json(path) if path.exists() else record
    refuse_other(stage, old, record)
    if "findings" in old and not differing(old, record):
        console.print(f"{stage.out}: complete", markup=False)
        return old["findings"]
    write_json(path, record)
    multihost_utils.sync_global_devices(f"{path} is written")
    console.print(str(stage.out), style="bold", markup=False)
    try:
        findings = stage.run()
    except InputError:
        shutil.rmtree(stage.out / TOKENS, ignore_errors=True)
        if [*stage.out.glob("*")] == [path]:  # nothing was done: the same folder will do when the fault is mended
            shutil.rmtree(stage.out, ignore_errors=True)
        raise
    write_json(path, record | {"findings": findings})
    if is_main():
        for scratch in ("checkpoints", TOKENS):
            shutil.rmtree(stage.out / scratch, ignore_errors=True)
    multihost_utils.sync_global_devices(f"{path} is complete")
    for name, value in findings.items():
        console.print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
    return findings


def description(stage: Stage) -> dict[str, Any]:
    paths = [located(path) for path in stage.inputs()]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise InputError(f"{', '.join(missing)}: no such file or folder")
    options = {k: plain(v) for k, v in asdict(stage).items() if k not in HOW and not is_path(v)}
    inputs = [fingerprint(path) for path in paths]
    return {"stage": type(stage).__name__, "options": options, "inputs": inputs}


def plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def is_path(value: Any) -> bool:
    """Paths are not compared: a run may move, and the inputs' contents are."""
    return isinstance(value, Path) or (isinstance(value, tuple) and any(map(is_path, value)))


def refuse_other(stage: Stage, old: dict[str, Any], new: dict[str, Any]) -> None:
    if old["stage"] != new["stage"]:
        raise InputError(f"{stage.out}: holds a {old['stage']} stage, not {new['stage']}; name another --out")
    other = [k for k in differing(old, new) if k not in stage.EXTENDS]
    other += ["contents of the inputs"] * (old["inputs"] != new["inputs"])
    if other:
        raise InputError(f"{stage.out}: was begun with other {', '.join(other)}; name another --out or delete it")


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options of `new` that `old` has not, or other values of."""
    return [k for k in new["options"] if old["options"].get(k) != new["options"][k]]
