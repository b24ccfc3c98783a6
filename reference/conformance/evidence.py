"""What an implementation answers, and which hypotheses reproduce it."""

from collections.abc import Iterable, Iterator
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.cases import Case, Tolerance
from reference.conformance.hypotheses import Hypothesis
from reference.conformance.judge import (
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


def evidence_of(adapter: Adapter, cases: list[Case], dtype: str) -> Evidence:
    """Put cases to an implementation.

    Args:
        adapter: the implementation.
        cases: those of one dialect, the most telling first.
        dtype: how exact the answers are.

    Returns:
        Its answers.
    """
    asked = [item for case in cases for item in _ask(adapter, case)]
    return Evidence(asked, _outputs(asked), dtype)


def _ask(adapter: Adapter, case: Case) -> Iterator[Asked]:
    """The answer to a case; nothing where there is no answer to be explained."""
    answer, error = attempted(lambda: answer_of(adapter, case))
    if error:
        if case.result == "reject":
            yield Asked(case, None)
        return
    values = {name: _array(value) for name, value in reported(answer).items()}
    due = {name for name, _ in leaves(case.expected)}
    if case.result == "reject":
        yield Asked(case, values)
    if case.result == "value":
        yield Asked(case, {name: value for name, value in values.items() if name in due})


def _array(value: Any) -> Any:
    """Numbers as an array of floats; other values as they are, or as a text, which equals none."""
    numbers, error = attempted(lambda: numbers_of(value))
    if error is None:
        return numbers
    return value if isinstance(value, str | list) else str(value)


def _outputs(asked: list[Asked]) -> frozenset[str]:
    """The outputs that the implementation reports, and its refusals."""
    values = {name for case, answer in asked if case.result == "value" for name in answer or ()}
    refusals = {REFUSALS, ACCEPTED} if any(case.result == "reject" for case, _ in asked) else set()
    return frozenset(values | refusals)


def size_of(case: Case) -> int:
    """The number of numbers, or characters, of a case.

    Args:
        case: the case.
    """
    values = case.inputs.values()
    return sum(v.size if isinstance(v, np.ndarray) else len(str(v)) for v in values)


def searched(
    hypotheses: Iterable[Hypothesis], evidence: Evidence, wrong: frozenset[str]
) -> list[Found]:
    """The hypotheses that reproduce a wrong output.

    Args:
        hypotheses: in the order in which they are named.
        evidence: the answers.
        wrong: names of outputs.

    Returns:
        Each with what it reproduces.
    """
    made = (Found(reproduced(h, evidence, wrong), h) for h in hypotheses)
    return [found for found in made if found.outputs]


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
        left -= contradicted(hypothesis, case, answer, left, evidence.dtype)
        if not left & wanted:
            return frozenset()
    return frozenset(name for name in left if not _vacuous(hypothesis, evidence, name))


def _vacuous(hypothesis: Hypothesis, evidence: Evidence, name: str) -> bool:
    """Whether a gradient may be anything in all cases."""
    if not name.startswith("grads."):
        return False
    made = [evaluated(hypothesis, case) for case, _ in evidence.asked if case.result == "value"]
    return all(np.all(np.isinf(one[name])) for one in made if one and name in one)


def contradicted(
    hypothesis: Hypothesis, case: Case, answer: Any, outputs: frozenset[str], dtype: str
) -> set[str]:
    """Those of the outputs that a case speaks against.

    Args:
        hypothesis: what the implementation may compute.
        case: the case.
        answer: the implementation's, by outputs; None where it refused.
        outputs: their names.
        dtype: how exact the answers are.

    Returns:
        Names of outputs.
    """
    made = evaluated(hypothesis, case)
    if case.result == "reject":
        if made is None or answer is None:
            return {REFUSALS, ACCEPTED} if (made is None) != (answer is None) else set()
        names = (made.keys() & answer.keys()) - {name for name in made if "grads" in name}
        return {ACCEPTED} if any(differs(case, n, made, answer, dtype) for n in names) else set()
    if made is None:
        return set(outputs) - {REFUSALS, ACCEPTED}
    return {name for name in outputs & answer.keys() if differs(case, name, made, answer, dtype)}


def differs(case: Case, name: str, made: Any, answer: Any, dtype: str) -> bool:
    """Whether an output is another one; NaN in a hypothesis is a number that is not finite.

    Args:
        case: the case, whose tolerances apply.
        name: of the output.
        made: the hypothesis's outputs, where a gradient may be `mistake.ANY`.
        answer: the implementation's.
        dtype: how exact it is.
    """
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
    if kind == "grads":
        unknown |= np.isinf(expected)  # `mistake.ANY`
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


def error_of(expected: Any, value: Any) -> float:
    """The largest difference of an output from the right one; -1 where they cannot be compared.

    Args:
        expected: the right output; None where there is none.
        value: the implementation's.
    """
    if not (isinstance(value, np.ndarray) and isinstance(expected, np.ndarray | float)):
        return -1.0
    if np.shape(expected) != value.shape or not value.size:
        return -1.0
    error = np.abs(value - expected).max()
    return float(error) if np.isfinite(error) else np.inf


def evaluated(hypothesis: Hypothesis, case: Case) -> dict[str, Any] | None:
    """The outputs of a hypothesis; None where it refuses the inputs, or does not go with them.

    Args:
        hypothesis: what an implementation may compute.
        case: the case.
    """
    try:
        with np.errstate(all="ignore"):
            made = reported(hypothesis.function(case.params, case.inputs))
    except Exception:
        return None
    is_real = not any(np.iscomplexobj(value) for value in made.values())
    return made if is_real else None  # the root of a negative beta is complex
