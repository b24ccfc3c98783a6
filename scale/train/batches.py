"""The batches of a run: which rows each step reads, in which of a few shapes.

A shape costs one compilation and saves the padding of a larger one. The batches of a run are known
before its first step, so the shapes are chosen for them: as few as pay. Runs that differ by their
seed can share shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipref.batch import Batch
from scale.data.dataset import Dataset, batch_indices
from scale.data.layout import BatchShape
from scale.errors import InputError
from scale.model.flops import batch_flops
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime
from scale.parallel.processes import shard_batch
from scale.train.loop import TrainingConfig
from scale.train.throughput import Throughput, throughput_of

SIZE_STEP = 16  # the sizes of a shape are multiples of it
COMPILE_SECONDS = 5.0
CPU_FLOPS = 1e11  # FLOP/s of a model on a device whose peak is not known


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run."""

    dataset: Dataset
    rows: np.ndarray
    """The rows of the dataset in each step [steps, B]."""
    shapes: list[BatchShape]
    """The shape of each step."""
    runtime: Runtime
    parts: int = 1
    """How many parts of that shape a batch has."""

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the devices."""
        batch = self.dataset.batch(self.rows[step], self.shapes[step], self.parts)
        return shard_parts(batch, self.runtime, self.parts)

    def throughput(self, model: Transformer) -> Throughput:
        """A stopwatch for a run with these rows."""
        lengths = self.dataset.tokens.lengths
        return throughput_of(model, lengths.sum(1).mean(), lengths[:, 1:].sum(1).mean())

    @property
    def findings(self) -> dict[str, Any]:
        """How many shapes there are, and which share of their positions is not padding."""
        tokens = self.dataset.tokens.lengths.sum(1)[self.rows].sum()
        positions = self.parts * sum(s.num_sequences * s.length for s in self.shapes)
        return {
            "shapes of a step": len(set(self.shapes)),
            "positions that hold a token": round(float(tokens / positions), 3),
        }


def shard_parts(batch: Batch, runtime: Runtime, parts: int, axis: int = 0) -> Batch:
    """A batch on the devices, which share its rows along `axis`; or those of each of its parts."""
    inputs = shard_batch(batch.inputs, runtime, axis + int(parts > 1))
    return Batch(inputs, shard_batch(batch.targets, runtime, axis))


def plan_batches(
    dataset: Dataset, training: TrainingConfig, model: Transformer, seeds: Sequence[int] = ()
) -> BatchPlan:
    """The batches of a run.

    Args:
        dataset: The rows.
        training: Steps, batch size and seed.
        model: Gives the cost of a shape, and the devices.
        seeds: Other runs for which the shapes are chosen too.

    Returns:
        The plan.

    Raises:
        InputError: The batch does not divide among the devices.
    """
    runtime, parts = model.runtime, training.accumulation
    require_divisible(training, runtime)
    all_seeds = dict.fromkeys((training.seed, *seeds))
    orders = [row_order(len(dataset), training, seed) for seed in all_seeds]
    if dataset.layout:
        shapes = [dataset.layout.shape(training.batch_size // parts)] * training.steps
    else:
        lengths = dataset.tokens.lengths[np.concatenate(orders)]
        shapes = choose_shapes(lengths, model, parts=parts)[: training.steps]
    return BatchPlan(dataset, orders[0], shapes, runtime, parts)


def common_shape(
    dataset: Dataset, rows: np.ndarray, model: Transformer, training: TrainingConfig
) -> BatchShape:
    """One shape for all batches of these rows [batches, B], or for all of their parts.

    Raises:
        InputError: The batch does not divide among the devices.
    """
    parts = training.accumulation
    require_divisible(training, model.runtime)
    if dataset.layout:
        return dataset.layout.shape(rows.shape[1] // parts)
    shapes = choose_shapes(dataset.tokens.lengths[rows], model, parts=parts)
    return BatchShape(*map(max, zip(*shapes, strict=True)))


def require_divisible(training: TrainingConfig, runtime: Runtime) -> None:
    """Refuse a batch whose parts cannot be split over the devices."""
    size, parts, devices = training.batch_size, training.accumulation, runtime.batch_shards
    if size % parts:
        raise InputError(f"--training.accumulation {parts}: does not divide a batch of {size}")
    if size // parts % devices:
        raise InputError(
            f"--training.batch-size {training.batch_size}: does not divide among {devices} devices"
            + f" in {parts} parts" * (parts > 1)
        )


def row_order(n: int, training: TrainingConfig, seed: int) -> np.ndarray:
    """Which of n rows make up each batch [steps, B]."""
    rows = batch_indices(n, training.steps * training.batch_size, seed, 0)
    return rows.reshape(training.steps, training.batch_size)


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

    compile_flops = compile_seconds * (throughput_of(model, 1.0, 1.0).peak_flops or CPU_FLOPS)
    of_parts = lengths.reshape(steps * parts, batch // parts, -1)
    sizes = smallest_sizes(of_parts, num_sequences).reshape(steps, parts, 3).max(1)
    sizes = coarsen_sizes(merge_sizes(sizes, flops, compile_flops), flops, compile_flops)
    return [BatchShape(num_sequences, *map(int, row)) for row in sizes]


def smallest_sizes(lengths: np.ndarray, num_sequences: int) -> np.ndarray:
    """The length and labels of a sequence, and the longest row, of each batch [steps, 3]."""

    def longest(counts: np.ndarray) -> np.ndarray:
        return counts.reshape(len(counts), num_sequences, -1).sum(2).max(1)

    per_row, per_label = lengths.sum(2), lengths[:, :, 1:].sum(2)
    sizes = np.stack([longest(per_row), longest(per_label), per_row.max(1)], axis=1)
    return -(-sizes // SIZE_STEP) * SIZE_STEP


def merge_sizes(
    sizes: np.ndarray, cost: Callable[[np.ndarray], np.ndarray], compile_cost: float
) -> np.ndarray:
    """For each row of `sizes` one that is nowhere smaller, with few different rows.

    Neighbours in the order of cost merge while the cheapest merge costs less than a compilation.

    Args:
        sizes: [steps, 3].
        cost: Sizes [n, 3] -> FLOPs of one step [n].
        compile_cost: FLOPs of one compilation.

    Returns:
        [steps, 3].
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


def coarsen_sizes(
    sizes: np.ndarray, cost: Callable[[np.ndarray], np.ndarray], compile_cost: float
) -> np.ndarray:
    """The sizes, rounded up by at most a quarter where all of that costs less than a compilation.

    So short runs over similar rows, such as those of one method at several length biases, have
    equal shapes, and a process compiles once for them.

    Args:
        sizes: [steps, 3].
        cost: Sizes [n, 3] -> FLOPs of one step [n].
        compile_cost: FLOPs of one compilation.

    Returns:
        [steps, 3].
    """
    multiple = 2 ** np.maximum(np.log2(np.maximum(sizes, 1)).astype(int) - 2, 0)
    coarse = -(-sizes // multiple) * multiple
    return coarse if (cost(coarse) - cost(sizes)).sum() < compile_cost else sizes
