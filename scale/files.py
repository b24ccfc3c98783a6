"""TODO scale.files."""

import csv
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

LOGS = frozenset({"checkpoints", "metrics.jsonl", "tensorboard", "timing.json", "wandb", "wandb.json"})


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (same suffix), moved onto it on success and removed on failure.

    Of several processes, all may write the same file, and that of process 0 stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        if jax.process_index() == 0:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON; a NaN or infinity, which JSON has not, raises ValueError."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A table whose cells are empty where a row has no such column."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def fingerprint(*paths: Path) -> str:
    """The first 16 hex digits of a SHA-256: of a file's contents (as `sha256sum` has it), of a folder's
    sorted relative names with their contents, but for logs and checkpoints, which may differ; or of several such
    digests in the order given."""
    digests = [_digest(path) for path in paths]
    return (digests[0] if len(digests) == 1 else _sha256("".join(digests)))[:16]


def _digest(path: Path) -> str:
    if path.is_dir():
        names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        files = {name.as_posix(): path / name for name in names if LOGS.isdisjoint(name.parts)}
        return _sha256(json.dumps([[name, _digest(files[name])] for name in sorted(files)]))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
