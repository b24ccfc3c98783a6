"""The claims of section 6 as differences between methods, and what a study says of them.

A claim is about one or several differences, each measured in independent repetitions. Holm's
adjustment is over all differences of all claims.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from scale.paper.comparisons import REFERENCE, SIGNIFICANT, Seeds, Values, minus
from scale.statistics import holm, interval, p_value, seed_means

LITTLE = 0.05  # reward


class Difference(NamedTuple):
    """Something that a claim says is large enough.

    Attributes:
        what: What is compared with what.
        values: The difference in each repetition, at each of its prompts.
        at_least: The claim is that the mean is above this.
    """

    what: str
    values: Seeds
    at_least: float = 0.0


class Contrast(NamedTuple):
    """A measured difference.

    Attributes:
        what: What is compared with what.
        mean, low, high: The mean over repetitions, with its 95% interval.
        p: Of the test that the mean is `at_least`, adjusted.
        at_least: What the claim says that it is above.
    """

    what: str
    mean: float
    low: float
    high: float
    p: float
    at_least: float = 0.0

    @property
    def agrees(self) -> bool | None:
        """Whether it agrees with the claim or contradicts it; None where it is not significant."""
        return self.mean > self.at_least if self.p < SIGNIFICANT else None


class Verdict(NamedTuple):
    """What the differences of a claim say of it.

    Attributes:
        claim: The claim in words.
        contrasts: Empty where its methods or rhos did not run.
    """

    claim: str
    contrasts: list[Contrast]

    @property
    def word(self) -> str:
        """Confirmed if all contrasts agree with the claim, refuted if one contradicts it."""
        if not self.contrasts:
            return "not tested"
        if self.those(False):
            return "refuted"
        return "undecided" if self.those(None) else "confirmed"

    def those(self, agrees: bool | None) -> list[Contrast]:
        """The contrasts that agree, contradict, or (None) do neither."""
        return [contrast for contrast in self.contrasts if contrast.agrees is agrees]


def judge(claims: Mapping[str, Sequence[Difference]]) -> list[Verdict]:
    """The verdict on each claim, by its differences."""
    p = {
        (claim, i): p_value([values - difference.at_least for values in difference.values])
        for claim, differences in claims.items()
        for i, difference in enumerate(differences)
    }
    adjusted = holm(p)
    return [
        Verdict(claim, [measured(d, adjusted[claim, i]) for i, d in enumerate(differences)])
        for claim, differences in claims.items()
    ]


def measured(difference: Difference, p: float) -> Contrast:
    mean = float(seed_means(difference.values).mean())
    return Contrast(
        difference.what, mean, *interval(difference.values), p=p, at_least=difference.at_least
    )


class Claim(NamedTuple):
    """That each of `better` beats each other one of `worse`, over the rhos for which `where` holds.

    Attributes:
        text: The claim in words.
        better: Rows of `METHODS`.
        worse: Rows of `METHODS`, or pi_ref.
        where: Which rhos it is about.
        at_least: By how much.
    """

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    where: Callable[[float], bool] = lambda rho: True
    at_least: float = 0.0

    def differences(self, values: Values) -> list[Difference]:
        """Those of the methods that ran."""
        pairs = [pair for pair in product(self.better, self.worse) if pair[0] != pair[1]]
        return [
            Difference(f"{method} - {baseline}", seeds, self.at_least)
            for method, baseline in pairs
            if (seeds := self.over_rhos(values, method, baseline))
        ]

    def over_rhos(self, values: Values, method: str, baseline: str) -> Seeds:
        """For each seed the difference at each of its prompts, the mean over the claim's rhos."""
        both = [name for name in (method, baseline) if name != REFERENCE]
        every = dict.fromkeys(rho for rho, _ in values if self.where(rho))
        rhos = [rho for rho in every if all((rho, name) in values for name in both)]
        if not rhos:
            return []
        ours = over_rhos(values, rhos, method)
        return ours if baseline == REFERENCE else minus(ours, over_rhos(values, rhos, baseline))


def over_rhos(values: Values, rhos: Sequence[float], method: str) -> Seeds:
    """For each seed the values of a method at each of its prompts, the mean over some rhos."""
    cells = [values[rho, method] for rho in rhos]
    return [np.mean(seed, axis=0) for seed in zip(*cells, strict=True)]


PAPERS = ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")
DISTILLED = ("d-dpo", "dp-dpo", "e-dpo")
PLAIN = ("dpo", "ipo")
CLAIMS = (
    Claim("the paper's six improve on pi_ref", PAPERS, (REFERENCE,)),
    Claim("(a) d-dpo, dp-dpo and e-dpo beat dpo and ipo, rho <= .5",
          DISTILLED, PLAIN, lambda rho: rho <= 0.5),
    Claim("(b) e-dpo is the best of the paper's six, rho < .5",
          ("e-dpo",), PAPERS, lambda rho: rho < 0.5),
    Claim("(c) d-dpo is the best of the paper's six, rho > .6",
          ("d-dpo",), PAPERS, lambda rho: rho > 0.6),
    Claim(f"(d) p-dpo adds less than {LITTLE:g} to dpo", ("dpo",), ("p-dpo",), at_least=-LITTLE),
    Claim("ours: hull beats e-dpo", ("hull",), ("e-dpo",)),
    Claim("ours: e-dpo beats the plain mean", ("e-dpo",), ("mean",)),
    Claim("ours: hull beats the plain mean", ("hull",), ("mean",)),
)  # fmt: skip

# claims about other things than advantages, which `benchmarks` judge
LOWER_KL = "(e) the KL term lowers the forward KL"
HIGHER_CHOSEN = "(e) the KL term raises log pi of the chosen"
HIGHER_REJECTED = "(e) the KL term raises log pi of the rejected"
OPPOSITE = "(f) the reward model nearest on each pair has the bias opposite to rho's"
ANNEALING = f"(g) annealing gamma changes e-dpo by less than {LITTLE:g}"


def verdicts(values: Values, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """The verdict on each claim, by the advantages of a run's cells."""
    return judge({claim.text: claim.differences(values) for claim in claims})
