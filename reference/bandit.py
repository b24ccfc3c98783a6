"""The multi-arm bandit (section 7.2): one weight psi_i an arm, and preferences between arms.

psi_i = log pi(y_i) up to a constant; the reference is indifferent between all arms. Pairs are [B, 2] of (preferred,
dispreferred) arms.
"""

import numpy as np

from reference.loglinear import log_softmax
from reference.objectives import dpo, ipo


def chain(arms):
    """D = {(1, 2), (2, 3), ...} over `arms` arms, from 0: [arms - 1, 2]. Source: Proposition 7."""
    return np.stack([np.arange(arms - 1), np.arange(1, arms)], axis=1)


def closure(arms):
    """The transitive closure of `chain`: every (i, j) with i < j. Source: Proposition 7."""
    return np.stack(np.triu_indices(arms, 1), axis=1)


def spread(weights):
    """max_i psi_i - min_i psi_i. Source: Proposition 7."""
    return np.max(weights) - np.min(weights)


def ipo_loss(weights, pairs, tau):
    """sum over pairs of (psi_w - psi_l - 1/tau)^2. Source: sections 7.1 and 7.2."""
    return np.sum([ipo(weights[better] - weights[worse], tau) for better, worse in pairs])


def ipo_solution(pairs, arms, tau):
    """The minimiser of `ipo_loss` with the least norm, by least squares: [arms], of mean 0."""
    rows = np.eye(arms)[pairs[:, 0]] - np.eye(arms)[pairs[:, 1]]
    return np.linalg.lstsq(rows, np.full(len(pairs), 1 / tau))[0]


def pessimistic_dpo_loss(weights, pairs, beta, alpha):
    """p-DPO with the forward KL estimated on the preference data, as section 7.1 analyses it.

    sum over pairs of -log sigmoid(beta (psi_w - psi_l)) - (beta / alpha) [log pi(w) + log pi(l)]

    Shapes: [arms] -> scalar, nats. Source: section 7.1, Proposition 5.
    """
    logps = log_softmax(weights)
    pair_loss = [dpo(weights[better] - weights[worse], beta) for better, worse in pairs]
    return np.sum(pair_loss) - beta / alpha * np.sum(logps[pairs])


def pessimistic_dpo_gradient(weights, pairs, beta, alpha):
    """The gradient of `pessimistic_dpo_loss`: [arms] -> [arms], of mean 0."""
    rows = np.eye(len(weights))[pairs[:, 0]] - np.eye(len(weights))[pairs[:, 1]]
    pull = -beta * rows.T @ np.exp(-np.logaddexp(0.0, beta * rows @ weights))
    policy = np.exp(log_softmax(weights))
    return pull - beta / alpha * (np.bincount(pairs.ravel(), minlength=len(weights)) - pairs.size * policy)


def pessimistic_dpo_solution(pairs, arms, beta, alpha, steps=2000):
    """The minimiser of `pessimistic_dpo_loss`, by accelerated descent projected on weights of mean 0: [arms].

    The loss is convex in psi and its curvature at most 1 / rate. Momentum starts anew where it points uphill.

    Source: section 7.2 solves by projected gradient descent; O'Donoghue and Candes (2015) for the momentum.
    """
    rate = 1 / (beta**2 / 2 * np.max(np.bincount(pairs.ravel())) + beta / alpha * pairs.size / 2)
    weights = ahead = np.zeros(arms)
    count = 0
    for _ in range(steps):
        slope = pessimistic_dpo_gradient(ahead, pairs, beta, alpha)
        moved = ahead - rate * (slope - np.mean(slope))
        count = 0 if slope @ (moved - weights) > 0 else count + 1
        weights, ahead = moved, moved + count / (count + 3) * (moved - weights)
    return weights
