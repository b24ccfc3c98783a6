"""What a mistake is, and the few ways to write one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from reference.conformance import pairs
from reference.conformance.pairs import POLICY, REFERENCE

Values = dict[str, Any]
Function = Callable[[Values, Values], Values]
"""(params, inputs) of a case -> its outputs."""
SCORES = ("score_chosen", "score_rejected")
LOGPS = POLICY + REFERENCE
ANY = np.inf
"""A gradient that may be anything: libraries differ where a function has a kink."""


class Mistake(NamedTuple):
    """One named mistake.

    Attributes:
        name: what follows the name of a dialect: "dpo/plain" "at beta 1: beta is dropped". A "{c}"
            stands for a constant that no case gives, and an "{exp c}" for its exponential, where
            the constant is the logarithm of what may be tiny; it is fitted.
        flag: the flag whose line in the README says how to mend it.
        change: the function of a dialect -> the mistaken function; of the constant too, if any.
    """

    name: str
    flag: str
    change: Callable[..., Function]

    @property
    def free(self) -> bool:
        """Whether it has a constant."""
        return "c}" in self.name

    def known(self, constant: float) -> "Mistake":
        """The mistake at a constant."""
        words = {"{c}": f"{constant:g}", "{exp c}": f"{np.exp(constant):g}"}
        name = self.name
        for mark, number in words.items():
            name = name.replace(mark, number)
        return self._replace(name=name, change=lambda f: self.change(f, constant))


def at(**changes: Callable[[float], float]) -> Callable[[Function], Function]:
    """Parameters are other numbers: each is a function of the case's own."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            other = {name: value(params[name]) for name, value in changes.items()}
            return function(params | other, inputs)

        return mistaken

    return change


def beta_and(other: str, function: Function) -> Function:
    """beta and another parameter in the wrong order."""

    def mistaken(params: Values, inputs: Values) -> Values:
        return function(params | {"beta": params[other], other: params["beta"]}, inputs)

    return mistaken


def on(inputs_of: Callable[[Values], Values]) -> Callable[[Function], Function]:
    """Some inputs are others: a function of all inputs returns these."""
    return on_case(lambda params, inputs: inputs_of(inputs))


def on_case(inputs_of: Callable[[Values, Values], Values]) -> Callable[[Function], Function]:
    """Some inputs are others: a function of params and inputs returns these."""

    def change(function: Function) -> Function:
        return lambda params, inputs: function(params, inputs | inputs_of(params, inputs))

    return change


def then(outputs_of: Callable[[Values, Values, Values], Values]) -> Callable[[Function], Function]:
    """Some outputs are others: a function of outputs, params and inputs returns these."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made = function(params, inputs)
            return made | outputs_of(made, params, inputs)

        return mistaken

    return change


def times(made: Values, factor: Any) -> Values:
    """The whole loss times a factor."""
    scaled = {name: made[name] * factor for name in ("loss", "per_example") if name in made}
    return scaled | scaled_grads(made, factor)


def scaled_grads(made: Values, factor: Any) -> Values:
    return {"grads": {name: grad * factor for name, grad in made["grads"].items()}}


def plus(made: Values, constant: float) -> Values:
    return {name: made[name] + constant for name in ("loss", "per_example") if name in made}


def through(made: Values, losses: np.ndarray, slopes: np.ndarray) -> Values:
    """A function of the loss of each pair, with its slope in that loss."""
    return {"loss": np.mean(losses), "per_example": losses} | scaled_grads(made, slopes)


def size(inputs: Values) -> int:
    """B, the number of pairs."""
    return np.shape(inputs[REFERENCE[0]] if REFERENCE[0] in inputs else inputs[SCORES[0]])[-1]


def argument(params: Values, inputs: Values) -> np.ndarray:
    """What the sigmoid is of."""
    if POLICY[0] in inputs:
        return params["beta"] * pairs.margins_of(inputs)
    return pairs.reward_margins(inputs) - inputs.get("margins", 0.0)


def margin(inputs: Values) -> np.ndarray:
    """h, or of a reward model the difference of rewards."""
    return pairs.margins_of(inputs) if POLICY[0] in inputs else pairs.reward_margins(inputs)


def of_argument(made: Values, params: Values, losses: np.ndarray, slopes: np.ndarray) -> Values:
    """Outputs from losses and their slopes in beta h, or in the difference of rewards."""
    if POLICY[0] not in made["grads"]:
        d = slopes / len(slopes)
        grads = {"score_chosen": d, "score_rejected": -d}
        return {"loss": np.mean(losses), "per_example": losses, "grads": grads}
    return pairs.over_pairs(losses, params["beta"] * slopes)


def step(values: np.ndarray) -> np.ndarray:
    """The slope of max(0, values)."""
    return np.where(values == 0, ANY, 1.0 * (values > 0))
