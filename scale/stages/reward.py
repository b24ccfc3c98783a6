"""`reward`: train reward models on preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from minipref.batch import Batch
from minipref.reward_models import RewardModel, stack
from scale.data.dataset import Dataset, Limits
from scale.data.formats import SIDES
from scale.data.layout import BatchShape
from scale.data.length_bias import largest, longer_side, picking_longer, subsample
from scale.data.rows import part_of_each
from scale.data.table import Table, scan
from scale.errors import InputError
from scale.health import as_findings, reward_signs
from scale.io import model_folder
from scale.io.model_folder import ModelFolder, load_trunk, save
from scale.model.adapters import AdapterConfig, adapted, combine, partition
from scale.model.inference import rewards
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.mesh import Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import constrain, initialise, runtime_of
from scale.stages.stage import MEMBERS, Stage
from scale.train.batches import common_shape, require_divisible, row_order, shard_parts
from scale.train.loop import TrainingConfig, train
from scale.train.metrics import LoggerName
from scale.train.steps import reward_step, start_reward_states
from scale.train.throughput import throughput_of

STATE_BYTES = 16  # of a parameter, its gradient and Adam's two moments, in float32
SIDE_BY_SIDE = 4 * 2**30  # bytes on a device up to which the states of several are in memory


@dataclass(frozen=True)
class RewardBatches:
    """The batches of several reward models.

    Attributes:
        dataset: The rows.
        orders: For each model the rows of its steps [steps, B].
        shape: Of all batches.
        runtime: Where they are placed.
        parts: How many parts of that shape a batch has.
    """

    dataset: Dataset
    orders: Sequence[np.ndarray]
    shape: BatchShape
    runtime: Runtime
    parts: int

    def names(self, members: Sequence[int], step: int) -> list[int]:
        """The rows of a step of any of these models, as the file counts them from 1."""
        rows = np.concatenate([self.orders[k][step] for k in members])
        return sorted({*(self.dataset.kept[rows] + 1).tolist()})

    def batch(self, members: Sequence[int], step: int) -> Batch:
        """The batch of a step of each of these models, stacked."""
        batches = [
            self.dataset.batch(self.orders[k][step], self.shape, self.parts) for k in members
        ]
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        return shard_parts(stacked, self.runtime, self.parts, axis=1)


@dataclass(frozen=True, kw_only=True)
class Reward(Stage):
    """Train reward models by maximum likelihood under Bradley-Terry (Eq. 2), side by side."""

    data: Path
    """Preference rows."""
    init: Path
    """The policy whose layers and tokenizer every reward model starts from: a folder of ours, a
    Hugging Face folder, an id of its hub, a .gguf file, or smollm2."""
    validation: Path | None = None
    """Held-out preference rows. Default: a tenth of the prompts of --data."""
    num_reward_models: int = 1
    """How many. Where there are several, each is trained on a bootstrap sample of the rows."""
    length_biases: tuple[float, ...] = ()
    """Instead of --num-reward-models: one for each length bias b, trained on pairs of which a share
    b prefer the longer response. All have as many pairs, the most that --data allows."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(100, 16, 2e-3))
    """The training run of every reward model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters, trained in place of the weights of --init, which all have in common."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def run(self) -> dict[str, Any]:
        rows, held_out = self.parts()
        runtime = make_runtime(self.runtime)
        policy = load_trunk(self.init, runtime, self.adapter, self.training.seed)
        of_rows = str(self.data) if self.validation else f"{self.data}, without those held out"
        dataset = policy.make_dataset(rows, SIDES, self.limits, of_rows)
        subsets = self.subsets(policy, rows.where(dataset.mask(len(rows))))
        source = str(self.validation or f"{self.data}, held out")
        validation = policy.make_dataset(held_out, SIDES, self.limits, source)
        run = replace(self, training=self.training.for_rows(len(subsets[0])))
        models = run.trained(policy, dataset, subsets)
        save(replace(policy, path=self.out, model=models))
        seen = run.training.steps * run.training.batch_size
        findings = {"pairs of each reward model": len(subsets[0]), "pairs seen by each": seen}
        held_out = held_out.where(validation.mask(len(held_out)))
        return findings | accuracy(models, policy, validation, held_out)

    def parts(self) -> tuple[Table, Table]:
        """The rows to train on, and the rows to measure the accuracy on."""
        rows = scan(self.data)
        if self.validation:
            return rows, scan(self.validation)
        seed = -1 - self.training.seed  # not one of `corpus`, whose parts are ranges of a hash
        is_held_out = held_out(rows, seed)
        if not is_held_out.any() or is_held_out.all():
            raise InputError(f"{self.data}: too few prompts to hold any out; name --validation")
        return rows.where(~is_held_out), rows.where(is_held_out)

    def subsets(self, policy: ModelFolder, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The indices of the rows that each reward model trains on."""
        rng, n = np.random.default_rng(self.training.seed), len(rows)
        if self.length_biases:
            sides = longer_side(policy.tokenizer, rows)
            size = min(largest(sides, bias) for bias in self.length_biases)
            return [subsample(sides, bias, size, rng) for bias in self.length_biases]
        if self.num_reward_models == 1:
            return [np.arange(n)]
        return [rng.integers(n, size=n) for _ in range(self.num_reward_models)]

    def trained(
        self, policy: ModelFolder, dataset: Dataset, subsets: list[np.ndarray]
    ) -> RewardModel:
        """The stacked reward models.

        They are trained side by side where the training states of all are small, as with adapters,
        and otherwise one after another, so that the most memory is that of one.
        """
        data, members = self.batches(policy.model, dataset, subsets), range(len(subsets))
        bytes_of_one = STATE_BYTES * parameter_count(policy.model) / data.runtime.devices
        if side_by_side(len(members), bytes_of_one, self.adapter):
            return self.fit(policy, data, members, self.out)
        folders = [self.member(policy, data, k) for k in members]
        return loaded(folders, data.runtime)

    def batches(
        self, trunk: Transformer, dataset: Dataset, subsets: list[np.ndarray]
    ) -> RewardBatches:
        """The batches of all reward models, each in an order of its own."""
        training = self.training
        tokens, runtime = dataset.tokens.lengths.sum(1), trunk.runtime
        require_divisible(training, runtime)
        sequences = training.accumulation * runtime.batch_shards
        orders = [
            rows[row_order(tokens[rows], training, training.seed + k, sequences)]
            for k, rows in enumerate(subsets)
        ]
        shape = common_shape(dataset, np.concatenate(orders), trunk, training)
        return RewardBatches(dataset, orders, shape, runtime, training.accumulation)

    def member(self, policy: ModelFolder, data: RewardBatches, k: int) -> Path:
        """The folder of the k-th reward model, which is trained alone unless it is there."""
        folder = self.out / MEMBERS / str(k)
        if not model_folder.is_ours(folder):
            model = self.fit(policy, data, [k], folder)
            save(replace(policy, path=folder, model=model))
        return folder

    def fit(
        self, policy: ModelFolder, data: RewardBatches, members: Sequence[int], folder: Path
    ) -> RewardModel:
        """Train reward models side by side: equal trunks, each with a head of its own."""
        training, schedule = self.training, self.training.schedule
        key = jax.random.key(training.seed)

        def fresh(trunk: Transformer, key: PRNGKeyArray) -> RewardModel:
            return stack([partition(self.reward_model(trunk, key, k))[0] for k in members])

        models = initialise(fresh, policy.model, key)
        frozen = partition(self.reward_model(policy.model, key, 0))[1]
        trained = train(
            partial(reward_step, schedule, frozen=frozen),
            start_reward_states(models, schedule, training.learning_rate),
            partial(data.batch, members),
            training.steps,
            folder,
            f"reward models {', '.join(str(k + 1) for k in members)}",
            record=self.record,
            loggers=self.log,
            throughput=throughput_of(policy.model, float(data.shape.row_length), 0.0),
            rows_fn=partial(data.names, members),
        )
        return combine(trained, frozen)

    def reward_model(self, trunk: Transformer, key: PRNGKeyArray, k: int) -> RewardModel:
        """The k-th reward model before its first step: a head and, if any, adapters of its own."""
        key = jax.random.split(key, k + 1)[k]
        trunk = adapted(trunk, self.adapter, key)
        return RewardModel(trunk, trunk.config.d_model, key)


