"""What is computed of files of rows stays on disk for the next command, under a hash of its inputs.

An entry is a folder. It is written under another name and then renamed, and it is used only while
its files have the hashes that were recorded with it.
"""

import atexit
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from scale.files import fingerprint, read_json, remove_unused, user_cache

RECORD = "entry.json"  # what `make` returned, and the hash of each file


def entry(inputs: Sequence[Any], make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """The folder that `make` wrote for these inputs, and what it returned.

    Several processes may ask for one entry at once: one makes it and the others wait.

    Args:
        inputs: All that the entry depends on, besides the code of this package, as JSON.
        make: Writes files into a folder that exists, and returns a value of JSON.
    """
    home, key = cache_folder(), key_of([code(), *inputs])
    with one_at_a_time(home / f".{key}.lock"):
        folder = home / key
        if not is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            write(folder, make)
        os.utime(folder)
    remove_unused(home, "*", used=folder)
    return folder, read_json(folder / RECORD)["value"]


def cache_folder() -> Path:
    """The user's cache, or where it cannot be written a folder of this process alone."""
    try:
        folder = user_cache("tokens")
    except OSError:
        return own_folder()
    return folder if os.access(folder, os.W_OK | os.X_OK) else own_folder()


@cache
def own_folder() -> Path:
    """A folder that lasts as long as this process."""
    own = tempfile.TemporaryDirectory(prefix="minipref-tokens-")
    atexit.register(own.cleanup)
    return Path(own.name)


def key_of(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


@cache
def code() -> str:
    """The hash of the modules that read rows and make tokens of them."""
    return fingerprint(*sorted(Path(__file__).parent.glob("*.py")))


@contextmanager
def one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process has the lock, which ends with its process at the latest."""
    file = os.open(lock, os.O_CREAT | os.O_RDWR)
    try:
        with suppress(OSError):  # a file system without locks: then the last one to rename it wins
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def is_whole(folder: Path) -> bool:
    """Whether an entry has the files that were written, unchanged."""
    try:
        files = read_json(folder / RECORD)["files"]
        return all(fingerprint(folder / name) == value for name, value in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write(folder: Path, make: Callable[[Path], Any]) -> None:
    temporary = folder.with_name(f".{uuid.uuid4().hex}")
    temporary.mkdir(mode=0o700)
    try:
        value = make(temporary)
        files = {path.name: fingerprint(path) for path in temporary.iterdir()}
        record = json.dumps({"value": value, "files": files})
        (temporary / RECORD).write_text(record, encoding="utf-8")
        with suppress(OSError):  # where there are no locks, another process may have been faster
            temporary.rename(folder)
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f"{folder}: cannot be written: {error}") from error  # a full disk
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class GrowingArray:
    """A `.npy` file to which rows are added; closing it writes how many there are."""

    def __init__(self, path: Path, like: np.ndarray):
        """An array of the type and the sizes of `like`, with no rows yet."""
        self.file, self.like, self.rows = path.open("wb"), like, 0
        self.write_header()

    def write_header(self) -> None:
        """The header has the same size for any number of rows."""
        header = npy.header_data_from_array_1_0(self.like[:0])
        header["shape"] = (self.rows, *self.like.shape[1:])
        self.file.seek(0)
        npy.write_array_header_1_0(self.file, header)

    def add(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, self.like.dtype).data)
        self.rows += len(rows)

    def close(self) -> None:
        self.write_header()
        self.file.close()
