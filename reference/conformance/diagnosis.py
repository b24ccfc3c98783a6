"""Which hypotheses reproduce an implementation's numbers on ALL the cases of a dialect.

Outputs are looked at one by one, since a loss may be wrong where its gradient is right. Which
inputs are refused is looked at by itself.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.cases import Case, Tolerance
from reference.conformance.hypotheses import (
    Family,
    Hypothesis,
    Key,
    beyond,
    compound,
    families,
    right,
    simple,
)
from reference.conformance.judge import (
    OPTIONAL,
    RAISED,
    Adapter,
    answer_of,
    difference,
    leaves,
    reported,
)

REFUSALS, ACCEPTED = "refusals", "what is accepted"
"""Which inputs are refused; and, of those that should be and are not, the numbers."""
SCALES = 10.0 ** np.linspace(-3, 3, 25)
GRID = np.concatenate([-SCALES[::-1], SCALES])
"""Constants between which one is looked for."""


class Part(NamedTuple):
    """What some wrong outputs are.

    Attributes:
        outputs: their names.
        hypotheses: those that reproduce them, and that nothing tells apart; none where there is
            none.
    """

    outputs: tuple[str, ...]
    hypotheses: tuple[Hypothesis, ...]


class Diagnosis(NamedTuple):
    """What an implementation computes in place of a dialect.

    Attributes:
        dialect: the claimed `objective/dialect`.
        parts: the wrong outputs.
        whole: the first part's hypotheses reproduce all outputs, those that are right too.
        smallest: the id of the failing case with the fewest numbers.
    """

    dialect: str
    parts: tuple[Part, ...]
    whole: bool
    smallest: str

    @property
    def known(self) -> bool:
        """Every wrong output is explained."""
        return all(part.hypotheses for part in self.parts)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of all mistakes that it names."""
        named = (h.flags for part in self.parts for h in part.hypotheses)
        return tuple(dict.fromkeys(flag for flags in named for flag in flags))


class Asked(NamedTuple):
    """A case, and the outputs that the implementation answered: None where it refused."""

    case: Case
    answer: dict[str, Any] | None


class Evidence(NamedTuple):
    """What an implementation answers of one dialect; the smallest failing cases come first."""

    asked: list[Asked]
    outputs: frozenset[str]
    dtype: str


class Found(NamedTuple):
    """A hypothesis and the outputs that it reproduces on all cases."""

    outputs: frozenset[str]
    hypothesis: Hypothesis


def diagnose(adapter: Adapter, cases: list[Case], failed: set[str], dtype: str) -> Diagnosis | None:
    """Search for what an implementation computes in place of one dialect.

    Args:
        adapter: the implementation.
        cases: all cases of the dialect, whatever came of them.
        failed: ids of those that failed.
        dtype: how exact the answers are.

    Returns:
        The diagnosis; None where no output of an answered case is wrong.
    """
    cases = sorted(cases, key=lambda case: (case.id not in failed, _size(case)))
    asked = [item for case in cases for item in _ask(adapter, case)]
    evidence, key = Evidence(asked, _outputs(asked), dtype), (cases[0].objective, cases[0].dialect)
    wrong = evidence.outputs - reproduced(right(*key), evidence, evidence.outputs) - {ACCEPTED}
    if not wrong:
        return None
    values = evidence._replace(outputs=evidence.outputs - {REFUSALS, ACCEPTED})
    parts = _parts(key, values, wrong - {REFUSALS})
    whole = len(parts) < 2 and _any_reproduces(parts, evidence, values.outputs)
    if REFUSALS in wrong and not _any_reproduces(parts, evidence, frozenset([REFUSALS])):
        parts.append(_refusals(key, evidence, parts))
    return Diagnosis("/".join(key), tuple(parts), whole, cases[0].id)


def _refusals(key: Key, evidence: Evidence, parts: list[Part]) -> Part:
    """What accepts the same inputs, and computes the same of them; the values may be mistaken."""
    mistaken = [h for part in parts for h in part.hypotheses] if len(parts) == 1 else []
    hypotheses = beyond(*key, mistaken) if parts else simple(*key)
    due = frozenset([REFUSALS, ACCEPTED])
    found = [one for one in _found(hypotheses, evidence, due) if one.outputs >= due]
    named = {one.hypothesis.name: one.hypothesis for one in _best(found, due, evidence)}
    return Part((REFUSALS,), tuple(named.values()))


