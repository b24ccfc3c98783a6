"""Mistakes in the label smoothing of losses of pairs."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance import pairs
from reference.conformance.mistakes.logistic import softplus
from reference.conformance.mistakes.mistake import (
    Function,
    Mistake,
    Values,
    argument,
    at,
    beta_and,
    of_argument,
    plus,
    then,
    times,
)
from reference.conformance.mistakes.pairs import exchanged
from reference.conformance.pairs import sigmoid


def on_beta(times_smoothing: int, function: Function) -> Function:
    """Label smoothing makes beta smaller."""

    def mistaken(params: Values, inputs: Values) -> Values:
        share = 1 - times_smoothing * params["label_smoothing"]
        made = function(params | {"beta": share * params["beta"], "label_smoothing": 0.0}, inputs)
        return made | {"metrics": pairs.implicit_rewards(params["beta"], inputs)}

    return mistaken


def over_once(made: Values, params: Values, inputs: Values) -> Values:
    e = params["label_smoothing"]
    return times(made, (1 - 2 * e) / (1 - e))


def precedence(made: Values, params: Values, inputs: Values) -> Values:
    """`loss / 1 - 2 * e`, where brackets are missing."""
    e = params["label_smoothing"]
    undivided = times(made, 1 - 2 * e)
    return undivided | plus(undivided, -2 * e)


def inside_logarithm(function: Function) -> Function:
    """-log [(1 - e) sigmoid(beta h) + e sigmoid(-beta h)]."""

    def mistaken(params: Values, inputs: Values) -> Values:
        e, made = params["label_smoothing"], function(params, inputs)
        right = pairs.sigmoid(params["beta"] * pairs.margins_of(inputs))
        mixed = e + (1 - 2 * e) * right
        slopes = -params["beta"] * (1 - 2 * e) * right * (1 - right) / mixed
        return made | pairs.over_pairs(-np.log(mixed), slopes)

    return mistaken


def smoothed(function: Function, constant: float) -> Function:
    """(1 - c) of the loss, and c of the loss of the opposite preference."""
    opposite = exchanged("policy", "ref", "chosen_l", "rejected_l", "score")(function)

    def mistaken(params: Values, inputs: Values) -> Values:
        made, other = function(params, inputs), opposite(params, inputs)
        mix = {
            name: (1 - constant) * made[name] + constant * other[name]
            for name in ("loss", "per_example")
            if name in made
        }
        others, share = other["grads"], 1 - constant
        grads = {n: share * g + constant * others[n] for n, g in made["grads"].items()}
        return made | mix | {"grads": grads}

    return mistaken


def weighed(right: Callable[[float], float], wrong: Callable[[float], float]):
    """Other weights of -log sigmoid(beta h) and of -log sigmoid(-beta h)."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        a, e = argument(params, inputs), params["label_smoothing"]
        losses = right(e) * softplus(-a) + wrong(e) * softplus(a)
        return of_argument(made, params, losses, wrong(e) * sigmoid(a) - right(e) * sigmoid(-a))

    return then(outputs)


# fmt: off
SMOOTHING = (
    Mistake("with label smoothing {c}", "label-smoothing-misused", smoothed),
    *(Mistake(f"with beta and {other} exchanged", "beta-changed", partial(beta_and, other))
        for other in ("label_smoothing", "reward_scale")),
    Mistake("at beta (1 - 2 label_smoothing), without label smoothing", "label-smoothing-misused",
        partial(on_beta, 2)),
    Mistake("at beta (1 - label_smoothing), without label smoothing", "label-smoothing-misused",
        partial(on_beta, 1)),
    Mistake("at label_smoothing squared", "label-smoothing-misused",
        at(label_smoothing=lambda e: e * e)),
    Mistake("at label_smoothing 1/2 - e", "label-smoothing-misused",
        at(label_smoothing=lambda e: 0.5 - e)),
    Mistake("at label_smoothing 0", "label-smoothing-ignored", at(label_smoothing=lambda e: 0.0)),
    Mistake("at label_smoothing 1 - e", "label-smoothing-misused",
        at(label_smoothing=lambda e: 1 - e)),
    Mistake("at label_smoothing {c} e", "label-smoothing-misused",
        lambda f, c: at(label_smoothing=lambda e: c * e)(f)),
    Mistake("at label_smoothing {c}, whatever the case says", "label-smoothing-misused",
        lambda f, c: at(label_smoothing=lambda e: c)(f)),
    Mistake("with label smoothing inside the logarithm", "label-smoothing-misused",
        inside_logarithm),
    Mistake("times 1 - 2 label_smoothing", "label-smoothing-misused",
        then(lambda made, p, x: times(made, 1 - 2 * p["label_smoothing"]))),
    Mistake("over 1 - label_smoothing, not 1 - 2 label_smoothing", "label-smoothing-misused",
        then(over_once)),
    Mistake("over 1 - 2 label_smoothing", "label-smoothing-misused",
        then(lambda made, p, x: times(made, 1 / (1 - 2 * p["label_smoothing"])))),
    Mistake("with the first term alone over 1 - 2 label_smoothing", "label-smoothing-misused",
        weighed(lambda e: (1 - e) / (1 - 2 * e), lambda e: -e)),
    Mistake("with / 1 - 2 label_smoothing in place of / (1 - 2 label_smoothing)",
        "label-smoothing-misused", then(precedence)),
    Mistake("with the second term alone over 1 - 2 label_smoothing", "label-smoothing-misused",
        weighed(lambda e: 1 - e, lambda e: -e / (1 - 2 * e))),
)
# fmt: on
