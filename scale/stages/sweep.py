"""`sweep`: a policy for every combination of methods and hyperparameters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from minipref.methods import METHODS
from scale.console import console
from scale.data.dataset import read_targets
from scale.data.formats import SIDES
from scale.data.table import scan
from scale.errors import InputError, option_name
from scale.files import read_json, write_csv
from scale.parallel.workers import execute_all, usable_cores, workers
from scale.stages.align import Align, Alignment, MethodName, require_columns
from scale.stages.stage import Stage, execute
from scale.train.metrics import LoggerName

RESULTS = {
    "loss": "loss",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "kl": "kl",
    "validation_kl": "validation/kl",
}
OPTIONS = ("policy", "method", "beta", "gamma_first", "gamma_last", "learning_rate", "seed")
COLUMNS = (*OPTIONS, *RESULTS, "seconds", "programs", "error")


@dataclass(frozen=True, kw_only=True)
class Sweep(Alignment):
    """Train a policy with every combination of methods, betas, KL weights, learning rates, seeds.

    Each is an `align` stage in a folder of its own, METHOD-BETA[-GAMMAS]-RATE-SEED. `results.csv`
    has a row for each: the metrics of its last batch; `seconds` and `programs` (compilations of its
    step) of the run that ended it; the error where it diverged, which does not stop the others. The
    same folder takes a wider or a narrower grid: complete policies stay. Small models train one on
    each core.
    """

    EXTENDS = ("methods", "betas", "gammas", "learning_rates", "seeds")
    methods: tuple[MethodName, ...] = ("e-dpo",)
    """The objectives; README.md has the table."""
    betas: tuple[float, ...] = ()
    """Values of beta (for ipo of its tau). Default: each method's own."""
    gammas: tuple[tuple[float, float], ...] = ()
    """KL weights at the first and the last step, of the methods with a KL term. Default: each
    method's own."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates. Default: that of --training."""
    seeds: int = 1
    """Repetitions: with the seed of --training, the next one, and so on."""
    workers: int = 0
    """Processes that train side by side, each on a core of its own. 0: one for each core. 1: one
    policy after another in this process, for large models; on accelerators 0 means the same."""
    validation: Path | None = None
    """Scored rows that are not trained on: their log-probs and KL over training go to the log."""
    snapshots: int = 0
    """Also keep each policy at this many steps before the last, in `step-N/`: at steps 1, 4, 9, ...
    times steps / (snapshots + 1)^2."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def run(self) -> dict[str, Any]:
        self.check()
        stages = [self.stage(name, *values) for name in self.methods for values in self.grid(name)]
        check_rows(stages, scan(self.data))
        processes = min(self.processes, len(stages))
        errors = self.train(stages, processes)
        rows = [result(stage, error) for stage, error in zip(stages, errors, strict=True)]
        write_csv(self.out / "results.csv", COLUMNS, rows)
        console.print(table(rows))
        diverged = [error for error in errors if error]
        for error in diverged:
            console.print(f"  {error}", style="red", markup=False)
        compilations = sum(row.get("programs", 0) for row in rows)
        console.print(
            f"  {compilations} compilations of the steps of {len(self.methods)} methods, "
            f"in {processes} processes",
            markup=False,
        )
        return {"policies": len(stages), "diverged": len(diverged)}

    def train(self, stages: Sequence[Align], processes: int) -> list[str]:
        """The error of each policy that diverged, else ""."""
        if processes == 1:
            return [attempt(stage) for stage in stages]
        label = "policies, a share a process"
        with workers(processes) as pool:
            return [*chain(*execute_all(pool, shares(stages, processes), label, attempt))]

    def check(self) -> None:
        """Refuse an option that no method has, or one that names a value twice."""
        if not self.methods:
            raise InputError("--methods: none")
        if self.gammas and all(METHODS[name].gamma is None for name in self.methods):
            raise InputError(f"--gammas: none of {', '.join(self.methods)} has a KL term")
        require_distinct(self, ("methods", "betas", "gammas", "learning_rates"))

    def grid(self, method: MethodName) -> product:
        """Betas x KL weights x learning rates x seeds of one method; None is the method's own."""
        first = self.training.seed
        gammas = () if METHODS[method].gamma is None else self.gammas
        rates = self.learning_rates or (self.training.learning_rate,)
        seeds = range(first, first + self.seeds)
        return product(self.betas or (None,), gammas or (None,), rates, seeds)

    def stage(
        self,
        method: MethodName,
        beta: float | None,
        gamma: tuple[float, float] | None,
        rate: float,
        seed: int,
    ) -> Align:
        names = {f.name for f in fields(Align)} & {f.name for f in fields(self)}
        common: dict[str, Any] = {name: getattr(self, name) for name in names}
        common["training"] = replace(self.training, learning_rate=rate, seed=seed)
        seeds = tuple(range(self.training.seed, self.training.seed + self.seeds))
        stage = Align(**common, method=method, beta=beta, gamma=gamma, shape_seeds=seeds)
        parts = [method, stage.beta_value, *([gamma] if gamma else []), rate, seed]
        return replace(stage, out=self.out / "-".join(map(text, parts)))

    @property
    def processes(self) -> int:
        """Processes that train side by side."""
        alone = jax.default_backend() != "cpu" or jax.process_count() > 1
        if self.workers > 1 and alone:
            raise InputError(
                f"--workers {self.workers}: only processes on one machine's CPU train side by side"
            )
        most = 1 if alone else len(usable_cores())
        return min(self.workers or most, most)


