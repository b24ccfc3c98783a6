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
Loss = Callable[[Values, Values], Values]


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
    e = params["label_smoothing"]
    return _smoothed_dpo(params, inputs, 1 - e, e)


def robust_dpo(params: Values, inputs: Values) -> Values:
    """Robust DPO, the unbiased loss where each label is wrong with probability e.

    [(1 - e) dpo(h) - e dpo(-h)] / (1 - 2e)

    Source: Chowdhury et al. (2024).
    """
    e = params["label_smoothing"]
    return _smoothed_dpo(params, inputs, (1 - e) / (1 - 2 * e), -e / (1 - 2 * e))


def summed_ipo(target: float, params: Values, inputs: Values) -> Values:
    """IPO of summed log-probabilities.

    (h - target/beta)^2

    Source: section 7.1 with target 1; Azar et al. (2024), Eq. 17, with 1/2.
    """
    margins, tau = margins_of(inputs), params["beta"] / target
    return over_pairs([ipo(h, tau) for h in margins], 2 * (margins - 1 / tau))


def per_token(loss: Loss, params: Values, inputs: Values) -> Values:
    """A loss of log-probabilities that are averaged over the tokens of each response.

    Where a case has no lengths, a response has one token.

    Source: of IPO, the code of TRL and LLaMA-Factory.
    """
    names = POLICY + REFERENCE
    lengths = {name: inputs.get(f"{name.split('_')[1]}_lengths", 1) for name in names}
    logps = dict(zip(names, _alike(inputs, names), strict=True))
    made = loss(params, inputs | {name: logps[name] / lengths[name] for name in names})
    return made | {"grads": {name: grad / lengths[name] for name, grad in made["grads"].items()}}


def distil(params: Values, inputs: Values) -> Values:
    """Reward model distillation.

    (rho - beta h)^2

    Source: Eq. 7.
    """
    return rpo_sq(params | {"reward_scale": 1.0}, inputs)


def rpo_sq(params: Values, inputs: Values) -> Values:
    """Reward model distillation with a scale of the rewards.

    (reward_scale rho - beta h)^2

    Source: NeMo-Aligner's rpo_sq.
    """
    beta, margins = params["beta"], margins_of(inputs)
    rewards = params["reward_scale"] * reward_margins(inputs)
    losses = [distillation(h, rho, beta) for h, rho in zip(margins, rewards, strict=True)]
    made = over_pairs(losses, -2 * beta * (rewards - beta * margins))
    return made | {"metrics": implicit_rewards(beta, inputs)}


def over_beta_squared(loss: Loss, params: Values, inputs: Values) -> Values:
    """A loss over beta^2; of Eq. 7 this is REBEL.

    (h - eta rho)^2,  eta = 1/beta

    Source: the code of Gao et al. (2024).
    """
    made, scale = loss(params, inputs), params["beta"] ** -2
    grads = {name: scale * grad for name, grad in made["grads"].items()}
    scaled = {name: scale * made[name] for name in ("loss", "per_example")}
    return made | scaled | {"grads": grads}


def distil_ensemble(weigh: Callable, params: Values, inputs: Values) -> Values:
    """Eq. 7 for the mixture of K rewards whose weights are `weigh(margins, reward_margins, beta)`.

    mean_b (sum_k w_k rho_kb - beta h_b)^2

    Weights that minimise the loss are constants to its gradient (envelope theorem).

    Source: Eq. 11, footnote 5; ours for hull and mean.
    """
    beta, margins, rewards = params["beta"], margins_of(inputs), reward_margins(inputs)
    residuals = weigh(margins, rewards, beta) @ rewards - beta * margins
    return over_pairs(residuals**2, -2 * beta * residuals)


def nearest_per_pair(params: Values, inputs: Values) -> Values:
    """Eq. 11 with the minimum inside the mean.

    mean_b min_k (rho_kb - beta h_b)^2

    Source: Eq. 11, read pair by pair.
    """
    return one_per_pair(np.argmin, params, inputs)


