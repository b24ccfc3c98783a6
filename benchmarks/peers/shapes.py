"""The models and the rows of `python -m benchmarks.peers`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from scale.data.dataset import Limits, encode
from scale.data.docstrings import docstrings
from scale.data.formats import Row
from scale.data.packing import Tokens
from scale.data.rows import read
from scale.data.tokenizer import SMALLEST, Tokenizer, train_tokenizer
from scale.errors import InputError
from scale.io.huggingface import export
from scale.io.model_folder import tokenizer_of
from scale.model.config import ModelConfig
from scale.model.presets import MODELS
from scale.model.transformer import Transformer


@dataclass(frozen=True)
class Shape:
    """A Llama, and how its rows come in batches."""

    model: ModelConfig
    batch: int
    rows: tuple[str, ...] = ("hh", "short")
    whole: bool = False
    """Whether rows are as long as they are, up to the model's context."""


# RoPE's base is the only one that Tunix's Llama has, whatever its configuration says
SMOLLM2 = replace(MODELS["smollm2-135m"], rope_base=1e6)
SHAPES = {
    "49m": Shape(replace(SMOLLM2, num_layers=6), 4),
    "135m": Shape(SMOLLM2, 2),
    "miniature": Shape(
        replace(SMOLLM2, vocab_size=1024, num_layers=2, d_model=64, num_heads=2, head_dim=32, num_kv_heads=1, d_ff=256), 16, whole=True
    ),
    "1b": Shape(  # Llama 3.2 1B's
        replace(SMOLLM2, vocab_size=128_256, num_layers=16, d_model=2048, num_heads=32, head_dim=64, num_kv_heads=8, d_ff=8192), 8,
        rows=("random",),
    ),
}


def save(folder: Path, shape: Shape, tokenizer: Tokenizer, tokens: Tokens, dtype: str) -> None:
    """The reference is the uniform distribution over the vocabulary: with the policy itself as its own reference, the
    first loss is log 2 whatever the weights and the tokens are, and would prove nothing."""
    ref_logps = -tokens.lengths[:, 1:] * math.log(shape.model.vocab_size)
    arrays = tokens._asdict() | {"ref_logps": ref_logps.astype(np.float32), "batch": shape.batch, "dtype": dtype}
    np.savez(folder / "work.npz", **arrays)
    export(folder / "model", Transformer(shape.model, jax.random.key(0)), tokenizer)


def rows_of(kind: str, shape: Shape, hh: Path | None, lengths: tuple[int, int], n: int) -> tuple[Tokenizer, Tokens]:
    """The first n rows of `kind`, and the tokenizer of the model that reads them."""
    if kind == "random":
        return train_tokenizer([], SMALLEST), random_tokens(shape.model.vocab_size, lengths, n)
    texts = read(hh) if kind == "hh" and hh else short_rows()
    if shape.whole:
        tokenizer = train_tokenizer((row[field] for row in texts for field in ("prompt", "chosen")), shape.model.vocab_size)
        limits = Limits(shape.model.max_seq_len // 2, shape.model.max_seq_len // 2)
    else:
        tokenizer, limits = tokenizer_of(Path("smollm2")), Limits(*lengths, "keep-end")
    tokens = encode(tokenizer, texts, ["chosen", "rejected"], limits).tokens
    if len(tokens.ends) < n:
        raise InputError(f"--pairs {n}: there are {len(tokens.ends)} {kind} rows within {limits.response} tokens")
    return tokenizer, tokens.take(np.arange(n))


def short_rows() -> list[Row]:
    """Docstrings of the installed code: each one's summary, chosen over that of another."""
    found = docstrings()
    order = np.random.default_rng(0).permutation(len(found))
    return [{"prompt": found[i]["prompt"], "chosen": found[i]["completion"], "rejected": found[j]["completion"]}
            for i, j in zip(order, np.roll(order, 1), strict=True)]


def random_tokens(vocab_size: int, lengths: tuple[int, int], n: int) -> Tokens:
    """Prompts and responses of a quarter of these lengths up to them, all as likely."""
    rng = np.random.default_rng(0)
    prompt, response = lengths
    longest = np.array([prompt, response, response])
    ends = np.cumsum(rng.integers(-(-longest // 4), longest + 1, (n, 3))).reshape(n, 3)
    return Tokens(rng.integers(SMALLEST, vocab_size, ends[-1, -1], np.int32), ends)
