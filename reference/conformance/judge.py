"""One case is put to an implementation, and its answer is judged."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import numpy as np

from reference.conformance.cases import Case, Tolerance

DTYPES = ("float64", "float32", "bfloat16")
OPTIONAL = ("per_example", "grads", "metrics")
RAISED = (Exception, SystemExit)  # whatever an implementation under test raises
BROKEN = (NotImplementedError, AttributeError, NameError, ImportError, ConnectionError, SystemExit)


class Adapter(Protocol):
    """An implementation under test, NumPy in and out.

    An attribute `dtype` says how exact it is: "float64", "float32" or "bfloat16". Where there is
    none, "float32" is assumed.
    """

    def supports(self, objective: str, dialect: str) -> bool:
        """Whether the implementation claims to compute this dialect of this objective."""

    def evaluate(
        self, objective: str, dialect: str, params: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The implementation's answer to one case.

        Args:
            objective, dialect: what to compute.
            params: name -> number.
            inputs: name -> array; of `data`, plain JSON.

        Returns:
            The outputs that the dialect's format page lists; `per_example`, `grads` and `metrics`
            where the implementation has them.

        Raises:
            Exception: any, where the input is refused.
        """


class Result(NamedTuple):
    """What came of one case.

    Attributes:
        outcome: "passed", "failed", "skipped" (not supported) or "errored" (raised where a value
            was due).
        detail: what was wrong, in words.
        unchecked: outputs that the implementation did not report.
    """

    case: Case
    outcome: str
    detail: str = ""
    unchecked: tuple[str, ...] = ()


def judge(adapter: Adapter, case: Case, dtype: str | None = None) -> Result:
    """Put one case to an implementation.

    Args:
        adapter: the implementation.
        case: the case.
        dtype: how exact the answer must be, in place of what the adapter says of itself.

    Returns:
        The result, whatever the implementation raises.
    """
    try:
        if not adapter.supports(case.objective, case.dialect):
            return Result(case, "skipped")
    except RAISED as error:
        return Result(case, "errored", _words(error))
    try:
        answer = answer_of(adapter, case)
    except RAISED as error:
        return _raised(case, error)
    if case.result == "reject":
        return Result(case, "failed", "accepted, where an error is due")
    if case.result == "unspecified":
        return Result(case, "passed")
    faults = list(differences(case, answer, dtype or dtype_of(adapter)))
    outcome = "failed" if faults else "passed"
    return Result(case, outcome, "; ".join(faults), _unchecked(case, answer))


def dtype_of(adapter: Adapter) -> str:
    """How exact an adapter says it is.

    Args:
        adapter: the implementation.

    Returns:
        One of `DTYPES`.

    Raises:
        ValueError: there are no tolerances for its dtype.
    """
    dtype = str(getattr(adapter, "dtype", "float32"))
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(DTYPES)}")
    return dtype


def differences(case: Case, answer: Any, dtype: str) -> Iterator[str]:
    """What is missing from an answer or is out of tolerance.

    Args:
        case: the case, whose result is "value".
        answer: what the implementation returned.
        dtype: one of `DTYPES`, whose tolerances apply.

    Returns:
        One text for each difference.
    """
    if not isinstance(answer, dict):
        yield f"the answer is of type {type(answer).__name__}, where a dict of outputs is due"
        return
    values = reported(answer)
    for name, expected in leaves(case.expected):
        if name not in values:
            yield from () if _optional(name) else (f"{name} is missing",)
        else:
            yield from difference(case, name, expected, values[name], dtype)


def difference(case: Case, name: str, expected: Any, value: Any, dtype: str) -> Iterator[str]:
    """How one output differs, if it does.

    Args:
        case: the case, whose tolerances apply.
        name: of the output, as `leaves` has it.
        expected: what it should be.
        value: what the implementation returned.
        dtype: one of `DTYPES`.

    Returns:
        No text, or one.
    """
    if isinstance(expected, str | list):
        if _plain(value) != expected:
            yield f"{name}: {_plain(value)!r}, not {expected!r}"
        return
    kind = "grads" if name.startswith("grads.") else "values"
    yield from _distance(name, np.asarray(expected), value, case.tolerance[dtype][kind])


def _unchecked(case: Case, answer: Any) -> tuple[str, ...]:
    """The optional outputs that an answer does not have."""
    optional = [name for name, _ in leaves(case.expected) if _optional(name)]
    return tuple(name for name in optional if name not in reported(answer))


def answer_of(adapter: Adapter, case: Case) -> Any:
    """The answer for copies of the case's values: an implementation may change its inputs.

    Args:
        adapter: the implementation.
        case: the case.
    """
    return adapter.evaluate(
        case.objective, case.dialect, deepcopy(case.params), deepcopy(case.inputs)
    )


def _raised(case: Case, error: BaseException) -> Result:
    """Where anything may happen, an error may; but a program that is gone has not answered."""
    broken = {"value": RAISED, "reject": BROKEN, "unspecified": (ConnectionError,)}[case.result]
    return Result(case, "errored" if isinstance(error, broken) else "passed", _words(error))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _optional(name: str) -> bool:
    return name.split(".")[0] in OPTIONAL


def _plain(value: Any) -> Any:
    """As JSON has it: arrays of any library, and tuples, as lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _numbers(value: Any) -> np.ndarray:
    """The value as floats. Raises where it is no array of real numbers, text of digits included."""
    array = np.asarray(value)
    if array.dtype.kind in "USc":
        raise TypeError(f"of type {array.dtype}")
    return array.astype(float)


def reported(answer: Any) -> dict[str, Any]:
    """The outputs that an answer has, by the names of `leaves`.

    Args:
        answer: what `evaluate` returned.
    """
    named = leaves(answer) if isinstance(answer, dict) else ()
    return {name: value for name, value in named if value is not None}


def leaves(outputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"grads": {"logits": x}}` as `("grads.logits", x)`.

    Args:
        outputs: a dictionary, whose values may be dictionaries.
        prefix: what stands before each name.
    """
    for name, value in outputs.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _distance(name: str, expected: np.ndarray, answer: Any, tolerance: Tolerance) -> Iterator[str]:
    try:
        numbers = _numbers(answer)
    except Exception as error:  # whatever an array of another library raises
        yield f"{name}: no array of numbers: {error}"
        return
    if numbers.shape != expected.shape:
        yield f"{name}: shape {list(numbers.shape)}, not {list(expected.shape)}"
        return
    largest = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    atol = tolerance.rtol * largest + tolerance.atol
    wrong = ~np.isclose(numbers, expected, rtol=0.0, atol=atol)
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f"{name}{list(index)}" if index else name
        yield f"{where}: {numbers[index]:.9g}, not {expected[index]:.9g}"
