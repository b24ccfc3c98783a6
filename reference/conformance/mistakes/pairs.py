"""Mistakes in losses of pairs."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance import pairs
from reference.conformance.mistakes.mistake import (
    Function,
    Mistake,
    Values,
    at,
    on,
    on_case,
    plus,
    scaled_grads,
    then,
    times,
)
from reference.conformance.pairs import POLICY, REFERENCE

SCORES = ("score_chosen", "score_rejected")
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


def size(inputs: Values) -> int:
    """B, the number of pairs."""
    return np.shape(inputs[REFERENCE[0]] if REFERENCE[0] in inputs else inputs[SCORES[0]])[-1]


def added(made: Values, params: Values, inputs: Values) -> Values:
    """The sum over the pairs in place of their mean; values of single pairs stay."""
    return times(made, size(inputs)) | {"per_example": made.get("per_example")}


def added_metrics(made: Values, params: Values, inputs: Values) -> Values:
    mean = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    sums = {name: size(inputs) * made["metrics"][name] for name in mean}
    return {"metrics": made["metrics"] | sums}


def into_reference(made: Values, params: Values, inputs: Values) -> Values:
    """The reference's gradients are those of the policy, negated."""
    both = zip(REFERENCE, POLICY, strict=True)
    return {"grads": made["grads"] | {ref: -made["grads"][policy] for ref, policy in both}}


def without_gradient(name: str, made: Values, params: Values, inputs: Values) -> Values:
    return {"grads": made["grads"] | {name: 0 * made["grads"][name]}}


def absolute(made: Values, params: Values, inputs: Values) -> Values:
    """|x| for x^2."""
    roots = np.sqrt(made["per_example"])
    slopes = 1 / (2 * np.where(roots > 0, roots, np.inf))
    return {"loss": np.mean(roots), "per_example": roots} | scaled_grads(made, slopes)


def through(made: Values, losses: np.ndarray, slopes: np.ndarray) -> Values:
    """A function of the loss of each pair, with its slope in that loss."""
    return {"loss": np.mean(losses), "per_example": losses} | scaled_grads(made, slopes)


def as_probability(made: Values, params: Values, inputs: Values) -> Values:
    """1 - p for -log p: the same minimum, and gradients that vanish."""
    wrong = np.exp(-made["per_example"])
    return through(made, 1 - wrong, wrong)


def squared(made: Values, params: Values, inputs: Values) -> Values:
    return through(made, made["per_example"] ** 2, 2 * made["per_example"])


def exponential(made: Values, params: Values, inputs: Values) -> Values:
    return through(made, np.exp(made["per_example"]), np.exp(made["per_example"]))


def over_once(made: Values, params: Values, inputs: Values) -> Values:
    e = params["label_smoothing"]
    return times(made, (1 - 2 * e) / (1 - e))


def by_length(made: Values, params: Values, inputs: Values) -> Values:
    """Gradients in token means, not in sums."""
    lengths = {name: inputs[f"{name.split('_')[1]}_lengths"] for name in POLICY}
    return {"grads": made["grads"] | {name: made["grads"][name] * lengths[name] for name in POLICY}}


def other_singles(function: Callable, made: Values, params: Values, inputs: Values) -> Values:
    return {"per_example": function(made["per_example"])}


def margin(inputs: Values) -> np.ndarray:
    return pairs.margins_of(inputs) if POLICY[0] in inputs else pairs.reward_margins(inputs)


def accurate(count: Callable, made: Values, params: Values, inputs: Values) -> Values:
    """The accuracy where each pair counts `count(margin)`."""
    accuracy = {"rewards/accuracies": np.mean(count(margin(inputs)))}
    return {"metrics": made["metrics"] | accuracy}


def of_mean_margin(made: Values, params: Values, inputs: Values) -> Values:
    return accurate(lambda h: np.mean(h) > 0, made, params, inputs)


def one_by_one(function: Function) -> Function:
    """The loss of each pair alone, then the mean."""

    def mistaken(params: Values, inputs: Values) -> Values:
        function(params, inputs)  # it refuses what the loss refuses
        singles = [
            function(params, {name: value[..., [b]] for name, value in inputs.items()})
            for b in range(size(inputs))
        ]
        names = singles[0]["grads"]
        grads = {n: np.concatenate([s["grads"][n] for s in singles]) / len(singles) for n in names}
        return {"loss": np.mean([single["loss"] for single in singles]), "grads": grads}

    return mistaken


