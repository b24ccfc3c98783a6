"""Mistakes in the function of margins and rewards that a loss is, and functions of the loss."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance import pairs
from reference.conformance.mistakes.logistic import OF_LOGISTIC, bernoulli, softplus
from reference.conformance.mistakes.mistake import (
    LOGPS,
    Function,
    Mistake,
    Values,
    of_argument,
    scaled_grads,
    step,
    then,
    through,
)
from reference.conformance.pairs import POLICY, REFERENCE, sigmoid


def of_loss(words: str, flag: str, value: Callable, slope: Callable) -> Mistake:
    """The loss of each pair is a function of the right one, and of a constant if it has one."""

    def outputs(made: Values, *rest: Values, **constants: float) -> Values:
        right = made["per_example"]
        return through(made, value(right, **constants), slope(right, **constants))

    fixed = Mistake(words, flag, then(outputs))
    fitted = Mistake(words, flag, lambda f, c: then(partial(outputs, c=c))(f))
    return fitted if fixed.free else fixed


def of_rewards(value: Callable, slope: Callable) -> Callable[[Function], Function]:
    """A loss of beta h and the reward margin rho, in place of the square of their difference."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        h, rho = pairs.margins_of(inputs), pairs.reward_margins(inputs)
        if np.shape(h) != np.shape(rho):
            raise ValueError("there are several reward models")
        a, rho = params["beta"] * h, params.get("reward_scale", 1.0) * rho
        return of_argument(made, params, value(a, rho), slope(a, rho))

    return then(outputs)


def of_margin(value: Callable, slope: Callable) -> Callable[[Function], Function]:
    """A loss of the rewards' difference and the pair's margin."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        d, margins = pairs.reward_margins(inputs), inputs["margins"]
        return of_argument(made, params, value(d, margins), slope(d, margins))

    return then(outputs)


def of_target(value: Callable, slope: Callable) -> Callable[[Function], Function]:
    """A loss of h and beta, where there are neither metrics nor rewards, as in IPO."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        if "metrics" in made or "score_chosen" in inputs:
            raise ValueError("this is not IPO")
        h = pairs.margins_of(inputs)
        return pairs.over_pairs(value(h, params["beta"]), slope(h, params["beta"]))

    return then(outputs)


def before_loss(function: Function) -> Function:
    """The margin of IPO is multiplied by beta, as in DPO; the target is what it was."""

    def mistaken(params: Values, inputs: Values) -> Values:
        scale = params["beta"]
        made = function(params, inputs | {name: scale * inputs[name] for name in LOGPS})
        if "metrics" in made or "score_chosen" in inputs:
            raise ValueError("this is not IPO")
        return made | scaled_grads(made, scale)

    return mistaken


