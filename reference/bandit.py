"""The multi-arm bandit (section 7.2): one weight psi_i for each arm, and preferences between arms.

psi_i = log pi(y_i) up to a constant. The reference is indifferent between all arms. Pairs are
(preferred, dispreferred) arms [B, 2], counted from 0.
"""

import numpy as np

from reference.loglinear import log_softmax
from reference.objectives import dpo, ipo


def chain(arms):
    """The preferences of each arm over the next one.

    D = {(1, 2), (2, 3), ..}

    Args:
        arms: the number of arms.

    Returns:
        Pairs [arms - 1, 2].
    Source: Proposition 7.
    """
    return np.stack([np.arange(arms - 1), np.arange(1, arms)], axis=1)


def closure(arms):
    """The transitive closure of `chain`.

    D = {(i, j): i < j}

    Args:
        arms: the number of arms.

    Returns:
        Pairs [arms (arms - 1) / 2, 2].
    Source: Proposition 7.
    """
    return np.stack(np.triu_indices(arms, 1), axis=1)


def spread(weights):
    """The difference between the largest and the smallest weight.

    max_i psi_i - min_i psi_i

    Args:
        weights: psi [arms], in nats.

    Returns:
        The spread, a scalar in nats.
    Source: Proposition 7.
    """
    return np.max(weights) - np.min(weights)


def ipo_loss(weights, pairs, tau):
    """IPO, summed over pairs of arms.

    sum_{(w, l) in D} (psi_w - psi_l - 1/tau)^2

    Args:
        weights: psi [arms], in nats.
        pairs: D, (preferred, dispreferred) arms [B, 2].
        tau: the inverse of the target margin, per nat, above 0.

    Returns:
        The loss, a scalar in nats squared.
    Source: sections 7.1 and 7.2.
    """
    return np.sum([ipo(weights[better] - weights[worse], tau) for better, worse in pairs])


def ipo_solution(pairs, arms, tau):
    """The minimiser of `ipo_loss` with the least norm, by least squares.

    argmin_psi sum_{(w, l) in D} (psi_w - psi_l - 1/tau)^2

    Args:
        pairs: D, (preferred, dispreferred) arms [B, 2].
        arms: the number of arms.
        tau: the inverse of the target margin, per nat, above 0.

    Returns:
        psi [arms], in nats, with mean 0.
    Source: sections 7.1 and 7.2.
    """
    rows = np.eye(arms)[pairs[:, 0]] - np.eye(arms)[pairs[:, 1]]
    return np.linalg.lstsq(rows, np.full(len(pairs), 1 / tau))[0]


def pessimistic_dpo_loss(weights, pairs, beta, alpha):
    """p-DPO with the forward KL estimated on the preference data, as section 7.1 analyses it.

    sum_{(w, l) in D} -log sigmoid(beta (psi_w - psi_l)) - (beta / alpha) [log pi(w) + log pi(l)]

    Args:
        weights: psi [arms], in nats.
        pairs: D, (preferred, dispreferred) arms [B, 2].
        beta: the weight of the KL in Eq. 1, above 0.
        alpha: the weight of the loss in Eq. 10, above 0.

    Returns:
        The loss, a scalar in nats.
    Source: section 7.1, Proposition 5.
    """
    logps = log_softmax(weights)
    pair_loss = [dpo(weights[better] - weights[worse], beta) for better, worse in pairs]
    return np.sum(pair_loss) - beta / alpha * np.sum(logps[pairs])


def pessimistic_dpo_gradient(weights, pairs, beta, alpha):
    """The gradient of `pessimistic_dpo_loss` in the weights.

    d/d psi_i = sum_{(w, l)} -beta sigmoid(-beta (psi_w - psi_l)) ([w = i] - [l = i])
                - (beta / alpha) ([w = i] + [l = i] - 2 pi(i))

    Args:
        weights: psi [arms], in nats.
        pairs: D, (preferred, dispreferred) arms [B, 2].
        beta: the weight of the KL in Eq. 1, above 0.
        alpha: the weight of the loss in Eq. 10, above 0.

    Returns:
        The gradient [arms], with mean 0.
    Source: section 7.1, Proposition 5.
    """
    rows = np.eye(len(weights))[pairs[:, 0]] - np.eye(len(weights))[pairs[:, 1]]
    pull = -beta * rows.T @ np.exp(-np.logaddexp(0.0, beta * rows @ weights))
    occurrences = np.bincount(pairs.ravel(), minlength=len(weights))
    policy = np.exp(log_softmax(weights))
    return pull - beta / alpha * (occurrences - pairs.size * policy)


def pessimistic_dpo_solution(pairs, arms, beta, alpha, steps=2000):
    """The minimiser of `pessimistic_dpo_loss`, by projected gradient descent with momentum.

    The loss is convex in psi, and its curvature is at most 1 / rate. The descent is projected on
    weights of mean 0. Momentum restarts where it points uphill.

    Args:
        pairs: D, (preferred, dispreferred) arms [B, 2].
        arms: the number of arms.
        beta: the weight of the KL in Eq. 1, above 0.
        alpha: the weight of the loss in Eq. 10, above 0.
        steps: the number of gradient steps.

    Returns:
        psi [arms], in nats, with mean 0.
    Source: section 7.2; the momentum is O'Donoghue and Candes's (2015).
    """
    rate = _descent_rate(pairs, beta, alpha)
    weights = ahead = np.zeros(arms)
    count = 0
    for _ in range(steps):
        slope = pessimistic_dpo_gradient(ahead, pairs, beta, alpha)
        moved = ahead - rate * (slope - np.mean(slope))
        count = 0 if slope @ (moved - weights) > 0 else count + 1
        weights, ahead = moved, moved + count / (count + 3) * (moved - weights)
    return weights


def _descent_rate(pairs, beta, alpha):
    """The inverse of a bound on the curvature of `pessimistic_dpo_loss`."""
    most_pairs = np.max(np.bincount(pairs.ravel()))
    return 1 / (beta**2 / 2 * most_pairs + beta / alpha * pairs.size / 2)
