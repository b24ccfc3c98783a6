"""The losses of the three kinds of training: policies, reward models, supervised fine-tuning.

A loss sees numbers, never a model. It returns `(loss, metrics)`, both over the batch.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from minipref.methods import METHODS, Method, method_loss
from minipref.objectives import Loss, bradley_terry, log_ratio_margin, sampled_forward_kl
from minipref.weights import nearest_shares, promote

Metrics = dict[str, Float[Array, "..."]]


def preference_loss(
    method: str,
    policy_logps: ArrayLike,
    ref_logps: ArrayLike,
    *,
    rewards: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    gamma: ArrayLike | Sequence[ArrayLike] | None = None,
    progress: ArrayLike = 1.0,
) -> tuple[Loss, Metrics]:
    """The loss of one row of `METHODS` on a batch of preference pairs.

    pair_loss(h, rho) + gamma(progress) mean_s KL_s

    h_b = log_ratio_margin of pair b;  rho_kb = r_k(chosen_b) - r_k(rejected_b);
    KL_s = log pi_ref(y_s) - log pi(y_s) for each sample y_s ~ pi_ref

    Differentiate it with respect to `policy_logps`; `jit` and `vmap` it over beta, gamma, progress.

    Args:
        method: A name in `METHODS`: dpo, ipo, d-dpo, p-dpo, dp-dpo, e-dpo, hull or mean.
        policy_logps: log pi of chosen, rejected and S >= 0 samples of pi_ref [B, 2 + S], nats: sums
            over the tokens of a response.
        ref_logps: log pi_ref of the same responses [B, 2 + S], nats.
        rewards: Rewards of chosen and rejected by K models [K, B, 2]. Only for methods that distil
            rewards; K is 1 for d-dpo and dp-dpo. (`ensemble_rewards` has the models last.)
        beta: Weight of the KL in Eq. 1: the larger, the nearer the policy stays to pi_ref. For ipo
            it is tau, with 1/tau the target margin. Default: the row's.
        gamma: Weight of the KL term, or its weights at the first and the last step. Only for
            methods with a KL term. Default: the row's, which is annealed.
        progress: 0 at the first step of training, 1 at the last; `minipref.progress(state)` gives
            it. It anneals gamma; by default gamma stays at its last weight.

    Returns:
        The loss (a scalar, float32 at least), and metrics under the names that users of TRL know:
        `logps/chosen`, `logps/rejected`, `rewards/chosen`, `rewards/rejected` (implicit rewards,
        beta log pi / pi_ref), `rewards/margins`, `rewards/accuracies`; `kl` where there are
        samples; where the method distils, `ensemble/weights` [K], the weight of each reward model
        in the loss, and `ensemble/nearest` [K], the share of pairs that it is nearest to.

    Raises:
        ValueError: An argument is missing, is not read by the method, or has a wrong shape or
            range. What is traced is checked by its shape alone.

    Source: Eq. 6, Eq. 7, Eq. 11, Eq. 13, section 7.1.
    """
    row = _row(method)
    logps, ref = _log_probabilities(policy_logps, ref_logps)
    rewards = _checked_rewards(method, row, rewards, len(logps))
    row = _with_gamma(method, row, gamma, num_samples=logps.shape[1] - 2)
    beta = _number("beta", row.beta if beta is None else beta, lambda x: x > 0, "above 0")
    progress = _number("progress", progress, lambda x: (x >= 0) & (x <= 1), "within 0 and 1")

    margins = jax.vmap(log_ratio_margin)(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1])
    reward_margins = rewards[..., 0] - rewards[..., 1]
    kls = jax.vmap(jax.vmap(sampled_forward_kl))(ref[:, 2:], logps[:, 2:]).ravel()
    loss = method_loss(row, margins, reward_margins, kls, beta, progress)
    metrics = pair_metrics(logps, ref, margins, beta)
    if kls.size:
        metrics["kl"] = kls.mean()
    if row.weights:
        metrics["ensemble/weights"] = row.weights(margins, reward_margins, beta)
        metrics["ensemble/nearest"] = nearest_shares(margins, reward_margins, beta)
    return loss, metrics


def pair_metrics(
    policy_logps: Float[Array, "B n"],
    ref_logps: Float[Array, "B n"],
    margins: Float[Array, " B"],
    beta: Array,
) -> Metrics:
    """Batch means of log-probabilities and implicit rewards, under TRL's names."""
    rewards = beta * (policy_logps[:, :2] - ref_logps[:, :2])
    return {
        "logps/chosen": policy_logps[:, 0].mean(),
        "logps/rejected": policy_logps[:, 1].mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": beta * margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
    }


