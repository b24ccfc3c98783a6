"""One case is put to an implementation, and its answer is judged."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import numpy as np

from reference.conformance.answers import plain, readable, to_json
from reference.conformance.cases import Case, Tolerance

DTYPES = ("float64", "float32", "bfloat16")
OPTIONAL = ("per_example", "grads", "metrics")
BROKEN = (NotImplementedError, AttributeError, NameError, ImportError, MemoryError)
HARMLESS = {"value": (), "reject": ("refused",), "unspecified": ("refused", "broken")}
"""The kinds of error that a case may end with, by what is due."""


class Told(Exception):
    """What an implementation in another process raised, in the words of `words`.

    Args:
        text: the words.
        kind: as `kind_of` has it.
    """

    def __init__(self, text: str, kind: str = "refused"):
        super().__init__(text)
        self.kind = kind


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
    question = (case.objective, case.dialect)
    is_supported, error = attempted(lambda: bool(adapter.supports(*question)))
    if error or not is_supported:
        return Result(case, "errored", words(error)) if error else Result(case, "skipped")
    answer, error = attempted(lambda: answer_of(adapter, case))
    if error:
        is_harmless = kind_of(error) in HARMLESS[case.result]
        return Result(case, "passed" if is_harmless else "errored", words(error))
    if case.result == "reject":
        return Result(case, "failed", "accepted, where an error is due")
    if case.result == "unspecified":
        return Result(case, "passed")
    faults = list(differences(case, answer, dtype or dtype_of(adapter)))
    outcome = "failed" if faults else "passed"
    return Result(case, outcome, readable("; ".join(faults)), _unchecked(case, answer))


def attempted(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What an implementation returns, or what it raises: anything but Ctrl-C, which is the user's.

    Args:
        call: asks the implementation.

    Returns:
        The value and None, or None and the error.
    """
    try:
        return call(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, error


def kind_of(error: BaseException) -> str:
    """What an error says of its implementation.

    Args:
        error: what was raised.

    Returns:
        "gone": nothing answers any more. "broken": it is no refusal of the input. "refused".
    """
    if isinstance(error, Told):
        return error.kind
    if isinstance(error, ConnectionError):
        return "gone"
    return "broken" if isinstance(error, BROKEN) or not isinstance(error, Exception) else "refused"


def words(error: BaseException) -> str:
    """An error as a report has it.

    Args:
        error: what was raised.
    """
    if isinstance(error, Told):
        return str(error)
    text, unreadable = attempted(lambda: str(error))
    return readable(f"{type(error).__name__}: {'' if unreadable else text}")


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
        value = to_json(value)
        if value != expected:
            yield f"{name}: {value!r}, not {expected!r}"
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

    Returns:
        The answer, as `plain` has it.
    """
    return plain(
        adapter.evaluate(
            case.objective, case.dialect, deepcopy(case.params), deepcopy(case.inputs)
        )
    )


def _optional(name: str) -> bool:
    return name.split(".")[0] in OPTIONAL


def numbers_of(value: Any) -> np.ndarray:
    """An output as floats.

    Args:
        value: what `plain` returned.

    Raises:
        Exception: it is no array of real numbers; texts of digits are none.
    """
    array = np.asarray(value)
    if array.dtype.kind == "U":
        raise TypeError(value if isinstance(value, str) else "texts")
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
        numbers = numbers_of(answer)
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