def require_distinct(stage: Stage, names: Sequence[str]) -> None:
    """Refuse an option that names a value twice: two runs would write one folder."""
    for name in names:
        values = [text(value) for value in getattr(stage, name)]
        if len(set(values)) < len(values):
            raise InputError(
                f"{option_name(name)} {' '.join(values)}: the same twice, to six digits"
            )


def check_rows(stages: Sequence[Align], rows: Sequence[dict[str, Any]]) -> None:
    """Refuse rows that lack a method's columns, before anything is trained."""
    num_reward_models = read_targets(rows[:1], SIDES).rewards.shape[2]
    for stage in {stage.method: stage for stage in stages}.values():
        require_columns(stage.data, rows, stage.fields)
        stage.check(num_reward_models)


def attempt(stage: Align) -> str:
    """Train a policy; the error with which it diverged, if it did."""
    try:
        execute(stage)
    except FloatingPointError as error:
        return str(error)
    return ""


def shares(stages: Sequence[Align], n: int) -> list[Sequence[Align]]:
    """n parts of neighbours: at most n - 1 methods are in two, and compiled twice."""
    return [stages[len(stages) * i // n : len(stages) * (i + 1) // n] for i in range(n)]


def text(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, tuple):
        return "-".join(map(text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def result(stage: Align, error: str) -> dict[str, Any]:
    """The row of `results.csv`; a policy that diverged has no metrics."""
    training = stage.training
    options = (stage.out.name, stage.method, stage.beta_value, *stage.gamma_values)
    values = (*options, training.learning_rate, training.seed)
    metrics = {} if error else last_metrics(stage.out)
    return dict(zip(OPTIONS, values, strict=True)) | {"error": error} | metrics


def last_metrics(out: Path) -> dict[str, Any]:
    """The metrics of a policy's last step, where it has them, and the cost of its run."""
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    timing = read_json(out / "timing.json")
    metrics = {name: last[key] for name, key in RESULTS.items() if key in last}
    return metrics | {"seconds": round(timing["seconds"], 3), "programs": timing["programs"]}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="the last batch of each policy", title_justify="left")
    numbers = [n for n in (*RESULTS, "seconds", "programs") if any(n in row for row in rows)]
    shown.add_column("policy")
    for name in numbers:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(row["policy"], *(f"{row[n]:.4g}" if n in row else "" for n in numbers))
    return shown
