"""Mistakes in what the logits say of a token: other functions than the log-softmax.

Which labels are read, with what weights, is seen from the gradient where all logits are 0.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import ANY, Function, Mistake, Values
from reference.conformance.mistakes.precision import half
from reference.conformance.mistakes.quantities import positive

NAMES = ("logps", "chosen_logps", "rejected_logps")


def scored(value: Callable, slope: Callable) -> Callable[[Function], Function]:
    """`value(logits)` [B, T, V] in place of the log-softmax.

    `slope(logits, weights)` is the gradient of its sum with weights [B, T, V].
    """

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made, logits = function(params, inputs), inputs["logits"]
            weights = {n: weights_of(function, params, inputs, n) for n in NAMES if n in made}
            values = value(logits)
            sums = {
                name: np.sum(np.where(w != 0, w * values, 0.0), axis=(1, 2))
                for name, w in weights.items()
            }
            total = np.sum(list(weights.values()), axis=0)
            return sums | {"grads": {"logits": slope(logits, total)}}

        return mistaken

    return change


def weights_of(function: Function, params: Values, inputs: Values, name: str) -> np.ndarray:
    """What the log-probability of each token of the vocabulary counts in an output, [B, T, V].

    Of no response more labels are read at one position than the vocabulary has tokens.
    """
    flat = inputs | {"logits": 0 * np.nan_to_num(inputs["logits"], neginf=0.0)}
    if name != "logps":
        other = {"chosen_logps": 2, "rejected_logps": 1}[name]
        starts = inputs["segments"]
        alone = np.where(starts == other, -1, starts)
        flat = flat | {"segments": alone}
    grads = function(params, flat)["grads"]["logits"]
    weights = grads - grads.min(axis=2, keepdims=True)
    return np.where(weights < 1e-12, 0.0, weights)


def softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.exp(log_softmax(logits, axis))


def normaliser(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.logaddexp.reduce(logits, axis=axis, keepdims=True)


def log_softmax(logits: np.ndarray, axis: int = -1) -> np.ndarray:
    return logits - normaliser(logits, axis)


def of_softmax(logits: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    return weights - softmax(logits, axis) * weights.sum(axis=axis, keepdims=True)


def of_probabilities(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    chances = softmax(logits)
    return chances * (weights - np.sum(chances * weights, axis=-1, keepdims=True))


def without_last(function: Callable, *arrays: np.ndarray, axis: int) -> np.ndarray:
    """A function of all positions but the last."""
    made = function(*(array[:, :-1] for array in arrays), axis=axis)
    return np.pad(made, ((0, 0), (0, 1), (0, 0)))


def later(logits: np.ndarray) -> np.ndarray:
    """The normaliser is that of the position after."""
    sums = normaliser(logits)
    return logits - np.concatenate([sums[:, 1:], sums[:, -1:]], axis=1)


def of_later(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    totals = np.pad(weights.sum(axis=-1, keepdims=True)[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return weights - softmax(logits) * totals


def likeliest(logits: np.ndarray) -> np.ndarray:
    """The log-probability of the most likely token, whatever the label."""
    return np.broadcast_to(log_softmax(logits).max(axis=-1, keepdims=True), logits.shape)


def of_likeliest(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    best = np.eye(logits.shape[-1])[np.argmax(logits, axis=-1)]
    return of_softmax(logits, best * weights.sum(axis=-1, keepdims=True))


def with_zeros(number_of: Callable[[np.ndarray], float]) -> tuple[Callable, Callable]:
    """The log-softmax over so many logits of 0 more, and its slope."""

    def total(logits: np.ndarray) -> np.ndarray:
        return np.logaddexp(normaliser(logits), np.log(number_of(logits)))

    def slope(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return weights - np.exp(logits - total(logits)) * weights.sum(axis=-1, keepdims=True)

    return lambda logits: logits - total(logits), slope


def of_largest(logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The slopes of the largest logit times the weights' sums: anything where several share it."""
    largest, total = logits == logits.max(axis=-1, keepdims=True), weights.sum(-1, keepdims=True)
    shared = largest & (largest.sum(axis=-1, keepdims=True) > 1) & (total != 0)
    return np.where(shared, ANY, largest * total)


