"""Constants that no case gives, from the answers of one case."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from reference.conformance.evidence import (
    REFUSALS,
    Asked,
    Evidence,
    Found,
    contradicted,
    evaluated,
    reproduced,
    searched,
    size_of,
)
from reference.conformance.hypotheses import Family, Hypothesis, Key, right

SCALES = 10.0 ** np.linspace(-3, 3, 25)
GRID = np.concatenate([-SCALES[::-1], SCALES])
"""Constants between which one is looked for."""


def fitted(
    key: Key, families: Iterable[Family], evidence: Evidence, wrong: frozenset[str]
) -> list[Found]:
    """What members of families explain; of a family with several none is determined.

    Args:
        key: the claimed dialect.
        families: a constant -> a hypothesis.
        evidence: the answers.
        wrong: the outputs of interest.

    Returns:
        Each member with what it reproduces.
    """
    found = list[Found]()
    outputs = {"loss"} & wrong or wrong - {REFUSALS}
    cases = {output: _largest_wrong(right(*key), evidence, output) for output in outputs}
    for family in families:
        left = set(outputs)
        while left:
            output = min(left)
            members = searched(_members(family, cases[output], evidence, output), evidence, wrong)
            names = {member.hypothesis.name for member in members}
            found += members[:1] if len(names) == 1 else []
            left -= {output}.union(*(member.outputs for member in members))
    return found


def _largest_wrong(usual: Hypothesis, evidence: Evidence, output: str) -> Asked:
    """The largest case of which an output is wrong."""
    wrong = [
        one
        for one in evidence.asked
        if one.case.result == "value"
        and contradicted(usual, *one, frozenset([output]), evidence.dtype)
    ]
    return max(wrong, key=lambda one: size_of(one.case))


def _members(family: Family, asked: Asked, evidence: Evidence, output: str) -> Iterator[Hypothesis]:
    """The members of a family that reproduce one output of a case, where their neighbours do not.

    A constant is rounded to a few digits where that is enough.
    """
    case, value = asked.case, (asked.answer or {}).get(output)
    one = evidence._replace(asked=[asked])
    if not isinstance(value, np.ndarray):
        return

    def gap(constant: float) -> float:
        made = evaluated(family(constant), case) or {}
        return np.sum(made[output]) - np.sum(value) if output in made else np.nan

    def fits(constant: float) -> bool:
        return output in reproduced(family(constant), one, frozenset([output]))

    for root in _roots(gap):
        rounded = (float(f"{root:.{digits}g}") for digits in (1, 2, 3, 17))
        constants = [constant for constant in rounded if fits(constant)][:1]
        yield from (family(c) for c in constants if not (fits(1.01 * c) or fits(0.99 * c)))


def _roots(gap: Callable[[float], float]) -> Iterator[float]:
    """Where a function changes its sign between two points of the grid."""
    with np.errstate(all="ignore"):
        values = [gap(constant) for constant in GRID]
        for low, high, below, above in zip(GRID, GRID[1:], values, values[1:], strict=False):
            if np.isfinite(below * above) and below * above <= 0 and low * high > 0:
                yield _root(gap, low, high, below, above)


def _root(
    gap: Callable[[float], float], low: float, high: float, below: float, above: float
) -> float:
    """The root between two points: false position, and every third time the middle."""
    for turn in range(60):
        if not below or not above or abs(high - low) <= 1e-15 * abs(high):
            break
        share = 0.5 if turn % 3 == 2 else below / (below - above)
        middle = low + share * (high - low)
        value = gap(middle)
        if value * below > 0:
            low, below = middle, value
        else:
            high, above = middle, value
    return low if abs(below) < abs(above) else high
