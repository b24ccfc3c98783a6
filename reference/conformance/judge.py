"""One case put to an implementation, and what is made of its answer."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from reference.conformance.cases import Case, Tolerance
from reference.conformance.dialects import DIALECTS

OPTIONAL = ("per_example", "grads", "metrics")
BROKEN = (NotImplementedError, AttributeError, NameError, ImportError, ConnectionError)


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
    if not adapter.supports(case.objective, case.dialect):
        return Result(case, "skipped")
    try:
        answer = adapter.evaluate(case.objective, case.dialect, case.params, case.inputs)
    except Exception as error:  # whatever an implementation under test raises
        return _raised(case, error)
    if case.result == "reject":
        return Result(case, "failed", "accepted, where an error is due")
    if case.result == "unspecified":
        return Result(case, "passed")
    faults = list(differences(case, answer, dtype or dtype_of(adapter)))
    reported = dict(_leaves(answer))
    unchecked = tuple(name for name, _ in _leaves(case.expected) if _optional(name) and name not in reported)
    return Result(case, "failed" if faults else "passed", "; ".join(faults), unchecked)


def dtype_of(adapter: Adapter) -> str:
    return getattr(adapter, "dtype", "float32")


def differences(case: Case, answer: dict[str, Any], dtype: str) -> Iterator[str]:
    """What is missing from an answer or is out of tolerance, in words."""
    reported = dict(_leaves(answer))
    for name, expected in _leaves(case.expected):
        found, kind = reported.get(name), "grads" if name.startswith("grads.") else "values"
        if found is None:
            yield from () if _optional(name) else (f"{name} is missing",)
        elif isinstance(expected, str | list):
            yield from () if _plain(found) == expected else (f"{name}: {_plain(found)!r}, not {expected!r}",)
        else:
            yield from _distance(name, np.asarray(expected), np.asarray(found, float), case.tolerance[dtype][kind])


def followed(adapter: Adapter, failed: list[Case], dtype: str | None = None) -> list[str]:
    """The other dialects of the objective whose values and gradients explain all of these cases of one dialect."""
    objective, claimed = failed[0].objective, failed[0].dialect
    others = [name for kind, name in DIALECTS if kind == objective and name != claimed]
    return [name for name in others if all(_explains(name, adapter, case, dtype) for case in failed)]


def _explains(dialect: str, adapter: Adapter, case: Case, dtype: str | None) -> bool:
    try:
        expected = DIALECTS[case.objective, dialect](case.params, case.inputs)
        answer = adapter.evaluate(case.objective, case.dialect, case.params, case.inputs)
    except Exception:
        return False
    other = {name: value for name, value in expected.items() if name != "metrics"}
    return not any(differences(case._replace(expected=other), answer, dtype or dtype_of(adapter)))


def _raised(case: Case, error: Exception) -> Result:
    detail = f"{type(error).__name__}: {error}"
    if case.result == "value" or isinstance(error, BROKEN):
        return Result(case, "errored", detail)
    return Result(case, "passed", detail)


def _optional(name: str) -> bool:
    return name.split(".")[0] in OPTIONAL


def _plain(found: Any) -> Any:
    return found.tolist() if isinstance(found, np.ndarray) else found


def _leaves(outputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"grads": {"logits": x}}` as `("grads.logits", x)`."""
    for name, value in outputs.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _distance(name: str, expected: np.ndarray, found: np.ndarray, tolerance: Tolerance) -> Iterator[str]:
    if found.shape != expected.shape:
        yield f"{name}: shape {list(found.shape)}, not {list(expected.shape)}"
        return
    largest = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
    wrong = ~np.isclose(found, expected, rtol=0.0, atol=tolerance.rtol * largest + tolerance.atol)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = f"{name}{list(at)}" if at else name
        yield f"{where}: {found[at]:.9g}, not {expected[at]:.9g}"
