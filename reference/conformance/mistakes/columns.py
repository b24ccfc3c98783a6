"""Mistakes in which column of inputs stands where: taken for another, or reordered; and in lengths.

A column has a number for each pair.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import LOGPS, SCORES, Function, Mistake, Values, on
from reference.conformance.pairs import POLICY, REFERENCE

WORDS = {
    POLICY[0]: "the policy's log-probability of chosen",
    POLICY[1]: "the policy's log-probability of rejected",
    REFERENCE[0]: "the reference's log-probability of chosen",
    REFERENCE[1]: "the reference's log-probability of rejected",
    SCORES[0]: "the chosen response's reward",
    SCORES[1]: "the rejected response's reward",
}
LENGTHS = ("chosen_lengths", "rejected_lengths")


def taken(wrong: str, right: str) -> Callable[[Function], Function]:
    """The column `wrong` stands where `right` is due, and has its gradient too."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made = function(params, inputs | {right: inputs[wrong]})
            grads = dict(made["grads"])
            if right in grads:
                grads[wrong] = grads.get(wrong, 0.0) + grads[right]
                grads[right] = 0 * grads[right]
            return made | {"grads": grads}

        return mistaken

    return change


def exchanged(a: str, b: str, reference: float | None) -> Callable[[Function], Function]:
    """Two arguments are passed in the wrong order, where the margin is the same.

    Gradients by autodiff are right. Those by hand are exchanged too: then `reference` is 0 where it
    is detached, else 1.
    """

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made = function(params, inputs | {a: inputs[b], b: inputs[a]})
            if reference is None:
                return made
            built = {"gamma", "learning_rate"} & params.keys()  # whose outputs have no rewards
            if built or "rewards/chosen" not in made.get("metrics", ()):
                raise ValueError("nothing tells an exchange from a detached argument")
            grads = made["grads"] | {a: made["grads"][b], b: made["grads"][a]}
            return made | {"grads": grads | {n: reference * grads[n] for n in REFERENCE}}

        return mistaken

    return change


def mixed(names: tuple[str, ...], matrix: Callable[[int], np.ndarray]):
    """Columns are products of columns and a matrix, [B] @ [B, B]."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            size = inputs[names[0]].shape[-1]
            if names == SCORES and POLICY[0] not in inputs:
                raise ValueError("that is another order of all pairs")
            changed = {name: inputs[name] @ matrix(size) for name in names}
            made = function(params, inputs | changed)
            grads = {n: g @ matrix(size).T if n in names else g for n, g in made["grads"].items()}
            return made | {"grads": grads}

        return mistaken

    return change


def per_token(*names: str, power: float = -1.0) -> Callable[[Function], Function]:
    """These log-probabilities alone are averaged over tokens; with power 1 they alone are added,
    where the right loss averages all."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            sizes = {n: inputs.get(f"{n.split('_')[1]}_lengths", 1) ** power for n in names}
            made = function(params, inputs | {n: inputs[n] * sizes[n] for n in names})
            grads = {n: g * sizes.get(n, 1) for n, g in made["grads"].items()}
            return made | {"grads": grads}

        return mistaken

    return change


def lengths(change: Callable[[np.ndarray, np.ndarray], tuple]) -> Callable[[Function], Function]:
    """Other lengths of chosen and rejected, where there are lengths."""

    def inputs_of(inputs: Values) -> Values:
        known = [inputs[name] for name in LENGTHS if name in inputs]
        return dict(zip(LENGTHS, change(*known), strict=True)) if known else {}

    return on(inputs_of)


def first(size: int) -> np.ndarray:
    return np.eye(size)[[0]].T * np.ones(size)


def sorted_apart(parts: tuple[tuple[str, str], ...]) -> Callable[[Function], Function]:
    """Each part, a difference of two columns, is in its own order of size over the batch."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            orders = {both: np.argsort(inputs[both[0]] - inputs[both[1]]) for both in parts}
            order_of = {name: order for both, order in orders.items() for name in both}
            changed = {name: inputs[name][order] for name, order in order_of.items()}
            made = function(params, inputs | changed)
            grads = dict(made["grads"])
            for name in order_of.keys() & grads.keys():
                grads[name] = grads[name][np.argsort(order_of[name])]
            return made | {"grads": grads}

        return mistaken

    return change


def alternated(halves: list[np.ndarray]) -> list[np.ndarray]:
    """What lies in halves, chosen and then rejected, is read as alternating."""
    both = np.concatenate(halves)
    return [both[0::2], both[1::2]]


def halved(alternating: list[np.ndarray]) -> list[np.ndarray]:
    """What lies as alternating chosen and rejected is read in halves: `alternated`'s inverse."""
    return np.split(np.stack(alternating, axis=1).ravel(), 2)


