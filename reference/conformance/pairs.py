"""Level 1: losses of B pairs from sequence log-probabilities and rewards, with their gradients.

Each function takes the params and inputs of a case and returns its outputs. Losses are batch means,
and gradients are derived by hand. The pages of `vectors_v1/` list names, shapes and units.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.objectives import (
    bradley_terry,
    distillation,
    dpo,
    forward_kl,
    ipo,
    log_ratio_margin,
    pessimistic,
    sampled_forward_kl,
)

Values = dict[str, Any]


def plain_dpo(params: Values, inputs: Values) -> Values:
    """DPO.

    -log sigmoid(beta h)

    Source: Eq. 6.
    """
    return _smoothed_dpo(params, inputs, 1.0, 0.0)


def conservative_dpo(params: Values, inputs: Values) -> Values:
    """Conservative DPO, where each label is wrong with probability e.

    (1 - e) dpo(h) + e dpo(-h)

    Source: Mitchell (2023), cDPO.
    """
    e = params.get("label_smoothing", 0.0)
    return _smoothed_dpo(params, inputs, 1 - e, e)


def robust_dpo(params: Values, inputs: Values) -> Values:
    """Robust DPO, the unbiased loss where each label is wrong with probability e.

    [(1 - e) dpo(h) - e dpo(-h)] / (1 - 2e)

    Source: Chowdhury et al. (2024).
    """
    e = params.get("label_smoothing", 0.0)
    return _smoothed_dpo(params, inputs, (1 - e) / (1 - 2 * e), -e / (1 - 2 * e))


def summed_ipo(target: float, params: Values, inputs: Values) -> Values:
    """IPO of summed log-probabilities.

    (h - target/beta)^2

    Source: section 7.1 with target 1; Azar et al. (2024), Eq. 17, with 1/2.
    """
    margins, tau = _margins(inputs), params["beta"] / target
    return _over_pairs([ipo(h, tau) for h in margins], 2 * (margins - 1 / tau))


def token_mean_ipo(params: Values, inputs: Values) -> Values:
    """IPO of log-probabilities that are averaged over the tokens of each response.

    (h - 1/(2 beta))^2

    Source: the code of TRL and LLaMA-Factory.
    """
    lengths = {name: inputs[f"{name}_lengths"] for name in ("chosen", "rejected")}
    logps = dict(zip(POLICY + REFERENCE, _alike(inputs, POLICY + REFERENCE), strict=True))
    means = {name: values / lengths[name.split("_")[1]] for name, values in logps.items()}
    made = summed_ipo(0.5, params, means)
    grads = {name: grad / lengths[name.split("_")[1]] for name, grad in made["grads"].items()}
    return made | {"grads": grads}


def distil(params: Values, inputs: Values) -> Values:
    """Reward model distillation.

    (reward_scale rho - beta h)^2

    Source: Eq. 7 with reward_scale 1; NeMo-Aligner's rpo_sq with any.
    """
    beta, margins = params["beta"], _margins(inputs)
    rewards = params.get("reward_scale", 1.0) * _reward_margins(inputs)
    losses = [distillation(h, rho, beta) for h, rho in zip(margins, rewards, strict=True)]
    made = _over_pairs(losses, -2 * beta * (rewards - beta * margins))
    return made | {"metrics": _implicit_rewards(beta, inputs)}


def rebel(params: Values, inputs: Values) -> Values:
    """REBEL, which is Eq. 7 over beta^2.

    (h - eta rho)^2,  eta = 1/beta

    Source: the code of Gao et al. (2024).
    """
    made, scale = distil(params, inputs), params["beta"] ** -2
    grads = {name: scale * grad for name, grad in made["grads"].items()}
    return made | {
        "loss": scale * made["loss"],
        "per_example": scale * made["per_example"],
        "grads": grads,
    }


def distil_ensemble(weigh: Callable, params: Values, inputs: Values) -> Values:
    """Eq. 7 for the mixture of K rewards whose weights are `weigh(margins, reward_margins, beta)`.

    mean_b (sum_k w_k rho_kb - beta h_b)^2

    Weights that minimise the loss are constants to its gradient (envelope theorem).

    Source: Eq. 11, footnote 5; ours for hull and mean.
    """
    beta, margins, rewards = params["beta"], _margins(inputs), _reward_margins(inputs)
    residuals = weigh(margins, rewards, beta) @ rewards - beta * margins
    made = _over_pairs(residuals**2, -2 * beta * residuals)
    return {name: made[name] for name in ("loss", "grads")}


def nearest_per_pair(params: Values, inputs: Values) -> Values:
    """Eq. 11 with the minimum inside the mean.

    mean_b min_k (rho_kb - beta h_b)^2

    Source: Eq. 11, read pair by pair.
    """
    beta, margins, rewards = params["beta"], _margins(inputs), _reward_margins(inputs)
    residuals = rewards - beta * margins
    nearest = residuals[np.argmin(residuals**2, axis=0), np.arange(len(margins))]
    return _over_pairs(nearest**2, -2 * beta * nearest)


def sampled_kl(params: Values, inputs: Values) -> Values:
    """p-DPO, with the KL estimated on S samples of the reference.

    dpo + gamma mean_s [log pi_ref(y_s) - log pi(y_s)]

    Source: Eq. 11, 13.
    """
    ref, policy = inputs["ref_sample_logps"], inputs["policy_sample_logps"]
    kl = np.mean([sampled_forward_kl(r, p) for r, p in zip(ref, policy, strict=True)])
    slope = np.full(len(policy), -params["gamma"] / len(policy))
    return _with_kl(params, inputs, kl, {"policy_sample_logps": slope})


def exact_kl(params: Values, inputs: Values) -> Values:
    """p-DPO, with the exact KL of distributions over Y outcomes at X prompts.

    dpo + gamma mean_x KL(pi_ref || pi)

    Source: Eq. 9, 13.
    """
    ref, policy = inputs["ref_distribution_logps"], inputs["policy_distribution_logps"]
    slope = -params["gamma"] * np.exp(ref) / len(ref)
    return _with_kl(
        params, inputs, np.mean(forward_kl(ref, policy)), {"policy_distribution_logps": slope}
    )


def reward(params: Values, inputs: Values) -> Values:
    """The loss of a reward model, with a margin that is 0 where the case has none.

    -log sigmoid(r(y_w) - r(y_l) - margin)

    Source: Eq. 2; Llama 2, Eq. 2.
    """
    differences = _reward_margins(inputs)
    shifted = differences - inputs.get("margins", 0.0)
    losses, slopes = [bradley_terry(d) for d in shifted], -_sigmoid(-shifted) / len(shifted)
    return {
        "loss": np.mean(losses),
        "per_example": np.array(losses),
        "grads": {"score_chosen": slopes, "score_rejected": -slopes},
        "metrics": {
            "rewards/margins": np.mean(differences),
            "rewards/accuracies": np.mean(differences > 0),
        },
    }


POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def _smoothed_dpo(params: Values, inputs: Values, right: float, wrong: float) -> Values:
    """right dpo(h) + wrong dpo(-h)."""
    beta, margins = params["beta"], _margins(inputs)
    losses = [right * dpo(h, beta) + wrong * dpo(-h, beta) for h in margins]
    slopes = beta * (wrong * _sigmoid(beta * margins) - right * _sigmoid(-beta * margins))
    return _over_pairs(losses, slopes) | {"metrics": _implicit_rewards(beta, inputs)}


def _margins(inputs: Values) -> np.ndarray:
    return log_ratio_margin(*_alike(inputs, POLICY + REFERENCE))


def _reward_margins(inputs: Values) -> np.ndarray:
    chosen, rejected = _alike(inputs, ("score_chosen", "score_rejected"))
    return chosen - rejected


def _alike(inputs: Values, names: tuple[str, ...]) -> list[np.ndarray]:
    """Arrays of one shape. Raises ValueError where shapes differ, which NumPy would broadcast."""
    arrays = [inputs[name] for name in names]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(
            f"{', '.join(names)} have shapes {', '.join(str(array.shape) for array in arrays)}"
        )
    return arrays


def _over_pairs(losses: Any, slopes: np.ndarray) -> Values:
    """Outputs from the loss of each pair and its derivative in h. The reference has gradient 0."""
    slopes = slopes / len(slopes)
    grads = dict(zip(POLICY + REFERENCE, (slopes, -slopes, 0 * slopes, 0 * slopes), strict=True))
    return {"loss": np.mean(losses), "per_example": np.array(losses), "grads": grads}


def _implicit_rewards(beta: float, inputs: Values) -> Values:
    """Batch means of beta log(pi / pi_ref); a margin of 0 is not accurate."""
    ratios = [inputs[policy] - inputs[ref] for policy, ref in zip(POLICY, REFERENCE, strict=True)]
    return {
        "rewards/chosen": beta * np.mean(ratios[0]),
        "rewards/rejected": beta * np.mean(ratios[1]),
        "rewards/margins": beta * np.mean(_margins(inputs)),
        "rewards/accuracies": np.mean(_margins(inputs) > 0),
    }


def _with_kl(params: Values, inputs: Values, kl: float, grads: Values) -> Values:
    made = plain_dpo(params, inputs)
    loss = pessimistic(made["loss"], kl, params["gamma"])
    return {"loss": loss, "grads": made["grads"] | grads, "metrics": {"kl": kl}}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
