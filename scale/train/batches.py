"""Which rows make up each step's batch, in which of a few shapes.

A shape costs a compilation, and saves the padding of a larger one. All of a run's batches are known before its first
step, so the shapes are chosen for them: the fewest that pay. Runs that differ by seed can have theirs in common.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minipref.batch import Batch
from scale.data.dataset import Encoded, batch_indices
from scale.data.layout import Shape
from scale.errors import InputError
from scale.model.flops import batch_flops
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime
from scale.parallel.processes import on_devices
from scale.train.loop import Training
from scale.train.throughput import Speed, speed_of

GRAIN = 32  # sizes of a shape are its multiples


COMPILATION = 5.0  # seconds


CPU_FLOPS = 1e11  # FLOP/s that a model reaches where the peak is not known


@dataclass(frozen=True)
class Schedule:
    """The batches of a run."""

    data: Encoded
    rows: np.ndarray
    """[steps, B]"""
    shapes: list[Shape]
    """Of each step."""
    runtime: Runtime

    def batch(self, step: int) -> Batch:
        return on_devices(self.data.batch(self.rows[step], self.shapes[step]), self.runtime)

    def speed(self, model: Transformer) -> Speed:
        """What turns the run's tokens and seconds into its throughput and MFU."""
        lengths = self.data.tokens.lengths
        return speed_of(model, lengths.sum(1).mean(), lengths[:, 1:].sum(1).mean())

    @property
    def findings(self) -> dict[str, Any]:
        """How many shapes there are, and how much of what is computed with them is no padding."""
        tokens = self.data.tokens.lengths.sum(1)[self.rows].sum()
        slots = sum(shape.lines * shape.width for shape in self.shapes)
        return {"shapes of a step": len(set(self.shapes)), "slots that hold a token": round(float(tokens / slots), 3)}


def schedule(data: Encoded, training: Training, model: Transformer, seeds: Sequence[int] = ()) -> Schedule:
    """The batches of a run, in shapes chosen for its own and for those of the runs with these seeds.

    Errors: InputError where a batch does not divide among the devices that share it out.
    """
    runtime, runs = model.runtime, [order(len(data), training, seed) for seed in dict.fromkeys((training.seed, *seeds))]
    rows = runs[0]
    if data.layout:
        return Schedule(data, rows, [data.layout.shape(training.batch)] * training.steps, runtime)
    if training.batch % runtime.batch_shards:
        raise InputError(f"--training.batch {training.batch}: does not divide among {runtime.batch_shards} devices")
    shapes = shapes_for(data.tokens.lengths[np.concatenate(runs)], model)[: training.steps]
    return Schedule(data, rows, shapes, runtime)


def order(n: int, training: Training, seed: int) -> np.ndarray:
    """[steps, B]: which of n rows make up each batch."""
    return batch_indices(n, training.steps * training.batch, seed, 0).reshape(training.steps, training.batch)


def shapes_for(lengths: np.ndarray, model: Transformer, seconds: int | float = COMPILATION) -> list[Shape]:
    """One for each batch of rows with pieces of `lengths` [steps, B, 1 + n]; `seconds` is what a compilation takes."""
    lines, batch = model.runtime.batch_shards, lengths.shape[1]

    def cost(sizes: np.ndarray) -> np.ndarray:
        return batch_flops(model, lines, batch, *sizes.T)

    price = seconds * (speed_of(model, 1, 1).peak_flops or CPU_FLOPS)
    return [Shape(lines, *map(int, sizes)) for sizes in few(least_sizes(lengths, lines), cost, price)]


def least_sizes(lengths: np.ndarray, lines: int) -> np.ndarray:
    """[steps, 3]: of batches of rows with pieces of `lengths` [steps, B, 1 + n], the width and labels of a line and
    the slots of a row."""

    def longest(counts: np.ndarray, parts: int) -> np.ndarray:
        return counts.reshape(len(counts), parts, -1).sum(2).max(1)

    per_row, per_label = lengths.sum(2), lengths[:, :, 1:].sum(2)
    sizes = longest(per_row, lines), longest(per_label, lines), per_row.max(1)
    return -(-np.stack(sizes, 1) // GRAIN) * GRAIN


def few(sizes: np.ndarray, cost: Callable[[np.ndarray], np.ndarray], price: int | float) -> np.ndarray:
    """For each row of `sizes` one that is nowhere smaller. `cost` is of one use, `price` of each different row.

    Neighbours in the order of cost are joined while the cheapest pair to join costs less than `price`.
    """
    kinds, kind, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(cost(kinds), kind="stable")
    kinds, counts, members = kinds[order], counts[order], [[i] for i in order]
    while len(kinds) > 1:
        joint = np.maximum(kinds[1:], kinds[:-1])
        extra = counts[1:] * (cost(joint) - cost(kinds[1:])) + counts[:-1] * (cost(joint) - cost(kinds[:-1]))
        i = int(np.argmin(extra))
        if extra[i] >= price:
            break
        kinds[i + 1], counts[i + 1], members[i + 1] = joint[i], counts[i] + counts[i + 1], members[i] + members[i + 1]
        kinds, counts = np.delete(kinds, i, 0), np.delete(counts, i)
        del members[i]
    chosen = np.empty_like(kinds, shape=(len(order), sizes.shape[1]))
    for sizes_of_all, group in zip(kinds, members, strict=True):
        chosen[group] = sizes_of_all
    return chosen[kind.ravel()]
