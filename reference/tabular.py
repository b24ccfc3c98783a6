"""Tabular policies over finitely many prompts and responses: a logit of its own for each, everything exact.

Log-probabilities and rewards are [X, Y], an ensemble's rewards [K, X, Y]; prompts are equally likely.
"""

from itertools import chain, combinations

import numpy as np

from reference.loglinear import Problem, log_softmax
from reference.objectives import forward_kl


def problem(ref_logps, pairs, rewards):
    """Pairs [B, 3] of (prompt, chosen, rejected) indices and rewards [K, X, Y] as a `Problem`."""
    prompts, chosen, rejected = np.transpose(pairs)
    differences = np.zeros((len(prompts), *ref_logps.shape))
    differences[np.arange(len(prompts)), prompts, chosen] += 1
    differences[np.arange(len(prompts)), prompts, rejected] -= 1
    return Problem(ref_logps, differences, rewards[:, prompts, chosen] - rewards[:, prompts, rejected])


def all_pairs(prompts, responses):
    """Every ordered pair of different responses to every prompt, once: full support, as Theorem 1 asks."""
    grid = np.indices((prompts, responses, responses)).reshape(3, -1).T
    return grid[grid[:, 1] != grid[:, 2]]


def log_partition(ref_logps, rewards, beta):
    """log Z(x): [X, Y] -> [X].

    log sum_y pi_ref(y) exp(r(y) / beta)

    Source: below Eq. 3.
    """
    tilted = ref_logps + rewards / beta
    top = np.max(tilted, axis=-1)
    return top + np.log(np.sum(np.exp(tilted - top[..., None]), axis=-1))


def optimal_policy(ref_logps, rewards, beta):
    """The maximiser of the RLHF objective: log-probabilities [X, Y].

    log pi(y) = log pi_ref(y) + r(y) / beta - log Z

    Source: Eq. 3.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[..., None]  # Eq. 3


def implicit_rewards(policy_logps, ref_logps, beta):
    """The rewards that a policy is optimal for, up to a constant a prompt (beta log Z).

    beta log pi(y) / pi_ref(y)

    Source: Eq. 4.
    """
    return beta * (policy_logps - ref_logps)  # Eq. 4


def preference_probability(policy_logps, ref_logps, beta):
    """How likely, by the policy's implicit rewards, each response beats each other one: [X, Y] -> [X, Y, Y].

    sigmoid(beta log [pi(y1) pi_ref(y2)] / [pi(y2) pi_ref(y1)])

    Source: Eq. 5.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta)
    return np.exp(-np.logaddexp(0.0, rewards[..., None, :] - rewards[..., :, None]))  # Eq. 5


def advantages(policy_logps, ref_logps, rewards):
    """By how much a policy's expected reward exceeds the reference's under each of K models: [K, X, Y] -> [K].

    mean_x [E_pi r_k - E_pi_ref r_k]

    Source: the marked term of Eq. 8.
    """
    excess = np.exp(policy_logps) - np.exp(ref_logps)
    return np.mean(np.sum(excess * rewards, axis=-1), axis=-1)


def finite_minimum(ref_logps, rewards, beta):
    """Theorem 2 as printed: of the K models' optimal policies, the one nearest to pi_ref in forward KL: [X, Y]."""
    policies = [optimal_policy(ref_logps, each, beta) for each in rewards]
    return min(policies, key=lambda policy: np.mean(forward_kl(ref_logps, policy)))  # Eq. 9


def maximin(ref_logps, rewards, beta):
    """The maximiser of the pessimistic objective Eq. 8, and the weights of the mixture it is optimal for.

    max_pi min_k [adv_k(pi) - beta KL(pi || pi_ref)] = min_{w in simplex} beta KL(pi_ref || pi_w),
    pi_w the optimal policy for sum_k w_k r_k

    The right side is convex in w: its slope along w_k is adv_k(pi_w), its curvature the rewards' covariance.

    Shapes: [X, Y], [K, X, Y] -> weights [K], log-probabilities [X, Y]. Source: the proof of Theorem 2, over the
    convex hull of S.
    """

    def dual(weights):
        policy = optimal_policy(ref_logps, np.tensordot(weights, rewards, 1), beta)
        curvature = _reward_covariance(policy, rewards) / beta
        return beta * np.mean(forward_kl(ref_logps, policy)), advantages(policy, ref_logps, rewards), curvature

    weights = minimise_on_simplex(dual, len(rewards))
    return weights, optimal_policy(ref_logps, np.tensordot(weights, rewards, 1), beta)


def distil(ref_logps, rewards, beta, gamma):
    """The exact minimiser of Eq. 7 over all pairs of responses plus gamma KL(pi_ref || pi), by Newton's method.

    mean_x [mean_{y1, y2} (r(y1) - r(y2) - beta h)^2 + gamma KL_x], y1 and y2 uniform and independent

    Shapes: [X, Y], [X, Y] -> log-probabilities [X, Y]. Source: Eq. 11 with one reward model.
    """
    return np.stack([_distil_one(*each, beta, gamma) for each in zip(ref_logps, rewards, strict=True)])