def reward_loss(rewards: Float[Array, "B n"]) -> tuple[Loss, Metrics]:
    """The loss that fits a reward model to preferences, over the batch.

    mean_b -log sigmoid(r(chosen_b) - r(rejected_b))

    Args:
        rewards: Rewards of chosen, rejected and any other responses [B, n].

    Returns:
        The loss in nats, with `rewards/accuracies` and `rewards/margins`. A tie is not accurate.

    Raises:
        ValueError: There is no pair, or no second response.

    Source: Eq. 2.
    """
    (rewards,) = promote(rewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2 or not len(rewards):
        raise ValueError(
            f"rewards has shape {rewards.shape}: pass [B, n], the rewards of chosen, rejected and "
            "any other responses, for B >= 1 pairs"
        )
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {"rewards/accuracies": (margins > 0).mean(), "rewards/margins": margins.mean()}
    return jax.vmap(bradley_terry)(margins).mean(), metrics


def sft_loss(logps: Float[Array, "..."], num_tokens: ArrayLike) -> tuple[Loss, Metrics]:
    """The negative log-likelihood of responses, in nats a token.

    Args:
        logps: Log-probabilities of the responses, or their sum; nats.
        num_tokens: How many response tokens there are, ends of sequence included.

    Returns:
        The loss, without metrics.
    """
    (logps,) = promote(logps)
    return -jnp.sum(logps) / num_tokens, {}


def z_loss(log_normalizers: Float[Array, "*R L"], mask: Bool[Array, "*R L"]) -> Loss:
    """The mean of log^2 Z over the masked positions; 0 where logits are log-probabilities.

    Args:
        log_normalizers: log Z, the log of the softmax's denominator [..., L].
        mask: The positions that count [..., L].

    Returns:
        Scalar.

    Source: PaLM (arXiv 2204.02311), section 5, which adds 1e-4 of it to the loss.
    """
    return jnp.sum(jnp.where(mask, log_normalizers, 0.0) ** 2) / mask.sum()


def _row(method: str) -> Method:
    if method not in METHODS:
        raise ValueError(f"method {method!r}: pass one of {', '.join(METHODS)}")
    return METHODS[method]


def _log_probabilities(policy: ArrayLike, ref: ArrayLike) -> tuple[Array, Array]:
    policy, ref = promote(policy, ref)
    if policy.ndim != 2 or policy.shape[1] < 2 or not len(policy):
        raise ValueError(
            f"policy_logps has shape {policy.shape}: pass [B, 2 + S], the log-probabilities of "
            "chosen, rejected and S samples of pi_ref, for B >= 1 pairs"
        )
    if ref.shape != policy.shape:
        raise ValueError(
            f"ref_logps has shape {ref.shape}: pass pi_ref's log-probabilities of the same "
            f"responses, {policy.shape}"
        )
    return policy, ref


def _checked_rewards(method: str, row: Method, rewards: ArrayLike | None, batch: int) -> Array:
    """Rewards [K, B, 2]; K is 0 for a method that reads none."""
    if row.rewards == "none":
        if rewards is not None:
            raise ValueError(f"rewards: {method} reads none; leave them out")
        return jnp.zeros((0, batch, 2))
    if rewards is None:
        raise ValueError(f"{method} distils rewards: pass rewards=[K, B, 2] of chosen and rejected")
    (rewards,) = promote(rewards)
    if rewards.ndim != 3 or rewards.shape[1:] != (batch, 2) or not len(rewards):
        raise ValueError(
            f"rewards has shape {rewards.shape}: pass [K, B, 2], the rewards of chosen and "
            f"rejected by K models, here with B = {batch}"
        )
    if row.rewards == "single" and len(rewards) > 1:
        raise ValueError(
            f"rewards are of {len(rewards)} models: {method} distils one; pass [1, B, 2], or use "
            "an ensemble method"
        )
    return rewards


def _with_gamma(method: str, row: Method, gamma: object, num_samples: int) -> Method:
    """The row with the caller's KL weights."""
    if row.gamma is None:
        if gamma is not None:
            raise ValueError(f"gamma: {method} has no KL term; leave it out")
        return row
    if not num_samples:
        raise ValueError(
            f"{method} has a KL term: pass log-probabilities [B, 2 + S] with S >= 1 samples of "
            "pi_ref"
        )
    if gamma is None:
        return row
    weights = jnp.asarray(gamma, jnp.float32)
    if weights.shape not in ((), (2,)):
        raise ValueError(f"gamma has shape {weights.shape}: pass a number, or (first, last)")
    _in_range("gamma", weights, lambda x: x >= 0, "at least 0")
    first, last = jnp.broadcast_to(weights, (2,))
    return row._replace(gamma=(first, last))  # type: ignore[arg-type]  # traced numbers


def _number(name: str, value: ArrayLike, holds: Callable, bounds: str) -> Array:
    """A scalar within its bounds."""
    if jnp.ndim(value):
        raise ValueError(f"{name} has shape {jnp.shape(value)}: pass a number, or vmap")
    return _in_range(name, value, holds, bounds)


def _in_range(name: str, value: ArrayLike, holds: Callable, bounds: str) -> Array:
    """The value, checked unless it is traced."""
    if not isinstance(value, Tracer) and not np.all(holds(np.asarray(value))):
        raise ValueError(f"{name} = {value}: pass a number {bounds}")
    return jnp.asarray(value)
