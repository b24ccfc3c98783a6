"""What a run produced: `results.csv`, and per-prompt outcomes for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scale.files import write_csv
from scale.paper.contents import CONTENTS, contents, sampled_texts
from scale.stages.align import MethodName
from scale.train.metrics import records


class Policy(NamedTuple):
    """One trained candidate.

    Where there was a choice, it has its advantage over and KL to pi_ref on validation prompts.
    """

    path: Path
    rho: float
    method: MethodName
    beta: float
    learning_rate: float
    seed: int
    validation: float | None = None
    validation_kl: float | None = None


class Outcome(NamedTuple):
    """A selected policy on the test prompts, at each snapshot and, last, at the end of training.

    For each of those points, `rows` has one row a prompt: prompt, samples, reference_samples,
    reward, reference_reward, win, tie, loss, kl, tokens. `findings` has their means: advantage,
    low, high, win, tie, loss, kl, tokens.
    """

    policy: Policy
    steps: list[int]
    rows: list[list[dict[str, Any]]]
    findings: list[dict[str, float]]

    def advantages(self, point: int = -1) -> np.ndarray:
        """Reward minus pi_ref's, for each test prompt."""
        return np.array([row["reward"] - row["reference_reward"] for row in self.rows[point]])


OPTIONS = ("method", "rho", "seed", "beta", "learning_rate")
MONITORED = {
    "chosen_logps": "validation/logps/chosen",
    "rejected_logps": "validation/logps/rejected",
    "forward_kl": "validation/kl",
    "implicit_accuracy": "validation/rewards/accuracies",
}
"""Columns of the last value on held-out pairs; of the log-probs, its change over training."""
COLUMNS = (
    *(*OPTIONS, "selected", "validation_advantage", "validation_kl"),
    *("advantage", "low", "high", "win", "tie", "loss", "kl", "tokens"),
    *CONTENTS,
    *MONITORED,
    "nearest",
)


def write_results(
    path: Path, policies: Sequence[Policy], outcomes: Sequence[Outcome], has_truth: bool
) -> None:
    """One row a policy; the test columns are empty where it was not selected."""
    selected = {outcome.policy.path: tested_values(outcome, has_truth) for outcome in outcomes}
    write_csv(path, COLUMNS, (csv_row(policy, selected.get(policy.path)) for policy in policies))


def tested_values(outcome: Outcome, has_truth: bool) -> dict[str, Any]:
    """The findings of a policy on test prompts, what its samples say, and the end of its log."""
    values: dict[str, Any] = dict(outcome.findings[-1])
    if has_truth:
        values |= contents(sampled_texts(outcome.rows[-1]))
    log = outcome.policy.path / "metrics.jsonl"
    for column, metric in MONITORED.items():
        logged = [*records(log, metric).values()]
        if logged:
            values[column] = logged[-1] - logged[0] if "logps" in metric else logged[-1]
    nearest = [*records(log, "ensemble/nearest").values()]
    if nearest and len(nearest[0]) > 1:
        values["nearest"] = np.mean(nearest, axis=0)
    return values


def csv_row(policy: Policy, tested: dict[str, Any] | None) -> dict[str, Any]:
    """A policy's options, and its validation and test values to six digits where it has them."""
    values = {"validation_advantage": policy.validation, "validation_kl": policy.validation_kl}
    values |= tested or {}
    row = {name: getattr(policy, name) for name in OPTIONS} | {"selected": int(bool(tested))}
    return row | {name: digits(value) for name, value in values.items() if value is not None}


def digits(value: float | np.ndarray) -> str:
    """A number, or several with spaces between them, to six digits."""
    return " ".join(f"{number:.6g}" for number in np.atleast_1d(value))
