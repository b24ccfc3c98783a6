"""Mistakes in the function -log sigmoid: others stand in its place, or in its gradient's."""

from collections.abc import Callable
from functools import partial
from math import erfc

import numpy as np

from reference.conformance.mistakes.mistake import (
    Function,
    Mistake,
    Values,
    argument,
    of_argument,
    step,
)
from reference.conformance.pairs import POLICY, REFERENCE, sigmoid


def linked(value: Callable, slope: Callable) -> Callable[[Function], Function]:
    """Another function than -log sigmoid, of beta h or of rewards; label smoothing mixes sides."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made, a = function(params, inputs), argument(params, inputs)
            right, wrong = sides(function, params, inputs)
            losses = right * value(a) + (wrong * value(-a) if wrong else 0.0)
            slopes = right * slope(a) - (wrong * slope(-a) if wrong else 0.0)
            return made | of_argument(made, params, losses, slopes)

        return mistaken

    return change


def sides(function: Function, params: Values, inputs: Values) -> tuple[float, float]:
    """The weights of -log sigmoid(beta h) and of -log sigmoid(-beta h): log 2 each where h is 0."""
    if not params.get("label_smoothing"):
        return 1.0, 0.0
    level = {name: inputs[ref] for name, ref in zip(POLICY, REFERENCE, strict=True)}
    made = function(params, inputs | level)
    total = made["loss"] / np.log(2)
    difference = -2 * np.sum(made["grads"][POLICY[0]]) / params["beta"]
    return (total + difference) / 2, (total - difference) / 2


def of_probability(value: Callable, slope: Callable, function: Function, constant: float):
    return linked(partial(value, c=constant), partial(slope, c=constant))(function)


def wrong_weights(function: Function) -> Function:
    """The gradients have the sigmoid of the other sign; the loss is right."""
    weighed = linked(lambda a: a, lambda a: -sigmoid(a))(function)
    return lambda p, x: function(p, x) | {"grads": weighed(p, x)["grads"]}


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def bernoulli(x: np.ndarray) -> np.ndarray:
    """The slope of sigmoid."""
    return sigmoid(x) * sigmoid(-x)


def normal(x: np.ndarray) -> np.ndarray:
    """The distribution function of the normal distribution."""
    return np.vectorize(lambda v: erfc(-v / 2**0.5) / 2)(x)


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / (2 * np.pi) ** 0.5


# fmt: off
X = ", where x is beta h or the reward margin"
LOGISTIC = (
    ("the hinge", lambda a: np.maximum(0.0, 1 - a), lambda a: -step(1 - a)),
    ("the squared hinge",
        lambda a: np.maximum(0.0, 1 - a) ** 2, lambda a: -2 * np.maximum(0.0, 1 - a)),
    ("the square of 1 - x", lambda a: (1 - a) ** 2, lambda a: 2 * (a - 1)),
    ("the square of 1/2 - x", lambda a: (0.5 - a) ** 2, lambda a: 2 * (a - 0.5)),
    ("the perceptron's max(0, -x)", lambda a: np.maximum(0.0, -a), lambda a: -step(-a)),
    ("exp of -x", lambda a: np.exp(-a), lambda a: -np.exp(-a)),
    ("-x", lambda a: -a, lambda a: -1.0 + 0 * a),
    ("-sigmoid", lambda a: -sigmoid(a), lambda a: -bernoulli(a)),
    ("sigmoid of -x", lambda a: sigmoid(-a), lambda a: -bernoulli(a)),
    ("sigmoid", sigmoid, bernoulli),
    ("-log sigmoid of the sigmoid",
        lambda a: softplus(-sigmoid(a)), lambda a: -sigmoid(-sigmoid(a)) * bernoulli(a)),
    ("log sigmoid", lambda a: -softplus(-a), lambda a: sigmoid(-a)),
    ("log sigmoid of -x", lambda a: -softplus(a), lambda a: -sigmoid(a)),
    ("-log of the normal distribution function",
        lambda a: -np.log(normal(a)), lambda a: -density(a) / normal(a)),
    ("-tanh", lambda a: -np.tanh(a), lambda a: np.tanh(a) ** 2 - 1),
    ("the square of sigmoid of -x",
        lambda a: sigmoid(-a) ** 2, lambda a: -2 * sigmoid(-a) * bernoulli(a)),
    ("the focal loss with exponent 2", lambda a: sigmoid(-a) ** 2 * softplus(-a),
        lambda a: -sigmoid(-a) ** 2 * (2 * sigmoid(a) * softplus(-a) + sigmoid(-a))),
    ("the logistic loss of |x|", lambda a: softplus(-np.abs(a)),
        lambda a: -np.sign(a) * sigmoid(-np.abs(a))),
)
"""In place of -log sigmoid."""
OF_PROBABILITIES = (
    ("with {exp c} added to the probability in the logarithm", "offset",
        lambda a, c: -np.logaddexp(-softplus(-a), c),
        lambda a, c: -np.exp(-softplus(-a) - softplus(a) - np.logaddexp(-softplus(-a), c))),
    ("with the probability in the logarithm no lower than {exp c}", "clipped",
        lambda a, c: np.minimum(softplus(-a), -c),
        lambda a, c: -sigmoid(-a) * (softplus(-a) < -c)),
    ("with the probability in the logarithm clipped to {exp c} and 1 less that", "clipped",
        lambda a, c: np.clip(softplus(-a), -np.log1p(-np.exp(c)), -c),
        lambda a, c: -sigmoid(-a) * ((softplus(-a) < -c) & (softplus(a) < -c))),
)
"""In place of -log sigmoid, on each side of the label smoothing."""
OF_LOGISTIC = (
    *(Mistake(f"with {words} as the loss" + (X if "x" in words.split()[-1] else ""),
        "link", linked(value, slope)) for words, value, slope in LOGISTIC),
    Mistake(f"with gradients weighed by sigmoid of x, not of -x{X}", "slope", wrong_weights),
    *(Mistake(words, flag, partial(of_probability, value, slope))
        for words, flag, value, slope in OF_PROBABILITIES),
)
# fmt: on
