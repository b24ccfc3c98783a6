"""The models and the rows of `python -m benchmarks.peers`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from scale.data.dataset import Limits, make_dataset
from scale.data.docstrings import docstrings
from scale.data.formats import Row
from scale.data.packing import TokenizedRows
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
    """A Llama, and the batches that it reads."""

    model: ModelConfig
    batch: int
    rows: tuple[str, ...] = ("hh", "short")
    """The kinds of rows: hh, short or random."""
    whole: bool = False
    """Whether rows have their own lengths, up to the longest sequence of the model."""


# The Llama of Tunix has this base of RoPE only, whatever its configuration says.
SMOLLM2 = replace(MODELS["smollm2-135m"], rope_base=1e6)
MINIATURE = replace(
    SMOLLM2,
    vocab_size=1024,
    num_layers=2,
    d_model=64,
    num_heads=2,
    head_dim=32,
    num_kv_heads=1,
    d_ff=256,
)
LLAMA_1B = replace(  # Llama 3.2 1B
    SMOLLM2,
    vocab_size=128_256,
    num_layers=16,
    d_model=2048,
    num_heads=32,
    head_dim=64,
    num_kv_heads=8,
    d_ff=8192,
)
SHAPES = {
    "49m": Shape(replace(SMOLLM2, num_layers=6), 4),
    "135m": Shape(SMOLLM2, 2),
    "miniature": Shape(MINIATURE, 16, whole=True),
    "1b": Shape(LLAMA_1B, 8, rows=("random",)),
}


def save(
    folder: Path, shape: Shape, tokenizer: Tokenizer, tokens: TokenizedRows, dtype: str
) -> None:
    """Write the work that `benchmarks.peers.work.load` reads.

    The reference is the uniform distribution over the vocabulary. If the policy were its own
    reference, the first loss would be log 2 whatever the weights and the tokens, and equal losses
    would prove nothing.
    """
    ref_logps = -tokens.lengths[:, 1:] * math.log(shape.model.vocab_size)
    np.savez(
        folder / "work.npz",
        ids=tokens.ids,
        ends=tokens.ends,
        ref_logps=ref_logps.astype(np.float32),
        batch=shape.batch,
        dtype=dtype,
    )
    export(folder / "model", Transformer(shape.model, jax.random.key(0)), tokenizer)


def rows_of(
    kind: str, shape: Shape, hh: Path | None, limits: tuple[int, int], n: int
) -> tuple[Tokenizer, TokenizedRows]:
    """The first n rows of a kind, and the tokenizer of the model that reads them.

    Args:
        kind: hh, short or random.
        shape: The model.
        hh: Anthropic's HH rows.
        limits: Tokens of a prompt and of a response, at most.
        n: Rows.

    Raises:
        InputError: There are fewer rows within the limits.
    """
    if kind == "random":
        return train_tokenizer([], SMALLEST), random_rows(shape.model.vocab_size, limits, n)
    rows = read(hh) if kind == "hh" and hh else short_rows()
    tokenizer, row_limits = tokenizer_of(Path("smollm2")), Limits(*limits, "left")
    if shape.whole:
        texts = (row[field] for row in rows for field in ("prompt", "chosen"))
        half = shape.model.max_seq_len // 2
        tokenizer, row_limits = train_tokenizer(texts, shape.model.vocab_size), Limits(half, half)
    tokens = make_dataset(tokenizer, rows, ["chosen", "rejected"], row_limits).tokens
    if len(tokens.ends) < n:
        available = f"there are {len(tokens.ends)} {kind} rows"
        raise InputError(f"--pairs {n}: {available} within {row_limits.response} tokens")
    return tokenizer, tokens.take(np.arange(n))


def short_rows() -> list[Row]:
    """Docstrings of the installed code: the summary of each is chosen over that of another."""
    rows = docstrings()
    order = np.random.default_rng(0).permutation(len(rows))
    return [
        {
            "prompt": rows[i]["prompt"],
            "chosen": rows[i]["completion"],
            "rejected": rows[j]["completion"],
        }
        for i, j in zip(order, np.roll(order, 1), strict=True)
    ]


def random_rows(vocab_size: int, limits: tuple[int, int], n: int) -> TokenizedRows:
    """n rows of random tokens.

    The lengths of prompts and responses are uniform, from a quarter of the limits to the limits.
    """
    rng = np.random.default_rng(0)
    prompt, response = limits
    longest = np.array([prompt, response, response])
    ends = np.cumsum(rng.integers(-(-longest // 4), longest + 1, (n, 3))).reshape(n, 3)
    return TokenizedRows(rng.integers(SMALLEST, vocab_size, ends[-1, -1], np.int32), ends)
