"""Trained models over rows: samples, log-probabilities, rewards."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from minipref.batch import Inputs
from minipref.reward_models import RewardModel, ensemble_rewards
from scale.console import Rate, track
from scale.data.dataset import Dataset, cached, take
from scale.data.layout import BatchShape, round_up
from scale.data.tokenizer import Tokenizer
from scale.model.adapters import partition
from scale.model.batch_shapes import COMPILE_SECONDS, choose_shapes
from scale.model.response_logps import response_logps
from scale.model.sampling import sample
from scale.model.transformer import Transformer
from scale.parallel.processes import shard_batch, to_host
from scale.parallel.sharding import runtime_of

ROWS = 16  # of a batch; they fit a CPU's cache: with 128 the miniature runs at half the speed

BLOCK = 64 * ROWS  # rows whose numbers are kept together

TRAINING = 3  # times the FLOPs of a forward pass

jitted_logps = eqx.filter_jit(lambda model, inputs: response_logps(model, inputs).logps)


@eqx.filter_jit
def jitted_rewards(models: RewardModel, inputs: Inputs) -> Any:
    trained, frozen = partition(models)
    return ensemble_rewards(trained, inputs, frozen)


class Sampled(NamedTuple):
    """One sample."""

    text: str
    complete: bool
    """Whether it ended by itself."""
    ids: list[int]
    """Its tokens, with the one that ended it."""


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Dataset,
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    temperature: float,
    label: str,
    cache: Path | None = None,
) -> list[list[Sampled]]:
    """Sample responses.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        n: Samples of each prompt.
        max_new_tokens: Tokens of a sample, at most.
        seed: The same seed gives the same samples, whatever the number of devices.
        temperature: 1 samples from the policy itself, 0 is greedy.
        label: What the progress bar shows.
        cache: A folder that keeps what is sampled, for a run that resumes this one.

    Returns:
        The n samples of each prompt.
    """
    inputs, runtime, key = prompts.all.inputs, model.runtime, jax.random.key(seed)
    total = len(inputs.tokens)
    size = min(max(1, ROWS * 4 // n), total)
    padded = round_up(size, runtime.batch_shards)

    def sampled_at(i: int) -> tuple[np.ndarray, np.ndarray]:
        part = shard_batch(take(inputs, np.arange(i, i + padded) % total), runtime)
        lengths = (part.segment_ids == 0).sum(1)
        samples = sample(
            model, part.tokens, lengths, jax.random.fold_in(key, i), n=n, max_new=max_new_tokens,
            stops=tokenizer.stops, pad=tokenizer.pad, temperature=temperature,
        )  # fmt: skip
        return to_host((samples.tokens, samples.complete))

    sampled: list[list[Sampled]] = []
    for i in track(range(0, total, size), label):
        folder = cache and cache / f"sampled-{i}"
        tokens, complete = cached(folder, ("tokens", "complete"), partial(sampled_at, i))
        sampled += [
            [as_sampled(tokenizer, ids, bool(done)) for ids, done in zip(*row, strict=True)]
            for row in zip(tokens[:size], complete[:size], strict=True)
        ]
    return sampled[:total]


def as_sampled(tokenizer: Tokenizer, ids: np.ndarray, complete: bool) -> Sampled:
    """A sample, whose tokens after the one that ended it are padding."""
    length = 1 + int(np.isin(ids, tokenizer.stops).argmax()) if complete else len(ids)
    own = ids[:length].tolist()
    return Sampled(tokenizer.decode(own[: length - complete]), complete, own)


def sequence_logps(model: Transformer, dataset: Dataset, cache: Path | None = None) -> np.ndarray:
    """log pi(y | x) of the responses [N, n], nats."""
    return over_batches(jitted_logps, model, dataset, "log-probabilities", cache)


def rewards(models: RewardModel, dataset: Dataset) -> np.ndarray:
    """The rewards of the responses by K stacked reward models [N, n, K]."""
    return over_batches(jitted_rewards, models, dataset, "rewards")


def over_batches(
    function: Callable[[Any, Inputs], Any],
    model: Any,
    dataset: Dataset,
    label: str = "",
    cache: Path | None = None,
) -> np.ndarray:
    """`function` over all rows, in packed batches of rows of similar length.

    Args:
        function: The model and a batch -> an array with a row for each of the batch's.
        model: Its first argument: a policy or stacked reward models.
        dataset: The rows.
        label: The name of the results: of their files, and of the progress bar of many rows.
        cache: A folder that keeps the results, for a run that resumes this one.

    Returns:
        The results of all rows, in their order.
    """
    runtime, rate = runtime_of(model), Rate()
    order = longest_first(dataset.tokens.lengths.sum(1))
    batches = in_batches(order, round_up(min(ROWS, len(order)), runtime.batch_shards))
    shapes = shapes_of(dataset, batches, model)

    def results(indices: Iterable[int]) -> list[np.ndarray]:
        outputs = []
        for i in indices:
            inputs = dataset.batch(batches[i], shapes[i]).inputs
            outputs.append(to_host(function(model, shard_batch(inputs, runtime))))
            rate.rows += len(batches[i])
        return [np.concatenate(outputs)]

    progress = track(range(len(batches)), label, status=rate)
    per_block = -(-BLOCK // batches.shape[1])
    blocks: list[np.ndarray] = []
    for start in range(0, len(batches), per_block):
        folder = cache and cache / f"{label}-by-length-{start}-{per_block}"
        block = islice(progress, per_block)
        blocks += cached(folder, ("values",), partial(results, block))
        deque(block, maxlen=0)  # where the block was there, its batches are done
    deque(progress, maxlen=0)
    return np.concatenate(blocks)[np.argsort(order)]


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Rows in the order of their lengths: the batch that needs most memory comes first."""
    return np.argsort(-lengths, kind="stable")


def in_batches(rows: np.ndarray, size: int) -> np.ndarray:
    """Batches of `size` rows [batches, size]; copies of the last row fill up the last batch."""
    return np.pad(rows, (0, -len(rows) % size), mode="edge").reshape(-1, size)


def shapes_of(dataset: Dataset, batches: np.ndarray, model: Any) -> list[BatchShape]:
    """The shape of each batch of rows [batches, size]."""
    if dataset.layout:
        return [dataset.layout.shape(batches.shape[1])] * len(batches)
    trunk = model.trunk if isinstance(model, RewardModel) else model
    seconds = TRAINING * COMPILE_SECONDS
    return choose_shapes(dataset.tokens.lengths[batches], trunk, seconds)
