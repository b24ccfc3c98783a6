"""Running trained models over rows of text: samples, log-probabilities, rewards."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from minipref.batch import Batch
from minipref.reward_models import RewardModel, ensemble_rewards
from scale.console import track
from scale.data.dataset import Encoded
from scale.data.layout import round_up
from scale.io.model_folder import Folder
from scale.model.response_logps import logps
from scale.model.sampling import Samples, sample
from scale.model.transformer import Transformer
from scale.parallel.processes import shard_batch, to_host
from scale.parallel.sharding import runtime_of

BATCH = 16  # small enough for a CPU cache: at 128 the miniature runs at half the speed


jitted_logps = eqx.filter_jit(logps)


jitted_rewards = eqx.filter_jit(ensemble_rewards)


def generate(
    policy: Folder, encoded: Encoded, *, n: int, max_new: int, seed: int, temperature: float, label: str
) -> list[list[tuple[str, bool]]]:
    """For each encoded prompt, n texts, each with whether it ended by itself within `max_new` tokens."""
    data, runtime = encoded.data, policy.model.runtime
    size = max(1, BATCH * 4 // n)  # a stride that no number of devices changes: samples depend on it
    padded = round_up(size, runtime.batch_shards)
    key, found = jax.random.key(seed), []
    for i in track(range(0, len(data.tokens), size), label):
        part = shard_batch(data, np.arange(i, i + padded) % len(data.tokens), runtime)
        lengths = (part.segments == 0).sum(1)
        samples = sample(policy.model, part.tokens, lengths, jax.random.fold_in(key, i), n=n, max_new=max_new,
                         eos=policy.codec.eos, pad=policy.codec.pad, temperature=temperature)
        found += texts(policy, samples)[:size]
    return found[: len(data.tokens)]


def texts(policy: Folder, samples: Samples) -> list[list[tuple[str, bool]]]:
    tokens, complete = to_host((samples.tokens, samples.complete))
    return [[(policy.codec.decode(ids), bool(done)) for ids, done in zip(*row, strict=True)]
            for row in zip(tokens, complete, strict=True)]


def sequence_logps(policy: Transformer, data: Batch) -> np.ndarray:
    """[N, n] log pi(y | x) in nats of the rows' responses."""
    return over_batches(jitted_logps, policy, data)


def rewards(models: RewardModel, data: Batch) -> np.ndarray:
    """[N, n, K] rewards of the rows' responses under K stacked reward models."""
    return over_batches(jitted_rewards, models, data)


def over_batches(function: Callable[[Any, Batch], Any], model: Any, data: Batch) -> np.ndarray:
    """`function` over all rows in batches of one shape (the last is filled up with the first rows)."""
    n, runtime = len(data.tokens), runtime_of(model)
    size = round_up(BATCH, runtime.batch_shards)
    parts = [to_host(function(model, shard_batch(data, np.arange(i, i + size) % n, runtime))) for i in range(0, n, size)]
    return np.concatenate(parts)[:n]
