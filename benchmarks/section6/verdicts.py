"""What the worlds say of the claims of section 6, and of ours."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.section6.variations import CONSTANT, Cells
from reference.worlds import BIASES
from scale.paper import claims
from scale.paper.claims import LITTLE, Difference, Verdict, judge
from scale.paper.figures import COLLAPSE

Differences = Callable[[Cells, Sequence[float]], Iterator[Difference]]


class Claim(NamedTuple):
    """A claim, and its differences: (cells, rhos) -> differences in each world."""

    text: str
    differences: Differences


def advantage(cells: Cells, rho: float, method: str) -> np.ndarray:
    return cells[rho, method].values("advantage")


def difference(cells: Cells, rho: float, better: str, worse: str) -> np.ndarray:
    return advantage(cells, rho, better) - advantage(cells, rho, worse)


def at(rho: float, what: str, effect: np.ndarray, at_least: float = 0.0) -> Difference:
    """A difference at one rho, in each world [N]."""
    return Difference(f"{what} at {rho:g}", list(effect[:, None]), at_least)


def between_methods(claim: claims.Claim) -> Claim:
    """The same claim in the bandit, at each of its rhos."""

    def differences(cells: Cells, rhos: Sequence[float]) -> Iterator[Difference]:
        for rho in filter(claim.where, rhos):
            for a in claim.better:
                for b in (name for name in claim.worse if name != a):
                    yield at(rho, f"{a} - {b}", difference(cells, rho, a, b), claim.at_least)

    return Claim(claim.text, differences)


def annealing(cells: Cells, rhos: Sequence[float]) -> Iterator[Difference]:
    """e-DPO with an annealed gamma and with a constant one are within `LITTLE` (two tests)."""
    for rho in rhos:
        annealed_ahead = difference(cells, rho, "e-dpo", CONSTANT)
        yield at(rho, "annealed - constant", annealed_ahead, -LITTLE)
        yield at(rho, "constant - annealed", -annealed_ahead, -LITTLE)


def mitigates(field: str, sign: int) -> Differences:
    """The KL term raises (sign 1) or lowers (-1) a field, at the beta of the method without it."""

    def differences(cells: Cells, rhos: Sequence[float]) -> Iterator[Difference]:
        for rho in rhos:
            for plain, pessimistic in COLLAPSE:
                best = cells[rho, plain].best
                with_kl, without = (cells[rho, n].values(field, best) for n in (pessimistic, plain))
                yield at(rho, f"{pessimistic} against {plain}", sign * (with_kl - without))

    return differences


def opposite(field: str) -> Differences:
    """The mean length bias of e-DPO's reward models is on the other side of .5 than rho."""

    def differences(cells: Cells, rhos: Sequence[float]) -> Iterator[Difference]:
        for rho in (rho for rho in rhos if rho != 0.5):
            bias = cells[rho, "e-dpo"].values(field) @ np.array(BIASES) - 0.5
            yield at(rho, "mean bias", np.sign(0.5 - rho) * bias)

    return differences


CLAIMS = (
    *map(between_methods, claims.CLAIMS[1:5]),
    Claim(claims.LOWER_KL, mitigates("forward_kl", -1)),
    Claim(claims.HIGHER_CHOSEN, mitigates("chosen_logp", 1)),
    Claim(claims.HIGHER_REJECTED, mitigates("rejected_logp", 1)),
    Claim(claims.OPPOSITE, opposite("nearest")),
    Claim("(f) so has the one that e-dpo selects on all of D_rho", opposite("selected")),
    Claim(claims.ANNEALING, annealing),
    *map(between_methods, claims.CLAIMS[5:]),
)


def verdicts(
    cells: Cells, rhos: Sequence[float], claims: Sequence[Claim] = CLAIMS
) -> list[Verdict]:
    """The verdict on each claim."""
    return judge({claim.text: [*claim.differences(cells, rhos)] for claim in claims})