def by_halves(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    """A function of each half of the vocabulary."""
    halves = zip(*(np.array_split(array, 2, axis=-1) for array in arrays), strict=True)
    return np.concatenate([function(*half) for half in halves], axis=-1)


def free(words: str, flag: str, value: Callable, slope: Callable) -> Mistake:
    """A row with a constant."""
    return Mistake(words, flag,
        lambda f, c: scored(partial(value, c=c), partial(slope, c=c))(f))  # fmt: skip


def smoothed(logits: np.ndarray, c: float) -> np.ndarray:
    right = log_softmax(logits)
    return (1 - c) * right + c * right.mean(axis=-1, keepdims=True)


def of_smoothed(logits: np.ndarray, weights: np.ndarray, c: float) -> np.ndarray:
    totals = weights.sum(axis=-1, keepdims=True) / logits.shape[-1]
    return of_softmax(logits, (1 - c) * weights + c * totals)


# fmt: off
IN_HALF = (
    ("token log-probabilities", lambda kind, x: half(log_softmax(x), kind)),
    ("the normaliser", lambda kind, x: x - half(normaliser(x), kind)),
    ("the normaliser and token log-probabilities",
        lambda kind, x: half(x - half(normaliser(x), kind), kind)),
)
SCORES_OF_TOKENS = (
    Mistake("with logits, not normalised", "unshifted-denominator",
        scored(lambda x: x, lambda x, w: w)),
    Mistake("with the probabilities of tokens, not their logarithms", "link",
        scored(softmax, of_probabilities)),
    Mistake("with softmax over positions", "unshifted-denominator",
        scored(partial(log_softmax, axis=1), partial(of_softmax, axis=1))),
    Mistake("with softmax over positions but the last", "unshifted-denominator",
        scored(partial(without_last, log_softmax, axis=1),
            partial(without_last, of_softmax, axis=1))),
    Mistake("with softmax over the batch", "unshifted-denominator",
        scored(partial(log_softmax, axis=0), partial(of_softmax, axis=0))),
    Mistake("with the normaliser of the position after", "unshifted-denominator",
        scored(later, of_later)),
    *(Mistake(f"with {words} in {kind}", "half-precision-sums",
        scored(partial(value, kind), of_softmax))
        for kind in ("bfloat16", "float16") for words, value in IN_HALF),
    Mistake("with logits of 0 in the normaliser, up to a power of two", "unshifted-denominator",
        scored(*with_zeros(lambda x: 2 ** np.ceil(np.log2(x.shape[-1])) - x.shape[-1]))),
    free("with {c} logits of 0 more in the normaliser", "unshifted-denominator",
        lambda x, c: with_zeros(lambda x: positive(c))[0](x),
        lambda x, w, c: with_zeros(lambda x: positive(c))[1](x, w)),
    Mistake("with softmax applied twice", "unshifted-denominator", scored(
        lambda x: log_softmax(softmax(x)),
        lambda x, w: of_probabilities(x, of_softmax(softmax(x), w)))),
    Mistake("with the sigmoid of each logit, not softmax", "link",
        scored(lambda x: -np.logaddexp(0.0, -x), lambda x, w: w / (1 + np.exp(x)))),
    Mistake("with logits less the largest, not normalised", "unshifted-denominator", scored(
        lambda x: x - x.max(axis=-1, keepdims=True),
        lambda x, w: w - of_largest(x, w))),
    Mistake("with softmax over the label's half of the vocabulary", "unshifted-denominator",
        scored(partial(by_halves, log_softmax), partial(by_halves, of_softmax))),
    Mistake("with the likeliest token for the label", "shift", scored(likeliest, of_likeliest)),
    free("with log-probabilities of tokens no lower than {c}, the logarithm of {exp c}", "clipped",
        lambda x, c: np.maximum(log_softmax(x), c),
        lambda x, w, c: of_softmax(x, w * (log_softmax(x) > c))),
    free("with {exp c} added to the probabilities of tokens", "offset",
        lambda x, c: np.logaddexp(log_softmax(x), c),
        lambda x, w, c: of_probabilities(x, w / (softmax(x) + np.exp(c)))),
    free("with label smoothing {c} of tokens", "label-smoothing-misused", smoothed, of_smoothed),
    free("with {c} times the log-probabilities", "scale",
        lambda x, c: c * log_softmax(x), lambda x, w, c: c * of_softmax(x, w)),
    free("with {c} tanh(logits / {c})", "clipped",
        lambda x, c: log_softmax(c * np.tanh(x / c)),
        lambda x, w, c: of_softmax(c * np.tanh(x / c), w) * (1 - np.tanh(x / c) ** 2)),
)
# fmt: on
