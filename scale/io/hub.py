"""Models and data sets of the Hugging Face hub by their ids, `ORGANISATION/NAME[@REVISION]`.

The id of a data set may name a split, `ORGANISATION/NAME:SPLIT`; without one it is `train`.

Cache, token and offline mode are those of `huggingface_hub`: `HF_HOME`, `HF_TOKEN` or
`hf auth login`, `HF_HUB_OFFLINE=1`.
"""

import re
from functools import cache
from pathlib import Path

from scale.errors import InputError
from scale.files import atomic, matching
from scale.io.huggingface import MODEL_FILES, TOKENIZER_FILES

FILES = (".parquet", ".jsonl", ".json", ".gz", ".gguf")  # suffixes of what is no model's id
ID = re.compile(
    r"(?P<name>(?P<organisation>[\w.-]+)/[\w.-]+)(:(?P<split>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
)


@cache
def downloaded(path: Path) -> Path | None:
    """The folder of the model that a path names, in the hub's cache; it is downloaded if need be.

    Args:
        path: What a user wrote where a model is asked for.

    Returns:
        The folder. None: the path is no id, is a file's, or lies in a folder that exists here.

    Raises:
        InputError: The hub has no such model or revision, does not give access, or is not reached.
    """
    named = parsed(path)
    if not named or named["split"]:
        return None
    from huggingface_hub import snapshot_download  # it takes half a second to import

    try:
        folder = snapshot_download(
            named["name"],
            revision=named["revision"],
            allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES],
        )
    except Exception as error:  # it raises what its HTTP client and the file system raise
        raise refused(path, "model", error) from error
    return Path(folder)


@cache
def located_rows(path: Path) -> Path:
    """The file of rows that a path means: its own, or that of a data set of the hub.

    Such a data set is read by the package `datasets`, and its file lies in that package's cache.

    Args:
        path: What a user wrote where rows are asked for.

    Raises:
        InputError: The hub has no such data set, split or revision, or is not reached; or
            `datasets` is missing.
    """
    named = None if matching(path) else parsed(path)
    if not named:
        return path
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: no such file; ids need pip install datasets") from error
    try:
        rows = load_dataset(
            named["name"], split=named["split"] or "train", revision=named["revision"]
        )
        file = Path(rows.cache_files[0]["filename"]).with_suffix(".parquet")
        if not file.exists():
            with atomic(file) as temporary:
                rows.to_parquet(str(temporary))
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
