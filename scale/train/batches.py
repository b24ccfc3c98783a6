"""The batches of a run: which rows each step reads, in which of a few shapes.

The batches of a run are known before its first step, so the shapes are chosen for them. Runs that
differ by their seed can share shapes. Rows are shared out among the steps of a window so that all
batches have about as many tokens, and so have the packed sequences of a batch: then few positions
are padding, and runs over similar rows have the same shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipref.batch import Batch
from scale.data.dataset import Dataset, batch_indices
from scale.data.layout import BatchShape
from scale.data.packing import shared_out
from scale.errors import InputError
from scale.model.batch_shapes import choose_shapes
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime
from scale.parallel.processes import shard_batch
from scale.train.loop import TrainingConfig
from scale.train.throughput import Throughput, throughput_of

WINDOW = 64  # steps among which rows are shared out, at most those of an epoch


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

    def names(self, step: int) -> list[int]:
        """The rows of a step, as the file counts them from 1."""
        return sorted((self.dataset.kept[self.rows[step]] + 1).tolist())

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
    tokens, sequences = dataset.tokens.lengths.sum(1), parts * runtime.batch_shards
    orders = [row_order(tokens, training, seed, sequences) for seed in all_seeds]
    if dataset.layout:
        shapes = [dataset.layout.shape(training.batch_size // parts)] * training.steps
    else:
        lengths = dataset.tokens.lengths[np.concatenate(orders)]
        shapes = choose_shapes(lengths, model, parts=parts)[: training.steps]
    return BatchPlan(dataset, orders[0], shapes, runtime, parts)


def common_shape(
    dataset: Dataset, rows: np.ndarray, model: Transformer, training: TrainingConfig
) -> BatchShape:
    """One shape for all batches of these rows [batches, B], or for all of their parts."""
    parts = training.accumulation
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


def row_order(
    tokens: np.ndarray, training: TrainingConfig, seed: int, num_sequences: int
) -> np.ndarray:
    """Which rows make up each batch.

    The steps of a window have rows that follow each other in an endless run of permutations. How
    the rows of a batch are ordered depends on its packed sequences, and which rows it has does not.

    Args:
        tokens: How many tokens each row has [N].
        training: Steps and batch size.
        seed: Of the permutations.
        num_sequences: Packed sequences of a batch, which divide it.

    Returns:
        Indices of rows [steps, B].
    """
    steps, size = training.steps, training.batch_size
    rows = batch_indices(len(tokens), steps * size, seed, 0).reshape(steps, size)
    window = max(1, min(WINDOW, len(tokens) // size))
    windows, rng = np.split(rows, range(window, steps, window)), np.random.default_rng(seed)
    batches = [rng.permutation(shared_out(w.ravel(), tokens, len(w))) for w in windows]
    in_order = [shared_out(batch, tokens, num_sequences) for batch in np.concatenate(batches)]
    return np.stack(in_order).reshape(steps, size)