def all_against_all(function: Function) -> Function:
    """The loss of every chosen response with every rejected one."""

    def mistaken(params: Values, inputs: Values) -> Values:
        function(params, inputs)  # it refuses what the loss refuses
        number = size(inputs)
        rows = dict(zip(("chosen", "rejected"), np.indices((number, number)), strict=True))
        chosen = {n: v[..., rows["chosen"].ravel()] for n, v in inputs.items() if "chosen" in n}
        others = {n: v[..., rows["rejected"].ravel()] for n, v in inputs.items() if n not in chosen}
        made = function(params, chosen | others)
        grads = {
            name: grad.reshape(number, number).sum(axis=1 if "chosen" in name else 0)
            for name, grad in made["grads"].items()
        }
        return {"loss": made["loss"], "grads": grads}

    return mistaken


def against_all_margins(function: Function) -> Function:
    """Rewards [B, 1] less margins [B]: every pair with every margin, as arrays broadcast."""

    def mistaken(params: Values, inputs: Values) -> Values:
        rolled = [np.roll(inputs["margins"], b) for b in range(size(inputs))]
        made = [function(params, inputs | {"margins": margins}) for margins in rolled]
        singles = np.mean([one["per_example"] for one in made], axis=0)
        grads = {n: np.mean([one["grads"][n] for one in made], axis=0) for n in made[0]["grads"]}
        return made[0] | {"loss": np.mean(singles), "per_example": singles, "grads": grads}

    return mistaken


def without_ties(made: Values, params: Values, inputs: Values) -> Values:
    """Pairs of margin 0 have no loss, and are counted."""
    kept = 1.0 * (margin(inputs) != 0)
    return through(made, kept * made["per_example"], kept)


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


def both_lengths(inputs: Values) -> Values:
    names = ("chosen_lengths", "rejected_lengths")
    return dict.fromkeys(names, inputs[names[0]] + inputs[names[1]])


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


def inside_logarithm(function: Function) -> Function:
    """-log [(1 - e) sigmoid(beta h) + e sigmoid(-beta h)]."""

    def mistaken(params: Values, inputs: Values) -> Values:
        e, made = params["label_smoothing"], function(params, inputs)
        right = pairs.sigmoid(params["beta"] * pairs.margins_of(inputs))
        mixed = e + (1 - 2 * e) * right
        slopes = -params["beta"] * (1 - 2 * e) * right * (1 - right) / mixed
        return made | pairs.over_pairs(-np.log(mixed), slopes)

    return mistaken


def scores(change: Callable) -> Callable[[Values], Values]:
    return lambda inputs: {name: change(inputs[name]) for name in SCORES}


LOGPS = tuple(f"{who}_{side}_logps" for who in ("policy", "ref") for side in SWAP)

