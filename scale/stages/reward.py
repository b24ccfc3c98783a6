"""`reward`: train reward models on preference pairs."""

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
from minipref.training import init_state
from scale.data.dataset import Dataset, Limits
from scale.data.formats import SIDES
from scale.data.length_bias import largest, longer_side, longer_wins, subsample
from scale.data.rows import read, split
from scale.errors import InputError
from scale.io import model_folder
from scale.io.model_folder import ModelFolder
from scale.model.inference import rewards
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.parallel.processes import shard_batch
from scale.parallel.sharding import initialise, runtime_of
from scale.stages.stage import TOKENS, Stage
from scale.train.batches import common_shape, row_order
from scale.train.loop import TrainingConfig, train
from scale.train.metrics import LoggerName
from scale.train.optimizer import make_optimizer
from scale.train.steps import reward_step
from scale.train.throughput import throughput_of


@dataclass(frozen=True, kw_only=True)
class Reward(Stage):
    """Train reward models by maximum likelihood under Bradley-Terry (Eq. 2), side by side."""

    data: Path
    """Preference rows."""
    init: Path
    """The policy whose layers and tokenizer every reward model starts from: a folder of ours or of
    Hugging Face's, a .gguf file, or smollm2."""
    validation: Path | None = None
    """Held-out preference rows. Default: a tenth of the prompts of --data."""
    num_reward_models: int = 1
    """How many; they differ by seed: each has its own head and its own order of the rows."""
    length_biases: tuple[float, ...] = ()
    """Instead of --num-reward-models: one for each length bias b, trained on pairs of which a share
    b prefer the longer response. All have as many pairs, the most that --data allows."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(100, 16, 2e-3))
    """The training run of every reward model."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def run(self) -> dict[str, Any]:
        rows, held_out = self.parts()
        policy = model_folder.load_policy(self.init, make_runtime(self.runtime))
        dataset = policy.make_dataset(rows, SIDES, self.limits, str(self.data), self.out / TOKENS)
        subsets = self.subsets(policy, dataset.select(rows))
        source = str(self.validation or f"{self.data}, held out")
        validation = policy.make_dataset(held_out, SIDES, self.limits, source)
        models = self.fit(self.start(policy, len(subsets)), dataset, subsets)
        model_folder.save(self.out, models, policy.config, policy.tokenizer, len(subsets))
        findings = {"pairs of each reward model": len(subsets[0])}
        return findings | accuracy(models, policy, validation, held_out)

    def parts(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The rows to train on, and the rows to measure the accuracy on."""
        rows = read(self.data)
        if self.validation:
            return rows, read(self.validation)
        seed = -1 - self.training.seed  # not one of `corpus`, whose parts are ranges of a hash
        parts = split(rows, {"train": 0.9, "held out": 0.1}, seed)
        if not parts["held out"]:
            raise InputError(f"{self.data}: too few prompts to hold any out; name --validation")
        return parts["train"], parts["held out"]

    def subsets(self, policy: ModelFolder, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The indices of the rows that each reward model trains on."""
        if not self.length_biases:
            return [np.arange(len(rows))] * self.num_reward_models
        sides = longer_side(policy.tokenizer, rows)
        size = min(largest(sides, bias) for bias in self.length_biases)
        rng = np.random.default_rng(self.training.seed)
        return [subsample(sides, bias, size, rng) for bias in self.length_biases]

    def start(self, policy: ModelFolder, num_reward_models: int) -> RewardModel:
        """Stacked reward models: equal trunks, each with a head of its own."""
        keys = list(jax.random.split(jax.random.key(self.training.seed), num_reward_models))
        width = policy.config.d_model
        return initialise(
            lambda trunk: stack([RewardModel(trunk, width, key) for key in keys]), policy.model
        )

    def fit(self, models: RewardModel, dataset: Dataset, subsets: list[np.ndarray]) -> RewardModel:
        training, runtime, schedule = self.training, runtime_of(models), self.training.schedule
        optimizer = make_optimizer("adam", schedule, training.learning_rate)
        orders = np.stack(
            [
                rows[row_order(len(rows), training, training.seed + k)]
                for k, rows in enumerate(subsets)
            ]
        )
        trunk: Any = models.trunk
        shape = common_shape(dataset, orders.reshape(-1, training.batch_size), trunk)

        def batch_fn(step: int) -> Batch:
            batches = [dataset.batch(rows, shape) for rows in orders[:, step]]
            return shard_batch(jax.tree.map(lambda *a: np.stack(a), *batches), runtime, axis=1)

        start = eqx.filter_vmap(lambda model: init_state(model, optimizer, training.steps))
        return train(
            partial(reward_step, schedule),
            initialise(start, models, donate=(0,)),
            batch_fn,
            training.steps,
            self.out,
            f"reward models x {len(subsets)}",
            record=self.record,
            loggers=self.log,
            throughput=throughput_of(trunk, float(shape.row_length), 0.0),
        )


def accuracy(
    models: RewardModel, policy: ModelFolder, dataset: Dataset, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy of each reward model on held-out rows, and that of picking the longer response."""
    values = rewards(models, dataset.all.inputs)
    margins = values[:, 0] - values[:, 1]
    return {
        "held-out pairs": len(margins),
        "held-out accuracy": [round(float(a), 4) for a in (margins > 0).mean(0)],
        "accuracy of picking the longer": longer_wins(
            longer_side(policy.tokenizer, dataset.select(rows))
        ),
        "standard deviation of held-out margins": [round(float(s), 3) for s in margins.std(0)],
    }
