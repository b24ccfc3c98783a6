"""Mistakes in losses of pairs."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance import pairs
from reference.conformance.mistakes.mistake import (
    SCORES,
    Function,
    Mistake,
    Values,
    at,
    on,
    on_case,
    scaled_grads,
    step,
    then,
    times,
)
from reference.conformance.pairs import POLICY, REFERENCE

SWAP = {"chosen": "rejected", "rejected": "chosen"}


def exchanged(*starts: str) -> Callable[[Function], Function]:
    """The inputs of chosen and rejected whose names begin so are exchanged."""

    def other(name: str) -> str:
        side = "chosen" if "chosen" in name else "rejected"
        return name.replace(side, SWAP[side]) if name.startswith(starts) else name

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made = function(params, {other(name): value for name, value in inputs.items()})
            grads = {other(name): grad for name, grad in made["grads"].items()}
            return made | {"grads": grads}

        return mistaken

    return change


def without(*names: str) -> Callable[[Function], Function]:
    """These inputs are 0, and have no gradient."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made = function(params, inputs | {name: 0 * inputs[name] for name in names})
            none = {name: 0 * made["grads"][name] for name in names if name in made["grads"]}
            return made | {"grads": made["grads"] | none}

        return mistaken

    return change


def into_reference(made: Values, params: Values, inputs: Values) -> Values:
    """The reference's gradients are those of the policy, negated."""
    both = zip(REFERENCE, POLICY, strict=True)
    return {"grads": made["grads"] | {ref: -made["grads"][policy] for ref, policy in both}}


def without_gradient(name: str, made: Values, params: Values, inputs: Values) -> Values:
    return {"grads": made["grads"] | {name: 0 * made["grads"][name]}}


def beta_on(others: tuple[str, ...]) -> Callable[[Function], Function]:
    """These columns are not multiplied by beta."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            beta = params["beta"]
            made = function(params, inputs | {name: inputs[name] / beta for name in others})
            grads = {n: g / beta if n in others else g for n, g in made["grads"].items()}
            return made | {"grads": grads}

        return mistaken

    return change


def longer(function: Function, constant: float) -> Function:
    """The margin times beta is less by a constant for each token that chosen is longer."""

    def inputs_of(params: Values, inputs: Values) -> Values:
        lengths = [inputs.get(f"{side}_lengths", 0) for side in SWAP]
        shift = constant * (lengths[0] - lengths[1]) / params["beta"]
        return {POLICY[0]: inputs[POLICY[0]] - shift}

    def kept(made: Values, params: Values, inputs: Values) -> Values:
        metrics = {"metrics": pairs.implicit_rewards(params["beta"], inputs)}
        return metrics if "metrics" in made else {}

    return then(kept)(on_case(inputs_of)(function))


def dynamic(function: Function, constant: float) -> Function:
    """beta grows with the batch's mean margin, and is constant to the gradient."""

    def mistaken(params: Values, inputs: Values) -> Values:
        beta = params["beta"] * (1 + constant * np.mean(pairs.margins_of(inputs)))
        made = function(params | {"beta": beta}, inputs)
        kept = {"metrics": pairs.implicit_rewards(params["beta"], inputs)}
        return made | (kept if "metrics" in made else {})

    return mistaken


def by_length(made: Values, params: Values, inputs: Values) -> Values:
    """Gradients in token means, not in sums."""
    lengths = {name: inputs[f"{name.split('_')[1]}_lengths"] for name in POLICY}
    return {"grads": made["grads"] | {name: made["grads"][name] * lengths[name] for name in POLICY}}


def likelihood(function: Function) -> Function:
    """-log pi(y_w)."""

    def mistaken(params: Values, inputs: Values) -> Values:
        losses = -inputs[POLICY[0]]
        slopes = np.full(len(losses), -1 / len(losses))
        named = zip(POLICY + REFERENCE, (slopes, *[0 * slopes] * 3), strict=True)
        return {"loss": np.mean(losses), "per_example": losses, "grads": dict(named)}

    return mistaken


def more_reward(function: Function, constant: float) -> Function:
    """The rewards times a constant, and so their gradients, where there are any."""

    def mistaken(params: Values, inputs: Values) -> Values:
        made = function(params, inputs | {name: constant * inputs[name] for name in SCORES})
        own = {n: constant * made["grads"][n] for n in SCORES if n in made["grads"]}
        return made | {"grads": made["grads"] | own}

    return mistaken


