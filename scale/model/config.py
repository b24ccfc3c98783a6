"""The shape of a decoder, as options of the command line."""

import math
from dataclasses import dataclass, fields
from typing import Literal

LARGEST = 2**24  # of the sizes that a file may give


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder."""

    vocab_size: int = 1024
    """Rows of the embedding: the size of the tokenizer's vocabulary."""
    num_layers: int = 2
    """Transformer blocks."""
    d_model: int = 64
    """Width of the residual stream."""
    num_heads: int = 2
    """Query heads."""
    head_dim: int = 32
    """Width of a head, an even number."""
    d_ff: int = 256
    """Width of the SwiGLU's hidden layer."""
    rope_base: float = 10_000.0
    """Base of RoPE's frequencies."""
    num_kv_heads: int = 1
    """Key/value heads; they divide the query heads."""
    block: Literal["parallel", "sequential"] = "parallel"
    """Attention and MLP side by side (PaLM), or one after the other (Llama)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm without bias, or RMSNorm."""
    norm_eps: float = 1e-6
    """Added to the variance."""
    tie_embeddings: bool = True
    """Whether the embedding is also the output layer."""
    scaled_logits: bool = True
    """Whether logits are divided by sqrt(d_model) (PaLM)."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalised (Qwen3)."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3.1's scaling of RoPE: factor, low and high frequency factor, original length."""
    max_seq_len: int = 2048
    """Longest sequence of the model, in tokens."""


def checked(config: ModelConfig) -> ModelConfig:
    """A shape that a file describes.

    Raises:
        ValueError: A value is of another type, not positive, or larger than any model's.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if kind is int and not (type(value) is int and 0 < value < LARGEST):
            raise ValueError(f"{field.name} must be a positive number, not {value!r}")
        if kind is float and not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{field.name} must be a positive number, not {value!r}")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{field.name} must be true or false, not {value!r}")
    if config.block not in ("parallel", "sequential") or config.norm not in ("layer", "rms"):
        raise ValueError(f"block {config.block!r} with norm {config.norm!r} is not known")
    scaling = config.rope_scaling
    if scaling is not None and not (
        len(scaling) == 4 and all(type(x) in (int, float) and 0 < x < math.inf for x in scaling)
    ):
        raise ValueError(f"rope_scaling must be four positive numbers, not {scaling!r}")
    return config
