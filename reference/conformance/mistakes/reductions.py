"""Mistakes in what is made of the pairs' losses: their reduction, their scale, and the metrics."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import (
    ANY,
    Function,
    Mistake,
    Values,
    margin,
    plus,
    scaled_grads,
    size,
    then,
    through,
    times,
)
from reference.conformance.pairs import POLICY, REFERENCE


def added(made: Values, params: Values, inputs: Values) -> Values:
    """The sum over the pairs in place of their mean; values of single pairs stay."""
    return times(made, size(inputs)) | {"per_example": made.get("per_example")}


def added_metrics(made: Values, params: Values, inputs: Values) -> Values:
    mean = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    sums = {name: size(inputs) * made["metrics"][name] for name in mean}
    return {"metrics": made["metrics"] | sums}


def other_singles(function: Callable, made: Values, params: Values, inputs: Values) -> Values:
    return {"per_example": function(made["per_example"])}


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


def beside_all(starts: tuple[str, ...], matrix: bool) -> Callable[[Function], Function]:
    """The inputs whose names begin so [B] beside the others [B, 1]: arrays broadcast to [B, B].

    The losses of pairs are this matrix, or the mean of each row.
    """

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            beside = [n.startswith(starts) for n in inputs if not n.endswith("lengths")]
            if all(beside) or not any(beside):
                raise ValueError("nothing is beside another")
            function(params, inputs)  # it refuses what the loss refuses
            number = size(inputs)
            rows, columns = (index.ravel() for index in np.indices((number, number)))
            index_of = {n: columns if n.startswith(starts) else rows for n in inputs}
            every = function(params, {n: v[..., index_of[n]] for n, v in inputs.items()})
            grads = {
                name: grad.reshape(number, number).sum(axis=int(index_of[name] is rows))
                for name, grad in every["grads"].items()
            }
            singles = {}
            if "per_example" in every:
                losses = every["per_example"].reshape(number, number)
                singles["per_example"] = losses if matrix else losses.mean(axis=1)
            return every | singles | {"grads": grads}

        return mistaken

    return change


def kept(which: Callable) -> Callable[[Function], Function]:
    """Pairs have no loss, and are counted, unless `which(margin)`."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        chosen = 1.0 * which(margin(inputs))
        return through(made, chosen * made["per_example"], chosen)

    return then(outputs)


