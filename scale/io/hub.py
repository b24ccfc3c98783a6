"""Models of the Hugging Face hub by their ids, `ORGANISATION/NAME[@REVISION]`.

Cache, token and offline mode are those of `huggingface_hub`: `HF_HOME`, `HF_TOKEN` or
`hf auth login`, `HF_HUB_OFFLINE=1`.
"""

from functools import cache
from pathlib import Path

from scale.data.hub_rows import parsed, refused
from scale.io.huggingface import MODEL_FILES, TOKENIZER_FILES


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
