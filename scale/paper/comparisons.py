"""Which method is better: paired tests over prompts, and what they say of the paper's claims."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from minipref.methods import METHODS
from scale.paper.results import Outcome
from scale.statistics import holm, value_at, wald_p

SIGNIFICANT = 0.05
REFERENCE = "pi_ref"

Key = tuple[float, str]  # rho and method
Cells = dict[Key, list[Outcome]]  # the seeds of each
Values = dict[Key, np.ndarray]  # advantages of each prompt, the mean over seeds


class Comparison(NamedTuple):
    """A method minus another at one rho.

    Attributes:
        rho: Length bias.
        method: A row of `METHODS`.
        baseline: Another one, or pi_ref.
        difference: Mean over prompts.
        p: The p-value of the Wald test, after Holm's adjustment.
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
    """Advantages of each prompt at the end of training, the mean over seeds."""
    return {key: np.mean([o.advantages() for o in seeds], axis=0) for key, seeds in cells.items()}


def against_reference(values: Values) -> list[Comparison]:
    """Every method minus pi_ref."""
    return adjusted({(rho, method, REFERENCE): v for (rho, method), v in values.items()})


def between_methods(values: Values) -> list[Comparison]:
    """Every two methods of one rho."""
    return adjusted({(*a, b[1]): values[a] - values[b] for a, b in same_rho(values)})


def at_equal_kl(cells: Cells) -> list[Comparison]:
    """Every two methods of one rho at the largest KL that all seeds of both reach.

    A pair is left out where a path is not known there, because its first point after pi_ref is
    beyond that KL.
    """
    differences = {}
    for a, b in same_rho(cells):
        kl = min(trace(outcome)[0].max() for outcome in cells[a] + cells[b])
        if all(trace(outcome)[0][1] <= kl for outcome in cells[a] + cells[b]):
            differences[*a, b[1]] = mean_at(kl, cells[a]) - mean_at(kl, cells[b])
    return adjusted(differences)


def same_rho(keys: Iterable[Key]) -> list[tuple[Key, Key]]:
    return [(a, b) for a, b in combinations(keys, 2) if a[0] == b[0]]


def trace(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """KL [P] and advantages of each prompt [P, N] along training, from pi_ref on."""
    values = [outcome.advantages(point) for point in range(len(outcome.steps))]
    kls = [findings["kl"] for findings in outcome.findings]
    return np.array([0.0, *kls]), np.stack([np.zeros_like(values[0]), *values])


def mean_at(kl: float, seeds: Sequence[Outcome]) -> np.ndarray:
    return np.mean([value_at(kl, *trace(outcome)) for outcome in seeds], axis=0)


def adjusted(differences: dict[tuple[float, str, str], np.ndarray]) -> list[Comparison]:
    p = holm({key: wald_p(values) for key, values in differences.items()})
    return [Comparison(*key, float(values.mean()), p[key]) for key, values in differences.items()]


class Claim(NamedTuple):
    """That each of `better` beats each other one of `worse` at the rhos for which `where` holds."""

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    where: Callable[[float], bool] = lambda rho: True


def low(rho: float) -> bool:
    return rho <= 0.5


def high(rho: float) -> bool:
    return rho > 0.6


PAPERS = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")
DISTILLED = ("d-dpo", "dp-dpo", "e-dpo")
PLAIN = ("dpo", "ipo")
BEST = "is the best of the paper's six"
CLAIMS = (
    Claim("the paper's six improve on pi_ref", PAPERS, (REFERENCE,)),
    Claim("d-dpo, dp-dpo and e-dpo beat dpo and ipo, rho <= 0.5", DISTILLED, PLAIN, low),
    Claim("e-dpo beats d-dpo and dp-dpo, rho <= 0.5", ("e-dpo",), ("d-dpo", "dp-dpo"), low),
    Claim(f"e-dpo {BEST}, rho < 0.5", ("e-dpo",), PAPERS, lambda rho: rho < 0.5),
    Claim(f"d-dpo {BEST}, rho > 0.6", ("d-dpo",), PAPERS, high),
    Claim("d-dpo beats dpo and ipo, rho > 0.6", ("d-dpo",), PLAIN, high),
    Claim("d-dpo, dp-dpo and e-dpo beat p-dpo", DISTILLED, ("p-dpo",)),
    Claim("ours: hull beats e-dpo", ("hull",), ("e-dpo",)),
    Claim("ours: hull beats the plain mean", ("hull",), ("mean",)),
    Claim("ours: e-dpo beats the plain mean", ("e-dpo",), ("mean",)),
)


class Evidence(NamedTuple):
    """What the comparisons say of a claim: how many there are, and how they come out."""

    claim: str
    tested: int
    ahead: int
    significantly_ahead: int
    significantly_behind: int

    @property
    def verdict(self) -> str:
        ahead, behind = self.significantly_ahead, self.significantly_behind
        if not self.tested:
            return "not tested"
        if ahead == self.tested:
            return "yes"
        if ahead:
            return "mixed" if behind else "in part"
        return "no" if behind else "undecided"


def evidence(claim: Claim, comparisons: Sequence[Comparison]) -> Evidence:
    """The comparisons that a claim is about, counted."""
    both = [c for comparison in comparisons for c in (comparison, comparison.flipped())]
    tested = [
        c
        for c in both
        if claim.where(c.rho) and c.method in claim.better and c.baseline in claim.worse
    ]
    real = [c.difference > 0 for c in tested if c.significant]
    ahead = sum(c.difference > 0 for c in tested)
    return Evidence(claim.text, len(tested), ahead, sum(real), len(real) - sum(real))