def weighed(weights_of: Callable) -> Callable[[Function], Function]:
    """The sum of the pairs' losses times `weights_of(losses, inputs)` [B], for their mean."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        losses = made["per_example"]
        weights = weights_of(losses, inputs)
        return {"loss": weights @ losses} | scaled_grads(made, weights * len(losses))

    return then(outputs)


def only(index_of: Callable) -> Callable[[Function], Function]:
    """The loss of one pair."""
    return weighed(lambda losses, inputs: np.eye(len(losses))[index_of(losses)])


def halves(losses: np.ndarray, inputs: Values) -> np.ndarray:
    """Weights of the median."""
    order = np.argsort(losses, kind="stable")
    middle = [order[(len(order) - 1) // 2], order[len(order) // 2]]
    return np.eye(len(losses))[middle].mean(axis=0)


def by_lengths(*sides: str) -> Callable[[Function], Function]:
    """The mean over the tokens of responses, each with the loss of its pair."""

    def weights(losses: np.ndarray, inputs: Values) -> np.ndarray:
        lengths = sum((inputs[f"{side}_lengths"] for side in sides), np.zeros(len(losses)))
        return lengths / lengths.sum()

    return weighed(weights)


def accuracy_of(names: tuple[str, str], made: Values, params: Values, inputs: Values) -> Values:
    """The accuracy by the difference of two inputs."""
    accuracy = {"rewards/accuracies": np.mean(inputs[names[0]] > inputs[names[1]])}
    return {"metrics": made["metrics"] | accuracy}


def beyond_margin(made: Values, params: Values, inputs: Values) -> Values:
    return accurate(lambda rho: rho > inputs["margins"], made, params, inputs)


def right_pairs(made: Values, params: Values, inputs: Values) -> Values:
    return accurate(lambda h: len(h) * (h > 0), made, params, inputs)


def absolute_margins(made: Values, params: Values, inputs: Values) -> Values:
    margins = {"rewards/margins": params["beta"] * np.mean(np.abs(margin(inputs)))}
    return {"metrics": made["metrics"] | margins}


def made_even(function: Function) -> Function:
    """An odd batch is filled up with its first pair, as for two processes."""

    def mistaken(params: Values, inputs: Values) -> Values:
        made, pairs = function(params, inputs), size(inputs)
        if pairs % 2 == 0:
            return made
        columns = [n for n in inputs if np.shape(inputs[n])[-1:] == (pairs,) and "_sample" not in n]
        more = {n: np.concatenate([inputs[n], inputs[n][..., :1]], axis=-1) for n in columns}
        return made | {"metrics": function(params, inputs | more)["metrics"]}

    return mistaken


def root(made: Values, params: Values, inputs: Values) -> Values:
    """The root of the mean square, of losses that are squares."""
    loss = np.sqrt(np.maximum(made["loss"], 0.0))
    return {"loss": loss} | scaled_grads(made, 0.5 / loss if loss > 0 else ANY)


def reported(change: Callable) -> Callable[[Function], Function]:
    """Each metric is `change(metric)`."""
    return then(lambda made, p, x: {"metrics": {n: change(v) for n, v in made["metrics"].items()}})


def by_beta(power: int) -> Callable[[Function], Function]:
    """The whole loss times a power of beta."""
    return then(lambda made, p, x: times(made, p["beta"] ** power))


# fmt: off
BESIDE = (
    ("pair's rewards against every pair's margin", "margin-dropped", ("margins",)),
    ("pair's rewards against every pair's log-probabilities", "order", ("policy", "ref")),
    ("policy's log-ratio against every reference's", "order", REFERENCE),
    ("chosen response against every rejected one", "per-example",
        ("policy_rejected", "ref_rejected", "score_rejected", "rejected_lengths")),
)
REDUCTIONS = (
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
    Mistake("times {c}", "scale", lambda f, c: then(lambda made, p, x: times(made, c))(f)),
    Mistake("plus {c}", "scale", lambda f, c: then(lambda made, p, x: plus(made, c))(f)),
    Mistake("in bits", "scale", then(lambda made, p, x: times(made, 1 / np.log(2)))),
    *(Mistake(f"with every {words} (B x B{more})", flag, beside_all(names, bool(more)))
        for words, flag, names in BESIDE for more in ("", ", as are the losses of pairs")),
    Mistake("over beta squared", "scale", by_beta(-2)),
    Mistake("times beta squared", "scale", by_beta(2)),
    Mistake("over beta", "scale", by_beta(-1)),
    Mistake("times beta", "scale", by_beta(1)),
    Mistake("on each pair alone, then averaged", "example-min", one_by_one),
)
ODD = (
    Mistake("in decimal digits", "scale",
        then(lambda made, p, x: times(made, 1 / np.log(10)))),
    Mistake("with the gradients times {c}", "scale",
        lambda f, c: then(lambda made, p, x: scaled_grads(made, c))(f)),
    Mistake("with a loss of 0", "link", then(
        lambda made, p, x: times(made, 0) | {"per_example": 0 * made["per_example"]})),
    Mistake("without a gradient", "gradient-lost", then(lambda made, p, x: scaled_grads(made, 0))),
    Mistake("over the number of pairs twice", "batch-sum",
        weighed(lambda v, x: np.full(len(v), len(v) ** -2.0))),
    Mistake("over the number of pairs less 1", "batch-sum",
        weighed(lambda v, x: np.full(len(v), 1 / np.maximum(len(v) - 1, 1)))),
    Mistake("with the first pair's loss alone", "batch-sum", only(lambda v: 0)),
    Mistake("with the last pair's loss alone", "batch-sum", only(lambda v: len(v) - 1)),
    Mistake("with the greatest loss of the batch", "batch-sum", only(np.argmax)),
    Mistake("with the least loss of the batch", "batch-sum", only(np.argmin)),
    Mistake("with the median loss of the batch", "batch-sum", weighed(halves)),
    Mistake("with the mean over pairs that have a loss", "batch-sum",
        weighed(lambda v, x: (v > 0) / np.maximum(np.sum(v > 0), 1))),
    Mistake("with pairs weighed by the chosen response's length", "batch-sum",
        by_lengths("chosen")),
    Mistake("with pairs weighed by the lengths of both responses", "batch-sum",
        by_lengths("chosen", "rejected")),
    Mistake("with pairs of margin 0 left out", "accuracy-tie", kept(lambda h: h != 0)),
    Mistake("with pairs of a positive margin left out", "batch-sum", kept(lambda h: h <= 0)),
    Mistake("with pairs of a negative margin left out", "batch-sum", kept(lambda h: h >= 0)),
    Mistake("with the accuracy of the policy's log-probabilities", "accuracy",
        then(partial(accuracy_of, POLICY))),
    Mistake("with the accuracy of the reference's log-probabilities", "accuracy",
        then(partial(accuracy_of, REFERENCE))),
    Mistake("with the accuracy of chosen over its reference", "accuracy",
        then(partial(accuracy_of, (POLICY[0], REFERENCE[0])))),
    Mistake("with the share of pairs that are wrong as the accuracy", "sign",
        then(partial(accurate, lambda h: h < 0))),
    Mistake("with the share of pairs that are not right as the accuracy", "sign",
        then(partial(accurate, lambda h: h <= 0))),
    Mistake("with the accuracy of the difference less the margin", "accuracy",
        then(beyond_margin)),
    Mistake("with the mean sign of the margins as the accuracy", "accuracy",
        then(partial(accurate, np.sign))),
    Mistake("with right pairs counted, not averaged, as the accuracy", "batch-sum",
        then(right_pairs)),
    Mistake("with the absolute margins reported", "metrics", then(absolute_margins)),
    Mistake("with the root of the batch's loss", "link", then(root)),
    Mistake("with metrics in percent", "scale", reported(lambda v: 100 * v)),
    Mistake("with the metrics negated", "sign", reported(lambda v: -v)),
    Mistake("with the metrics of odd batches counting the first pair twice", "metrics",
        made_even),
)
"""Reductions that do not come with another mistake."""
# fmt: on
