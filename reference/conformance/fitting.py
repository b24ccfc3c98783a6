"""Constants that no case gives, from the answers of one case."""

from collections.abc import Callable, Iterable, Iterator
from math import exp, isfinite, log
from typing import Any

import numpy as np

from reference.conformance.cases import Case
from reference.conformance.evidence import (
    REFUSALS,
    Asked,
    Evidence,
    Found,
    contradicted,
    error_of,
    evaluated,
    reproduced,
    searched,
    size_of,
)
from reference.conformance.hypotheses import Family, Hypothesis, Key, right

SCALES = 10.0 ** np.linspace(-3, 3, 25)
GRID = np.concatenate([-SCALES[::-1], SCALES])
"""Constants between which one is looked for."""
Outputs = dict[str, Any]
Made = Callable[[Case, float], Outputs]
"""A case and a constant -> outputs."""


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
    cases = {output: _telling(right(*key), evidence, output) for output in outputs}
    for family in families:
        left, made = set(outputs), _made(family)
        while left:
            output = min(left)
            known = _members(family, made, cases[output], evidence, output)
            members = searched(known, evidence, wrong)
            names = {member.hypothesis.name for member in members}
            found += members[:1] if len(names) == 1 else []
            left -= {output}.union(*(member.outputs for member in members))
    return found


def _telling(usual: Hypothesis, evidence: Evidence, output: str) -> list[Asked]:
    """The largest case of which an output is wrong, and the one where it is most wrong."""
    wrong = [
        one
        for one in evidence.asked
        if one.case.result == "value"
        and contradicted(usual, *one, frozenset([output]), evidence.dtype)
    ]

    def error(one: Asked) -> float:
        due = evaluated(usual, one.case) or {}
        largest = error_of(due.get(output), (one.answer or {}).get(output))
        return largest if isfinite(largest) else -1.0

    largest = max(wrong, key=lambda one: size_of(one.case))
    return [_beginning(one, usual) for one in (largest, max(wrong, key=error))]


def _beginning(asked: Asked, usual: Hypothesis) -> Asked:
    """The losses of a run up to the first that is clearly wrong, which are fast to compute.

    Another case stays as it is.
    """
    case, answer = asked
    due, losses = ((made or {}).get("losses", 0.0) for made in (evaluated(usual, case), answer))
    if not 0 < error_of(due, losses) < np.inf:
        return asked
    gaps = np.abs(losses - due)
    steps = 1 + int(np.argmax(gaps >= gaps.max() / 100))
    inputs = case.inputs | {"batches": case.inputs["batches"][:steps]}
    return Asked(case._replace(inputs=inputs), {"losses": losses[:steps]})


def _made(family: Family) -> Made:
    """What the members of a family make of a case; each is evaluated once."""
    known = dict[tuple[str, float], Outputs]()

    def made(case: Case, constant: float) -> Outputs:
        key = case.id, constant
        if key not in known:
            known[key] = evaluated(family(constant), case) or {}
        return known[key]

    return made


def _members(
    family: Family, made: Made, asked: list[Asked], evidence: Evidence, output: str
) -> Iterator[Hypothesis]:
    """The members of a family that reproduce one output of cases, where their neighbours do not.

    A constant is found in the first case; it, or its exponential, is rounded to a few digits where
    that is enough. Where the first case does not tell constants apart, the next one is asked.
    """
    case, value = asked[0].case, (asked[0].answer or {}).get(output)
    if not isinstance(value, np.ndarray):
        return

    def gap(constant: float) -> float:
        outputs = made(case, constant)
        return np.sum(outputs[output]) - np.sum(value) if output in outputs else np.nan

    def fits(constant: float, cases: list[Asked]) -> bool:
        of_cases = evidence._replace(asked=cases)
        return output in reproduced(family(constant), of_cases, frozenset([output]))

    for root in _roots(gap):
        near = [constant for constant in _rounded(root) if fits(constant, asked[:1])]
        constants = [constant for constant in near if fits(constant, asked)][:1]
        determined = [c for c in constants if not (fits(1.01 * c, asked) or fits(0.99 * c, asked))]
        yield from (family(c) for c in determined)
        if near and not determined and asked[1:]:
            yield from _members(family, made, asked[1:], evidence, output)
            return


def _rounded(root: float) -> Iterator[float]:
    """A constant with few digits, the logarithm of one, and the constant as it is."""
    yield from (float(f"{root:.{digits}g}") for digits in (1, 2, 3))
    if -700 < root < 0:  # the exponential is a small number
        yield from (log(float(f"{exp(root):.{digits}g}")) for digits in (1, 2, 3))
    yield root


def _roots(gap: Callable[[float], float]) -> Iterator[float]:
    """Where a function changes its sign between two points of the grid.

    One that is the same at points of the whole grid is constant, and has none.
    """
    with np.errstate(all="ignore"):
        spread = np.array([gap(constant) for constant in GRID[::8]])
        if np.array_equal(spread, np.full_like(spread, spread[0]), equal_nan=True):
            return
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
