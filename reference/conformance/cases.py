"""Test vectors: one JSON file for each objective and dialect.

The tests check the files against `vectors_v1/schema.json`.
"""

import json
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VECTORS = Path(__file__).parent / "vectors_v1"


class Tolerance(NamedTuple):
    """A number passes within `rtol` times the largest of its expected array, plus `atol`."""

    rtol: float
    atol: float


class Case(NamedTuple):
    """One question and its answer.

    Attributes:
        flags: the bugs that the case exists to catch.
        params: name -> number; of `data`, plain JSON.
        inputs: name -> array of float64 or of integers; of `data`, plain JSON.
        result: "value": the outputs must be `expected`. "reject": an error must be raised.
            "unspecified": anything passes.
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
    """All cases, in a stable order.

    Args:
        objective, dialect: which ones, where `*` stands for any text.

    Returns:
        The cases of the files that match.

    Raises:
        ValueError: no file has that objective and dialect.
    """
    wanted = f"{objective}/{dialect}"
    paths = [
        p
        for p in sorted(VECTORS.glob("*/*.json"))
        if fnmatchcase(f"{p.parent.name}/{p.stem}", wanted)
    ]
    if not paths:
        raise ValueError(f"no vectors for {wanted}")
    return [case for path in paths for case in _cases(json.loads(path.read_text(encoding="utf-8")))]


def to_hex(value: Any) -> Any:
    """A value as JSON that keeps every bit; `from_hex` is its inverse.

    Args:
        value: numbers, arrays, text, and lists and dictionaries of them.

    Returns:
        Floats as hexadecimal strings, "NaN", "Infinity" or "-Infinity", arrays as nested lists,
        all else as it is.
    """
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
    """The inverse of `to_hex`.

    Args:
        value: what `to_hex` returned.

    Returns:
        The value, its lists as arrays: float64 where they hold a float, else integers.
    """
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
