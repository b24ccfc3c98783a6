"""What a run found: `results.csv`, and per-prompt outcomes for the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scale.files import write_csv
from scale.stages.align import MethodName


class Policy(NamedTuple):
    """One trained candidate; its advantage over and KL to pi_ref on validation prompts, where there was a choice."""

    path: Path
    rho: float
    method: MethodName
    beta: float
    learning_rate: float
    seed: int
    validation: float | None = None
    validation_kl: float | None = None


class Outcome(NamedTuple):
    """A selected policy on the test prompts: at each snapshot and, last, at the end of its training.

    `rows` holds, for each of those points, one row a prompt: prompt, sample, reward, reference_reward, win, loss, kl,
    tokens. `findings` holds their means: advantage, low, high, win, tie, loss, kl, tokens.
    """

    policy: Policy
    steps: list[int]
    rows: list[list[dict[str, Any]]]
    findings: list[dict[str, float]]

    def advantages(self, point: int = -1) -> np.ndarray:
        """Oracle reward minus pi_ref's, for each test prompt."""
        return np.array([row["reward"] - row["reference_reward"] for row in self.rows[point]])


COLUMNS = ("method", "rho", "seed", "beta", "learning_rate", "selected", "validation_advantage",
           "validation_kl", "advantage", "low", "high", "win", "tie", "loss", "kl", "tokens")


def write_results(path: Path, policies: Sequence[Policy], outcomes: Sequence[Outcome]) -> None:
    """One line a policy; the test columns are empty where it was not selected."""
    found = {o.policy.path: o.findings[-1] for o in outcomes}
    write_csv(path, COLUMNS, (line(p, found.get(p.path)) for p in policies))


def line(policy: Policy, findings: dict[str, float] | None) -> dict[str, Any]:
    known: dict[str, Any] = {
        "method": policy.method, "rho": policy.rho, "seed": policy.seed,
        "beta": policy.beta,
        "learning_rate": policy.learning_rate, "selected": int(findings is not None),
    }
    if policy.validation is not None:
        known |= {"validation_advantage": f"{policy.validation:.6g}", "validation_kl": f"{policy.validation_kl:.6g}"}
    return known | {k: f"{v:.6g}" for k, v in (findings or {}).items()}
