"""Trained models over rows: samples, log-probabilities, rewards."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from minipref.batch import Inputs
from minipref.reward_models import RewardModel, ensemble_rewards
from scale.console import track
from scale.data.dataset import Dataset, take
from scale.data.layout import round_up
from scale.data.tokenizer import Tokenizer
from scale.model.response_logps import response_logps
from scale.model.sampling import sample
from scale.model.transformer import Transformer
from scale.parallel.processes import shard_batch, to_host
from scale.parallel.sharding import runtime_of

ROWS = 16  # of a batch; they fit a CPU's cache: with 128 the miniature runs at half the speed

jitted_logps = eqx.filter_jit(lambda model, inputs: response_logps(model, inputs).logps)
jitted_rewards = eqx.filter_jit(ensemble_rewards)


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
) -> list[list[tuple[str, bool]]]:
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

    Returns:
        For each prompt n pairs: the text, and whether it ended by itself.
    """
    inputs, runtime, key = prompts.all.inputs, model.runtime, jax.random.key(seed)
    total, size = len(inputs.tokens), max(1, ROWS * 4 // n)
    padded = round_up(size, runtime.batch_shards)
    texts: list[list[tuple[str, bool]]] = []
    for i in track(range(0, total, size), label):
        part = shard_batch(take(inputs, np.arange(i, i + padded) % total), runtime)
        lengths = (part.segment_ids == 0).sum(1)
        samples = sample(
            model, part.tokens, lengths, jax.random.fold_in(key, i), n=n, max_new=max_new_tokens,
            stops=tokenizer.stops, pad=tokenizer.pad, temperature=temperature,
        )  # fmt: skip
        tokens, complete = to_host((samples.tokens, samples.complete))
        texts += [
            [(tokenizer.decode(ids), bool(done)) for ids, done in zip(*row, strict=True)]
            for row in zip(tokens[:size], complete[:size], strict=True)
        ]
    return texts[:total]


def sequence_logps(model: Transformer, inputs: Inputs) -> np.ndarray:
    """log pi(y | x) of the responses [N, n], nats."""
    return over_batches(jitted_logps, model, inputs)


def rewards(models: RewardModel, inputs: Inputs) -> np.ndarray:
    """The rewards of the responses by K stacked reward models [N, n, K]."""
    return over_batches(jitted_rewards, models, inputs)


def over_batches(function: Callable[[Any, Inputs], Any], model: Any, inputs: Inputs) -> np.ndarray:
    """`function` over all rows, in batches of one shape; the first rows fill up the last batch."""
    total, runtime = len(inputs.tokens), runtime_of(model)
    size = round_up(ROWS, runtime.batch_shards)
    outputs = [
        to_host(function(model, shard_batch(take(inputs, np.arange(i, i + size) % total), runtime)))
        for i in range(0, total, size)
    ]
    return np.concatenate(outputs)[:total]
