"""The paper's objectives, Eq. 1-13: jit, vmap and differentiate at will.

A function takes scalars of ONE pair, unless it says that it minimises over a batch; callers `vmap`
and reduce. The same functions, in the same order, are in `reference/objectives.py`. Inputs of lower
precision are promoted to float32. Log-probabilities, margins (their differences) and rewards are in
nats. Two symbols stand in the equations:

    h    `margin`, the log-ratio margin of Eq. 6
    rho  `reward_margin`, r(y1) - r(y2)
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from minipref.weights import Margins, RewardMargins, Scalar, Weights, hull_weights, promote

Loss: TypeAlias = Float[Array, ""]


def sequence_logp(token_logps: Float[Array, " T"], mask: Shaped[Array, " T"]) -> Loss:
    """The log-probability of one response: the SUM over its tokens, never their mean.

    log pi(y | x) = sum_t mask_t log pi(y_t | x, y_<t)

    Masked positions are not read, so they may hold NaN or -inf. A response without tokens has
    log-probability 0.

    Args:
        token_logps: log-probabilities of the tokens [T], in nats.
        mask: [T], 1 where a token belongs to the response and 0 elsewhere.

    Returns:
        The response's log-probability, a scalar in nats.
    Source: section 3.1, where pi(y | x) is the probability of a sequence.
    """
    (token_logps,) = promote(token_logps)
    return jnp.sum(jnp.where(mask, token_logps, 0.0))


def log_ratio_margin(
    policy_chosen: Scalar, policy_rejected: Scalar, ref_chosen: Scalar, ref_rejected: Scalar
) -> Loss:
    """How much more the policy prefers the chosen response than the reference does.

    h = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)]

    Args:
        policy_chosen, policy_rejected: log pi of y_w and of y_l, in nats, summed over tokens.
        ref_chosen, ref_rejected: log pi_ref of y_w and of y_l, likewise.

    Returns:
        The margin h, a scalar in nats.
    Source: the argument of Eq. 6 and Eq. 7.
    """
    logps = promote(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = logps
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # Eq. 6


def bradley_terry(reward_margin: Scalar) -> Loss:
    """The loss that fits a reward model to preferences.

    -log sigmoid(r(y_w) - r(y_l))

    Args:
        reward_margin: r(y_w) - r(y_l), a scalar in nats.

    Returns:
        The loss, a scalar in nats.
    Source: Eq. 2.
    """
    (reward_margin,) = promote(reward_margin)
    return -jax.nn.log_sigmoid(reward_margin)  # Eq. 2


def dpo(margin: Scalar, beta: Scalar) -> Loss:
    """Direct preference optimization: Bradley-Terry with the rewards beta log(pi / pi_ref).

    -log sigmoid(beta h)

    Args:
        margin: h, a scalar in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss, a scalar in nats.
    Source: Eq. 6.
    """
    margin, beta = promote(margin, beta)
    return bradley_terry(beta * margin)  # Eq. 6


def ipo(margin: Scalar, tau: Scalar) -> Loss:
    """Identity preference optimization: regress the margin on a constant.

    (h - 1/tau)^2

    This is the paper's convention. The authors of IPO use the target 1/(2 tau), so their tau is
    half of this one. Margins are of summed token log-probabilities; some implementations average.

    Args:
        margin: h, a scalar in nats.
        tau: the inverse of the target margin, per nat, above 0.

    Returns:
        The loss, a scalar in nats squared.
    Source: section 7.1; Azar et al. (2024), Eq. 17.
    """
    margin, tau = promote(margin, tau)
    return (margin - 1.0 / tau) ** 2  # section 7.1


def distillation(margin: Scalar, reward_margin: Scalar, beta: Scalar) -> Loss:
    """Reward model distillation: fit the policy's implicit reward margin to the reward model's.

    (r(y1) - r(y2) - beta h)^2

    Args:
        margin: h, a scalar in nats.
        reward_margin: rho = r(y1) - r(y2), a scalar in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss, a scalar in nats squared.
    Source: Eq. 7.
    """
    margin, reward_margin, beta = promote(margin, reward_margin, beta)
    return (reward_margin - beta * margin) ** 2  # Eq. 7


def mean_distillation(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Loss:
    """Distil the mean of the K reward models: the batch mean of Eq. 7.

    mean_b (mean_k rho_kb - beta h_b)^2

    With K = 1 this is Eq. 7. With more it is a baseline without pessimism that the paper does not
    run.

    Args:
        margins, reward_margins: h [B] and rho [K, B], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss, a scalar in nats squared.
    Source: Eq. 7.
    """
    margins, reward_margins, beta = promote(margins, reward_margins, beta)
    return _batch_distillation(margins, jnp.mean(reward_margins, axis=0), beta)


def ensemble_distillation(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Loss:
    """Distil the reward model that is nearest to the policy on this batch.

    min_k mean_b (rho_kb - beta h_b)^2

    The minimum of Eq. 11 is outside the expectation. Footnote 5 takes it over each minibatch, and
    so does this function. The mean of such minima is at most the minimum of the mean.

    Args:
        margins, reward_margins: h [B] and rho [K, B], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss, a scalar in nats squared.
    Source: the first term of Eq. 11, with footnote 5.
    """
    return jnp.min(_model_losses(margins, reward_margins, beta))  # Eq. 11


def hull_distillation(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Loss:
    """Distil the MIXTURE of reward models that is nearest to the policy on this batch.

    min_{w in simplex} mean_b (sum_k w_k rho_kb - beta h_b)^2

    Departs from the paper. The proof of Theorem 2 exchanges a minimum with a maximum, which needs a
    convex set of reward models. So this loss takes the convex hull of the K models, where
    `ensemble_distillation` takes the K models alone. The slope of the loss is the slope at the
    minimising weights, held constant (envelope theorem).

    Args:
        margins, reward_margins: h [B] and rho [K, B], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss, a scalar in nats squared.
    Source: ours, after Theorem 2 and Eq. 11.
    """
    margins, reward_margins, beta = promote(margins, reward_margins, beta)
    weights = hull_weights(margins, reward_margins, beta)
    return _batch_distillation(margins, _mix(weights, reward_margins), beta)


def forward_kl(
    ref_logps: Float[Array, "*batch Y"], policy_logps: Float[Array, "*batch Y"]
) -> Float[Array, "*batch"]:
    """The divergence of the policy from the reference, in expectation over the reference.

    KL(pi_ref || pi) = sum_y pi_ref(y) [log pi_ref(y) - log pi(y)]

    Outcomes of reference probability 0 contribute 0, whatever the policy. An outcome that only the
    reference allows makes the divergence infinite.

    Args:
        ref_logps, policy_logps: log pi_ref and log pi [..., Y], normalised, in nats.

    Returns:
        The divergence [...], in nats.
    Source: Eq. 9.
    """
    ref_logps, policy_logps = promote(ref_logps, policy_logps)
    possible = jnp.exp(ref_logps) > 0
    ref, policy = jnp.where(possible, ref_logps, 0.0), jnp.where(possible, policy_logps, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(ref) * (ref - policy), 0.0), axis=-1)  # Eq. 9


def sampled_forward_kl(ref_logp: Scalar, policy_logp: Scalar) -> Loss:
    """The one-sample estimate of `forward_kl` at a response y drawn from the reference.

    log pi_ref(y) - log pi(y)

    The estimate is unbiased, and it is negative for some y.

    Args:
        ref_logp, policy_logp: log pi_ref(y) and log pi(y) of the same y, scalars in nats.

    Returns:
        The estimate, a scalar in nats.
    Source: the second term of Eq. 11.
    """
    ref_logp, policy_logp = promote(ref_logp, policy_logp)
    return ref_logp - policy_logp  # Eq. 11


def pessimistic(loss: Scalar, kl: Scalar, gamma: Scalar) -> Loss:
    """A pair loss plus the weighted forward KL, which makes the loss pessimistic.

    loss + gamma KL(pi_ref || pi)

    The paper defines gamma twice: as beta / alpha, which follows from Eq. 10 and Eq. 11, and as
    alpha / beta (section 6.1). Here gamma is the number that multiplies the KL.

    Args:
        loss: a pair loss, a scalar in nats or nats squared.
        kl: the forward KL or an estimate of it, a scalar in nats.
        gamma: the weight of the KL, at least 0.

    Returns:
        The pessimistic loss, a scalar.
    Source: Eq. 11 (with a distillation), Eq. 13 (with DPO).
    """
    loss, kl, gamma = promote(loss, kl, gamma)
    return loss + gamma * kl  # Eq. 11, Eq. 13


def rlhf(
    policy_logps: Float[Array, " Y"],
    ref_logps: Float[Array, " Y"],
    rewards: Float[Array, " Y"],
    beta: Scalar,
) -> Loss:
    """A policy's value at one prompt, to be MAXIMISED: expected reward minus weighted divergence.

    E_{y ~ pi} r(y) - beta KL(pi || pi_ref)

    This divergence is the reverse KL: the expectation in it is over the policy.

    Args:
        policy_logps, ref_logps: log pi and log pi_ref [Y], normalised, in nats.
        rewards: r [Y], in nats.
        beta: the weight of the KL, above 0.

    Returns:
        The value, a scalar in nats.
    Source: Eq. 1.
    """
    policy_logps, ref_logps, rewards, beta = promote(policy_logps, ref_logps, rewards, beta)
    reverse_kl = forward_kl(policy_logps, ref_logps)
    return jnp.sum(jnp.exp(policy_logps) * rewards, axis=-1) - beta * reverse_kl  # Eq. 1


def pessimistic_rlhf(
    policy_logps: Float[Array, "X Y"],
    ref_logps: Float[Array, "X Y"],
    rewards: Float[Array, "K X Y"],
    beta: Scalar,
) -> Loss:
    """The value of a policy under the worst of K reward models, to be MAXIMISED.

    min_k mean_x [E_{y ~ pi} r_k - E_{y ~ pi_ref} r_k - beta KL(pi || pi_ref)]

    Prompts are equally likely, and the minimum is outside their mean. The `rlhf` value of the
    reference is its expected reward, so the bracket is a difference of two values.

    Args:
        policy_logps, ref_logps: log pi and log pi_ref [X, Y], normalised, in nats.
        rewards: r [K, X, Y], in nats.
        beta: the weight of the KL, above 0.

    Returns:
        The value, a scalar in nats; the value of pi_ref is 0.
    Source: Eq. 8.
    """
    values = jax.vmap(jax.vmap(rlhf, (0, 0, 0, None)), (None, None, 0, None))
    reference = values(ref_logps, ref_logps, rewards, beta)
    advantages = values(policy_logps, ref_logps, rewards, beta) - reference
    return jnp.min(jnp.mean(advantages, axis=-1))  # Eq. 8


def _mix(weights: Weights, reward_margins: RewardMargins) -> Margins:
    """The mixture's reward margins, in full float32 on every device."""
    return jnp.matmul(weights, reward_margins, precision=lax.Precision.HIGHEST)


def _batch_distillation(
    margins: Float[Array, " B"], reward_margins: Float[Array, " B"], beta: Scalar
) -> Loss:
    """The batch mean of Eq. 7 for one reward model."""
    return jnp.mean(jax.vmap(distillation, (0, 0, None))(margins, reward_margins, beta))


def _model_losses(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Weights:
    """The batch mean of Eq. 7 for each reward model."""
    return jax.vmap(_batch_distillation, (None, 0, None))(margins, reward_margins, beta)
