"""`align`: train a policy on scored preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from minipref.losses import preference_loss
from minipref.methods import METHODS, Method
from minipref.training import Hyperparameters
from scale.data.dataset import REF_LOGPS, Dataset, Limits, limits_text, read_targets
from scale.data.formats import SIDES
from scale.data.rows import require
from scale.data.table import Table, scan
from scale.errors import InputError
from scale.health import as_findings, policy_signs
from scale.io.model_folder import ModelFolder, load_trunk, save
from scale.model.adapters import AdapterConfig, combine, partition
from scale.model.inference import sequence_logps
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.stage import Stage
from scale.train.batches import plan_batches
from scale.train.loop import EvalFn, TrainingConfig, train
from scale.train.metrics import LoggerName, logged
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import policy_step, start_state

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
MONITORED = (*SIDES, "ref_sample")
MONITORED_ROWS = 128
HELD_OUT = ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "kl")


@dataclass(frozen=True, kw_only=True)
class Alignment(Stage):
    """The inputs of one run and of a sweep of runs, and how they train."""

    data: Path
    """Preference rows with the columns of `score`."""
    policy: Path
    """The policy to start from, the pi_ref that the columns were computed with: a folder of ours, a
    Hugging Face folder, an id of its hub, a .gguf file, or smollm2."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(120, 16, 3e-3))
    """The training run."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and z-loss."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters, trained in place of the policy's weights."""
    limits: Limits = field(default_factory=Limits)
    """Length limits: they must equal those of `score`."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""


@dataclass(frozen=True, kw_only=True)
class Align(Alignment):
    """Train a policy on scored preference pairs by a method of `minipref.methods`."""

    method: MethodName = "e-dpo"
    """The objective; README.md has the table."""
    beta: float | None = None
    """Weight of the KL in Eq. 1: the larger, the nearer the policy stays to pi_ref (for ipo its
    tau: the target margin is 1/tau). Default: the method's own."""
    gamma: tuple[float, float] | None = None
    """KL weight at the first and the last step. Default: the method's own."""
    validation: Path | None = None
    """Scored rows that are not trained on: their log-probs and KL over training go to the log."""
    every: int = 50
    """Steps between two checkpoints, and between two looks at --validation."""
    snapshots: int = 0
    """Also keep the policy at this many steps before the last, in `step-N/`: at steps 1, 4, 9, ...
    times steps / (snapshots + 1)^2."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""
    shape_seeds: Annotated[tuple[int, ...], tyro.conf.Suppress] = ()
    """Seeds of other runs in this process: all get the same few shapes of batches."""

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    @property
    def fields(self) -> list[str]:
        """The responses that the method reads."""
        return list(MONITORED if self.row.gamma is not None else SIDES)

    @property
    def beta_value(self) -> float:
        return self.row.beta if self.beta is None else self.beta

    @property
    def gamma_values(self) -> tuple[float, float]:
        """The weight of the KL term at the first and at the last step."""
        return self.gamma or self.row.gamma or (0.0, 0.0)

    def run(self) -> dict[str, Any]:
        policy, dataset, validation = self.load()
        run = replace(self, training=self.training.for_rows(len(dataset)))
        return run.fit(policy, dataset, validation)

    def fit(
        self, policy: ModelFolder, dataset: Dataset, validation: Dataset | None
    ) -> dict[str, Any]:
        """Train and save the policy; returns the findings."""
        require_steps(self.snapshots, self.training.steps)
        batches = plan_batches(dataset, self.training, policy.model, self.shape_seeds)
        throughput = batches.throughput(policy.model)
        signs_fn = partial(policy_signs, beta=self.beta_value)
        start, frozen = partition(policy.model)
        step = partial(policy_step, self.method, self.optimizer, self.training.schedule)
        trained = train(
            partial(step, frozen=frozen),
            self.start(start),
            batches.batch,
            self.training.steps,
            self.out,
            f"{self.method}, beta {self.beta_value:g}",
            eval_fn=self.eval_fn(policy, frozen, validation),
            signs_fn=signs_fn,
            every=self.every,
            also=snapshot_steps(self.training.steps, self.snapshots),
            record=self.record,
            loggers=self.log,
            throughput=throughput,
            rows_fn=batches.names,
        )
        save(replace(policy, path=self.out, model=combine(trained, frozen)))
        signs = signs_fn(logged(self.out / "metrics.jsonl"))
        findings = {"pairs": len(dataset), "pairs seen": batches.rows.size} | batches.findings
        return findings | as_findings(signs.values())

    def start(self, model: Any) -> Any:
        beta, gamma = (jnp.asarray(x, jnp.float32) for x in (self.beta_value, self.gamma_values))
        schedule, rate = self.training.schedule, self.training.learning_rate
        return start_state(model, self.optimizer, schedule, rate, Hyperparameters(beta, gamma))

    def load(self) -> tuple[ModelFolder, Dataset, Dataset | None]:
        """The policy, the rows to train on and the first validation rows.

        A faulty file is refused before the policy is loaded.
        """
        rows = self.read(self.data, self.fields)
        held_out = self.read(self.validation, MONITORED) if self.validation else None
        self.check(num_reward_models=read_targets(rows[:1], SIDES).rewards.shape[2])
        runtime = make_runtime(self.runtime)
        policy = load_trunk(self.policy, runtime, self.adapter, self.training.seed)
        dataset = self.dataset(policy, self.data, rows, self.fields)
        if not self.validation or held_out is None:
            return policy, dataset, None
        monitored = self.dataset(policy, self.validation, held_out, MONITORED)
        return policy, dataset, monitored.head(MONITORED_ROWS)

    def dataset(
        self,
        policy: ModelFolder,
        path: Path,
        rows: Sequence[dict[str, Any]],
        fields: Sequence[str],
    ) -> Dataset:
        """Tokenized rows, whose columns must be those of this policy."""
        require(path, policy.hashes)
        return policy.make_dataset(rows, fields, self.limits, str(path))

    def read(self, path: Path, fields: Sequence[str]) -> Table:
        """Scored rows with the columns of these responses, within the limits of this run."""
        require(path, {"--limits": limits_text(self.limits)})
        rows = scan(path)
        require_columns(path, rows, fields)
        return rows

    def check(self, num_reward_models: int) -> None:
        """Refuse rewards or KL weights that the method cannot use."""
        if self.row.rewards != "none" and not num_reward_models:
            raise InputError(
                f"{self.data}: no column 'score_chosen', which {self.method} distils: see `score`"
            )
        if self.row.rewards == "single" and num_reward_models > 1:
            raise InputError(
                f"{self.data}: field 'score_chosen': {self.method} distils one reward, "
                f"not {num_reward_models}"
            )
        if self.gamma and max(self.gamma) and self.row.gamma is None:
            raise InputError(f"--gamma: {self.method} has no KL term")

    def eval_fn(self, policy: ModelFolder, frozen: Any, validation: Dataset | None) -> EvalFn:
        """Keeps the snapshots, and measures log-probs and KL on validation rows (Figure B.1)."""
        steps = snapshot_steps(self.training.steps, self.snapshots)

        def eval_fn(trained: Any, step: int) -> dict[str, Any]:
            model = combine(trained, frozen)
            if step in steps:
                save(replace(policy, path=self.out / f"step-{step}", model=model))
            progress = step / self.training.steps
            return self.validate(model, validation, progress) if validation else {}

        return eval_fn

    def validate(self, model: Transformer, rows: Dataset, progress: float) -> dict[str, float]:
        """The metrics on held-out rows; their loss where they have what the method reads.

        KL is the forward one to pi_ref, estimated at its samples (nats).
        """
        logps = sequence_logps(model, rows)
        rewards = np.moveaxis(np.asarray(rows.targets.rewards), 2, 0)
        has_loss = self.row.rewards == "none" or len(rewards) > 0
        options: dict[str, Any] = {"beta": self.beta_value, "progress": progress}
        if self.row.rewards != "none" and has_loss:
            options["rewards"] = rewards
        if self.row.gamma is not None and has_loss:
            options["gamma"] = self.gamma_values
        method = self.method if has_loss else "dpo"  # whose metrics need no rewards
        loss, metrics = preference_loss(method, logps, rows.targets.ref_logps, **options)
        values = {name: metrics[name] for name in HELD_OUT} | ({"loss": loss} if has_loss else {})
        return {f"validation/{name}": float(value) for name, value in values.items()}


def require_columns(path: Path, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    """Refuse rows without one of these responses, or its log-probability under pi_ref.

    The rows of a file have such columns all, or none.
    """
    for name in (*fields, *(REF_LOGPS[f] for f in fields)):
        if name not in rows[0]:
            raise InputError(
                f"{path}: row 1: field {name!r}: missing; `score --reference` adds it"
            )


def require_steps(snapshots: int, steps: int) -> None:
    """Refuse more snapshots than a run has steps for."""
    if (snapshots + 1) ** 2 > steps:
        raise InputError(f"--snapshots {snapshots}: too many for a run of {steps} steps")


def snapshot_steps(steps: int, snapshots: int) -> list[int]:
    """1, 4, 9, ... times a step, all before the last; a policy moves fast at first."""
    return [i**2 * (steps // (snapshots + 1) ** 2) for i in range(1, snapshots + 1)]
