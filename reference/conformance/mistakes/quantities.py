"""Mistakes in a quantity that a loss of pairs is made of: quantities times functions of them.

A quantity is a difference of inputs, pair by pair. It is changed by changing one of its inputs, and
the chain rule gives the gradients of all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from reference.conformance.mistakes.mistake import SCORES, Function, Mistake, Values, step
from reference.conformance.pairs import POLICY, REFERENCE, implicit_rewards, sigmoid


class Quantity(NamedTuple):
    """What a mistake changes.

    Attributes:
        words: its name, in the plural where it is several numbers of a pair.
        kind: what functions are mistakes of it.
        parts: each of these numbers, as the inputs that are added and those that are subtracted.
        by_beta: it is beta times that.
    """

    words: str
    kind: str
    parts: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    by_beta: bool = False


class Map(NamedTuple):
    """A function of a quantity.

    Attributes:
        words: where "{q}" stands for the quantity, and "{c}" for a constant, which is fitted.
        kinds: those of the quantities that it is a mistake of. Of beta times a quantity it is
            another mistake where `scales` is false: the function of a multiple is no multiple.
        value, slope: functions of the quantity, and of the constant.
    """

    words: str
    flag: str
    kinds: str
    value: Callable[..., np.ndarray]
    slope: Callable[..., np.ndarray]
    scales: bool = False

    def fits(self, quantity: Quantity) -> bool:
        """Whether it is a mistake of this quantity."""
        return quantity.kind in self.kinds.split() and not (self.scales and quantity.by_beta)


def mapped(quantity: Quantity, value: Callable, slope: Callable, function: Function) -> Function:
    """`value` of the quantity stands in its place; the metrics are those of the inputs."""

    def mistaken(params: Values, inputs: Values) -> Values:
        scale = params["beta"] if quantity.by_beta else 1.0
        changed, slopes = dict(inputs), dict[str, np.ndarray]()
        for added, subtracted in quantity.parts:
            now = scale * (_sum(inputs, added) - _sum(inputs, subtracted))
            if any(np.shape(inputs[name]) != np.shape(now) for name in added + subtracted):
                raise ValueError("shapes differ")
            changed[added[0]] = inputs[added[0]] + (value(now) - now) / scale
            slopes |= dict.fromkeys(added + subtracted, slope(now))
        made = function(params, changed)
        grads = {n: g * slopes[n] if n in slopes else g for n, g in made["grads"].items()}
        if "rewards/chosen" in made.get("metrics", ()):
            made["metrics"] = implicit_rewards(params["beta"], inputs)
        return made | {"grads": grads}

    return mistaken


def _sum(inputs: Values, names: tuple[str, ...]) -> np.ndarray:
    return sum((inputs[name] for name in names), np.zeros(()))


def fixed(quantity: Quantity, row: Map, function: Function) -> Function:
    return mapped(quantity, row.value, row.slope, function)


def fitted(quantity: Quantity, row: Map, function: Function, constant: float) -> Function:
    value, slope = (partial(f, c=constant) for f in (row.value, row.slope))
    return mapped(quantity, value, slope, function)


def rows(quantities: tuple[Quantity, ...], maps: tuple[Map, ...]) -> tuple[Mistake, ...]:
    """A mistake for each quantity and each function that fits it."""
    return tuple(
        Mistake(
            f"with {row.words.replace('{q}', quantity.words)}",
            row.flag,
            partial(fitted if "{c}" in row.words else fixed, quantity, row),
        )
        for quantity in quantities
        for row in maps
        if row.fits(quantity)
    )


def one(*names: str) -> tuple:
    return tuple(((name,), ()) for name in names)


def positive(constant: float) -> float:
    """A constant whose sign would have no effect."""
    return constant if constant > 0 else np.nan


# fmt: off
(PC, PR), (RC, RR) = POLICY, REFERENCE
RATIOS = (((PC,), (RC,)), ((PR,), (RR,)))
QUANTITIES = (
    Quantity("the margin", "margin", (((PC, RR), (PR, RC)),)),
    Quantity("beta times the margin", "margin", (((PC, RR), (PR, RC)),), by_beta=True),
    Quantity("the reward margin", "rho", ((SCORES[:1], SCORES[1:]),)),
    Quantity("the reward margin less the pair's margin", "rho",
        ((SCORES[:1], (SCORES[1], "margins")),)),
    Quantity("the policy's margin", "half", (((PC,), (PR,)),)),
    Quantity("the reference's margin", "half", (((RC,), (RR,)),)),
    Quantity("the log-ratios", "ratios", RATIOS),
    Quantity("the implicit rewards", "ratios", RATIOS, by_beta=True),
    Quantity("the chosen response's log-ratio", "ratio", RATIOS[:1]),
    Quantity("the rejected response's log-ratio", "ratio", RATIOS[1:]),
    Quantity("the chosen response's implicit reward", "ratio", RATIOS[:1], by_beta=True),
    Quantity("the rejected response's implicit reward", "ratio", RATIOS[1:], by_beta=True),
    Quantity("the log-probabilities", "all", one(*POLICY, *REFERENCE)),
    Quantity("the policy's log-probabilities", "logps", one(*POLICY)),
    Quantity("the reference's log-probabilities", "logps", one(*REFERENCE)),
    Quantity("the policy's log-probability of chosen", "logp", one(PC)),
    Quantity("the policy's log-probability of rejected", "logp", one(PR)),
    Quantity("the reference's log-probability of chosen", "logp", one(RC)),
    Quantity("the reference's log-probability of rejected", "logp", one(RR)),
    Quantity("the rewards", "rewards", one(*SCORES)),
    Quantity("the chosen response's reward", "reward", one(SCORES[0])),
    Quantity("the rejected response's reward", "reward", one(SCORES[1])),
)
MAPS = (
    Map("{q} negated", "sign", "ratio logp reward", np.negative, lambda q: -1.0 + 0 * q, True),
    Map("the absolute value of {q}", "link", "margin rho half ratios ratio rewards",
        np.abs, np.sign, True),
    Map("{q} no lower than 0", "clipped", "margin rho half ratios ratio rewards",
        lambda q: np.maximum(q, 0.0), step, True),
    Map("{q} no higher than 0", "clipped", "margin rho half ratios ratio rewards",
        lambda q: np.minimum(q, 0.0), lambda q: step(-q), True),
    Map("the sign alone of {q}", "link", "margin rho", np.sign, lambda q: 0 * q),
    Map("exp of {q}", "link", "margin rho ratios ratio all logps logp rewards",
        np.exp, np.exp),
    Map("the square of {q}", "link", "margin rho", np.square, lambda q: 2 * q, True),
    Map("the sigmoid of {q}", "link", "margin rho ratios rewards",
        sigmoid, lambda q: sigmoid(q) * sigmoid(-q)),
    Map("the log-sigmoid of {q}", "link", "margin rho ratios rewards",
        lambda q: -np.logaddexp(0.0, -q), lambda q: sigmoid(-q)),
    Map("{q} rounded to integers", "integers", "rewards",
        np.rint, np.ones_like),
    Map("{q} truncated to integers", "integers", "rewards",
        np.trunc, np.ones_like),
    Map("the softmax over the pair in place of {q}", "link", "rho",
        lambda q: np.tanh(q / 2), lambda q: (1 - np.tanh(q / 2) ** 2) / 2),
    Map("tanh of {q}", "link", "margin rho ratios rewards",
        np.tanh, lambda q: 1 - np.tanh(q) ** 2),
    Map("the log-odds of {q}", "link", "all logps",
        lambda q: q - np.log(-np.expm1(q)), lambda q: -1 / np.expm1(q)),
    Map("{q} clipped at {c} and -{c}", "clipped", "margin rho half ratios ratio rewards all logps",
        lambda q, c: np.clip(q, -positive(c), positive(c)),
        lambda q, c: step(c - np.abs(q))),
    Map("{q} no higher than {c}", "clipped", "margin rho half ratios ratio rewards",
        lambda q, c: np.minimum(q, c), lambda q, c: step(c - q)),
    Map("{q} no lower than {c}", "clipped", "margin rho half ratios ratio rewards all logps",
        lambda q, c: np.maximum(q, c), lambda q, c: step(q - c)),
    Map("{q} clipped at {c} and -{c}, which its gradient ignores", "clipped", "margin rho ratios",
        lambda q, c: np.clip(q, -positive(c), positive(c)), lambda q, c: 1.0 + 0 * q),
    Map("{c} times {q}", "scale", "ratio logps logp reward",
        lambda q, c: c * q, lambda q, c: c + 0 * q, True),
    Map("{c} added to {q}", "offset", "margin", lambda q, c: q + c, lambda q, c: 1.0 + 0 * q),
    Map("{c} tanh({q} / {c})", "clipped", "margin rho ratios rewards",
        lambda q, c: positive(c) * np.tanh(q / c), lambda q, c: 1 - np.tanh(q / c) ** 2),
)
# fmt: on
OF_QUANTITIES = rows(QUANTITIES, MAPS)
