"""TODO scale.model.flops."""

from typing import Any

from scale.model.config import ModelConfig
from scale.model.transformer import Transformer, parameter_count


def model_flops(config: ModelConfig, params: int, row_length: int | float, labels: int | float | None = None) -> float:
    """FLOPs that training needs for a token of a row of `row_length`, without recomputation.

    PaLM, arXiv 2204.02311, appendix B: 6 N + 12 L H Q T; N all parameters (the embedding too), L layers, H heads, Q
    head size, T row length. Attention counts in full, as there, though a causal model needs half of it. Where only
    `labels` positions of a row meet the vocabulary, its 6 V D counts for those.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * row_length
    share = 0.0 if labels is None else 1 - labels / row_length
    return 6 * params + attention - 6 * config.vocab_size * config.d_model * share


def batch_flops(model: Transformer, lines: int, rows: int, width: Any, labels: Any, slots: Any) -> Any:
    """`model_flops` of all slots of a batch, padded ones too: `lines` of `width` slots and `labels` labels, and `rows`
    of `slots` in attention."""
    config, head = model.config, model.config.vocab_size * model.config.d_model
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * slots
    return 6 * lines * ((parameter_count(model) - head) * width + head * labels) + attention * rows * slots


def model_copies(model: Transformer) -> int:
    """Members of an ensemble of trunks; 1 of a model."""
    return model.embedding.shape[0] if model.embedding.ndim == 3 else 1
