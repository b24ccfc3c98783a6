"""The shape of a decoder, as options of the command line."""

from dataclasses import dataclass
from typing import Literal


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