def read_as(*names: str, layout: Callable, inverse: Callable) -> Callable[[Function], Function]:
    """Columns of chosen and rejected lie in one array in another order than they are read in."""
    pairs_of = list(zip(names[::2], names[1::2], strict=True))

    def of(columns: Values, order: Callable) -> Values:
        split = [(both, order([columns[name] for name in both])) for both in pairs_of]
        return {n: v for both, made in split for n, v in zip(both, made, strict=True)}

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made = function(params, inputs | of(inputs, layout))
            return made | {"grads": made["grads"] | of(made["grads"], inverse)}

        return mistaken

    return change


def of_mean_margin(function: Function) -> Function:
    """The loss, and its gradient, of a pair whose numbers are the batch's means."""

    def mistaken(params: Values, inputs: Values) -> Values:
        columns = [name for name in (*LOGPS, *SCORES, "margins") if name in inputs]
        made = function(params, inputs)
        other = function(params, inputs | {name: mean_of(inputs[name]) for name in columns})
        grads = {n: mean_of(g) if n in columns else g for n, g in other["grads"].items()}
        return made | {"loss": other["loss"], "grads": grads}

    return mistaken


def mean_of(column: np.ndarray) -> np.ndarray:
    return np.mean(column, axis=-1, keepdims=True) + 0 * column


def deviation(numbers: np.ndarray, freedom: int) -> np.ndarray:
    """The standard deviation; NaN where a sample has no degree of freedom."""
    gaps = numbers - np.mean(numbers, axis=-1, keepdims=True)
    return np.sqrt(np.sum(gaps**2, axis=-1, keepdims=True) / (numbers.shape[-1] - freedom))


def of_all_models(rewards: np.ndarray) -> np.ndarray:
    """The rewards [K, N] of all models in one row."""
    if rewards.ndim < 2:
        raise ValueError("there is one model")
    return rewards.reshape(1, -1)


def over_common(
    every_model: bool, freedom: int, function: Function, constant: float = -np.inf
) -> Function:
    """All rewards over their standard deviation, plus the exponential of a constant."""

    def inputs_of(inputs: Values) -> Values:
        both = np.concatenate([inputs[name] for name in SCORES], axis=-1)
        scale = deviation(of_all_models(both) if every_model else both, freedom)
        scale = scale + np.exp(constant)
        return {name: inputs[name] / scale for name in SCORES}

    return on(inputs_of)(function)


def over_deviation(every_model: bool, freedom: int, centred: bool, inputs: Values) -> Values:
    """Reward margins over their standard deviation."""
    rho = inputs[SCORES[0]] - inputs[SCORES[1]]
    margins = of_all_models(rho) if every_model else rho
    scale = deviation(margins, freedom) + 1e-8
    rho = rho - np.mean(margins, axis=-1, keepdims=True) if centred else rho
    return {SCORES[0]: rho / scale, SCORES[1]: 0 * rho}


def standardised(rewards: np.ndarray) -> np.ndarray:
    return (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, keepdims=True) + 1e-8)


