"""Mistakes in what is made of several reward models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from reference.conformance import pairs
from reference.conformance.mistakes.mistake import SCORES, Function, Mistake, Values, on


def of_models(loss_of: Callable[[np.ndarray], tuple[float, np.ndarray]]):
    """Another function of the squares [K, B]: `loss_of(squares)` and its slopes [K, B]."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            beta, rewards = params["beta"], several(pairs.reward_margins(inputs))
            residuals = rewards - beta * pairs.margins_of(inputs)
            loss, weights = loss_of(residuals**2)
            d = np.sum(weights * -2 * beta * residuals, axis=0)
            made = pairs.over_pairs(np.full(len(d), loss), d * len(d))
            return {"loss": loss, "grads": made["grads"]}

        return mistaken

    return change


def averaged(squares: np.ndarray) -> tuple[float, np.ndarray]:
    return np.mean(squares), np.full(squares.shape, 1 / squares.size)


def added(squares: np.ndarray) -> tuple[float, np.ndarray]:
    return np.sum(np.mean(squares, axis=1)), np.full(squares.shape, 1 / squares.shape[1])


def one_along(axis: int, choose: Callable, squares: np.ndarray) -> tuple[float, np.ndarray]:
    """The chosen square along an axis, then the mean over the other axis."""
    weights = np.zeros(squares.shape)
    index = np.expand_dims(choose(squares, axis=axis), axis)
    np.put_along_axis(weights, index, 1 / squares.shape[1 - axis], axis=axis)
    return np.sum(weights * squares), weights


