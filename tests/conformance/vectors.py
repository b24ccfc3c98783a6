"""How cases are made: inputs that every format holds exactly, and expected values from mpmath."""

import json
import random

import mpmath as mp
import numpy as np

from reference.conformance import flags
from reference.conformance.cases import to_hex

DIGITS = 50
STEP = mp.mpf(10) ** -18

FLAGS = {name: flag.meaning for name, flag in flags.FLAGS.items()}

SCALAR = {
    "float64": {"values": (1e-10, 1e-12), "grads": (1e-9, 1e-12)},
    "float32": {"values": (1e-5, 1e-6), "grads": (1e-5, 1e-7)},
    "bfloat16": {"values": (1e-5, 1e-6), "grads": (2**-7, 1e-7)},
}
"""Losses are float32 whatever the model computes in; only the gradients it gets may be rounded."""


def dyadic(rng: random.Random, low: float, high: float, shape=(), unit: int = 64):
    """Multiples of 1/unit, which float32 holds, and adds, without rounding.

    The generator is the standard library's, whose `random()` is the same everywhere.
    """
    if not shape:
        return round((low + (high - low) * rng.random()) * unit) / unit
    return np.array([dyadic(rng, low, high, shape[1:], unit) for _ in range(shape[0])])


def vector_file(objective, dialect, equation, source, cases, tolerance, encoding="hex"):
    made = [case | {"id": f"{objective}/{dialect}/{case['id']}"} for case in cases]
    used = sorted({flag for case in made for flag in case["flags"]})
    return {
        "objective": objective,
        "dialect": dialect,
        "version": 1,
        "equation": equation,
        "source": source,
        "encoding": encoding,
        "tolerance": {
            dtype: {kind: {"rtol": rtol, "atol": atol} for kind, (rtol, atol) in kinds.items()}
            for dtype, kinds in tolerance.items()
        },
        "flags": {flag: FLAGS[flag] for flag in used},
        "cases": made,
    }


def case(name, flags, comment, params, inputs, expected=None, result="value"):
    return {
        "id": name,
        "comment": comment,
        "flags": flags.split(),
        "params": params,
        "inputs": inputs,
        "result": result,
        "expected": expected or {},
    }


def exact(value):
    """Numbers as mpmath's, arrays as nested lists of them."""
    if isinstance(value, dict):
        return {name: exact(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | list):
        return [exact(item) for item in value]
    return mp.mpf(float(value)) if isinstance(value, float | np.floating) else value


def nearest(value):
    """The nearest float64 of each number."""
    if isinstance(value, list):
        return np.array([nearest(item) for item in value])
    return float(value)


def slopes(function, inputs, name):
    """Central differences of a scalar function in each element of `inputs[name]`, at 50 digits."""

    def at(path, values, sign):
        head, *rest = path
        moved = at(rest, values[head], sign) if rest else values[head] + sign * STEP
        return [moved if i == head else value for i, value in enumerate(values)]

    def slope(path, values):
        if isinstance(values, list):
            return [slope([*path, i], value) for i, value in enumerate(values)]
        ahead, behind = (
            function(inputs | {name: at(path, inputs[name], sign)}) for sign in (1, -1)
        )
        return (ahead - behind) / (2 * STEP)

    return slope([], inputs[name])


def rendered(file):
    """JSON with one array a line, so that a difference is seen where it is."""
    head = json.dumps(
        {name: value for name, value in file.items() if name != "cases"},
        indent=1,
        ensure_ascii=False,
    )
    cases = ",\n".join(_lines(to_hex(case), 2) for case in file["cases"])
    return f'{head[:-2]},\n "cases": [\n{cases}\n ]\n}}\n'


def _lines(value, indent):
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    items = [
        f'{" " * (indent + 1)}"{name}": {_lines(item, indent + 1).lstrip()}'
        for name, item in value.items()
    ]
    space = " " * indent
    return f"{space}{{\n" + ",\n".join(items) + f"\n{space}}}"
