"""Test vectors: one JSON file an objective and dialect, checked against `vectors_v1/schema.json` by the tests."""

import json
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VECTORS = Path(__file__).parent / "vectors_v1"


class Tolerance(NamedTuple):
    """A number passes if it is within `rtol` times the largest of its expected array, plus `atol`."""

    rtol: float
    atol: float


class Case(NamedTuple):
    """One question and its answer.

    flags:     the bugs that the case exists to catch.
    params:    name -> number; inputs: name -> array. Floats are float64, others integers. Of `data`: plain JSON.
    result:    "value": the outputs must be `expected`. "reject": an error must be raised. "unspecified": anything.
    tolerance: dtype -> kind ("values", "grads") -> Tolerance.
    """

    id: str
    objective: str
    dialect: str
    equation: str
    comment: str
    flags: tuple[str, ...]
    params: dict[str, Any]
    inputs: dict[str, Any]
    result: str
    expected: dict[str, Any]
    tolerance: dict[str, dict[str, Tolerance]]


def load_cases(objective: str = "*", dialect: str = "*") -> list[Case]:
    """All cases, in a stable order. Errors: ValueError where no file has that objective and dialect."""
    wanted = f"{objective}/{dialect}"
    paths = [p for p in sorted(VECTORS.glob("*/*.json")) if fnmatchcase(f"{p.parent.name}/{p.stem}", wanted)]
    if not paths:
        raise ValueError(f"no vectors for {wanted}")
    return [case for path in paths for case in _cases(json.loads(path.read_text(encoding="utf-8")))]


def to_hex(value: Any) -> Any:
    """Floats as hex strings, NaN, Infinity or -Infinity; integers as they are; arrays as nested lists."""
    if isinstance(value, np.ndarray | np.generic):
        return to_hex(value.tolist())
    if isinstance(value, dict):
        return {name: to_hex(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_hex(item) for item in value]
    if isinstance(value, float):
        return value.hex() if math.isfinite(value) else json.dumps(value)
    return value


def from_hex(value: Any) -> Any:
    """The inverse of `to_hex`; lists become arrays, float64 where they hold any float."""
    if isinstance(value, dict):
        return {name: from_hex(item) for name, item in value.items()}
    if isinstance(value, list):
        return np.array([from_hex(item) for item in value])
    return float.fromhex(value) if isinstance(value, str) else value


def _cases(file: dict[str, Any]) -> Iterator[Case]:
    decode = from_hex if file["encoding"] == "hex" else lambda value: value
    tolerance = {
        dtype: {kind: Tolerance(**numbers) for kind, numbers in kinds.items()}
        for dtype, kinds in file["tolerance"].items()
    }
    for case in file["cases"]:
        yield Case(
            case["id"],
            file["objective"],
            file["dialect"],
            file["equation"],
            case["comment"],
            tuple(case["flags"]),
            decode(case["params"]),
            decode(case["inputs"]),
            case["result"],
            decode(case["expected"]),
            tolerance,
        )