def one_of_means(axis: int, choose: Callable, squares: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean over an axis, then the chosen one along the other."""
    means = np.mean(squares, axis=axis, keepdims=True)
    weights = np.zeros(squares.shape)
    index = choose(means)
    np.moveaxis(weights, 1 - axis, 0)[index] = 1 / squares.shape[axis]
    return means.ravel()[index], weights


def soft(sign: int, each: bool, normalised: bool, squares: np.ndarray, scale: float):
    """scale log of a sum or mean of exp(squares / scale), which is a maximum for the sign 1."""
    if not scale > 0:
        return np.nan, squares
    losses = squares if each else np.mean(squares, axis=1, keepdims=True)
    largest = np.max(sign * losses / scale, axis=0)
    powers = np.exp(sign * losses / scale - largest)
    total = np.sum(powers, axis=0) / (len(powers) if normalised else 1)
    values = sign * scale * (np.log(total) + largest)
    weights = powers / np.sum(powers, axis=0) / squares.shape[1]
    return np.mean(values), np.broadcast_to(weights, squares.shape)


def weighed(squares: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    """The models' losses with weights of softmax(-losses / scale), which have a gradient too."""
    losses = np.mean(squares, axis=1)
    shares = np.exp((losses.min() - losses) / scale)
    shares = shares / shares.sum()
    total = shares @ losses
    slopes = shares * (1 - (losses - total) / scale) / squares.shape[1]
    return total, np.broadcast_to(slopes[:, None], squares.shape)


def softly(words: str, sign: int, each: bool, normalised: bool) -> Mistake:
    """A row whose temperature is fitted."""

    def change(function: Function, constant: float) -> Function:
        return of_models(partial(soft, sign, each, normalised, scale=constant))(function)

    return Mistake(words, "min-mean", change)


def as_margins(margin_of: Callable[[np.ndarray], np.ndarray]) -> Callable[[Values], Values]:
    """One reward model, whose margins are a function of the margins [K, B]."""

    def inputs_of(inputs: Values) -> Values:
        margins = margin_of(several(pairs.reward_margins(inputs)))[None]
        return {SCORES[0]: margins, SCORES[1]: 0 * margins}

    return inputs_of


def less_deviations(freedom: int, function: Function, constant: float) -> Function:
    def margin_of(margins: np.ndarray) -> np.ndarray:
        return np.mean(margins, axis=0) - constant * np.std(margins, axis=0, ddof=freedom)

    return on(as_margins(margin_of))(function)


def less_variance(function: Function, constant: float) -> Function:
    def margin_of(margins: np.ndarray) -> np.ndarray:
        return np.mean(margins, axis=0) - constant * np.var(margins, axis=0)

    return on(as_margins(margin_of))(function)


def scores(change: Callable) -> Callable[[Values], Values]:
    return lambda inputs: {name: change(several(inputs[name])) for name in SCORES}


def several(rewards: np.ndarray) -> np.ndarray:
    """The rewards, which have to be those of several models."""
    if np.ndim(rewards) != 2:
        raise ValueError("there is one model")
    return rewards


def cautious(inputs: Values) -> Values:
    """The least reward of chosen, and the greatest of rejected."""
    chosen, rejected = (several(inputs[name]) for name in SCORES)
    return {SCORES[0]: chosen.min(0, keepdims=True), SCORES[1]: rejected.max(0, keepdims=True)}


def least_squares(margins: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """Weights of the models, without constraints."""
    return np.linalg.lstsq(several(rewards).T, beta * margins)[0]


def sum_of_1(margins: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """Weights of least squares whose sum is 1: the last is 1 less the others."""
    rest, last = several(rewards)[:-1], rewards[-1]
    weights = np.linalg.lstsq((rest - last).T, beta * margins - last)[0]
    return np.append(weights, 1 - weights.sum())


def into_simplex(weights_of: Callable, *inputs: Any) -> np.ndarray:
    """Weights that are clipped at 0 and divided by their sum."""
    weights = np.maximum(weights_of(*inputs), 0.0)
    return weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))


# fmt: off
WEIGHTS = (
    ("", least_squares),
    (", clipped at 0 and divided by their sum", partial(into_simplex, least_squares)),
    (" of sum 1, clipped at 0 and divided by their sum", partial(into_simplex, sum_of_1)),
)
ENSEMBLES = (
    *(Mistake(f"with weights of least squares{words}", "hull-at-a-corner",
        lambda f, weights_of=weights_of: partial(pairs.distil_ensemble, weights_of))
        for words, weights_of in WEIGHTS),
    Mistake("with the models' losses averaged", "min-mean", of_models(averaged)),
    Mistake("with the models' losses added", "min-mean", of_models(added)),
    Mistake("with the median of the models for each pair", "min-mean",
        of_models(lambda v: one_along(0, lambda x, axis: np.argsort(x, axis)[len(x) // 2], v))),
    Mistake("with the minimum over pairs, averaged over models", "min-mean",
        of_models(partial(one_along, 1, np.argmin))),
    Mistake("with the maximum over pairs, averaged over models", "min-mean",
        of_models(partial(one_along, 1, np.argmax))),
    Mistake("with the minimum over pairs of the models' mean loss", "min-mean",
        of_models(partial(one_of_means, 0, np.argmin))),
    Mistake("with the minimum over models and pairs", "min-mean",
        of_models(lambda v: (v.min(), 1.0 * (np.arange(v.size) == v.argmin()).reshape(v.shape)))),
    softly("with a soft minimum over models, of temperature {c}", -1, False, False),
    softly("with a soft minimum over models by a mean, of temperature {c}", -1, False, True),
    softly("with a soft minimum for each pair, of temperature {c}", -1, True, False),
    softly("with a soft minimum for each pair by a mean, of temperature {c}", -1, True, True),
    softly("with a soft maximum over models, of temperature {c}", 1, False, False),
    softly("with a soft maximum for each pair, of temperature {c}", 1, True, False),
    Mistake("with models weighed by softmax(-loss / {c})", "min-mean",
        lambda f, c: of_models(partial(weighed, scale=c))(f)),
    Mistake("with the least reward of each response", "min-mean",
        on(scores(lambda s: s.min(axis=0, keepdims=True)))),
    Mistake("with the greatest reward of each response", "min-mean",
        on(scores(lambda s: s.max(axis=0, keepdims=True)))),
    Mistake("with the median reward of each response", "min-mean",
        on(scores(lambda s: np.median(s, axis=0, keepdims=True)))),
    Mistake("with the first reward model alone", "min-mean", on(scores(lambda s: s[:1]))),
    Mistake("with the last reward model alone", "min-mean", on(scores(lambda s: s[-1:]))),
    Mistake("without the first reward model", "min-mean", on(scores(lambda s: s[1:]))),
    Mistake("without the last reward model", "min-mean", on(scores(lambda s: s[:-1]))),
    Mistake("with the rewards of the models added", "min-mean",
        on(scores(lambda s: s.sum(axis=0, keepdims=True)))),
    Mistake("with the least reward of chosen and the greatest of rejected", "min-mean",
        on(cautious)),
    Mistake("with the least reward margin of each pair", "min-mean",
        on(as_margins(lambda m: m.min(axis=0)))),
    Mistake("with the greatest reward margin of each pair", "min-mean",
        on(as_margins(lambda m: m.max(axis=0)))),
    Mistake("with the median reward margin of each pair", "min-mean",
        on(as_margins(lambda m: np.median(m, axis=0)))),
    Mistake("with the smallest reward margin in size of each pair", "min-mean",
        on(as_margins(lambda m: m[np.argmin(np.abs(m), axis=0), np.arange(m.shape[1])]))),
    Mistake("with the model of the least mean reward margin", "min-mean",
        on(as_margins(lambda m: m[np.argmin(m.mean(axis=1))]))),
    Mistake("with the mean reward less {c} variances", "min-mean", less_variance),
    Mistake("with the mean reward less {c} standard deviations", "min-mean",
        partial(less_deviations, 0)),
    Mistake("with the mean reward less {c} standard deviations of a sample", "min-mean",
        partial(less_deviations, 1)),
)
# fmt: on
