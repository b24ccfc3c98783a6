"""The paper's objectives, Eq. 1-13, in float64.

A function takes scalars of ONE pair, unless it says that it minimises over a batch. The same
functions, in the same order, are in `minipref/objectives.py`. Log-probabilities, margins (their
differences) and rewards are in nats. Two symbols stand in the equations:

    h    `margin`, the log-ratio margin of Eq. 6
    rho  `reward_margin`, r(y1) - r(y2)
"""

import numpy as np

from reference.weights import hull_weights


def sequence_logp(token_logps, mask):
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
    return np.sum(np.where(mask, token_logps, 0.0))


def log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    """How much more the policy prefers the chosen response than the reference does.

    h = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)]

    Args:
        policy_chosen, policy_rejected: log pi of y_w and of y_l, in nats, summed over tokens.
        ref_chosen, ref_rejected: log pi_ref of y_w and of y_l, likewise.

    Returns:
        The margin h, a scalar in nats.
    Source: the argument of Eq. 6 and Eq. 7.
    """
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # Eq. 6


def bradley_terry(reward_margin):
    """The loss that fits a reward model to preferences.

    -log sigmoid(r(y_w) - r(y_l))

    Args:
        reward_margin: r(y_w) - r(y_l), a scalar in nats.

    Returns:
        The loss, a scalar in nats.
    Source: Eq. 2.
    """
    return np.logaddexp(0.0, -reward_margin)  # Eq. 2


def dpo(margin, beta):
    """Direct preference optimization: Bradley-Terry with the rewards beta log(pi / pi_ref).

    -log sigmoid(beta h)

    Args:
        margin: h, a scalar in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss, a scalar in nats.
    Source: Eq. 6.
    """
    return bradley_terry(beta * margin)  # Eq. 6


def ipo(margin, tau):
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
    return (margin - 1.0 / tau) ** 2  # section 7.1


def distillation(margin, reward_margin, beta):
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
    return (reward_margin - beta * margin) ** 2  # Eq. 7


def mean_distillation(margins, reward_margins, beta):
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
    return _batch_distillation(margins, np.mean(reward_margins, axis=0), beta)


def ensemble_distillation(margins, reward_margins, beta):
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
    return np.min(_model_losses(margins, reward_margins, beta))  # Eq. 11


def hull_distillation(margins, reward_margins, beta):
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
    weights = hull_weights(margins, reward_margins, beta)
    return _batch_distillation(margins, weights @ reward_margins, beta)


def forward_kl(ref_logps, policy_logps):
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
    possible = np.exp(ref_logps) > 0
    ref, policy = np.where(possible, ref_logps, 0.0), np.where(possible, policy_logps, 0.0)
    return np.sum(np.where(possible, np.exp(ref) * (ref - policy), 0.0), axis=-1)  # Eq. 9


def sampled_forward_kl(ref_logp, policy_logp):
    """The one-sample estimate of `forward_kl` at a response y drawn from the reference.

    log pi_ref(y) - log pi(y)

    The estimate is unbiased, and it is negative for some y.

    Args:
        ref_logp, policy_logp: log pi_ref(y) and log pi(y) of the same y, scalars in nats.

    Returns:
        The estimate, a scalar in nats.
    Source: the second term of Eq. 11.
    """
    return ref_logp - policy_logp  # Eq. 11


def pessimistic(loss, kl, gamma):
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
    return loss + gamma * kl  # Eq. 11, Eq. 13


def rlhf(policy_logps, ref_logps, rewards, beta):
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
    reverse_kl = forward_kl(policy_logps, ref_logps)
    return np.sum(np.exp(policy_logps) * rewards, axis=-1) - beta * reverse_kl  # Eq. 1


def pessimistic_rlhf(policy_logps, ref_logps, rewards, beta):
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
    ref_values = rlhf(ref_logps, ref_logps, rewards, beta)
    advantages = rlhf(policy_logps, ref_logps, rewards, beta) - ref_values
    return np.min(np.mean(advantages, axis=-1))  # Eq. 8


def _batch_distillation(margins, reward_margins, beta):
    """The batch mean of Eq. 7 for one reward model: [B], [B] -> scalar."""
    pairs = zip(margins, reward_margins, strict=True)
    return np.mean([distillation(margin, reward_margin, beta) for margin, reward_margin in pairs])


def _model_losses(margins, reward_margins, beta):
    """The batch mean of Eq. 7 for each reward model: [B], [K, B] -> [K]."""
    return np.array([_batch_distillation(margins, rewards, beta) for rewards in reward_margins])
