"""Trained models over rows: samples, log-probabilities, rewards."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils

from minipref.batch import Inputs
from minipref.reward_models import RewardModel, ensemble_rewards
from scale.console import Rate, track
from scale.data.dataset import Dataset
from scale.data.layout import BatchShape, round_up
from scale.data.packing import shared_out
from scale.data.tokenizer import Tokenizer
from scale.files import atomic
from scale.model.adapters import partition, trunk_of
from scale.model.batch_shapes import COMPILE_SECONDS, TRAINING, choose_prompt_shapes, choose_shapes
from scale.model.response_logps import response_logps
from scale.model.sampling import Samples, sample
from scale.model.transformer import Transformer
from scale.parallel.processes import shard_batch, to_host
from scale.parallel.sharding import runtime_of

ROWS = 16  # of a batch; they fit a CPU's cache: with 128 the miniature runs at half the speed

WINDOW = 4  # batches among which rows are shared out
BLOCK = 64 * ROWS  # rows whose numbers are kept together

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
    logp: float
    """The log-probability of `ids` under the policy, nats."""


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
    """Sample responses, in batches of prompts of similar length.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        n: Samples of each prompt.
        max_new_tokens: Tokens of a sample, at most.
        seed: The same seed gives the same samples for the same prompts, whatever the number of
            devices. A prompt's samples depend on its place in its batch, so on the other prompts.
        temperature: 1 samples from the policy itself, 0 is greedy.
        label: What the progress bar shows.
        cache: A folder that keeps what is sampled, for a run that resumes this one.

    Returns:
        The n samples of each prompt, in their order.
    """
    runtime, key = model.runtime, jax.random.key(seed)
    order = longest_first(prompts.tokens.lengths[:, 0])
    size = min(max(1, ROWS * 4 // n), len(order))
    batches = [in_batches(own, runtime.batch_shards).ravel() for own in in_batches(order, size)]
    lengths = prompts.tokens.lengths[np.stack(batches)]
    shapes = choose_prompt_shapes(lengths, model, max_new_tokens * n)

    def sampled_at(i: int) -> Sequence[np.ndarray]:
        inputs = shard_batch(prompts.batch(batches[i], shapes[i]).inputs, runtime)
        return to_host(sample(
            model, inputs, jax.random.fold_in(key, i), n=n, max_new=max_new_tokens,
            stops=tokenizer.stops, pad=tokenizer.pad, temperature=temperature,
        ))  # fmt: skip

    sampled: list[list[Sampled]] = []
    for i in track(range(len(batches)), label):
        folder = cache and cache / f"samples-{i}"
        columns = cached(folder, Samples._fields, partial(sampled_at, i))
        rows = islice(zip(*columns, strict=True), size)
        sampled += [[as_sampled(tokenizer, *one) for one in zip(*row, strict=True)] for row in rows]
    return [sampled[i] for i in np.argsort(order)]


def as_sampled(
    tokenizer: Tokenizer, ids: np.ndarray, logp: np.floating, complete: np.bool_
) -> Sampled:
    """A sample, whose tokens after the one that ended it are padding."""
    length = 1 + int(np.isin(ids, tokenizer.stops).argmax()) if complete else len(ids)
    own = ids[:length].tolist()
    text = tokenizer.decode(own[: length - int(complete)])
    return Sampled(text, bool(complete), own, float(logp))


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
    """`function` over all rows, in packed batches.

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
    batches = even_batches(dataset.tokens.lengths.sum(1), runtime.batch_shards)
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
        folder = cache and cache / f"{label}-{start}-{per_block}"
        block = islice(progress, per_block)
        blocks += cached(folder, ("values",), partial(results, block))
        deque(block, maxlen=0)  # where the block was there, its batches are done
    deque(progress, maxlen=0)
    return np.concatenate(blocks)[np.unique(batches, return_index=True)[1]]


def even_batches(tokens: np.ndarray, num_sequences: int) -> np.ndarray:
    """The rows in batches [batches, B], those that need most memory first.

    The batches of a window have rows of similar length, and their packed sequences about as many
    tokens each: so they share a shape, and few positions are padding.

    Args:
        tokens: How many tokens each row has [N].
        num_sequences: Packed sequences of a batch.
    """
    size = round_up(min(ROWS, len(tokens)), num_sequences)
    batches = in_batches(longest_first(tokens), size)
    windows = np.split(batches, range(WINDOW, len(batches), WINDOW))
    shared = [shared_out(w.ravel(), tokens, len(w) * num_sequences) for w in windows]
    return np.concatenate(shared).reshape(-1, size)


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Rows in the order of their lengths."""
    return np.argsort(-lengths, kind="stable")


def in_batches(rows: np.ndarray, size: int) -> np.ndarray:
    """Batches of `size` rows [batches, size]; copies of the last row fill up the last batch."""
    return np.pad(rows, (0, -len(rows) % size), mode="edge").reshape(-1, size)


def shapes_of(dataset: Dataset, batches: np.ndarray, model: Any) -> list[BatchShape]:
    """The shape of each batch of rows [batches, size]."""
    if dataset.layout:
        return [dataset.layout.shape(batches.shape[1])] * len(batches)
    seconds = TRAINING * COMPILE_SECONDS
    return choose_shapes(dataset.tokens.lengths[batches], trunk_of(model), seconds)


def cached(
    folder: Path | None, names: Sequence[str], make: Callable[[], Sequence[np.ndarray]]
) -> Sequence[np.ndarray]:
    """The arrays of `make`, kept as `NAME.npy` and mapped into memory; the last is written last.

    Without a folder nothing is kept.
    """
    if folder is None:
        return make()
    paths = [folder / f"{name}.npy" for name in names]
    if not paths[-1].exists():
        for path, array in zip(paths, make(), strict=True):
            with atomic(path) as temporary:
                np.save(temporary, array)
    multihost_utils.sync_global_devices(f"{folder} is written")
    return [np.load(path, mmap_mode="r") for path in paths]
