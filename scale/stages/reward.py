from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from minipref.batch import Batch
from minipref.reward_models import RewardModel, stack
from minipref.training import Metrics, TrainState, init_state, reward_loss, train_step
from scale.data.dataset import Encoded, Limits, batch_indices
from scale.data.length_bias import largest, longer_side, longer_wins, subsample
from scale.data.rows import read, split
from scale.errors import InputError
from scale.io import model_folder as folders
from scale.model.inference import rewards
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.parallel.processes import on_devices
from scale.parallel.sharding import constrain, initialise, runtime_of
from scale.stages.stage import TOKENS, Stage
from scale.train.loop import Training, hyper, train
from scale.train.metrics import LoggerName
from scale.train.optimizer import ADAM
from scale.train.throughput import speed_of

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Reward(Stage):
    """Reward models by maximum likelihood under Bradley-Terry (Eq. 2): one, or an ensemble trained side by side."""

    data: Path
    """Preference rows."""
    init: Path
    """Folder of the policy whose trunk and tokenizer every member starts from."""
    validation: Path | None = None
    """Held-out preference rows. Default: a tenth of the prompts of --data."""
    num_reward_models: int = 1
    """Reward models, differing by seed: each has its own head and its own order of the rows."""
    length_biases: tuple[float, ...] = ()
    """Instead of --num-reward-models: one for each length bias b, trained on the largest equal-sized D_b that --data allows."""
    training: Training = field(default_factory=lambda: Training(100, 16, 2e-3))
    """The training run of every member."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def inputs(self) -> list[Path]:
        return [path for path in (self.data, self.init, self.validation) if path]

    def run(self) -> dict[str, Any]:
        policy = folders.load_policy(self.init, make_runtime(self.runtime))
        rows, held_out = self.parts()
        encoded = policy.encode(rows, SIDES, self.limits, str(self.data), self.out / TOKENS)
        subsets = self.subsets(policy, encoded.rows(rows))
        models = self.start(policy, len(subsets))
        models = self.fit(models, encoded, subsets)
        folders.save(self.out, models, policy.config, policy.codec, len(subsets))
        return {"pairs of each member": len(subsets[0])} | accuracy(models, policy, held_out, self.limits)

    def parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = read(self.data)
        if self.validation:
            return rows, read(self.validation)
        seed = -1 - self.training.seed  # none that `corpus` may have: its parts are ranges of a hash with its seed
        parts = split(rows, {"train": 0.9, "held out": 0.1}, seed)
        if not parts["held out"]:
            raise InputError(f"{self.data}: too few prompts to hold any out; name --validation")
        return parts["train"], parts["held out"]

    def subsets(self, policy: folders.Folder, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The rows that each member trains on."""
        if not self.length_biases:
            return [np.arange(len(rows))] * self.num_reward_models
        sides = longer_side(policy.codec, rows)
        size = min(largest(sides, b) for b in self.length_biases)
        rng = np.random.default_rng(self.training.seed)
        return [subsample(sides, b, size, rng) for b in self.length_biases]

    def start(self, policy: folders.Folder, num_reward_models: int) -> RewardModel:
        keys = list(jax.random.split(jax.random.key(self.training.seed), num_reward_models))
        trunk = policy.model
        return initialise(lambda m: stack([RewardModel(m, policy.config.d_model, key) for key in keys]), trunk)

    def fit(self, models: RewardModel, data: Encoded, subsets: list[np.ndarray]) -> RewardModel:
        training, runtime, shape = self.training, runtime_of(models), data.shape(self.training.batch)
        trunk: Any = models.trunk
        start = eqx.filter_vmap(lambda model: init_state(model, ADAM, hyper(training)))

        def batch_at(step: int) -> Batch:
            windows = [s[batch_indices(len(s), training.batch, training.seed + k, step)] for k, s in enumerate(subsets)]
            return on_devices(jax.tree.map(lambda *a: np.stack(a), *(data.batch(w, shape) for w in windows)), runtime, 1)

        label = f"reward models x {len(subsets)}"
        return train(reward_step, initialise(start, models, donate=(0,)), batch_at, training.steps, self.out, label,
                     record=self.record, loggers=self.log, speed=speed_of(trunk, shape.slots, 0))


@partial(jax.jit, donate_argnums=0)
def reward_step(states: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
    """One step of each of the K members, each on its own batch."""
    step = partial(train_step, RewardModel.__call__, reward_loss, ADAM)
    return constrain(eqx.filter_vmap(step)(states, batches), runtime_of(states.model))


def accuracy(
    models: RewardModel, policy: folders.Folder, rows: list[dict[str, Any]], limits: Limits
) -> dict[str, Any]:
    """Held-out accuracy of each member, and of picking the longer response on the pairs that have one."""
    encoded = policy.encode(rows, SIDES, limits)
    values = rewards(models, encoded.data)
    margins = values[:, 0] - values[:, 1]
    longer = longer_wins(longer_side(policy.codec, encoded.rows(rows)))
    return {
        "held-out pairs": len(margins),
        "held-out accuracy": [round(float(a), 4) for a in (margins > 0).mean(0)],
        "accuracy of picking the longer": longer,
        "standard deviation of held-out margins": [round(float(s), 3) for s in margins.std(0)],
    }
