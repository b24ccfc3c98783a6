from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from minipref.reward_models import RewardModel, stack
from minipref.training import init_state, reward_loss, train_step
from scale import folders
from scale.batches import Encoded, Limits, batch_indices, encode, take
from scale.inference import rewards
from scale.rows import DataError, read, split
from scale.stages.base import Stage
from scale.stages.bias import largest, longer_side, longer_wins, subsample
from scale.train import OPTIMIZER, Training, hyper, train


@dataclass(frozen=True, kw_only=True)
class Reward(Stage):
    """Reward models by maximum likelihood under Bradley-Terry (Eq. 2): one, or an ensemble trained side by side."""

    data: Path
    """Preference rows."""
    init: Path
    """Folder of the policy whose trunk and tokenizer every member starts from."""
    validation: Path | None = None
    """Held-out preference rows. Default: a tenth of the prompts of --data."""
    members: int = 1
    """Reward models, differing by seed: each has its own head and its own order of the rows."""
    biases: tuple[float, ...] = ()
    """Instead of --members: one for each length bias b, trained on the largest equal-sized D_b that --data allows."""
    training: Training = field(default_factory=lambda: Training(100, 16, 2e-3))
    """The training run of every member."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""

    def inputs(self) -> list[Path]:
        return [path for path in (self.data, self.init, self.validation) if path]

    def run(self) -> dict[str, Any]:
        policy = folders.load_policy(self.init)
        rows, held_out = self.parts()
        encoded = encode(policy.codec, rows, ["chosen", "rejected"], self.limits, str(self.data))
        subsets = self.subsets(policy, encoded.rows(rows))
        models = self.start(policy, len(subsets))
        models = fit(models, encoded, subsets, self.training, self.out)
        folders.save(self.out, models, policy.config, policy.codec, len(subsets))
        return {"pairs of each member": len(subsets[0])} | accuracy(models, policy, held_out, self.limits)

    def parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = read(self.data)
        if self.validation:
            return rows, read(self.validation)
        seed = -1 - self.training.seed  # none that `corpus` may have: its parts are ranges of a hash with its seed
        parts = split(rows, {"train": 0.9, "held out": 0.1}, seed)
        if not parts["held out"]:
            raise DataError(f"{self.data}: too few prompts to hold any out; name --validation")
        return parts["train"], parts["held out"]

    def subsets(self, policy: folders.Folder, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The rows that each member trains on."""
        if not self.biases:
            return [np.arange(len(rows))] * self.members
        sides = longer_side(policy.codec, rows)
        size = min(largest(sides, b) for b in self.biases)
        rng = np.random.default_rng(self.training.seed)
        return [subsample(sides, b, size, rng) for b in self.biases]

    def start(self, policy: folders.Folder, members: int) -> RewardModel:
        keys = jax.random.split(jax.random.key(self.training.seed), members)
        return stack([RewardModel(policy.model, policy.config.d_model, key) for key in keys])


@eqx.filter_jit
def reward_step(states, batches):
    """One step of each of the K members, each on its own batch."""
    step = partial(train_step, RewardModel.__call__, reward_loss, OPTIMIZER)
    return eqx.filter_vmap(step)(states, batches)


def fit(models: RewardModel, data: Encoded, subsets: list[np.ndarray], training: Training, out: Path) -> RewardModel:
    start = eqx.filter_vmap(lambda model: init_state(model, OPTIMIZER, hyper(training)))

    def batch_at(i):
        windows = [batch_indices(len(s), training.batch, training.seed + k, i) for k, s in enumerate(subsets)]
        parts = [take(data.data, s[w]) for s, w in zip(subsets, windows, strict=True)]
        return jax.tree.map(lambda *a: np.stack(a), *parts)

    return train(reward_step, start(models), batch_at, training.steps, out, f"reward models x {len(subsets)}")


def accuracy(
    models: RewardModel, policy: folders.Folder, rows: list[dict[str, Any]], limits: Limits
) -> dict[str, Any]:
    """Held-out accuracy of each member, and of picking the longer response on the pairs that have one."""
    encoded = encode(policy.codec, rows, ["chosen", "rejected"], limits)
    values = rewards(models, encoded.data)
    margins = values[:, 0] - values[:, 1]
    longer = longer_wins(longer_side(policy.codec, encoded.rows(rows)))
    return {
        "held-out pairs": len(margins),
        "held-out accuracy": [round(float(a), 4) for a in (margins > 0).mean(0)],
        "accuracy of picking the longer": longer,
        "standard deviation of held-out margins": [round(float(s), 3) for s in margins.std(0)],
    }
