"""What a mistake is, and the few ways to write one."""

from collections.abc import Callable
from typing import Any, NamedTuple

Values = dict[str, Any]
Function = Callable[[Values, Values], Values]
"""(params, inputs) of a case -> its outputs."""


class Mistake(NamedTuple):
    """One named mistake.

    Attributes:
        name: what follows the name of a dialect: "dpo/plain" "at beta 1: beta is dropped". A "{c}"
            stands for a constant that no case gives; it is fitted.
        flag: the flag whose line in the README says how to mend it.
        change: the function of a dialect -> the mistaken function; with "{c}", of the constant too.
    """

    name: str
    flag: str
    change: Callable[..., Function]


def at(**changes: Callable[[float], float]) -> Callable[[Function], Function]:
    """Parameters are other numbers: each is a function of the case's own."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            other = {name: value(params[name]) for name, value in changes.items()}
            return function(params | other, inputs)

        return mistaken

    return change


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