def one_per_pair(choose: Callable, params: Values, inputs: Values) -> Values:
    """Eq. 7 for the reward model that `choose(squares, axis=0)` selects for each pair."""
    beta, margins, rewards = params["beta"], margins_of(inputs), reward_margins(inputs)
    residuals = rewards - beta * margins
    nearest = residuals[choose(residuals**2, axis=0), np.arange(len(margins))]
    return over_pairs(nearest**2, -2 * beta * nearest)


def sampled_kl(loss: Loss, params: Values, inputs: Values) -> Values:
    """A loss of pairs that is made pessimistic with the KL estimated on S samples of the reference.

    loss + gamma mean_s [log pi_ref(y_s) - log pi(y_s)]

    Source: Eq. 11, 13.
    """
    ref, policy = inputs["ref_sample_logps"], inputs["policy_sample_logps"]
    kl = np.mean([sampled_forward_kl(r, p) for r, p in zip(ref, policy, strict=True)])
    slope = np.full(len(policy), -params["gamma"] / len(policy))
    return _with_kl(loss(params, inputs), params, kl, {"policy_sample_logps": slope})


def exact_kl(loss: Loss, params: Values, inputs: Values) -> Values:
    """The same with the exact KL of distributions over Y outcomes at X prompts.

    loss + gamma mean_x KL(pi_ref || pi)

    Source: Eq. 9, 13.
    """
    ref, policy = inputs["ref_distribution_logps"], inputs["policy_distribution_logps"]
    slope = -params["gamma"] * np.exp(ref) / len(ref)
    kl = np.mean(forward_kl(ref, policy))
    return _with_kl(loss(params, inputs), params, kl, {"policy_distribution_logps": slope})


def reward(params: Values, inputs: Values) -> Values:
    """The loss of a reward model.

    -log sigmoid(r(y_w) - r(y_l))

    Source: Eq. 2.
    """
    return reward_beyond(params, inputs | {"margins": 0.0})


def reward_beyond(params: Values, inputs: Values) -> Values:
    """The same with a margin for each pair.

    -log sigmoid(r(y_w) - r(y_l) - margin)

    Source: Llama 2, Eq. 2.
    """
    differences = reward_margins(inputs)
    shifted = differences - inputs["margins"]
    losses, slopes = [bradley_terry(d) for d in shifted], -sigmoid(-shifted) / len(shifted)
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
    beta, margins = params["beta"], margins_of(inputs)
    losses = [right * dpo(h, beta) + wrong * dpo(-h, beta) for h in margins]
    slopes = beta * (wrong * sigmoid(beta * margins) - right * sigmoid(-beta * margins))
    return over_pairs(losses, slopes) | {"metrics": implicit_rewards(beta, inputs)}


def margins_of(inputs: Values) -> np.ndarray:
    """h of each pair, in nats."""
    return log_ratio_margin(*_alike(inputs, POLICY + REFERENCE))


def reward_margins(inputs: Values) -> np.ndarray:
    """rho of each pair."""
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


def over_pairs(losses: Any, slopes: np.ndarray) -> Values:
    """Outputs from the loss of each pair and its derivative in h. The reference has gradient 0."""
    slopes = slopes / len(slopes)
    grads = dict(zip(POLICY + REFERENCE, (slopes, -slopes, 0 * slopes, 0 * slopes), strict=True))
    return {"loss": np.mean(losses), "per_example": np.array(losses), "grads": grads}


def implicit_rewards(beta: float, inputs: Values) -> Values:
    """Batch means of beta log(pi / pi_ref); a margin of 0 is not accurate."""
    margins = margins_of(inputs)
    ratios = [inputs[policy] - inputs[ref] for policy, ref in zip(POLICY, REFERENCE, strict=True)]
    chosen, rejected, margin = beta * np.mean([*ratios, margins], axis=1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margin,
        "rewards/accuracies": np.mean(margins > 0),
    }


def _with_kl(made: Values, params: Values, kl: float, grads: Values) -> Values:
    loss = pessimistic(made["loss"], kl, params["gamma"])
    return {"loss": loss, "grads": made["grads"] | grads, "metrics": {"kl": kl}}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), which overflows nowhere."""
    return np.exp(-np.logaddexp(0.0, -x))
