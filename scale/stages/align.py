from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from minipref.batch import Batch
from minipref.methods import METHODS
from minipref.training import Metrics, TrainState, loss_of
from scale.data.dataset import REF_LOGPS, Encoded, Limits, take
from scale.data.rows import read, require
from scale.errors import InputError
from scale.io import model_folder as folders
from scale.model.inference import sequence_logps
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.stage import TOKENS, Stage
from scale.train.batches import schedule
from scale.train.loop import Training, hyper, train
from scale.train.metrics import LoggerName
from scale.train.optimizer import OptimizerConfig, language_step, start_state

MethodName = Literal["dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo", "hull", "mean"]
MONITORED = 128


@dataclass(frozen=True, kw_only=True)
class Alignment(Stage):
    """What one run and a sweep of them have in common."""

    data: Path
    """Preference rows with the columns of the score stage."""
    policy: Path
    """The policy to start from, the pi_ref that the columns were computed with: a folder of ours or of Hugging Face's,
    a .gguf file, or smollm2."""
    validation: Path | None = None
    """Scored rows that are not trained on: their log-probs and KL over training go to the log."""
    snapshots: int = 0
    """Also keep the policy at this many steps before the last, in `step-N/`, denser early."""
    training: Training = field(default_factory=lambda: Training(120, 16, 3e-3))
    """The training run."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and z-loss."""
    limits: Limits = field(default_factory=Limits)
    """Length limits: those of the score stage."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def inputs(self) -> list[Path]:
        return [path for path in (self.data, self.policy, self.validation) if path]


@dataclass(frozen=True, kw_only=True)
class Align(Alignment):
    """Train a policy on scored preference pairs by one of the eight methods of `minipref.methods`."""

    method: MethodName = "e-dpo"
    """Which row of the table of methods."""
    beta: float | None = None
    """Strength of all methods but ipo: how strictly log pi / pi_ref follows the rewards. Default: 0.1."""
    tau: float | None = None
    """Strength of ipo, whose target for the margin is 1/tau. Default: 0.1."""
    gamma: tuple[float, float] | None = None
    """KL weight at the first and the last step. Default: the method's own."""
    shape_seeds: tuple[int, ...] = ()
    """Seeds of other runs that this process trains: all get the same few shapes of batches, compiled once."""

    def run(self) -> dict[str, Any]:
        if (self.snapshots + 1) ** 2 > self.training.steps:
            raise InputError(f"--snapshots {self.snapshots}: too many for a run of {self.training.steps} steps")
        runtime = make_runtime(self.runtime)
        policy = folders.load_policy(self.policy, runtime)
        data = self.load(policy, self.data, self.fields, self.out / TOKENS)
        self.check(data.scores.shape[2])
        name, strength = METHODS[self.method].strength, self.strength
        batches = schedule(data, self.training, policy.model, self.shape_seeds)
        speed = batches.speed(policy.model)
        state = start_state(policy.model, self.optimizer, hyper(self.training, strength, self.weights))
        model = train(partial(align_step, self.method, self.optimizer), state, batches.batch,
                      self.training.steps, self.out, f"{self.method}, {name} {strength:g}",
                      self.eval_fn(policy), watch_every(self.training.steps, self.snapshots), self.record, self.log,
                      speed)
        folders.save(self.out, model, policy.config, policy.codec)
        return {"pairs": len(data)} | batches.findings

    @property
    def fields(self) -> list[str]:
        """The responses that the method reads."""
        return ["chosen", "rejected"] + ["ref_sample"] * bool(max(METHODS[self.method].gamma))

    @property
    def strength(self) -> float:
        """The value of the parameter that the method has; the other one must not be given."""
        given, name = {"beta": self.beta, "tau": self.tau}, METHODS[self.method].strength
        value, other = given.pop(name), next(iter(given.items()))
        if other[1] is not None:
            raise InputError(f"--{other[0]}: {self.method} has none; its strength is --{name}")
        return 0.1 if value is None else value

    @property
    def weights(self) -> tuple[float, float]:
        """The KL's at the first and at the last step."""
        return METHODS[self.method].gamma if self.gamma is None else self.gamma

    def load(self, policy: folders.Folder, path: Path, fields: list[str], folder: Path | None = None) -> Encoded:
        require(path, **policy.hashes, limits=str(self.limits))
        rows = read(path)
        require_columns(path, rows, fields)
        return policy.encode(rows, fields, self.limits, str(path), folder)

    def check(self, members: int) -> None:
        """Errors: InputError where the method cannot use the rewards of so many members, or the KL's weights."""
        rewards = METHODS[self.method].rewards
        if rewards != "none" and not members:
            raise InputError(f"{self.data}: no column 'score_chosen', which {self.method} distils: see `score`")
        if rewards == "single" and members > 1:
            raise InputError(f"{self.data}: field 'score_chosen': {self.method} distils one reward, not {members}")
        if max(self.weights) and not max(METHODS[self.method].gamma):
            raise InputError(f"--gamma: {self.method} has no KL term")

    def eval_fn(self, policy: folders.Folder) -> Callable[[Transformer, int], dict[str, Any]]:
        """Keeps the snapshots, and watches the validation rows (Figure B.1)."""
        watched = self.validation and self.load(policy, self.validation, ["chosen", "rejected", "ref_sample"])
        kept = snapshot_steps(self.training.steps, self.snapshots)
        sample = watched and take(watched.data, np.arange(min(MONITORED, len(watched))))

        def eval_fn(model: Transformer, step: int) -> dict[str, Any]:
            if step in kept:
                folders.save(self.out / f"step-{step}", model, policy.config, policy.codec)
            return monitor(model, sample) if sample else {}

        return eval_fn


def require_columns(path: Path, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
    """Errors: InputError for the first row without one of these responses, or its log-probability under pi_ref."""
    for name in (*fields, *(REF_LOGPS[f] for f in fields)):
        missing = next((i for i, row in enumerate(rows) if name not in row), None)
        if missing is not None:
            raise InputError(f"{path}: row {missing + 1}: field {name!r}: missing; `score --reference` adds it")


def snapshot_steps(steps: int, snapshots: int) -> list[int]:
    """1, 4, 9, ... times a step: denser early, where a policy moves fastest. All are before the last step."""
    return [i**2 * (steps // (snapshots + 1) ** 2) for i in range(1, snapshots + 1)]


def watch_every(steps: int, snapshots: int) -> int:
    """The largest divisor of the first snapshot's step, and so of all, that is at most 50."""
    first = [*snapshot_steps(steps, snapshots), steps][0]
    return next(d for d in range(min(50, first), 0, -1) if first % d == 0)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def align_step(method: str, optimizer: OptimizerConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    return language_step(loss_of(method), optimizer, state, batch)


def monitor(model: Transformer, data) -> dict[str, float]:
    """Held-out log-probs of chosen and rejected responses, and the sampled forward KL to pi_ref (nats)."""
    values = sequence_logps(model, data)
    kl = (data.ref_logps - values)[:, 2]
    return {"validation/logps/chosen": float(values[:, 0].mean()),
            "validation/logps/rejected": float(values[:, 1].mean()), "validation/kl": float(kl.mean())}