def side_by_side(several: int, bytes_of_one: float, adapter: AdapterConfig) -> bool:
    """Whether so many reward models are trained at once.

    Args:
        several: The reward models.
        bytes_of_one: The training state of one without adapters, on a device.
        adapter: Their adapters, whose states are small.
    """
    return adapter.rank > 0 or several * bytes_of_one <= SIDE_BY_SIDE


def held_out(rows: Table, seed: int) -> np.ndarray:
    """Which rows belong to a tenth of the prompts [N]."""
    shares = {"train": 0.9, "held out": 0.1}
    return part_of_each(rows, shares, seed) == 1


def loaded(folders: Sequence[Path], runtime: Runtime) -> RewardModel:
    """The reward models of several folders, stacked; one of them is in memory besides."""

    def room(one: RewardModel) -> RewardModel:
        return jax.tree.map(lambda a: jnp.zeros((len(folders), *a.shape[1:]), a.dtype), one)

    def read(folder: Path) -> RewardModel:
        return model_folder.load_rewards(folder, runtime, "float32").model

    models = initialise(room, read(folders[0]))
    for k, folder in enumerate(folders):
        models = written(models, read(folder), k)
    return models


@partial(jax.jit, donate_argnums=0)
def written(models: RewardModel, one: RewardModel, k: Int[Array, ""]) -> RewardModel:
    """Stacked reward models, whose memory is used again, with another one in the k-th place."""
    put = partial(jax.lax.dynamic_update_index_in_dim, index=k, axis=0)
    new = jax.tree.map(lambda a, b: put(a, b[0]), models, one)
    return constrain(new, runtime_of(models))


def accuracy(
    models: RewardModel, policy: ModelFolder, dataset: Dataset, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Accuracy of each reward model on held-out rows, and that of picking the longer response.

    Args:
        models: The reward models.
        policy: Their tokenizer.
        dataset: The rows, tokenized.
        rows: Their texts.
    """
    values = rewards(models, dataset)
    margins = values[:, 0] - values[:, 1]
    accuracies = (margins > 0).mean(0).tolist()
    longer = picking_longer(longer_side(policy.tokenizer, rows))
    signs = reward_signs(accuracies, longer, len(margins))
    return {
        "held-out pairs": len(margins),
        "held-out accuracy": [round(accuracy, 4) for accuracy in accuracies],
        "accuracy of picking the longer": round(longer, 4),
        "standard deviation of held-out margins": [round(float(s), 3) for s in margins.std(0)],
    } | as_findings(signs.values())
