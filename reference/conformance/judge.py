"""One case put to an implementation, and what is made of its answer."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import numpy as np

from reference.conformance.cases import Case, Tolerance
from reference.conformance.dialects import DIALECTS

DTYPES = ("float64", "float32", "bfloat16")
OPTIONAL = ("per_example", "grads", "metrics")
RAISED = (Exception, SystemExit)  # whatever an implementation under test raises
BROKEN = (NotImplementedError, AttributeError, NameError, ImportError, ConnectionError, SystemExit)


class Adapter(Protocol):
    """An implementation under test, NumPy in and out.

    An attribute `dtype` ("float64", "float32" or "bfloat16"; float32 where there is none) says how exact it is.
    """

    def supports(self, objective: str, dialect: str) -> bool: ...

    def evaluate(
        self, objective: str, dialect: str, params: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The outputs of the dialect's format page; `per_example`, `grads` and `metrics` where it has them.

        Errors: any, where the input is refused.
        """


class Result(NamedTuple):
    """outcome: passed, failed, skipped (not supported) or errored (raised where a value was due)."""

    case: Case
    outcome: str
    detail: str = ""
    unchecked: tuple[str, ...] = ()


def judge(adapter: Adapter, case: Case, dtype: str | None = None) -> Result:
    """`dtype` is how exact the adapter is said to be, in place of what it says itself."""
    try:
        if not adapter.supports(case.objective, case.dialect):
            return Result(case, "skipped")
    except RAISED as error:
        return Result(case, "errored", _words(error))
    try:
        answer = _answer(adapter, case)
    except RAISED as error:
        return _raised(case, error)
    if case.result == "reject":
        return Result(case, "failed", "accepted, where an error is due")
    if case.result == "unspecified":
        return Result(case, "passed")
    faults, reported = list(differences(case, answer, dtype or dtype_of(adapter))), _reported(answer)
    unchecked = tuple(name for name, _ in _leaves(case.expected) if _optional(name) and name not in reported)
    return Result(case, "failed" if faults else "passed", "; ".join(faults), unchecked)


def dtype_of(adapter: Adapter) -> str:
    """Errors: ValueError where there are no tolerances for it."""
    dtype = str(getattr(adapter, "dtype", "float32"))
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(DTYPES)}")
    return dtype


def differences(case: Case, answer: Any, dtype: str) -> Iterator[str]:
    """What is missing from an answer or is out of tolerance, in words."""
    if not isinstance(answer, dict):
        yield f"the answer is of type {type(answer).__name__}, where a dict of outputs is due"
        return
    reported = _reported(answer)
    for name, expected in _leaves(case.expected):
        found, kind = reported.get(name), "grads" if name.startswith("grads.") else "values"
        if found is None:
            yield from () if _optional(name) else (f"{name} is missing",)
        elif isinstance(expected, str | list):
            yield from () if _plain(found) == expected else (f"{name}: {_plain(found)!r}, not {expected!r}",)
        else:
            yield from _distance(name, np.asarray(expected), found, case.tolerance[dtype][kind])


def followed(adapter: Adapter, failed: list[Case], dtype: str | None = None) -> list[str]:
    """The other dialects of the objective whose values and gradients explain all of these cases of one dialect.

    Cases in which only metrics are wrong say nothing of the dialect.
    """
    objective, claimed = failed[0].objective, failed[0].dialect
    telling = [case for case in failed if not _explains(claimed, adapter, case, dtype)]
    others = [name for kind, name in DIALECTS if telling and kind == objective and name != claimed]
    return [name for name in others if all(_explains(name, adapter, case, dtype) for case in telling)]


def _explains(dialect: str, adapter: Adapter, case: Case, dtype: str | None) -> bool:
    try:
        expected = DIALECTS[case.objective, dialect](case.params, case.inputs)
        answer = _answer(adapter, case)
    except RAISED:
        return False
    other = {name: value for name, value in expected.items() if name != "metrics"}
    return not any(differences(case._replace(expected=other), answer, dtype or dtype_of(adapter)))


def _answer(adapter: Adapter, case: Case) -> Any:
    """Of copies: what an implementation does to its inputs must not change the next question."""
    return adapter.evaluate(case.objective, case.dialect, deepcopy(case.params), deepcopy(case.inputs))


def _raised(case: Case, error: BaseException) -> Result:
    """Where anything may happen, an error may; but a program that is gone has not answered."""
    broken = {"value": RAISED, "reject": BROKEN, "unspecified": (ConnectionError,)}[case.result]
    return Result(case, "errored" if isinstance(error, broken) else "passed", _words(error))


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _optional(name: str) -> bool:
    return name.split(".")[0] in OPTIONAL


def _plain(found: Any) -> Any:
    """As JSON has it: arrays of any library, and tuples, as lists."""
    if isinstance(found, dict):
        return {name: _plain(item) for name, item in found.items()}
    if isinstance(found, list | tuple):
        return [_plain(item) for item in found]
    return found.tolist() if hasattr(found, "tolist") else found


def _numbers(found: Any) -> np.ndarray:
    """Errors: any, where `found` is no array of real numbers; NumPy alone would read text as numbers."""
    array = np.asarray(found)
    if array.dtype.kind in "USc":
        raise TypeError(f"of type {array.dtype}")
    return array.astype(float)


def _reported(answer: Any) -> dict[str, Any]:
    leaves = _leaves(answer) if isinstance(answer, dict) else ()
    return {name: value for name, value in leaves if value is not None}


def _leaves(outputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"grads": {"logits": x}}` as `("grads.logits", x)`."""
    for name, value in outputs.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _distance(name: str, expected: np.ndarray, answer: Any, tolerance: Tolerance) -> Iterator[str]:
    try:
        found = _numbers(answer)
    except Exception as error:  # whatever an array of another library raises
        yield f"{name}: no array of numbers: {error}"
        return
    if found.shape != expected.shape:
        yield f"{name}: shape {list(found.shape)}, not {list(expected.shape)}"
        return
    largest = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    wrong = ~np.isclose(found, expected, rtol=0.0, atol=tolerance.rtol * largest + tolerance.atol)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f"{name}{list(at)}" if at else name
        yield f"{where}: {found[at]:.9g}, not {expected[at]:.9g}"
