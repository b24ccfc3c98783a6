"""The few shapes in which batches of packed rows are compiled.

A shape costs one compilation and saves the padding of a larger one: there are as many as pay.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np

from scale.data.layout import BatchShape
from scale.model.flops import batch_flops
from scale.model.transformer import Transformer
from scale.parallel.chips import peak_flops
from scale.parallel.mesh import Runtime

SIZE_STEP = 16  # the sizes of a shape are multiples of it
# or of parts of the power of two below, where this costs less than a share of a compilation
COARSE = ((4, 0.1), (8, 1.0))
COMPILE_SECONDS = 5.0
TRAINING = 3  # times the FLOPs of a forward pass
Cost: TypeAlias = Callable[[np.ndarray], np.ndarray]
CPU_FLOPS = 1e11  # FLOP/s of a model on a device whose peak is not known


def choose_shapes(
    lengths: np.ndarray,
    model: Transformer,
    compile_seconds: float = COMPILE_SECONDS,
    parts: int = 1,
) -> list[BatchShape]:
    """A shape for each batch of rows, or for its parts.

    Args:
        lengths: The tokens of prompt and responses of each row [steps, B, 1 + n].
        model: Gives the cost of a shape, and the devices.
        compile_seconds: What a shape costs.
        parts: Parts of a batch.
    """
    num_sequences, (steps, batch) = model.runtime.batch_shards, lengths.shape[:2]

    def flops(sizes: np.ndarray) -> np.ndarray:
        return parts * batch_flops(model, num_sequences, batch // parts, *sizes.T)

    of_parts = lengths.reshape(steps * parts, batch // parts, -1)
    sizes = smallest_sizes(of_parts, num_sequences).reshape(steps, parts, 3).max(1)
    return few_shapes(sizes, flops, model.runtime, compile_seconds)


def choose_prompt_shapes(
    lengths: np.ndarray, model: Transformer, new_tokens: int
) -> list[BatchShape]:
    """A shape for each batch of prompts that are sampled from.

    Args:
        lengths: The tokens of each prompt [batches, B, 1].
        model: Gives the cost of a shape, and the devices.
        new_tokens: All that are sampled for a prompt, at most; each attends to a whole row.
    """
    num_sequences, rows, config = model.runtime.batch_shards, lengths.shape[1], model.config

    def flops(sizes: np.ndarray) -> np.ndarray:
        prompts = batch_flops(model, num_sequences, rows, *sizes.T) / TRAINING
        attention = 4 * config.num_layers * config.num_heads * config.head_dim
        return prompts + attention * rows * new_tokens * sizes[:, 2]

    sizes = smallest_sizes(lengths, num_sequences)
    return few_shapes(sizes, flops, model.runtime, COMPILE_SECONDS)


def few_shapes(
    sizes: np.ndarray, cost: Cost, runtime: Runtime, compile_seconds: float
) -> list[BatchShape]:
    """A shape for each batch: no smaller than its sizes [steps, 3], and few different ones."""
    few = few_sizes(sizes, cost, compile_seconds * run_flops(runtime))
    return [BatchShape(runtime.batch_shards, *map(int, row)) for row in few]


def run_flops(runtime: Runtime) -> float:
    """FLOP/s of all devices of a run, about."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return peak * runtime.devices if peak else CPU_FLOPS


def smallest_sizes(lengths: np.ndarray, num_sequences: int) -> np.ndarray:
    """The length and labels of a sequence, and the longest row, of each batch [steps, 3]."""

    def longest(counts: np.ndarray) -> np.ndarray:
        return counts.reshape(len(counts), num_sequences, -1).sum(2).max(1)

    per_row, per_label = lengths.sum(2), lengths[:, :, 1:].sum(2)
    sizes = np.stack([longest(per_row), longest(per_label), per_row.max(1)], axis=1)
    return -(-sizes // SIZE_STEP) * SIZE_STEP


def few_sizes(sizes: np.ndarray, cost: Cost, compile_cost: float) -> np.ndarray:
    """For each row of `sizes` one that is nowhere smaller, with as few different rows as pay.

    Args:
        sizes: [steps, n].
        cost: Sizes [steps, n] -> FLOPs of one step each [steps].
        compile_cost: FLOPs of one compilation.

    Returns:
        [steps, n].
    """
    return coarsen_sizes(merge_sizes(sizes, cost, compile_cost), cost, compile_cost)


def merge_sizes(sizes: np.ndarray, cost: Cost, compile_cost: float) -> np.ndarray:
    """For each row of `sizes` one that is nowhere smaller, with few different rows.

    Neighbours in the order of cost merge while the cheapest merge costs less than a compilation.
    """
    distinct, inverse, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(cost(distinct), kind="stable")
    merged, counts, groups = distinct[order], counts[order], [[i] for i in order]
    while len(merged) > 1:
        joint = np.maximum(merged[1:], merged[:-1])
        extra = counts[1:] * (cost(joint) - cost(merged[1:]))
        extra += counts[:-1] * (cost(joint) - cost(merged[:-1]))
        i = int(np.argmin(extra))
        if extra[i] >= compile_cost:
            break
        merged[i + 1], counts[i + 1] = joint[i], counts[i] + counts[i + 1]
        groups[i : i + 2] = [groups[i] + groups[i + 1]]
        merged, counts = np.delete(merged, i, 0), np.delete(counts, i)
    for size, group in zip(merged, groups, strict=True):
        distinct[group] = size
    return distinct[inverse.ravel()]


def coarsen_sizes(sizes: np.ndarray, cost: Cost, compile_cost: float) -> np.ndarray:
    """The sizes, rounded up by `COARSE`: the coarsest multiples that are cheap for the whole run.

    So short runs over similar rows, such as those of one method at several length biases, have
    equal shapes, and a process compiles once for them.
    """
    powers = 2 ** np.log2(np.maximum(sizes, 1)).astype(int)
    for parts, share in COARSE:
        multiple = np.maximum(powers // parts, 1)
        coarse = -(-sizes // multiple) * multiple
        if (cost(coarse) - cost(sizes)).sum() < share * compile_cost:
            return coarse
    return sizes
