"""Mutations of JSON values and of bytes, drawn by a seeded generator."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

TEXTS = (
    "", " ", "\x00", "\ud800", "a" * 5000, "\n\nHuman: x\n\nAssistant:", "\n\nAssistant:", "../x",
    "<|im_end|>", "\u2028", "é\U0001f3f3\ufe0f", "nan", "1e5", "{{ x }}", "/etc/hostname", "%s",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), 2**31, 2**32, 2**53 + 1,
    2**60, 2**63, 2**64, -(2**63), 10**30, 10**400,
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": ""}, {"a": [1, "b", {}]})
Path = tuple[Any, ...]


def odd(rng: random.Random) -> Any:
    """A value that a reader may not expect; now and then a deep one."""
    if rng.random() < 0.02:
        value: Any = []
        for _ in range(rng.choice((50, 300))):
            value = [value]
        return value
    return copy.deepcopy(rng.choice(rng.choice((TEXTS, NUMBERS, OTHERS))))


def places(value: Any, path: Path = ()) -> list[Path]:
    """The paths of all values within a value, but the root's."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
    return found


def mutated(rng: random.Random, value: Any, names: tuple[str, ...] = ()) -> Any:
    """A JSON object or list with one change at a random place; the argument is changed too.

    Args:
        rng: The generator.
        value: An object or a list.
        names: Keys that mean something to the reader.
    """
    found = places(value)
    if not found or rng.random() < 0.02:
        return odd(rng)
    *way, key = rng.choice(found)
    parent = value
    for step in way:
        parent = parent[step]
    rng.choice(CHANGES)(rng, parent, key, names)
    return value


def replace(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    parent[key] = odd(rng)


def scale(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    """Another number, or another text of the same kind."""
    value = parent[key]
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value == 10**400:
        parent[key] = odd(rng)
    elif isinstance(value, str):
        place = rng.randrange(len(value) + 1)
        parent[key] = value[:place] + rng.choice(TEXTS) + value[place + rng.randrange(3) :]
    else:
        parent[key] = rng.choice((value + 1, value * 2, -value, value * 0.5))


def remove(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    del parent[key]


def wrap(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    value = parent[key]
    parent[key] = rng.choice(([value], [value, value], {"x": value}, {"text": value}))


def unwrap(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    value = parent[key]
    if isinstance(value, dict | list) and value:
        parent[key] = rng.choice(list(value.values() if isinstance(value, dict) else value))
    else:
        parent[key] = odd(rng)


def swap(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def rename(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    """Another name for the value; in a list, another copy of it."""
    if isinstance(parent, dict):
        parent[rng.choice((*names, *map(str, parent), "x"))] = parent.pop(key)
    else:
        parent.insert(key, parent[key])


def add(rng: random.Random, parent: Any, key: Any, names: tuple[str, ...]) -> None:
    if isinstance(parent, dict):
        value = rng.choice((odd(rng), parent[key]))
        parent[rng.choice((*names, "x"))] = value
    else:
        parent.append(odd(rng))


CHANGES: tuple[Callable[..., None], ...] = (
    replace, replace, scale, scale, remove, wrap, unwrap, swap, rename, add
)  # fmt: skip


def as_text(rng: random.Random, value: Any) -> bytes:
    """JSON in one of its spellings; a lone surrogate has only the escaped one."""
    is_escaped = rng.random() < 0.5
    try:
        text = json.dumps(value, ensure_ascii=is_escaped)
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one or a few faults of a disk or of a transfer."""
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        size = len(data)
        start = rng.randrange(size + 1)
        stop = min(size, start + rng.choice((1, 2, 8, 64)))
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            data = data[:start] + data[stop:]
        elif kind == 2:
            data = data[:stop] + data[start:]
        elif kind == 3:
            data = data[:start] + bytes(stop - start) + data[stop:]
        elif kind == 4:
            data = data[:start] + rng.randbytes(stop - start) + data[stop:]
        elif kind == 5:
            data = data[:start] + b"\xff" * (stop - start) + data[stop:]
        elif size:
            place = min(start, size - 1)
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    return data