def _any_reproduces(parts: list[Part], evidence: Evidence, outputs: frozenset[str]) -> bool:
    hypotheses = [hypothesis for part in parts for hypothesis in part.hypotheses]
    return any(reproduced(h, evidence, outputs) >= outputs for h in hypotheses)


def reproduced(
    hypothesis: Hypothesis, evidence: Evidence, wanted: frozenset[str]
) -> frozenset[str]:
    """The outputs that a hypothesis reproduces on all cases.

    Args:
        hypothesis: what the implementation may compute.
        evidence: its answers.
        wanted: the outputs of interest; where none of them is left, the search ends early.

    Returns:
        Names of outputs.
    """
    left = evidence.outputs
    for case, answer in evidence.asked:
        left -= _contradicted(hypothesis, case, answer, left, evidence.dtype)
        if not left & wanted:
            return frozenset()
    return left


def _parts(key: Key, evidence: Evidence, wrong: frozenset[str]) -> list[Part]:
    """The wrong outputs by what explains most of them.

    Two mistakes together come before two mistakes in two outputs.
    """
    if not wrong:
        return []
    one, two = _simple(key, evidence, wrong), list[Found]()
    if not any(found.outputs >= wrong for found in one):
        cases = [one.case for one in evidence.asked if one.case.result == "value"]
        usual = [(case, _evaluated(right(*key), case)) for case in cases]
        two = _found(compound(*key, partial(_matters, usual, evidence.dtype)), evidence, wrong)
        one = [found for found in two if found.outputs >= wrong] or one
    parts, left = list[Part](), wrong
    while best := _best(one, left, evidence) or _best(two, left, evidence):
        explained = best[0].outputs & left
        named = {found.hypothesis.name: found.hypothesis for found in best}
        parts.append(Part(tuple(sorted(explained)), tuple(named.values())))
        left -= explained
    if any(name.split(".")[0] not in OPTIONAL for name in left):
        return [Part(tuple(sorted(wrong)), ())]  # without the loss, its gradients tell little
    return parts + [Part(tuple(sorted(left)), ())] * bool(left)


def _matters(usual: list[tuple[Case, Any]], dtype: str, hypothesis: Hypothesis) -> bool:
    """Whether a hypothesis differs from the usual one, but for what can be wrong by itself."""
    for case, expected in usual:
        made = _evaluated(hypothesis, case)
        if made is None:
            continue
        names = [name for name in expected if name.split(".")[0] not in ("per_example", "metrics")]
        if any(_differs(case, name, made, expected, dtype) for name in names):
            return True
    return False


def _found(
    hypotheses: Iterable[Hypothesis], evidence: Evidence, wrong: frozenset[str]
) -> list[Found]:
    made = (Found(reproduced(h, evidence, wrong), h) for h in hypotheses)
    return [found for found in made if found.outputs]


def _best(found: list[Found], wrong: frozenset[str], evidence: Evidence) -> list[Found]:
    """Those that explain most: of them those that reproduce the right outputs too, the simplest."""

    def rank(one: Found) -> tuple[int, bool, int]:
        explained = len(one.outputs & wrong)
        return -explained, not one.outputs >= evidence.outputs, one.hypothesis.cost

    useful = sorted((one for one in found if one.outputs & wrong), key=rank)
    return [one for one in useful if rank(one) == rank(useful[0])]


def _simple(key: Key, evidence: Evidence, wrong: frozenset[str]) -> list[Found]:
    found = _found(simple(*key), evidence, wrong)
    if any(one.outputs >= wrong for one in found):
        return found
    outputs = {"loss"} & wrong or wrong - {REFUSALS}
    cases = {output: _largest_wrong(right(*key), evidence, output) for output in outputs}
    for family in families(*key):
        left = set(outputs)
        while left:
            output = min(left)
            fitted = _fitted(family, cases[output], evidence, output)
            members = _found(fitted, evidence, wrong)
            names = {member.hypothesis.name for member in members}
            found += members[:1] if len(names) == 1 else []  # of several, none is determined
            left -= {output}.union(*(member.outputs for member in members))
    return found


def _largest_wrong(usual: Hypothesis, evidence: Evidence, output: str) -> Asked:
    """The largest case of which an output is wrong."""
    wrong = [
        one
        for one in evidence.asked
        if one.case.result == "value"
        and _contradicted(usual, *one, frozenset([output]), evidence.dtype)
    ]
    return max(wrong, key=lambda one: _size(one.case))


