"""Running trained models over rows of text: samples, log-probabilities, rewards."""

import equinox as eqx
import jax
import numpy as np

from minipref.reward_models import RewardModel, ensemble_rewards
from minipref.sequences import Batch
from scale.batches import Encoded, map_batches, take
from scale.console import track
from scale.folders import Folder
from scale.model import Transformer, logps
from scale.sampling import Samples, sample
from scale.tokenizer import EOS, PAD

BATCH = 16  # small enough for a CPU cache: at 128 the miniature runs at half the speed

jitted_logps = eqx.filter_jit(logps)
jitted_rewards = eqx.filter_jit(ensemble_rewards)


def generate(
    policy: Folder, encoded: Encoded, *, n: int, max_new: int, seed: int, temperature: float, label: str
) -> list[list[tuple[str, bool]]]:
    """For each encoded prompt, n texts, each with whether it ended by itself within `max_new` tokens."""
    data, size = encoded.data, max(1, BATCH * 4 // n)
    key, found = jax.random.key(seed), []
    for i in track(range(0, len(data.tokens), size), label):
        part = take(data, np.arange(i, i + size) % len(data.tokens))
        lengths = (part.segments == 0).sum(1)
        samples = sample(policy.model, part.tokens, lengths, jax.random.fold_in(key, i), n=n, max_new=max_new,
                         eos=EOS, pad=PAD, temperature=temperature)
        found += texts(policy, samples)
    return found[: len(data.tokens)]


def texts(policy: Folder, samples: Samples) -> list[list[tuple[str, bool]]]:
    tokens, complete = np.asarray(samples.tokens), np.asarray(samples.complete)
    return [[(policy.codec.decode(ids), bool(done)) for ids, done in zip(*row, strict=True)]
            for row in zip(tokens, complete, strict=True)]


def sequence_logps(policy: Transformer, data: Batch) -> np.ndarray:
    """[N, n] log pi(y | x) in nats of the rows' responses."""
    return map_batches(lambda batch: jitted_logps(policy, batch), data, BATCH)


def rewards(models: RewardModel, data: Batch) -> np.ndarray:
    """[N, n, K] rewards of the rows' responses under K stacked reward models."""
    return map_batches(lambda batch: jitted_rewards(models, batch), data, BATCH)
