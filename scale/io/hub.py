"""Models of the Hugging Face hub by their ids: `ORGANISATION/NAME` or `ORGANISATION/NAME@REVISION`.

Cache, token and offline mode are those of `huggingface_hub`: `HF_HOME`, `HF_TOKEN` or
`hf auth login`, `HF_HUB_OFFLINE=1`.
"""

import re
from functools import cache
from pathlib import Path

from scale.errors import InputError
from scale.io.huggingface import MODEL_FILES, TOKENIZER_FILES

FILES = (".parquet", ".jsonl", ".json", ".gz", ".gguf")  # suffixes of what is no model's id
ID = re.compile(r"(?P<model>(?P<organisation>[\w.-]+)/[\w.-]+)(@(?P<revision>[\w./-]+))?")


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
    named = ID.fullmatch(str(path))
    if not named or path.suffix in FILES or Path(named["organisation"]).exists():
        return None
    from huggingface_hub import snapshot_download  # it takes half a second to import

    try:
        folder = snapshot_download(
            named["model"],
            revision=named["revision"],
            allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES],
        )
    except Exception as error:  # it raises what its HTTP client and the file system raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: no such file or folder, and not a model of the hub: {reason}"
        ) from error
    return Path(folder)
