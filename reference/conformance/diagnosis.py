"""Which hypotheses reproduce an implementation's numbers on ALL the cases of a dialect.

Outputs are looked at one by one, since a loss may be wrong where its gradient is right. Which
inputs are refused is looked at by itself.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.cases import Case
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
    Adapter,
    answer_of,
    attempted,
    difference,
    leaves,
    numbers_of,
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
        two = _found(compound(*key), evidence, wrong)
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
    for family in families(*key):
        left = set(outputs)
        while left:
            output = min(left)
            members = _found(_fitted(family, evidence, output), evidence, wrong)
            names = {member.hypothesis.name for member in members}
            found += members[:1] if len(names) == 1 else []  # of several, none is determined
            left -= {output}.union(*(member.outputs for member in members))
    return found


def _fitted(family: Family, evidence: Evidence, output: str) -> Iterator[Hypothesis]:
    """The members of a family that reproduce one output of the largest case.

    A constant is rounded to a few digits where that is enough.
    """
    answers = [(case, answer) for case, answer in evidence.asked if answer and output in answer]
    case, answer = max(answers, key=lambda one: _size(one[0]))
    value, largest = _numbers(answer[output]), evidence._replace(asked=[Asked(case, answer)])

    def gap(constant: float) -> float:
        made = _evaluated(family(constant), case) or {}
        is_like = output in made and np.shape(made[output]) == value.shape
        return np.sum(made[output]) - np.sum(value) if is_like else np.nan

    for root in _roots(gap):
        rounded = (float(f"{root:.{digits}g}") for digits in (1, 2, 3, 17))
        members = (family(constant) for constant in rounded)
        yield from [m for m in members if output in reproduced(m, largest, frozenset([output]))][:1]


def _roots(gap: Callable[[float], float]) -> Iterator[float]:
    """Where a function changes its sign between two points of the grid, by bisection."""
    with np.errstate(all="ignore"):
        values = [gap(constant) for constant in GRID]
        for low, high, below, above in zip(GRID, GRID[1:], values, values[1:], strict=False):
            if not np.isfinite(below * above) or below * above > 0 or low * high < 0:
                continue
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if gap(middle) * below > 0 else (low, middle)
            yield (low + high) / 2


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
    if not isinstance(expected, str | list):
        value = _numbers(value)
    if not isinstance(expected, str | list) and np.shape(expected) == value.shape:
        unknown = np.isnan(expected) & ~np.isfinite(value)
        if np.any(unknown):
            expected, value = (np.where(unknown, 0.0, item) for item in (expected, value))
    return any(difference(case, name, expected, value, dtype))


def _numbers(value: Any) -> np.ndarray:
    """An output as an array; where it is none, one of a shape that no output has."""
    numbers, error = attempted(lambda: numbers_of(value))
    return np.full((1,) * 9, np.nan) if error else numbers


def _evaluated(hypothesis: Hypothesis, case: Case) -> dict[str, Any] | None:
    """The outputs of a hypothesis; None where it refuses the inputs, or does not go with them."""
    try:
        with np.errstate(all="ignore"):
            return reported(hypothesis.function(case.params, case.inputs))
    except Exception:
        return None


def _ask(adapter: Adapter, case: Case) -> Iterator[Asked]:
    """The answer to a case; nothing where there is no answer to be explained."""
    answer, error = attempted(lambda: answer_of(adapter, case))
    if error:
        if case.result == "reject":
            yield Asked(case, None)
        return
    due = {name for name, _ in leaves(case.expected)}
    if case.result == "reject":
        yield Asked(case, reported(answer))
    if case.result == "value":
        yield Asked(case, {name: v for name, v in reported(answer).items() if name in due})


def _outputs(asked: list[Asked]) -> frozenset[str]:
    """The outputs that the implementation reports, and its refusals."""
    values = {name for case, answer in asked if case.result == "value" for name in answer or ()}
    refusals = {REFUSALS, ACCEPTED} if any(case.result == "reject" for case, _ in asked) else set()
    return frozenset(values | refusals)


def _size(case: Case) -> int:
    """The number of numbers, or characters, of a case."""
    values = case.inputs.values()
    return sum(v.size if isinstance(v, np.ndarray) else len(str(v)) for v in values)