# fmt: off
SUBJECTS = (
    ("the policy", POLICY),
    ("the reference", REFERENCE),
    ("the rejected responses", (POLICY[1], REFERENCE[1])),
    ("the rejected responses' reference", REFERENCE[1:]),
    ("the rewards", SCORES),
    ("the rejected responses' rewards", SCORES[1:]),
    ("the pairs' margins", ("margins",)),
)
ORDERS = (
    ("{s} of the pair after", lambda size: np.roll(np.eye(size), 1, axis=1).T),
    ("{s} of the pair before", lambda size: np.roll(np.eye(size), 1, axis=1)),
    ("{s} in reverse order", lambda size: np.eye(size)[::-1]),
    ("{s} of the first pair for all", first),
    ("the batch's mean of {s}", lambda size: np.full((size, size), 1 / size)),
)
COLUMNS = (
    *(Mistake(f"with {WORDS[a]} and {WORDS[b]} exchanged{words}", "swapped-reference",
        exchanged(a, b, reference))
        for a, b in ((POLICY[1], REFERENCE[0]), (POLICY[0], REFERENCE[1]))
        for words, reference in (("", None), (" in the loss and its gradients", 1.0),
            (" in the loss and its gradients, the reference detached", 0.0))),
    *(Mistake(f"with {WORDS[wrong]} in place of {WORDS[right]}",
        "swapped-reference", taken(wrong, right))
        for right in LOGPS for wrong in LOGPS
        if wrong != right and not {wrong, right} <= set(REFERENCE)),
    *(Mistake(f"with the {side} response's reference subtracted from both",
        "swapped-reference", taken(*names))
        for side, names in (("chosen", REFERENCE), ("rejected", REFERENCE[::-1]))),
    *(Mistake(f"with {WORDS[wrong]} in place of the other", "reward-sign", taken(wrong, right))
        for right in SCORES for wrong in SCORES if wrong != right),
    *(Mistake(f"with {words.replace('{s}', subject)}", "order", mixed(names, matrix))
        for subject, names in SUBJECTS for words, matrix in ORDERS),
    Mistake("with the log-ratios of policy and reference sorted apart, as AOT does", "order",
        sorted_apart((POLICY, REFERENCE))),
    Mistake("with the log-ratios of chosen and rejected sorted apart, as paired AOT does", "order",
        sorted_apart(((POLICY[0], REFERENCE[0]), (POLICY[1], REFERENCE[1])))),
    Mistake("less the batch's mean margin", "normalised",
        mixed(LOGPS, lambda size: np.eye(size) - 1 / size)),
    Mistake("with the loss of the batch's mean margin", "order", of_mean_margin),
    Mistake("with rewards less their batch's mean", "normalised",
        mixed(SCORES, lambda size: np.eye(size) - 1 / size)),
    Mistake("with rewards standardised over the batch", "normalised",
        on(lambda x: {name: standardised(x[name]) for name in SCORES})),
    *(Mistake(f"with reward margins {models}{less}over their standard deviation{sample}",
        "normalised", on(partial(over_deviation, bool(models), freedom, centred)))
        for models in ("", "of all models ")
        for freedom, sample in ((0, ""), (1, " of a sample"))
        for centred, less in ((False, ""), (True, "less their mean, "))),
    *(Mistake(f"with all rewards {models}over their standard deviation{sample}{more}",
        "normalised", partial(over_common, bool(models), freedom))
        for models in ("", "of all models ")
        for freedom, sample in ((0, ""), (1, " of a sample")) for more in ("", " plus {exp c}")),
    *(Mistake(f"with {whose} {words}", "layout",
        read_as(*names, layout=layout, inverse=inverse))
        for whose, names in (("the reference's chosen and rejected", REFERENCE),
            ("the policy's chosen and rejected", POLICY), ("chosen and rejected", LOGPS))
        for words, layout, inverse in (
            ("in halves, read as alternating", alternated, halved),
            ("alternating, read in halves", halved, alternated))),
    Mistake("with the policy's log-probabilities alone averaged over tokens", "sum-mean",
        per_token(*POLICY)),
    Mistake("with the reference's log-probabilities alone averaged over tokens", "sum-mean",
        per_token(*REFERENCE)),
    *(Mistake(f"with the {side}'s log-probabilities not divided by the number of tokens",
        "sum-mean", per_token(*names, power=1.0))
        for side, names in (("policy", POLICY), ("reference", REFERENCE))),
    Mistake("with the chosen response's log-probabilities alone averaged over tokens", "sum-mean",
        per_token(POLICY[0], REFERENCE[0])),
    Mistake("with the rejected response's log-probabilities alone averaged over tokens",
        "sum-mean", per_token(POLICY[1], REFERENCE[1])),
    Mistake("with the tokens of both responses counted", "sum-mean",
        lengths(lambda w, r: (w + r, w + r))),
    Mistake("with the tokens of the other response counted", "sum-mean",
        lengths(lambda w, r: (r, w))),
    Mistake("with the longer response's tokens counted", "sum-mean",
        lengths(lambda w, r: (np.maximum(w, r),) * 2)),
    Mistake("with the shorter response's tokens counted", "sum-mean",
        lengths(lambda w, r: (np.minimum(w, r),) * 2)),
    Mistake("with the mean length of both responses counted", "sum-mean",
        lengths(lambda w, r: ((w + r) / 2,) * 2)),
    Mistake("with the chosen response's tokens counted for both", "sum-mean",
        lengths(lambda w, r: (w, w))),
    Mistake("with the rejected response's tokens counted for both", "sum-mean",
        lengths(lambda w, r: (r, r))),
    Mistake("with every response divided by the length of the batch's longest one", "divisor",
        lengths(lambda w, r: (np.full(len(w), max(*w, *r)),) * 2)),
    Mistake("with one token more counted", "sum-mean", lengths(lambda w, r: (w + 1, r + 1))),
    Mistake("with one token fewer counted", "sum-mean", lengths(lambda w, r: (w - 1, r - 1))),
    Mistake("with the root of the number of tokens", "sum-mean",
        lengths(lambda w, r: (w**0.5, r**0.5))),
)
# fmt: on
