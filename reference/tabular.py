"""Tabular policies over finitely many prompts and responses: one logit for each, all sums exact.

Log-probabilities and rewards are [X, Y], the rewards of an ensemble [K, X, Y], all in nats. Prompts
are equally likely. beta is the weight of the KL in Eq. 1, above 0; gamma is that of the forward KL.
"""

from functools import partial

import numpy as np

from reference.loglinear import Problem, log_softmax
from reference.objectives import forward_kl
from reference.simplex import minimise_on_simplex


def problem(ref_logps, pairs, rewards):
    """The `Problem` of preference pairs under K reward models.

    rho_kb = r_k(x_b, chosen_b) - r_k(x_b, rejected_b)

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        pairs: (prompt, chosen, rejected) indices [B, 3].
        rewards: r [K, X, Y], in nats.

    Returns:
        The problem, with differences [B, X, Y] and reward margins [K, B].
    Source: the pairs of Eq. 6 and Eq. 7.
    """
    prompts, chosen, rejected = np.transpose(pairs)
    differences = np.zeros((len(prompts), *ref_logps.shape))
    differences[np.arange(len(prompts)), prompts, chosen] += 1
    differences[np.arange(len(prompts)), prompts, rejected] -= 1
    reward_margins = rewards[:, prompts, chosen] - rewards[:, prompts, rejected]
    return Problem(ref_logps, differences, reward_margins)


def all_pairs(prompts, responses):
    """Every ordered pair of different responses to every prompt, once.

    {(x, y1, y2): y1 != y2}

    Args:
        prompts: X, the number of prompts.
        responses: Y, the number of responses.

    Returns:
        (prompt, chosen, rejected) indices [X Y (Y - 1), 3].
    Source: the full support that Theorem 1 assumes.
    """
    grid = np.indices((prompts, responses, responses)).reshape(3, -1).T
    return grid[grid[:, 1] != grid[:, 2]]


def log_partition(ref_logps, rewards, beta):
    """The logarithm of the normaliser of the optimal policy.

    log Z = log sum_y pi_ref(y) exp(r(y) / beta)

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        log Z [X], in nats.
    Source: below Eq. 3.
    """
    tilted = ref_logps + rewards / beta
    largest = np.max(tilted, axis=-1)
    return largest + np.log(np.sum(np.exp(tilted - largest[..., None]), axis=-1))


