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
from scale.data.dataset import scores
from scale.data.rows import read
from scale.errors import InputError
from scale.files import read_json, write_csv
from scale.parallel.workers import execute_all, usable_cores, workers
from scale.stages.align import Align, Alignment, MethodName, require_columns
from scale.stages.stage import execute

RESULTS = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies", "kl": "kl",
           "validation_kl": "validation/kl"}
TRAINED = ("policy", "method", "parameter", "value", "gamma_first", "gamma_last", "learning_rate", "seed")
COLUMNS = (*TRAINED, *RESULTS, "seconds", "programs", "error")


@dataclass(frozen=True, kw_only=True)
class Sweep(Alignment):
    """Train a policy with every combination of methods, strengths, KL weights, learning rates and seeds.

    Each is an `align` stage in a folder of its own, METHOD-STRENGTH[-GAMMAS]-RATE-SEED. `results.csv` has a row of
    each: the metrics of its last batch; `seconds` and `programs` (compilations of its step) of the run that ended it;
    the error where it diverged, which does not stop the others. The same folder takes a wider or a narrower grid:
    policies that are complete stay. Small models train one a core.
    """

    EXTENDS = ("methods", "betas", "taus", "gammas", "learning_rates", "seeds")
    methods: tuple[MethodName, ...] = ("e-dpo",)
    """Rows of the table of methods."""
    betas: tuple[float, ...] = ()
    """Strengths of all methods but ipo. Default: that of align."""
    taus: tuple[float, ...] = ()
    """Strengths of ipo. Default: that of align."""
    gammas: tuple[tuple[float, float], ...] = ()
    """KL weights at the first and the last step, of the methods with a KL term. Default: each method's own."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates. Default: that of --training."""
    seeds: int = 1
    """Repetitions: with the seed of --training, the next one, and so on."""
    workers: int = 0
    """Processes that train side by side, each on a core of its own. 0: one a core. 1: one policy after another in this
    process, with all that it has: for models too large for a core's share, and on accelerators what 0 means too."""

    def run(self) -> dict[str, Any]:
        self.check()
        stages = [self.stage(method, *rest) for method in self.methods for rest in self.grid(method)]
        check_rows(stages, read(self.data))
        processes = min(self.processes, len(stages))
        if processes > 1:
            with workers(processes) as pool:
                errors = [*chain(*execute_all(pool, shares(stages, processes), "policies, a share a process", attempt))]
        else:
            errors = [attempt(stage) for stage in stages]
        rows = [result(stage, error) for stage, error in zip(stages, errors, strict=True)]
        diverged = [error for error in errors if error]
        write_csv(self.out / "results.csv", COLUMNS, rows)
        console.print(table(rows))
        for error in diverged:
            console.print(f"  {error}", style="red", markup=False)
        compilations = sum(row.get("programs", 0) for row in rows)
        console.print(f"  {compilations} compilations of the steps of {len(self.methods)} methods, in {processes} "
                      "processes", markup=False)
        return {"policies": len(stages), "diverged": len(diverged)}

    def check(self) -> None:
        """Errors: InputError for an option that no method has, or one that holds the same value twice."""
        if not self.methods:
            raise InputError("--methods: none")
        rows = [METHODS[method] for method in self.methods]
        used = {"methods": True, "betas": any(row.strength == "beta" for row in rows),
                "taus": any(row.strength == "tau" for row in rows), "gammas": any(max(row.gamma) for row in rows),
                "learning_rates": True}
        for name, has in used.items():
            values, flag = [text(value) for value in getattr(self, name)], f"--{name.replace('_', '-')}"
            if values and not has:
                raise InputError(f"{flag}: none of {', '.join(self.methods)} has it")
            if len(set(values)) < len(values):
                raise InputError(f"{flag} {' '.join(values)}: the same twice, to six digits")

    def grid(self, method: MethodName) -> product:
        """Strengths x KL weights x learning rates x seeds of one method; None is its own."""
        row, first = METHODS[method], self.training.seed
        strengths = self.betas if row.strength == "beta" else self.taus
        gammas = self.gammas if max(row.gamma) else ()
        rates = self.learning_rates or (self.training.learning_rate,)
        return product(strengths or (None,), gammas or (None,), rates, range(first, first + self.seeds))

    def stage(
        self, method: MethodName, strength: float | None, gamma: tuple[float, float] | None, rate: float, seed: int
    ) -> Align:
        common: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Alignment)}
        common |= {"method": method, METHODS[method].strength: strength, "gamma": gamma}
        seeds = tuple(range(self.training.seed, self.training.seed + self.seeds))
        training = replace(self.training, learning_rate=rate, seed=seed)
        stage = Align(**common | {"training": training, "shape_seeds": seeds})
        name = "-".join(map(text, [method, stage.strength, *([gamma] if gamma else []), rate, seed]))
        return replace(stage, out=self.out / name)

    @property
    def processes(self) -> int:
        alone = jax.default_backend() != "cpu" or jax.process_count() > 1
        if self.workers > 1 and alone:
            raise InputError(f"--workers {self.workers}: only processes on one machine's CPU train side by side")
        most = 1 if alone else len(usable_cores())
        return min(self.workers or most, most)


def check_rows(stages: Sequence[Align], rows: list[dict[str, Any]]) -> None:
    """Errors: InputError before anything is trained, where a method needs other columns."""
    for stage in {stage.method: stage for stage in stages}.values():
        require_columns(stage.data, rows, stage.fields)
        stage.check(scores(rows[:1], 2).shape[2])


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
    if isinstance(value, tuple):
        return "-".join(map(text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def result(stage: Align, error: str) -> dict[str, Any]:
    """What was trained, and how it ended; no metrics of a policy that diverged."""
    values = (stage.out.name, stage.method, METHODS[stage.method].strength, stage.strength, *stage.weights,
              stage.training.learning_rate, stage.training.seed)
    return dict(zip(TRAINED, values, strict=True)) | {"error": error} | ({} if error else last_step(stage.out))


def last_step(out: Path) -> dict[str, Any]:
    """The metrics of a policy's last step, where it has them, and what its run took."""
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    timing = read_json(out / "timing.json")
    metrics = {name: last[key] for name, key in RESULTS.items() if key in last}
    return metrics | {"seconds": round(timing["seconds"], 3), "programs": timing["programs"]}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="the last batch of each policy", title_justify="left")
    numbers = [name for name in (*RESULTS, "seconds", "programs") if any(name in row for row in rows)]
    shown.add_column("policy")
    for name in numbers:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(row["policy"], *(f"{row[n]:.4g}" if n in row else "" for n in numbers))
    return shown
