"""Mistakes of precision in losses of pairs: half precision, and exponentials that overflow."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from reference.conformance.mistakes.mistake import (
    LOGPS,
    SCORES,
    Mistake,
    Values,
    argument,
    on,
    scaled_grads,
    then,
)
from reference.conformance.pairs import POLICY, REFERENCE

LARGEST_EXPONENT = 88.7
"""exp of more is infinite in float32."""
LARGEST = {"": LARGEST_EXPONENT, ": one above 709, float64's limit": 709.7}


def rounded(names: tuple[str, ...], kind: str, inputs: Values) -> Values:
    """Inputs in half precision; of a loss without rewards it is one mistake, not two."""
    if set(names) == {*LOGPS, *SCORES} and not {LOGPS[0], SCORES[0]} <= inputs.keys():
        raise ValueError("there are no rewards, or no log-probabilities")
    return {name: half(inputs[name], kind) for name in names if name in inputs}


def half(values: Any, kind: str) -> np.ndarray:
    """Numbers rounded to float16 or, by their bits, to the nearest bfloat16."""
    if kind == "float16":
        return np.asarray(values).astype(np.float16).astype(float)
    bits = np.asarray(values, np.float32).view(np.uint32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return even.astype(np.uint32).view(np.float32).astype(float)


def beyond(sign: int, most: float, argument: np.ndarray) -> np.ndarray:
    """Where an argument of this sign, or 0 of either, is above the most that exp bears."""
    return (sign * argument if sign else np.abs(argument)) > most


def unstable(where: Callable, made: Values, params: Values, inputs: Values) -> Values:
    """Losses that are not finite where `where(argument)` says that exp overflows."""
    losses = np.where(where(argument(params, inputs)), np.nan, made["per_example"])
    return {"loss": np.mean(losses), "per_example": losses}


def unstable_slopes(where: Callable, made: Values, params: Values, inputs: Values) -> Values:
    """Gradients of infinity over infinity."""
    return scaled_grads(made, np.where(where(argument(params, inputs)), np.nan, 1.0))


def unstable_both(where: Callable, made: Values, params: Values, inputs: Values) -> Values:
    return unstable(where, made, params, inputs) | unstable_slopes(where, made, params, inputs)


def overflowing(name: str, sign: int) -> tuple[Mistake, ...]:
    """exp overflows for arguments of the sigmoid of this sign, in the loss, in its gradients, or
    both."""
    places = {
        "": unstable,
        " in the gradients": unstable_slopes,
        " in the loss and its gradients": unstable_both,
    }
    return tuple(
        Mistake(
            f"with exp of {name} overflowing{words}{limit}",
            "overflow",
            then(partial(change, partial(beyond, sign, most))),
        )
        for words, change in places.items()
        for limit, most in LARGEST.items()
    )


# fmt: off
PRECISION = (
    Mistake("with log-probabilities in bfloat16", "half-precision-sums",
        on(partial(rounded, LOGPS, "bfloat16"))),
    Mistake("with log-probabilities in float16", "half-precision-sums",
        on(partial(rounded, LOGPS, "float16"))),
    *(Mistake(f"with the {side}'s log-probabilities in {kind}", "half-precision-sums",
        on(partial(rounded, names, kind)))
        for side, names in (("reference", REFERENCE), ("policy", POLICY))
        for kind in ("bfloat16", "float16")),
    Mistake("with log-probabilities and rewards in bfloat16", "half-precision-sums",
        on(partial(rounded, LOGPS + SCORES, "bfloat16"))),
    Mistake("with log-probabilities and rewards in float16", "half-precision-sums",
        on(partial(rounded, LOGPS + SCORES, "float16"))),
    Mistake("with rewards in bfloat16", "half-precision-sums",
        on(partial(rounded, SCORES, "bfloat16"))),
    Mistake("with rewards in float16", "half-precision-sums",
        on(partial(rounded, SCORES, "float16"))),
    *overflowing("a large negative margin", -1),
    *overflowing("a large positive margin", 1),
    *overflowing("a large margin of either sign", 0),
)
# fmt: on