def optimal_policy(ref_logps, rewards, beta):
    """The maximiser of the RLHF objective.

    log pi(y) = log pi_ref(y) + r(y) / beta - log Z

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        log pi [X, Y], in nats.
    Source: Eq. 3.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[..., None]  # Eq. 3


def implicit_rewards(policy_logps, ref_logps, beta):
    """The rewards for which a policy is optimal, up to a constant beta log Z for each prompt.

    r(y) = beta log[pi(y) / pi_ref(y)]

    Args:
        policy_logps, ref_logps: log pi and log pi_ref [X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        r [X, Y], in nats.
    Source: Eq. 4.
    """
    return beta * (policy_logps - ref_logps)  # Eq. 4


def preference_probability(policy_logps, ref_logps, beta):
    """The probability, by a policy's implicit rewards, that one response beats another.

    p(y1 > y2) = sigmoid(beta log [pi(y1) pi_ref(y2)] / [pi(y2) pi_ref(y1)])

    Args:
        policy_logps, ref_logps: log pi and log pi_ref [X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        p(y1 > y2) [X, Y, Y] for y1 on the second axis and y2 on the third.
    Source: Eq. 5.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta)
    return np.exp(-np.logaddexp(0.0, rewards[..., None, :] - rewards[..., :, None]))  # Eq. 5


def advantages(policy_logps, ref_logps, rewards):
    """A policy's expected reward minus the reference's, under each of K reward models.

    adv_k = mean_x [E_{y ~ pi} r_k - E_{y ~ pi_ref} r_k]

    Args:
        policy_logps, ref_logps: log pi and log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.

    Returns:
        Advantages [K], in nats.
    Source: the marked term of Eq. 8.
    """
    excess = np.exp(policy_logps) - np.exp(ref_logps)
    return np.mean(np.sum(excess * rewards, axis=-1), axis=-1)


def finite_minimum(ref_logps, rewards, beta):
    """The optimal policy of one of the K models that is nearest to the reference in forward KL.

    argmin_{pi in {pi_1, .., pi_K}} KL(pi_ref || pi),  pi_k the optimal policy for r_k

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        log pi [X, Y], in nats.
    Source: Eq. 9; Theorem 2 as printed.
    """
    policies = [optimal_policy(ref_logps, model_rewards, beta) for model_rewards in rewards]
    return min(policies, key=lambda policy: np.mean(forward_kl(ref_logps, policy)))  # Eq. 9


def maximin(ref_logps, rewards, beta):
    """The maximiser of the pessimistic objective Eq. 8, and the mixture for which it is optimal.

    max_pi min_k [adv_k(pi) - beta KL(pi || pi_ref)] = min_{w in simplex} beta KL(pi_ref || pi_w)

    pi_w is the optimal policy for sum_k w_k r_k. The right side is convex in w: its slope along w_k
    is adv_k(pi_w), and its curvature is the covariance of the rewards over beta.

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The weights w [K] and log pi_w [X, Y], in nats.
    Source: the proof of Theorem 2, over the convex hull of S.
    """

    def dual(weights):
        policy = optimal_policy(ref_logps, np.tensordot(weights, rewards, 1), beta)
        value = beta * np.mean(forward_kl(ref_logps, policy))
        curvature = _reward_covariance(policy, rewards) / beta
        return value, advantages(policy, ref_logps, rewards), curvature

    weights = minimise_on_simplex(dual, len(rewards))
    return weights, optimal_policy(ref_logps, np.tensordot(weights, rewards, 1), beta)


def distil(ref_logps, rewards, beta, gamma):
    """The exact minimiser of Eq. 7 over all pairs of responses plus gamma KL(pi_ref || pi).

    mean_x [mean_{y1, y2} (r(y1) - r(y2) - beta h)^2 + gamma KL_x]

    The responses y1 and y2 are uniform and independent. The solution is by Newton's method.

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.
        gamma: the weight of the forward KL, above 0.

    Returns:
        log pi [X, Y], in nats.
    Source: Eq. 11 with one reward model.
    """
    prompts = zip(ref_logps, rewards, strict=True)
    return np.stack([_distil_one(ref, reward, beta, gamma) for ref, reward in prompts])


def hull_policy(ref_logps, rewards, beta, gamma):
    """The exact minimiser of the hull's distillation loss over all pairs plus gamma KL.

    min_{w in simplex} min_pi [Eq. 7 against sum_k w_k r_k + gamma KL(pi_ref || pi)]

    Its slope along w_k is gamma adv_k / beta. As gamma -> 0 it is the `maximin` policy.

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.
        gamma: the weight of the forward KL, above 0.

    Returns:
        log pi [X, Y], in nats.
    Source: ours, Eq. 11 over the convex hull of S.
    """
    dual = partial(_distilled_dual, ref_logps, rewards, beta, gamma)
    weights = minimise_on_simplex(dual, len(rewards))
    return distil(ref_logps, np.tensordot(weights, rewards, 1), beta, gamma)


def _distil_one(ref, rewards, beta, gamma):
    """One prompt: minimise over logits theta 2 Var_y(e) + gamma KL, e = r - beta (theta - ref).

    Damped Newton: each step is halved until the gradient's norm falls. A constant added to theta
    changes nothing; `beta**2 / Y` on that direction makes the system solvable. `ref` is log pi_ref
    [Y], `rewards` r [Y], and the result log pi [Y], in nats.
    """
    centring = np.eye(len(ref)) - 1 / len(ref)

    def gradient(theta):
        kl_gradient = gamma * (np.exp(log_softmax(theta)) - np.exp(ref))
        return kl_gradient - 4 * beta / len(ref) * centring @ (rewards - beta * (theta - ref))

    def gradient_norm(theta):
        return np.linalg.norm(gradient(theta))

    theta = min((ref, ref + rewards / beta), key=gradient_norm)
    for _ in range(500):
        policy = np.exp(log_softmax(theta))
        covariance = np.diag(policy) - np.outer(policy, policy)
        curvature = 4 * beta**2 / len(ref) * centring + gamma * covariance
        step = np.linalg.solve(curvature + beta**2 / len(ref), gradient(theta))
        if np.max(np.abs(step)) < 1e-14 * (1 + np.max(np.abs(theta))):
            break
        next_theta = _damped(gradient_norm, theta, step)
        if next_theta is None:
            break
        theta = next_theta
    return log_softmax(theta)


def _damped(gradient_norm, theta, step):
    """theta less the step, halved until the norm falls; None where 30 halvings do not suffice."""
    for scale in 0.5 ** np.arange(30):
        if gradient_norm(theta - scale * step) < (1 - scale / 10) * gradient_norm(theta):
            return theta - scale * step
    return None


def _distilled_dual(ref_logps, rewards, beta, gamma, weights):
    """What `hull_policy` minimises over weights, times beta / gamma: value, slope and curvature."""
    mixed = np.tensordot(weights, rewards, 1)
    policy = distil(ref_logps, mixed, beta, gamma)
    residuals = mixed - implicit_rewards(policy, ref_logps, beta)
    fit = 2 * np.mean(np.var(residuals, axis=-1))
    value = beta / gamma * fit + beta * np.mean(forward_kl(ref_logps, policy))
    curvature = _distilled_covariance(policy, rewards, beta, gamma) / beta
    return value, advantages(policy, ref_logps, rewards), curvature


def _reward_covariance(policy_logps, rewards):
    """mean_x Cov_pi(r_j, r_k): [X, Y], [K, X, Y] -> [K, K]."""
    policy = np.exp(policy_logps)
    centred = rewards - np.sum(policy * rewards, axis=-1, keepdims=True)
    return np.einsum("xy,jxy,kxy->jk", policy, centred, centred) / len(policy)


def _distilled_covariance(policy_logps, rewards, beta, gamma):
    """mean_x R' S (A + gamma S)^-1 A R, for the covariance S of pi and the curvature A of the fit.

    As gamma -> 0 this is `_reward_covariance`. Adding a constant to A along the all-ones direction
    changes nothing.
    """
    policy, size = np.exp(policy_logps), policy_logps.shape[1]
    fit = 4 * beta**2 / size * (np.eye(size) - 1 / size)
    covariance = policy[:, :, None] * np.eye(size) - policy[:, :, None] * policy[:, None]
    held = covariance @ np.linalg.solve(fit + gamma * covariance + beta**2 / size, fit)
    return np.einsum("jxy,xyz,kxz->jk", rewards, held, rewards) / len(policy)
