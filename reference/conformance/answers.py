"""What an implementation answers, as plain values of bounded size, whatever it answers."""

import json
import math
from typing import Any

import numpy as np

LARGEST = 1_000_000
"""Numbers of an array, items of a list or characters of a text, at most."""
DEEPEST = 16
"""Lists and dictionaries in one another, at most."""
READABLE = 2000
"""Characters of a text in a report, at most."""


def plain(value: Any, depth: int = 0) -> Any:
    """An answer without what only its own library knows.

    Args:
        value: anything.
        depth: of the value in the answer.

    Returns:
        None, numbers, texts, arrays of real numbers, and lists and dictionaries of them. In place
        of any other value, or of one that is too large, stands a text that says so.
    """
    if isinstance(value, dict | list | tuple) and (depth > DEEPEST or len(value) > LARGEST):
        return f"a {type(value).__name__} of {len(value)} items, {depth} deep"
    if isinstance(value, dict):
        return {n: plain(item, depth + 1) for n, item in value.items() if isinstance(n, str)}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, str):
        return str(value) if len(value) <= LARGEST else f"a text of {len(value)} characters"
    if value is None or isinstance(value, bool | int | float):
        return value
    try:
        return _array(value, depth)
    except Exception as error:  # whatever an array of another library raises
        return readable(f"a {type(value).__name__}: {error}")


def _array(value: Any, depth: int) -> Any:
    """An array of any library as NumPy's; its size is looked at before its numbers are."""
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) > LARGEST:
        return f"an array of shape {list(shape)}"
    array = np.asarray(value)
    if array.dtype.kind in "OUS" and array.shape == shape and hasattr(value, "tolist"):
        return plain(value.tolist(), depth + 1)
    if array.dtype.kind == "V":  # bfloat16
        return array.astype(float)
    return array if array.dtype.kind in "biuf" else f"a {type(value).__name__} of {array.dtype}"


def readable(text: str) -> str:
    """A text as a report shows it: cut where it is long, and without control characters.

    Args:
        text: any text, also one that no encoding has.
    """
    if len(text) > READABLE:
        text = f"{text[: READABLE - 40]} ... ({len(text)} characters)"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def to_json(value: Any) -> Any:
    """A value as strict JSON; `from_json` is its inverse.

    Args:
        value: numbers, arrays, text, and lists and dictionaries of them.

    Returns:
        Arrays as nested lists, "NaN", "Infinity" and "-Infinity" as text, all else as it is.
    """
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else json.dumps(value)


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, but lists stay lists.

    Args:
        value: decoded JSON.

    Returns:
        The value; the judge makes arrays of its lists where numbers are due.
    """
    if isinstance(value, dict):
        return {name: from_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