def more_margin(function: Function, constant: float) -> Function:
    return on(lambda inputs: {"margins": constant * inputs["margins"]})(function)


def repeated(inputs: Values) -> Values:
    """One value beside several is repeated, as array libraries do."""
    named = [name for name in POLICY + REFERENCE + SCORES if name in inputs]
    length = max(inputs[name].shape[-1] for name in named)
    shapes = {name: (*inputs[name].shape[:-1], length) for name in named}
    return {name: np.broadcast_to(inputs[name], shapes[name]) for name in named}


def cut(inputs: Values) -> Values:
    """All are cut to the shortest."""
    sided = [name for name in inputs if "chosen" in name or "rejected" in name or name == "margins"]
    length = min(inputs[name].shape[-1] for name in sided)
    return {name: inputs[name][..., :length] for name in sided}


def scores(change: Callable) -> Callable[[Values], Values]:
    return lambda inputs: {name: change(inputs[name]) for name in SCORES}


def likely(term: Callable, function: Function, constant: float) -> Function:
    """The loss plus a constant times the mean of `term(inputs)`: its values, slopes and input."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        values, slopes, name = term(inputs)
        grads = made["grads"] | {name: made["grads"][name] + constant * slopes / len(values)}
        singles = {"per_example": made["per_example"] + constant * values}
        return singles | {"loss": made["loss"] + constant * np.mean(values), "grads": grads}

    return then(outputs)(function)


def unlikely(per_token: bool, inputs: Values) -> tuple[np.ndarray, np.ndarray, str]:
    """The chosen response's negative log-likelihood."""
    lengths = inputs.get("chosen_lengths", 1.0) if per_token else 1.0
    slopes = -np.ones(len(inputs[POLICY[0]])) / lengths
    return slopes * inputs[POLICY[0]], slopes, POLICY[0]


def fallen(inputs: Values) -> tuple[np.ndarray, np.ndarray, str]:
    """How far the chosen response is below its reference, if it is."""
    fall = inputs[REFERENCE[0]] - inputs[POLICY[0]]
    return np.maximum(fall, 0.0), -step(fall), POLICY[0]


