"""What the worlds say of the claims of section 6, and of ours."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.section6.variations import CONSTANT, Cells
from reference.worlds import BIASES
from scale.paper.claims import DISTILLED, PAPERS, PLAIN
from scale.paper.comparisons import SIGNIFICANT
from scale.paper.figures import COLLAPSE
from scale.statistics import holm, wald_p

LITTLE = 0.05  # nats of advantage


class Contrast(NamedTuple):
    """One of the comparisons that a claim is about.

    Attributes:
        rho: The length bias.
        what: What is compared with what.
        effect: The difference of the two for each world [N].
        at_least: The claim is that the mean difference is above this.
    """

    rho: float
    what: str
    effect: np.ndarray
    at_least: float = 0.0

    @property
    def excess(self) -> np.ndarray:
        return self.effect - self.at_least


class Claim(NamedTuple):
    """A claim, and the tests of it: (cells, rhos) -> tests."""

    text: str
    tests: Callable[[Cells, Sequence[float]], Iterator[Contrast]]


class Verdict(NamedTuple):
    """What the tests of a claim say.

    Attributes:
        text: That of the claim.
        tested: How many tests there are.
        ahead, behind: How many significantly agree with the claim, and how many contradict it.
        low, high: The smallest and the largest mean effect.
        against, undecided: The tests that contradict it, and those that are not significant.
    """

    text: str
    tested: int
    ahead: int
    behind: int
    low: float
    high: float
    against: list[str]
    undecided: list[str]

    @property
    def word(self) -> str:
        """A claim of several comparisons is confirmed by all, and refuted by one."""
        if self.behind:
            return "refuted"
        return "confirmed" if self.ahead == self.tested else "undecided"


def advantage(cells: Cells, rho: float, method: str) -> np.ndarray:
    return cells[rho, method].values("advantage")


def difference(cells: Cells, rho: float, better: str, worse: str) -> np.ndarray:
    return advantage(cells, rho, better) - advantage(cells, rho, worse)


def beats(
    better: Sequence[str], worse: Sequence[str], where: Callable[[float], bool] = bool
) -> Callable[[Cells, Sequence[float]], Iterator[Contrast]]:
    """Each of `better` is ahead of each other one of `worse`, at the rhos for which `where` holds.

    A rho is above 0, so `bool` holds everywhere.
    """

    def tests(cells: Cells, rhos: Sequence[float]) -> Iterator[Contrast]:
        for rho in filter(where, rhos):
            for a in better:
                for b in (name for name in worse if name != a):
                    yield Contrast(rho, f"{a} - {b}", difference(cells, rho, a, b))

    return tests


def adds_little(cells: Cells, rhos: Sequence[float]) -> Iterator[Contrast]:
    """p-DPO is ahead of DPO by less than `LITTLE`."""
    for rho in rhos:
        yield Contrast(rho, "dpo - p-dpo", difference(cells, rho, "dpo", "p-dpo"), -LITTLE)


def annealing(cells: Cells, rhos: Sequence[float]) -> Iterator[Contrast]:
    """e-DPO with an annealed gamma and with a constant one are within `LITTLE` (two tests)."""
    for rho in rhos:
        annealed_ahead = difference(cells, rho, "e-dpo", CONSTANT)
        yield Contrast(rho, "annealed - constant", annealed_ahead, -LITTLE)
        yield Contrast(rho, "constant - annealed", -annealed_ahead, -LITTLE)


def mitigates(field: str, sign: int) -> Callable[[Cells, Sequence[float]], Iterator[Contrast]]:
    """The KL term raises (sign 1) or lowers (-1) a field, at the beta of the method without it."""

    def tests(cells: Cells, rhos: Sequence[float]) -> Iterator[Contrast]:
        for rho in rhos:
            for plain, pessimistic in COLLAPSE:
                best = cells[rho, plain].best
                with_kl, without = (cells[rho, n].values(field, best) for n in (pessimistic, plain))
                yield Contrast(rho, f"{pessimistic} against {plain}", sign * (with_kl - without))

    return tests


def opposite(field: str) -> Callable[[Cells, Sequence[float]], Iterator[Contrast]]:
    """The mean length bias of e-DPO's reward models is on the other side of .5 than rho."""

    def tests(cells: Cells, rhos: Sequence[float]) -> Iterator[Contrast]:
        for rho in (rho for rho in rhos if rho != 0.5):
            bias = cells[rho, "e-dpo"].values(field) @ np.array(BIASES) - 0.5
            yield Contrast(rho, "mean bias", np.sign(0.5 - rho) * bias)

    return tests


CLAIMS = (
    Claim("(a) d-DPO, dp-DPO and e-DPO beat DPO and IPO, rho <= .5",
          beats(DISTILLED, PLAIN, lambda rho: rho <= 0.5)),
    Claim("(b) e-DPO is the best of the paper's six, rho < .5",
          beats(("e-dpo",), PAPERS, lambda rho: rho < 0.5)),
    Claim("(c) d-DPO is the best of the paper's six, rho > .6",
          beats(("d-dpo",), PAPERS, lambda rho: rho > 0.6)),
    Claim(f"(d) p-DPO adds less than {LITTLE:g} to DPO (effect: what DPO is ahead)", adds_little),
    Claim("(e) the KL term lowers the forward KL", mitigates("forward_kl", -1)),
    Claim("(e) the KL term raises log pi of the chosen", mitigates("chosen_logp", 1)),
    Claim("(e) the KL term raises log pi of the rejected", mitigates("rejected_logp", 1)),
    Claim("(f) the reward model that e-DPO selects has the bias opposite to rho's",
          opposite("selected")),
    Claim("(f) so has the one that is nearest on each pair (Figure B.3)", opposite("nearest")),
    Claim(f"(g) annealing gamma changes e-DPO by less than {LITTLE:g}", annealing),
    Claim("ours: hull beats e-DPO", beats(("hull",), ("e-dpo",))),
    Claim("ours: e-DPO beats the plain mean", beats(("e-dpo",), ("mean",))),
    Claim("ours: hull beats the plain mean", beats(("hull",), ("mean",))),
)  # fmt: skip


def verdicts(
    cells: Cells, rhos: Sequence[float], claims: Sequence[Claim] = CLAIMS
) -> list[Verdict]:
    """The verdict on each claim; Holm's adjustment is over the tests of all of them."""
    tests = {
        (i, j): test
        for i, claim in enumerate(claims)
        for j, test in enumerate(claim.tests(cells, rhos))
    }
    p = holm({key: wald_p(test.excess) for key, test in tests.items()})
    return [
        verdict(claim, [(test, p[key]) for key, test in tests.items() if key[0] == i])
        for i, claim in enumerate(claims)
    ]


def verdict(claim: Claim, tested: Sequence[tuple[Contrast, float]]) -> Verdict:
    """The tests of one claim, counted, with their adjusted p-values."""
    effects = [float(test.effect.mean()) for test, _ in tested]
    names: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for test, p in tested:
        agrees = bool(test.excess.mean() > 0) if p < SIGNIFICANT else None
        names[agrees].append(f"{test.what} at {test.rho:g}")
    counts = len(tested), len(names[True]), len(names[False])
    return Verdict(claim.text, *counts, min(effects), max(effects), names[False], names[None])
