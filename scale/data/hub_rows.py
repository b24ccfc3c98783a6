"""Rows by the id of a data set of the Hugging Face hub, `ORGANISATION/NAME[:SPLIT][@REVISION]`.

The package `datasets` downloads and reads it; without a split it is `train`. A revision may stand
after the id of a model, too.
"""

import os
import re
import uuid
from functools import cache
from pathlib import Path

from scale.errors import InputError
from scale.files import matching

FILES = (".parquet", ".jsonl", ".json", ".gz", ".gguf")  # suffixes of what is no id
ID = re.compile(
    r"(?P<name>(?P<organisation>[\w.-]+)/[\w.-]+)(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)


def row_files(path: Path) -> list[Path]:
    """The files of rows that a path means, in order: itself, those that match it as a pattern, or
    that of a data set of the hub, which lies in the cache of `datasets`; none where it is no such.

    Raises:
        InputError: The hub has no such data set, split or revision, or is not reached; or
            `datasets` is missing.
    """
    files, named = matching(path), parsed(path)
    if files or not named:
        return files
    return [downloaded_rows(path, named["name"], named["split"] or "train", named["revision"])]


@cache
def downloaded_rows(path: Path, name: str, split: str, revision: str | None) -> Path:
    """The Parquet file of a data set of the hub; `path` is its name in messages."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: no such file; ids need pip install datasets") from error
    try:
        rows = load_dataset(name, split=split, revision=revision)
        file = Path(rows.cache_files[0]["filename"]).with_suffix(".parquet")
        if not file.exists():  # every process writes: their caches may be different ones
            temporary = file.with_name(f".{uuid.uuid4().hex}.parquet")
            rows.to_parquet(str(temporary))
            os.replace(temporary, file)
    except Exception as error:  # it raises what its HTTP client and its readers raise
        raise refused(path, "data set", error) from error
    return file


def parsed(path: Path) -> re.Match[str] | None:
    """The parts of an id; None where a path cannot be one."""
    named = ID.fullmatch(str(path))
    if not named or path.suffix in FILES or Path(named["organisation"]).exists():
        return None
    return named


def refused(path: Path, kind: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{path}: no such file or folder, and not a {kind} of the hub: {reason}")