# fmt: off
PAIRS = (
    Mistake("with chosen and rejected swapped", "sign",
        exchanged("policy", "ref", "chosen_l", "rejected_l")),
    Mistake("with the reference's chosen and rejected swapped", "swapped-reference",
        exchanged("ref")),
    Mistake("with the policy's chosen and rejected swapped", "sign", exchanged("policy")),
    Mistake("with the policy as its own reference", "swapped-reference",
        on(lambda x: dict(zip(REFERENCE, (x[n] for n in POLICY), strict=True)))),
    Mistake("without the reference", "swapped-reference",
        on(lambda x: {n: 0 * x[n] for n in REFERENCE})),
    Mistake("without the reference's log-probability of chosen", "swapped-reference",
        on(lambda x: {REFERENCE[0]: 0 * x[REFERENCE[0]]})),
    Mistake("without the reference's log-probability of rejected", "swapped-reference",
        on(lambda x: {REFERENCE[1]: 0 * x[REFERENCE[1]]})),
    Mistake("without the chosen response", "sign", without(POLICY[0], REFERENCE[0])),
    Mistake("without the rejected response", "sign", without(POLICY[1], REFERENCE[1])),
    Mistake("without the rewards", "reward-sign", without(*SCORES)),
    Mistake("without the rejected response's reward", "reward-sign", without(SCORES[1])),
    Mistake("without the chosen response's reward", "reward-sign", without(SCORES[0])),
    Mistake("with {c} times the rewards", "scale", more_reward),
    Mistake("with the rewards of chosen and rejected swapped", "reward-sign", exchanged("score")),
    Mistake("with the reference not detached", "reference-gradient", then(into_reference)),
    Mistake("with chosen detached", "gradient-lost", then(partial(without_gradient, POLICY[0]))),
    Mistake("with rejected detached", "gradient-lost", then(partial(without_gradient, POLICY[1]))),
    Mistake("negated", "sign", then(lambda made, p, x: times(made, -1))),
    Mistake("with the gradients negated", "sign", then(lambda made, p, x: scaled_grads(made, -1))),
    Mistake("at beta 1: beta is dropped", "beta-dropped", at(beta=lambda b: 1.0)),
    Mistake("at 1 / beta", "beta-changed", at(beta=lambda b: 1 / b)),
    Mistake("at beta squared", "beta-changed", at(beta=lambda b: b * b)),
    Mistake("at the root of beta", "beta-changed", at(beta=lambda b: b**0.5)),
    Mistake("at beta cubed", "beta-changed", at(beta=lambda b: b**3)),
    Mistake("at 1 - beta", "beta-changed", at(beta=lambda b: 1 - b)),
    Mistake("at 1 / beta squared", "beta-changed", at(beta=lambda b: b**-2)),
    Mistake("without the target", "target", at(beta=lambda b: np.inf)),
    Mistake("at reward_scale 1: it is dropped", "scale", at(reward_scale=lambda r: 1.0)),
    Mistake("at reward_scale squared", "scale", at(reward_scale=lambda r: r * r)),
    Mistake("at 1 / reward_scale", "scale", at(reward_scale=lambda r: 1 / r)),
    Mistake("at {c} reward_scale", "scale", lambda f, c: at(reward_scale=lambda r: c * r)(f)),
    Mistake("at reward_scale {c}, whatever the case says", "scale",
        lambda f, c: at(reward_scale=lambda r: c)(f)),
    Mistake("with beta on the policy alone", "beta-changed", beta_on(REFERENCE)),
    Mistake("with beta on the reference alone", "beta-changed", beta_on(POLICY)),
    Mistake("with beta on chosen alone", "beta-changed", beta_on((POLICY[1], REFERENCE[1]))),
    Mistake("with beta on rejected alone", "beta-changed", beta_on((POLICY[0], REFERENCE[0]))),
    Mistake("with beta times the rewards", "beta-changed",
        on_case(lambda p, x: {name: p["beta"] * x[name] for name in SCORES})),
    Mistake("with rewards over beta", "beta-changed",
        on_case(lambda p, x: {name: x[name] / p["beta"] for name in SCORES})),
    Mistake("with reward_scale on both sides", "scale",
        then(lambda made, p, x: times(made, p["reward_scale"] ** 2))),
    Mistake("plus {c} times the chosen response's negative log-likelihood", "offset",
        partial(likely, partial(unlikely, False))),
    Mistake("plus {c} times the chosen response's negative log-likelihood per token", "offset",
        partial(likely, partial(unlikely, True))),
    Mistake("plus {c} times how far chosen is below its reference", "offset",
        partial(likely, fallen)),
    Mistake("less {c} for each token that chosen is longer", "offset", longer),
    Mistake("at beta (1 + {c} times the batch's mean margin)", "beta-changed", dynamic),
    Mistake("at {c} beta", "beta-changed", lambda f, c: at(beta=lambda b: c * b)(f)),
    Mistake("at beta {c}, whatever the case says", "beta-changed",
        lambda f, c: at(beta=lambda b: c)(f)),
    Mistake("with the gradients' factor beta dropped", "beta-dropped",
        then(lambda made, p, x: scaled_grads(made, 1 / p["beta"]))),
    Mistake("with the gradients' factor beta twice", "beta-changed",
        then(lambda made, p, x: scaled_grads(made, p["beta"]))),
    Mistake("with a lone value repeated", "broadcast", on(repeated)),
    Mistake("with arrays cut to the shortest", "broadcast", on(cut)),
    Mistake("without the reference and averaged over tokens", "sum-mean", lambda f: partial(
        pairs.per_token, on(lambda x: {n: 0 * x[n] for n in REFERENCE})(f))),
    Mistake("with log-probabilities averaged over tokens", "sum-mean",
        lambda f: partial(pairs.per_token, f)),
    Mistake("with gradients in token means", "sum-mean", then(by_length)),
    Mistake("with {c} times the pair's margin", "margin-dropped", more_margin),
    Mistake("with the pair's margin added", "margin-dropped",
        on(lambda x: {"margins": -x["margins"]})),
    Mistake("with the chosen response's likelihood alone", "sign", likelihood),
)
# fmt: on