def _fitted(family: Family, asked: Asked, evidence: Evidence, output: str) -> Iterator[Hypothesis]:
    """The members of a family that reproduce one output of a case.

    A constant is rounded to a few digits where that is enough.
    """
    case, answer = asked.case, asked.answer or {}
    one = evidence._replace(asked=[asked])

    def gap(constant: float) -> float:
        made = _evaluated(family(constant), case) or {}
        return np.sum(made[output]) - np.sum(answer[output]) if output in made else np.nan

    for root in _roots(gap):
        rounded = (float(f"{root:.{digits}g}") for digits in (1, 2, 3, 17))
        members = (family(constant) for constant in rounded)
        yield from [m for m in members if output in reproduced(m, one, frozenset([output]))][:1]


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


def _contradicted(
    hypothesis: Hypothesis, case: Case, answer: Any, outputs: frozenset[str], dtype: str
) -> set[str]:
    """Those of the outputs that this case speaks against."""
    made = _evaluated(hypothesis, case)
    if case.result == "reject":
        if made is None or answer is None:
            return {REFUSALS, ACCEPTED} if (made is None) != (answer is None) else set()
        names = (made.keys() & answer.keys()) - {name for name in made if "grads" in name}
        return {ACCEPTED} if any(_differs(case, n, made, answer, dtype) for n in names) else set()
    if made is None:
        return set(outputs) - {REFUSALS, ACCEPTED}
    return {name for name in outputs & answer.keys() if _differs(case, name, made, answer, dtype)}


def _differs(case: Case, name: str, made: Any, answer: Any, dtype: str) -> bool:
    """In a hypothesis NaN is a number that is not finite, whichever."""
    if name not in made:
        return True
    expected, value = made[name], answer[name]
    if isinstance(expected, str | list) or isinstance(value, str | list):
        return any(difference(case, name, expected, value, dtype))
    kind = "grads" if name.startswith("grads.") else "values"
    near = _near(np.asarray(expected), np.asarray(value), case.tolerance[dtype][kind])
    if near is not None:
        return not near
    unknown = np.isnan(expected) & ~np.isfinite(value)
    expected, value = (np.where(unknown, 0.0, item) for item in (expected, value))
    return any(difference(case, name, expected, value, dtype))


def _near(expected: np.ndarray, value: np.ndarray, tolerance: Tolerance) -> bool | None:
    """Whether finite numbers agree as `difference` has it; None where one is not finite.

    Much of the time of a search is spent here.
    """
    if expected.shape != value.shape:
        return False
    if not value.size:
        return True
    if value.size == 1:
        number = float(expected.item())
        gap, size = abs(number - float(value.item())), abs(number)
    else:
        gap, size = np.abs(expected - value).max(), np.abs(expected).max()
    return bool(gap <= tolerance.rtol * size + tolerance.atol) if isfinite(gap) else None


def _evaluated(hypothesis: Hypothesis, case: Case) -> dict[str, Any] | None:
    """The outputs of a hypothesis; None where it refuses the inputs, or does not go with them."""
    try:
        with np.errstate(all="ignore"):
            return reported(hypothesis.function(case.params, case.inputs))
    except Exception:
        return None


def _ask(adapter: Adapter, case: Case) -> Iterator[Asked]:
    """The answer to a case; nothing where there is no answer to be explained."""
    try:
        answer = answer_of(adapter, case)
    except RAISED:
        if case.result == "reject":
            yield Asked(case, None)
        return
    due = {name for name, _ in leaves(case.expected)}
    if case.result == "reject":
        yield Asked(case, reported(answer))
    if case.result == "value":
        yield Asked(case, {name: _array(v) for name, v in reported(answer).items() if name in due})


def _array(value: Any) -> Any:
    """Numbers as floats; what is no array of numbers as text, which equals none."""
    if isinstance(value, str | list):
        return value
    try:
        return np.asarray(value).astype(float)
    except Exception:  # whatever an array of another library raises
        return str(value)


def _outputs(asked: list[Asked]) -> frozenset[str]:
    """The outputs that the implementation reports, and its refusals."""
    values = {name for case, answer in asked if case.result == "value" for name in answer or ()}
    refusals = {REFUSALS, ACCEPTED} if any(case.result == "reject" for case, _ in asked) else set()
    return frozenset(values | refusals)


def _size(case: Case) -> int:
    """The number of numbers, or characters, of a case."""
    values = case.inputs.values()
    return sum(v.size if isinstance(v, np.ndarray) else len(str(v)) for v in values)
