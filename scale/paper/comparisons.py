"""Which method is better: tests over seeds, paired by seed and prompt, and the paper's claims."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from minipref.methods import METHODS
from scale.paper.results import Outcome
from scale.statistics import holm, interval, p_value, seed_means, value_at

SIGNIFICANT = 0.01
REFERENCE = "pi_ref"
SUMMARY = ("rho", "method", "advantage", "low", "high", "seeds")

Key = tuple[float, str]  # rho and method
Cells = dict[Key, list[Outcome]]  # the seeds of each
Seeds = list[np.ndarray]  # for each seed, a value of each of its prompts
Values = dict[Key, Seeds]  # advantages over pi_ref


class Comparison(NamedTuple):
    """A method minus another at one rho.

    Attributes:
        rho: Length bias.
        method: A row of `METHODS`.
        baseline: Another one, or pi_ref.
        difference: Mean over seeds and prompts.
        p: Of the test that it is 0, after Holm's adjustment.
    """

    rho: float
    method: str
    baseline: str
    difference: float
    p: float

    def oriented(self) -> "Comparison":
        """The same, with the better one as `method`."""
        return self if self.difference >= 0 else self.flipped()

    def flipped(self) -> "Comparison":
        return Comparison(self.rho, self.baseline, self.method, -self.difference, self.p)

    @property
    def significant(self) -> bool:
        return self.p < SIGNIFICANT


def by_cell(outcomes: Sequence[Outcome]) -> Cells:
    """The seeds of each (rho, method): by rho, then in the order of `METHODS`."""
    order = list(METHODS)
    cells: Cells = {}
    for outcome in sorted(outcomes, key=lambda o: (o.policy.rho, order.index(o.policy.method))):
        cells.setdefault((outcome.policy.rho, outcome.policy.method), []).append(outcome)
    return cells


def final_values(cells: Cells) -> Values:
    """Advantages at the end of training."""
    return {key: [outcome.advantages() for outcome in seeds] for key, seeds in cells.items()}


def summaries(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The rows of `summary.csv`: by rho, then in the order of `METHODS`."""
    return [summary(*cell) for cell in final_values(by_cell(outcomes)).items()]


def summary(key: Key, seeds: Seeds) -> dict[str, Any]:
    """The mean of a cell with its interval over seeds and prompts, to six digits."""
    values = (seed_means(seeds).mean(), *interval(seeds))
    row = (*key, *(float(f"{value:.6g}") for value in values), len(seeds))
    return dict(zip(SUMMARY, row, strict=True))


def against_reference(values: Values) -> list[Comparison]:
    """Every method minus pi_ref."""
    return adjusted({(rho, method, REFERENCE): v for (rho, method), v in values.items()})


def between_methods(values: Values) -> list[Comparison]:
    """Every two methods of one rho."""
    return adjusted({(*a, b[1]): minus(values[a], values[b]) for a, b in same_rho(values)})


def minus(ours: Seeds, theirs: Seeds) -> Seeds:
    """The differences of two methods, paired by seed and prompt."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def at_equal_kl(cells: Cells) -> list[Comparison]:
    """Every two methods of one rho, in each seed at the largest KL that both reach.

    A pair of methods is left out where a path is not known there, because its first point after
    pi_ref is beyond that KL.
    """
    differences = {}
    for a, b in same_rho(cells):
        seeds = [equal_kl_difference(*both) for both in zip(cells[a], cells[b], strict=True)]
        known = [values for values in seeds if values is not None]
        if len(known) == len(seeds):
            differences[*a, b[1]] = known
    return adjusted(differences)


def equal_kl_difference(ours: Outcome, theirs: Outcome) -> np.ndarray | None:
    """The difference of two policies of one seed, for each prompt; None where it is not known."""
    paths = [trace(ours), trace(theirs)]
    kl = min(kls.max() for kls, _ in paths)
    if any(kls[1] > kl for kls, _ in paths):
        return None
    return value_at(kl, *paths[0]) - value_at(kl, *paths[1])


def same_rho(keys: Iterable[Key]) -> list[tuple[Key, Key]]:
    return [(a, b) for a, b in combinations(keys, 2) if a[0] == b[0]]


def trace(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """KL [P] and advantages of each prompt [P, N] along training, from pi_ref on."""
    values = [outcome.advantages(point) for point in range(len(outcome.steps))]
    kls = [findings["kl"] for findings in outcome.findings]
    return np.array([0.0, *kls]), np.stack([np.zeros_like(values[0]), *values])


def adjusted(differences: dict[tuple[float, str, str], Seeds]) -> list[Comparison]:
    p = holm({key: p_value(seeds) for key, seeds in differences.items()})
    return [
        Comparison(*key, float(seed_means(seeds).mean()), p[key])
        for key, seeds in differences.items()
    ]
