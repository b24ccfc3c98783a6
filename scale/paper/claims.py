"""The claims of section 6 as contrasts of methods, and what a run says of them.

A contrast is the advantage of one method minus that of another, the mean over the rhos that the
claim is about. It is tested over seeds, and Holm's adjustment is over all contrasts of all claims.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from scale.paper.comparisons import REFERENCE, SIGNIFICANT, Seeds, Values, minus
from scale.statistics import holm, interval, p_value, seed_means


class Claim(NamedTuple):
    """That each of `better` beats each other one of `worse`, over the rhos for which `where` holds.

    Attributes:
        text: The claim in words.
        better: Rows of `METHODS`.
        worse: Rows of `METHODS`, or pi_ref.
        where: Which rhos it is about.
    """

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
CLAIMS = (
    Claim("the paper's six improve on pi_ref", PAPERS, (REFERENCE,)),
    Claim("d-dpo, dp-dpo and e-dpo beat dpo and ipo, rho <= 0.5", DISTILLED, PLAIN, low),
    Claim("e-dpo is the best of the paper's six, rho < 0.5", ("e-dpo",), PAPERS, lambda r: r < 0.5),
    Claim("d-dpo is the best of the paper's six, rho > 0.6", ("d-dpo",), PAPERS, high),
    Claim("pessimism alone helps: p-dpo beats dpo", ("p-dpo",), ("dpo",)),
    Claim("ours: hull beats e-dpo", ("hull",), ("e-dpo",)),
    Claim("ours: hull beats the plain mean", ("hull",), ("mean",)),
    Claim("ours: e-dpo beats the plain mean", ("e-dpo",), ("mean",)),
)


class Contrast(NamedTuple):
    """A method minus another: the mean, its 95% interval, and the adjusted p."""

    method: str
    baseline: str
    mean: float
    low: float
    high: float
    p: float


class Verdict(NamedTuple):
    """What the contrasts of a claim say of it.

    Attributes:
        claim: The claim in words.
        contrasts: Empty where its methods or rhos did not run.
    """

    claim: str
    contrasts: list[Contrast]

    @property
    def word(self) -> str:
        """Confirmed if all contrasts are significantly above 0, refuted if one is below."""
        if not self.contrasts:
            return "not tested"
        real = [c for c in self.contrasts if c.p < SIGNIFICANT]
        if any(c.mean < 0 for c in real):
            return "refuted"
        return "confirmed" if len(real) == len(self.contrasts) else "undecided"


def verdicts(values: Values, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """The verdict on each claim, by the advantages of a run's cells."""
    tested = {
        (claim.text, *pair): contrast_values(values, claim, *pair)
        for claim in claims
        for pair in product(claim.better, claim.worse)
        if pair[0] != pair[1]
    }
    tested = {key: seeds for key, seeds in tested.items() if seeds}
    p = holm({key: p_value(seeds) for key, seeds in tested.items()})
    contrasts = {
        key: Contrast(*key[1:], float(seed_means(seeds).mean()), *interval(seeds), p[key])
        for key, seeds in tested.items()
    }
    return [
        Verdict(claim.text, [c for key, c in contrasts.items() if key[0] == claim.text])
        for claim in claims
    ]


def contrast_values(values: Values, claim: Claim, method: str, baseline: str) -> Seeds:
    """For each seed the difference at each of its prompts, the mean over the claim's rhos."""
    both = [name for name in (method, baseline) if name != REFERENCE]
    every = dict.fromkeys(rho for rho, _ in values if claim.where(rho))
    rhos = [rho for rho in every if all((rho, name) in values for name in both)]
    if not rhos:
        return []
    ours = over_rhos(values, rhos, method)
    if baseline == REFERENCE:
        return ours
    return minus(ours, over_rhos(values, rhos, baseline))


def over_rhos(values: Values, rhos: Sequence[float], method: str) -> Seeds:
    """For each seed the values of a method at each of its prompts, the mean over some rhos."""
    cells = [values[rho, method] for rho in rhos]
    return [np.mean(seed, axis=0) for seed in zip(*cells, strict=True)]