def of_sides(made: Values, losses: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Values:
    """Outputs from losses, and the mean's slopes in the log-probabilities of both sides."""
    grads = {POLICY[0]: chosen, POLICY[1]: rejected}
    grads |= dict.fromkeys(made["grads"].keys() - grads.keys(), 0 * chosen)
    return made | {"loss": np.mean(losses), "per_example": losses, "grads": grads}


def rewards_of(params: Values, inputs: Values) -> dict[str, np.ndarray]:
    """The implicit rewards of both sides."""
    sides = zip(("chosen", "rejected"), POLICY, REFERENCE, strict=True)
    return {side: params["beta"] * (inputs[name] - inputs[ref]) for side, name, ref in sides}


def one_by_one(function: Function) -> Function:
    """The mean of both responses' (r - beta log(pi / pi_ref))^2."""

    def mistaken(params: Values, inputs: Values) -> Values:
        made, implicit = function(params, inputs), rewards_of(params, inputs)
        gaps = [inputs[f"score_{side}"] - value for side, value in implicit.items()]
        if any(np.ndim(gap) > 1 for gap in gaps):
            raise ValueError("there are several reward models")
        slopes = [-params["beta"] * gap / len(gap) for gap in gaps]
        return of_sides(made, (gaps[0] ** 2 + gaps[1] ** 2) / 2, *slopes)

    return mistaken


def diagonal(rows: np.ndarray) -> np.ndarray:
    return np.diagonal(rows)[:, None]


def contrasted(against: Callable) -> Callable[[Function], Function]:
    """-log softmax of the chosen response's implicit reward among those of `against`, [B, N]."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made, implicit = function(params, inputs), rewards_of(params, inputs)
            size = len(implicit["chosen"])
            rows = {side: np.tile(value, (size, 1)) for side, value in implicit.items()}
            all_of = against(rows)
            total = np.logaddexp.reduce(all_of, axis=1)
            shares = np.exp(all_of - total[:, None])
            columns = shares[:, :-size]
            chosen = np.sum(columns, axis=0) if columns.shape[1] > 1 else columns[:, 0]
            scale = params["beta"] / size
            slopes = (scale * (chosen - 1), scale * np.sum(shares[:, -size:], axis=0))
            return of_sides(made, total - implicit["chosen"], *slopes)

        return mistaken

    return change


def kto(function: Function) -> Function:
    """1 - sigmoid of each side's reward against the other side's mean, if that is positive."""

    def mistaken(params: Values, inputs: Values) -> Values:
        made, implicit = function(params, inputs), rewards_of(params, inputs)
        w, l = implicit["chosen"], implicit["rejected"]  # noqa: E741
        a, b = w - np.maximum(np.mean(l), 0.0), np.maximum(np.mean(w), 0.0) - l
        losses = np.concatenate([sigmoid(-a), sigmoid(-b)])
        scale = params["beta"] / len(losses)
        through_a = step(np.mean(l)) * np.mean(bernoulli(a))
        through_b = step(np.mean(w)) * np.mean(bernoulli(b))
        slopes = (-bernoulli(a) - through_b, bernoulli(b) + through_a)
        return of_sides(made, losses, *(scale * slope for slope in slopes))

    return mistaken


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cross entropy of one bit: its probability is sigmoid(a), and is said to be sigmoid(b)."""
    return sigmoid(a) * softplus(-b) + sigmoid(-a) * softplus(b)


def one_sided(side: int, made: Values, params: Values, inputs: Values) -> Values:
    """Pairs whose gradient has the other sign have no loss, where the loss is a square."""
    slopes = made["grads"][POLICY[0]] * len(made["per_example"]) / 2
    roots = [np.allclose(slopes**2, b**2 * made["per_example"]) for b in (1.0, params["beta"])]
    if not any(roots):
        raise ValueError("the loss is no square")
    kept = 1.0 * (side * slopes < 0)
    return through(made, kept * made["per_example"], kept)


def root(loss: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(loss, 0.0))


def inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 for 0."""
    return 1 / np.where(x > 0, x, np.inf)


# fmt: off
OF_REWARDS = (
    ("the cross-entropy of sigmoid(rho) and sigmoid(beta h)",
        lambda a, r: cross(r, a), lambda a, r: sigmoid(a) - sigmoid(r)),
    ("KL(sigmoid(rho) || sigmoid(beta h))",
        lambda a, r: cross(r, a) - cross(r, r), lambda a, r: sigmoid(a) - sigmoid(r)),
    ("KL(sigmoid(beta h) || sigmoid(rho))",
        lambda a, r: cross(a, r) - cross(a, a), lambda a, r: bernoulli(a) * (a - r)),
    ("the square of sigmoid(rho) - sigmoid(beta h)",
        lambda a, r: (sigmoid(r) - sigmoid(a)) ** 2,
        lambda a, r: -2 * (sigmoid(r) - sigmoid(a)) * bernoulli(a)),
    ("-log sigmoid(beta h - rho)",
        lambda a, r: softplus(r - a), lambda a, r: -sigmoid(r - a)),
    ("-log sigmoid(rho - beta h)",
        lambda a, r: softplus(a - r), lambda a, r: sigmoid(a - r)),
    ("-rho log sigmoid(beta h)",
        lambda a, r: r * softplus(-a), lambda a, r: -r * sigmoid(-a)),
    ("-sigmoid(rho) log sigmoid(beta h)",
        lambda a, r: sigmoid(r) * softplus(-a), lambda a, r: -sigmoid(r) * sigmoid(-a)),
    ("rho - beta h, not squared", lambda a, r: r - a, lambda a, r: -1.0 + 0 * a),
    ("-log sigmoid(sign(rho) beta h)",
        lambda a, r: softplus(-np.sign(r) * a),
        lambda a, r: -np.sign(r) * sigmoid(-np.sign(r) * a)),
    ("|rho| (rho - beta h)^2", lambda a, r: np.abs(r) * (r - a) ** 2,
        lambda a, r: 2 * np.abs(r) * (a - r)),
    ("-rho beta h", lambda a, r: -r * a, lambda a, r: -r),
)
"""In place of (rho - beta h)^2."""
OF_LOSSES = (
    ("with the loss squared", "link", np.square, lambda v: 2 * v),
    ("with the exponential of the loss", "link", np.exp, np.exp),
    ("with absolute values, not squares", "squared", root, lambda v: inverse(2 * root(v))),
    ("with a probability, not its logarithm", "overflow",
        lambda v: -np.expm1(-v), lambda v: np.exp(-v)),
    ("with the square's 1 + log", "link", np.log1p, lambda v: 1 / (1 + v)),
    ("with log cosh, not the square", "squared",
        lambda v: root(v) + np.log1p(np.exp(-2 * root(v))) - np.log(2),
        lambda v: np.tanh(root(v)) * inverse(2 * root(v))),
    ("with smooth L1 (Huber), not the square", "squared",
        lambda v: np.where(v < 1, v / 2, root(v) - 0.5),
        lambda v: np.where(v < 1, 0.5, inverse(2 * root(v)))),
    ("with Huber's function at {c}, not the square", "squared",
        lambda v, c: np.where(v < c * c, v / 2, c * (root(v) - c / 2)),
        lambda v, c: np.where(v < c * c, 0.5, c * inverse(2 * root(v)))),
    ("with losses no higher than {c}", "clipped",
        lambda v, c: np.minimum(v, c), lambda v, c: 1.0 * (v < c)),
    ("with losses no lower than {c}", "clipped",
        lambda v, c: np.maximum(v, c), lambda v, c: 1.0 * (v > c)),
)
OF_MARGINS = (
    ("-log sigmoid of the margin times the difference",
        lambda d, m: softplus(-m * d), lambda d, m: -m * sigmoid(-m * d)),
    ("the margin times -log sigmoid",
        lambda d, m: m * softplus(-d), lambda d, m: -m * sigmoid(-d)),
    ("the square of the difference less the margin",
        lambda d, m: (d - m) ** 2, lambda d, m: 2 * (d - m)),
    ("the hinge at the margin",
        lambda d, m: np.maximum(0.0, m - d), lambda d, m: -step(m - d)),
)
"""Of rewards' difference and the pair's margin."""
OF_TARGETS = (
    ("the square of (h - 1) / (2 beta)",
        lambda h, b: ((h - 1) / (2 * b)) ** 2, lambda h, b: (h - 1) / (2 * b * b)),
    ("the square of h / (2 beta)", lambda h, b: (h / (2 * b)) ** 2, lambda h, b: h / (2 * b * b)),
    ("the square of h / beta - 1/2",
        lambda h, b: (h / b - 0.5) ** 2, lambda h, b: 2 * (h / b - 0.5) / b),
    ("the square of h, less the target", lambda h, b: h**2 - 0.5 / b, lambda h, b: 2 * h),
)
"""Of h and beta, in IPO."""
LINKS = (
    *OF_LOGISTIC,
    *(Mistake(f"with {words} as the loss", "link", of_margin(value, slope))
        for words, value, slope in OF_MARGINS),
    *(Mistake(f"with {words} for IPO's square", "target", of_target(value, slope))
        for words, value, slope in OF_TARGETS),
    Mistake("with the margin multiplied by beta before the loss", "beta-changed", before_loss),
    Mistake("with the mean of both responses' squared differences", "link", one_by_one),
    Mistake("with the softmax over all responses of the batch", "link",
        contrasted(lambda rows: np.concatenate([rows["chosen"], rows["rejected"]], axis=1))),
    Mistake("with the softmax over chosen and all rejected of the batch", "link", contrasted(
        lambda rows: np.concatenate([diagonal(rows["chosen"]), rows["rejected"]], axis=1))),
    Mistake("with KTO's loss of pairs", "link", kto),
    *(Mistake(f"with {words} for the square", "link", of_rewards(value, slope))
        for words, value, slope in OF_REWARDS),
    *(of_loss(*row) for row in OF_LOSSES),
    Mistake("with the square of positive differences alone", "squared",
        then(partial(one_sided, 1))),
    Mistake("with the square of negative differences alone", "squared",
        then(partial(one_sided, -1))),
)
# fmt: on
