"""Files of the host: written whole or not at all, and known by a hash of their contents."""

import csv
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from scale.errors import InputError, as_input_error

LOGS = frozenset(
    {"checkpoints", "metrics.jsonl", "tensorboard", "timing.json", "wandb", "wandb.json"}
)
"""What a folder's fingerprint ignores: files that differ between two runs with equal results."""
LARGEST_TEXT = 2**28  # bytes of a file that is read into memory as a whole
DAYS = 30  # how long what nothing uses stays in the user's cache


def user_cache(*names: str) -> Path:
    """A folder for what the next commands can use again: `$XDG_CACHE_HOME/minipref/NAMES`.

    Raises:
        OSError: It cannot be made.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home.joinpath("minipref", *names)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_unused(folder: Path, pattern: str, used: Path | None = None) -> None:
    """Remove the files and folders that match and that nothing has touched for `DAYS` days.

    What is `used` stays, whatever the clock says.
    """
    with suppress(OSError):  # another process may remove the same ones
        for path in folder.glob(pattern):
            if path != used and time.time() - path.stat().st_mtime > DAYS * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (same suffix), moved onto it on success, removed on failure.

    With several processes, each may call this; the file of process 0 stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        if jax.process_index() == 0:
            os.replace(temporary, path)
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f"{path}: cannot be written: {error}") from error  # NumPy names no file
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left of `atomic`, where no other process writes.

    Args:
        folder: Where the files were to be.
        name: A pattern of their names.
    """
    for path in folder.glob(f".{'[0-9a-f]' * 32}-{name}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON.

    Raises:
        ValueError: The value holds a NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table; a cell is empty where its row lacks the column."""
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `write_csv` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> Any:
    """The value of a JSON file that this program wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file that another program wrote.

    Raises:
        InputError: The file cannot be read, or holds no object.
    """
    require_file(path)
    with as_input_error(path):
        value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def require_file(path: Path) -> None:
    """Refuse, before it is read, what is no file: a device has no end, and a pipe waits for ever.

    Raises:
        InputError: It is none, or has more than `LARGEST_TEXT` bytes.
    """
    with as_input_error(path):
        size = path.stat().st_size
    if not path.is_file():
        raise InputError(f"{path}: is not a file")
    if size > LARGEST_TEXT:
        raise InputError(f"{path}: has {size} bytes, which no file of its kind has")


def matching(path: Path) -> list[Path]:
    """The files that a path means, in order: itself, or those that match it as a pattern
    (`shards/*.parquet`); none where there is neither."""
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))


def fingerprint(*paths: Path) -> str:
    """The first 16 hex digits of a SHA-256 that identifies files and folders by their contents.

    Args:
        *paths: A file, hashed as `sha256sum` does; a folder, hashed by its sorted relative names
            with their contents, without `LOGS`; or several of these, whose order matters.
    """
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