def _distil_one(ref, rewards, beta, gamma):
    """One prompt: [Y] -> [Y]. With e = r - beta (theta - ref), the loss is 2 Var(e) + gamma KL.

    Newton steps, halved until they shorten the slope, which each of them does for a strictly convex loss.
    """
    centring = np.eye(len(ref)) - 1 / len(ref)

    def slope(theta):
        pull = gamma * (np.exp(log_softmax(theta)) - np.exp(ref))
        return pull - 4 * beta / len(ref) * centring @ (rewards - beta * (theta - ref))

    theta = min((ref, ref + rewards / beta), key=lambda start: np.linalg.norm(slope(start)))
    for _ in range(500):
        policy = np.exp(log_softmax(theta))
        curvature = 4 * beta**2 / len(ref) * centring + gamma * (np.diag(policy) - np.outer(policy, policy))
        step = np.linalg.solve(curvature + beta**2 / len(ref), slope(theta))
        shortest = np.linalg.norm(slope(theta))
        halves = ((scale, theta - scale * step) for scale in 0.5 ** np.arange(30))
        shorter = (near for scale, near in halves if np.linalg.norm(slope(near)) < (1 - scale / 10) * shortest)
        if np.max(np.abs(step)) < 1e-14 * (1 + np.max(np.abs(theta))) or (after := next(shorter, None)) is None:
            break
        theta = after
    return log_softmax(theta)


def hull_policy(ref_logps, rewards, beta, gamma):
    """The exact minimiser of the hull's distillation loss over all pairs plus gamma KL(pi_ref || pi).

    min_{w in simplex} min_pi [Eq. 7 against sum_k w_k r_k + gamma KL]; its slope along w_k is gamma adv_k / beta

    As gamma -> 0 it is the `maximin` policy.

    Shapes: [X, Y], [K, X, Y] -> log-probabilities [X, Y]. Source: ours, Eq. 11 over the convex hull of S.
    """

    def dual(weights):
        mixed = np.tensordot(weights, rewards, 1)
        policy = distil(ref_logps, mixed, beta, gamma)
        fit = 2 * np.mean(np.var(mixed - implicit_rewards(policy, ref_logps, beta), axis=-1))
        value = beta / gamma * fit + beta * np.mean(forward_kl(ref_logps, policy))
        return value, advantages(policy, ref_logps, rewards), _distilled_covariance(policy, rewards, beta, gamma) / beta

    weights = minimise_on_simplex(dual, len(rewards))
    return distil(ref_logps, np.tensordot(weights, rewards, 1), beta, gamma)


def _reward_covariance(policy_logps, rewards):
    """mean_x Cov_pi(r_j, r_k): [X, Y], [K, X, Y] -> [K, K]."""
    policy = np.exp(policy_logps)
    centred = rewards - np.sum(policy * rewards, axis=-1, keepdims=True)
    return np.einsum("xy,jxy,kxy->jk", policy, centred, centred) / len(policy)


def _distilled_covariance(policy_logps, rewards, beta, gamma):
    """`_reward_covariance` less what the fit holds back: mean_x R' S (A + gamma S)^-1 A R, A the fit's curvature."""
    policy, size = np.exp(policy_logps), policy_logps.shape[1]
    fit = 4 * beta**2 / size * (np.eye(size) - 1 / size)
    spread = policy[:, :, None] * np.eye(size) - policy[:, :, None] * policy[:, None]
    held = spread @ np.linalg.solve(fit + gamma * spread + beta**2 / size, fit)  # the last term: constants are free
    return np.einsum("jxy,xyz,kxz->jk", rewards, held, rewards) / len(policy)


def minimise_on_simplex(function, size, most=200):
    """The minimiser of a smooth convex function over the probability simplex, by damped Newton steps.

    `function(w)` returns value, slope [size] and curvature [size, size] (exact, or not below the exact one). Stops
    where slope . w - min slope, which bounds how far the value is from its minimum (Frank and Wolfe), is rounding.
    """
    point = np.full(size, 1 / size)
    at = function(point)
    for _ in range(most):
        _, slope, curvature = at
        gap = slope @ point - np.min(slope)
        if gap <= 1e-13 * (1 + np.max(np.abs(slope))):
            break
        move = _quadratic_on_simplex(slope - curvature @ point, curvature) - point
        tried = ((0.5**i, point + 0.5**i * move, function(point + 0.5**i * move)) for i in range(30))
        better = ((near, there) for scale, near, there in tried if _is_progress(at, gap, scale * move, near, there))
        step = next(better, None)
        if step is None:
            break
        point, at = step
    return point


def _is_progress(at, gap, move, near, there):
    """Whether the value falls enough or, where values differ by no more than rounding, the gap is halved."""
    value, slope, _ = there
    level = value <= at[0] + 1e-13 * (1 + abs(at[0]))
    return value < at[0] + 0.1 * at[1] @ move or (level and slope @ near - np.min(slope) < gap / 2)


def _quadratic_on_simplex(linear, matrix):
    """argmin of linear . w + w' matrix w / 2 over the simplex: the best of the minima on its 2^K - 1 faces."""
    size = len(linear)
    matrix = matrix + 1e-14 * (1 + np.trace(matrix)) * np.eye(size)
    faces = chain.from_iterable(combinations(range(size), k) for k in range(1, size + 1))
    inside = [w for w in (_on_face(linear, matrix, list(face)) for face in faces) if np.min(w) >= 0]
    return min(inside, key=lambda w: linear @ w + w @ matrix @ w / 2)


def _on_face(linear, matrix, face):
    """The minimiser of sum 1 among weights that are 0 off the face, from its Lagrangian's linear system."""
    ones = np.ones((len(face), 1))
    system = np.block([[matrix[np.ix_(face, face)], ones], [ones.T, np.zeros((1, 1))]])
    weights = np.zeros(len(linear))
    weights[face] = np.linalg.solve(system, np.append(-linear[face], 1.0))[:-1]
    return weights
