"""The arithmetic that a model needs: what its utilisation (MFU) is measured against."""

from typing import Any

from scale.model.config import ModelConfig
from scale.model.transformer import Transformer, parameter_count


def model_flops(
    config: ModelConfig,
    params: int,
    row_length: int | float,
    labels: int | float | None = None,
    adapters: int | None = None,
) -> float:
    """The FLOPs that training needs for one token, without recomputation.

    6 N + 12 L H Q T, where N counts the parameters that a token is multiplied by

    Attention counts in full, as in the source, although a causal model needs half of it. An untied
    embedding is looked up, not multiplied, and does not count. Weights below adapters need no
    gradient: 4 FLOPs instead of 6.

    Args:
        config: Gives L layers, H heads and Q, the head dimension.
        params: All parameters, embeddings included, adapters not.
        row_length: T, the tokens of a row.
        labels: How many positions of a row have logits (default: all); the V D of the unembedding
            count for these alone.
        adapters: The parameters of adapters over a frozen model; None where all weights are
            trained.

    Returns:
        FLOPs a token, forward and backward.

    Source: PaLM, arXiv 2204.02311, appendix B.
    """
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * row_length
    unembedding = config.vocab_size * config.d_model
    share = 1.0 if labels is None else labels / row_length
    multiplied = blocks_parameters(config, params) + share * unembedding
    return (6 if adapters is None else 4) * multiplied + 6 * (adapters or 0) + attention


def blocks_parameters(config: ModelConfig, params: int) -> int:
    """All parameters but those of the embedding and of an output layer that it is not tied to."""
    tables = 1 if config.tie_embeddings else 2
    return params - tables * config.vocab_size * config.d_model


def batch_flops(
    model: Transformer, num_sequences: int, rows: int, length: Any, labels: Any, row_length: Any
) -> Any:
    """`model_flops` of a whole batch, padding included.

    Args:
        model: The model.
        num_sequences: Packed sequences, of `length` tokens and `labels` labels each.
        rows: Examples, of `row_length` tokens each in attention.
        length: A number or an array.
        labels: A number or an array.
        row_length: A number or an array.

    Returns:
        FLOPs of the step.
    """
    config, head = model.config, model.config.vocab_size * model.config.d_model
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * row_length
    blocks = blocks_parameters(config, parameter_count(model))
    per_sequence = blocks * length + head * labels
    return 6 * num_sequences * per_sequence + attention * rows * row_length


def model_copies(model: Transformer) -> int:
    """K for the stacked trunks of K reward models, 1 for a single model."""
    return model.embedding.shape[0] if model.embedding.ndim == 3 else 1
