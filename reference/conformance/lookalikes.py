"""What people mistake for the paper's objectives, so that a diagnosis can name it.

There are no test vectors of these. Each function takes the params and inputs of a case of pairs, as
in `pairs.py`. Where a case has no lengths, a response has one token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from reference.conformance import pairs
from reference.conformance.mistakes.mistake import step
from reference.conformance.pairs import POLICY, REFERENCE

Values = dict[str, Any]
Function = Callable[[Values, Values], Values]


def hinge(params: Values, inputs: Values) -> Values:
    """SLiC's loss on DPO's margin: max(0, 1 - beta h)."""
    beta, margins = params["beta"], pairs.margins_of(inputs)
    short = np.maximum(0.0, 1 - beta * margins)
    made = pairs.over_pairs(short, -beta * step(1 - beta * margins))
    return made | {"metrics": pairs.implicit_rewards(beta, inputs)}


def simpo(params: Values, inputs: Values, gamma: float) -> Values:
    """SimPO: -log sigmoid(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma)."""
    free = inputs | {name: np.zeros_like(inputs[name]) for name in REFERENCE}
    return pairs.per_token(partial(_beyond, gamma), params, free)


def dpo_positive(params: Values, inputs: Values, penalty: float) -> Values:
    """DPO-positive: -log sigmoid(beta (h - penalty max(0, log pi_ref(y_w) - log pi(y_w))))."""
    beta, fall = params["beta"], inputs[REFERENCE[0]] - inputs[POLICY[0]]
    margins = pairs.margins_of(inputs) - penalty * np.maximum(0.0, fall)
    made = _logistic(beta * margins, beta * (1 + penalty * step(fall)), beta)
    return made | {"metrics": pairs.implicit_rewards(beta, inputs)}


def forward_kl_link(params: Values, inputs: Values) -> Values:
    """f-DPO with the forward KL: -log sigmoid(beta (1/u_l - 1/u_w)), u = pi / pi_ref.

    It changes what a reward is; it is not p-DPO, which adds a KL to the loss.
    """
    beta = params["beta"]
    chosen, rejected = (
        np.exp(inputs[ref] - inputs[policy])
        for policy, ref in zip(POLICY, REFERENCE, strict=True)
    )
    made = _logistic(beta * (rejected - chosen), beta * chosen, beta * rejected)
    return made | {"metrics": pairs.implicit_rewards(beta, inputs)}


def farthest_weights(margins: Any, reward_margins: Any, beta: float) -> np.ndarray:
    """The reward model that is farthest from the policy on this batch, as a one-hot vector."""
    losses = np.mean((reward_margins - beta * np.asarray(margins)) ** 2, axis=1)
    return np.eye(len(losses))[np.argmax(losses)]


def affine_weights(margins: Any, reward_margins: Any, beta: float) -> np.ndarray:
    """The weights with sum 1, of either sign, whose mixture is nearest to the policy."""
    first, *others = reward_margins - beta * np.asarray(margins)
    if not np.all(np.isfinite([first, *others])):
        raise ValueError("a margin is not finite")
    rest = np.linalg.lstsq(np.transpose(others - first), -first)[0] if others else np.zeros(0)
    return np.array([1 - rest.sum(), *rest])


def farthest_per_pair(params: Values, inputs: Values) -> Values:
    """mean_b max_k (rho_kb - beta h_b)^2."""
    return pairs.one_per_pair(np.argmax, params, inputs)


class Lookalike(NamedTuple):
    """A dialect without vectors.

    Attributes:
        function: (params, inputs) -> outputs; of `free`, the constant is a third argument.
        free: the name of a constant that no case gives, or "".
    """

    function: Callable[..., Values]
    equation: str
    source: str
    free: str = ""


# fmt: off
LOOKALIKES = {
    ("dpo", "length-normalised"): Lookalike(
        partial(pairs.per_token, pairs.plain_dpo),
        "-log sigmoid(beta h), of log-probabilities averaged over tokens",
        "Meng et al. (2024), SimPO, section 4; TRL's `sigmoid_norm`"),
    ("dpo", "simpo"): Lookalike(
        simpo, "-log sigmoid(beta [log pi(y_w)/|y_w| - log pi(y_l)/|y_l|] - gamma)",
        "Meng et al. (2024), SimPO, Eq. 6", "gamma"),
    ("dpo", "hinge"): Lookalike(
        hinge, "max(0, 1 - beta h)", "Zhao et al. (2023), SLiC-HF; Liu et al. (2024), RSO, Eq. 9"),
    ("dpo", "positive"): Lookalike(
        dpo_positive,
        "-log sigmoid(beta [h - lambda max(0, log pi_ref(y_w) - log pi(y_w))])",
        "Pal et al. (2024), Smaug, DPO-positive", "lambda"),
    ("dpo", "forward-kl-link"): Lookalike(
        forward_kl_link, "-log sigmoid(beta [pi_ref(y_l)/pi(y_l) - pi_ref(y_w)/pi(y_w)])",
        "Wang et al. (2024), f-DPO; TRL's `f_divergence_type` `forward_kl`"),
    ("ensemble", "batch-max"): Lookalike(
        partial(pairs.distil_ensemble, farthest_weights),
        "max_k mean_b (rho_kb - beta h_b)^2", "ours: the minimum's opposite"),
    ("ensemble", "example-max"): Lookalike(
        farthest_per_pair, "mean_b max_k (rho_kb - beta h_b)^2", "ours: the minimum's opposite"),
    ("ensemble", "affine-hull"): Lookalike(
        partial(pairs.distil_ensemble, affine_weights),
        "min_w mean_b (sum_k w_k rho_kb - beta h_b)^2, sum_k w_k = 1", "ours: the hull's plane"),
}
# fmt: on


def _beyond(gamma: float, params: Values, inputs: Values) -> Values:
    beta = params["beta"]
    made = _logistic(beta * pairs.margins_of(inputs) - gamma, beta, beta)
    return made | {"metrics": pairs.implicit_rewards(beta, inputs)}


def _logistic(argument: np.ndarray, chosen: Any, rejected: Any) -> Values:
    """-log sigmoid of an argument, with its slopes in chosen and in minus rejected."""
    slopes = -pairs.sigmoid(-argument) / len(argument)
    grads = (slopes * chosen, -slopes * rejected, 0 * slopes, 0 * slopes)
    losses = np.logaddexp(0.0, -argument)
    named = dict(zip(POLICY + REFERENCE, grads, strict=True))
    return {"loss": np.mean(losses), "per_example": losses, "grads": named}