# fmt: off
PAIRS = (
    Mistake("with chosen and rejected swapped", "sign",
        exchanged("policy", "ref", "chosen_l", "rejected_l")),
    Mistake("with the reference's chosen and rejected swapped", "swapped-reference",
        exchanged("ref")),
    Mistake("without the reference", "swapped-reference",
        on(lambda x: {n: 0 * x[n] for n in REFERENCE})),
    Mistake("without the reference's log-probability of chosen", "swapped-reference",
        on(lambda x: {REFERENCE[0]: 0 * x[REFERENCE[0]]})),
    Mistake("without the reference's log-probability of rejected", "swapped-reference",
        on(lambda x: {REFERENCE[1]: 0 * x[REFERENCE[1]]})),
    Mistake("without the chosen response", "sign",
        on(lambda x: {n: 0 * x[n] for n in LOGPS if "chosen" in n})),
    Mistake("without the rejected response", "sign",
        on(lambda x: {n: 0 * x[n] for n in LOGPS if "rejected" in n})),
    Mistake("without the rewards", "reward-sign", on(scores(lambda s: 0 * s))),
    Mistake("without the rejected response's reward", "reward-sign",
        on(lambda x: {SCORES[1]: 0 * x[SCORES[1]]})),
    Mistake("without the chosen response's reward", "reward-sign",
        on(lambda x: {SCORES[0]: 0 * x[SCORES[0]]})),
    Mistake("with {c} times the rewards", "scale", more_reward),
    Mistake("with the least reward of each response", "min-mean",
        on(scores(lambda s: s.min(axis=0, keepdims=True)))),
    Mistake("with the greatest reward of each response", "min-mean",
        on(scores(lambda s: s.max(axis=0, keepdims=True)))),
    Mistake("with the median reward of each response", "min-mean",
        on(scores(lambda s: np.median(s, axis=0, keepdims=True)))),
    Mistake("with the first reward model alone", "min-mean", on(scores(lambda s: s[:1]))),
    Mistake("with the rewards of the models added", "min-mean",
        on(scores(lambda s: s.sum(axis=0, keepdims=True)))),
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
    Mistake("with beta on the policy alone", "beta-changed", on_case(
        lambda p, x: {name: x[name] / p["beta"] for name in REFERENCE})),
    Mistake("at {c} beta", "beta-changed", lambda f, c: at(beta=lambda b: c * b)(f)),
    Mistake("at beta {c}, whatever the case says", "beta-changed",
        lambda f, c: at(beta=lambda b: c)(f)),
    Mistake("with the gradients' factor beta dropped", "beta-dropped",
        then(lambda made, p, x: scaled_grads(made, 1 / p["beta"]))),
    Mistake("with the gradients' factor beta twice", "beta-changed",
        then(lambda made, p, x: scaled_grads(made, p["beta"]))),
    Mistake("at label_smoothing 0", "label-smoothing-ignored", at(label_smoothing=lambda e: 0.0)),
    Mistake("at label_smoothing 1 - e", "label-smoothing-misused",
        at(label_smoothing=lambda e: 1 - e)),
    Mistake("at {c} label_smoothing", "label-smoothing-misused",
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
    Mistake("with the pairs added, not averaged", "batch-sum", then(added)),
    Mistake("with the metrics of the pairs added, not averaged", "batch-sum", then(added_metrics)),
    Mistake("with the values of the pairs in reverse order", "per-example",
        then(partial(other_singles, lambda v: v[::-1]))),
    Mistake("with the values of the pairs sorted", "per-example",
        then(partial(other_singles, np.sort))),
    Mistake("with the mean as the value of each pair", "per-example",
        then(partial(other_singles, lambda v: np.full(len(v), np.mean(v))))),
    Mistake("with ties counted as accurate", "accuracy-tie",
        then(partial(accurate, lambda h: h >= 0))),
    Mistake("with ties counted as half accurate", "accuracy-tie",
        then(partial(accurate, lambda h: (np.sign(h) + 1) / 2))),
    Mistake("with the accuracy of the mean margin", "accuracy-of-means", then(of_mean_margin)),
    Mistake("with a lone value repeated", "broadcast", on(repeated)),
    Mistake("with arrays cut to the shortest", "broadcast", on(cut)),
    Mistake("over beta squared", "scale", then(lambda made, p, x: times(made, p["beta"] ** -2))),
    Mistake("times beta squared", "scale", then(lambda made, p, x: times(made, p["beta"] ** 2))),
    Mistake("times {c}", "scale", lambda f, c: then(lambda made, p, x: times(made, c))(f)),
    Mistake("plus {c}", "scale", lambda f, c: then(lambda made, p, x: plus(made, c))(f)),
    Mistake("in bits", "scale", then(lambda made, p, x: times(made, 1 / np.log(2)))),
    Mistake("with a probability, not its logarithm", "overflow", then(as_probability)),
    Mistake("with the loss squared", "squared", then(squared)),
    Mistake("with the exponential of the loss", "squared", then(exponential)),
    Mistake("with absolute values, not squares", "squared", then(absolute)),
    Mistake("with log-probabilities averaged over tokens", "sum-mean",
        lambda f: partial(pairs.per_token, f)),
    Mistake("with gradients in token means", "sum-mean", then(by_length)),
    Mistake("with {c} times the pair's margin", "margin-dropped", more_margin),
    Mistake("with the pair's margin added", "margin-dropped",
        on(lambda x: {"margins": -x["margins"]})),
    Mistake("with every pair's rewards against every margin", "margin-dropped",
        against_all_margins),
    Mistake("with every chosen response against every rejected one", "per-example",
        all_against_all),
    Mistake("with pairs of margin 0 left out", "accuracy-tie", then(without_ties)),
    Mistake("with the chosen response's likelihood alone", "sign", likelihood),
    Mistake("with the tokens of both responses counted", "sum-mean", on(both_lengths)),
    Mistake("on each pair alone, then averaged", "example-min", one_by_one),
)
# fmt: on
