"""The weight of each reward model in the pair term of a method: which models the policy follows.

The same functions, in the same order, are in `minipref/weights.py`. They take a whole batch.
"""

import numpy as np

from reference.simplex import nearest_mixture


def mean_weights(margins, reward_margins, beta):
    """The weight of each reward model in `mean_distillation`.

    w_k = 1/K

    Args:
        margins, reward_margins, beta: as in `mean_distillation`; only K is read.

    Returns:
        Weights [K], with sum 1.
    Source: Eq. 7.
    """
    return np.full(len(reward_margins), 1.0 / len(reward_margins))


def ensemble_weights(margins, reward_margins, beta):
    """The reward model that `ensemble_distillation` selects, as a one-hot vector.

    w = onehot(argmin_k mean_b (rho_kb - beta h_b)^2)

    Args:
        margins, reward_margins, beta: as in `ensemble_distillation`.

    Returns:
        Weights [K], with sum 1. Ties go to the first model.
    Source: the first term of Eq. 11, with footnote 5.
    """
    residuals = np.asarray(reward_margins) - beta * np.asarray(margins)
    return np.eye(len(residuals))[np.argmin(np.mean(residuals**2, axis=1))]


def nearest_shares(margins, reward_margins, beta):
    """The share of the pairs on which each reward model is the nearest to the policy.

    mean_b onehot(argmin_k (rho_kb - beta h_b)^2)

    Figure B.3 tracks these shares. The loss itself takes its minimum over the whole batch
    (`ensemble_weights`).

    Args:
        margins, reward_margins, beta: as in `ensemble_distillation`.

    Returns:
        Shares [K], with sum 1.
    Source: section 6.2, appendix B.3.
    """
    pairs = zip(margins, np.transpose(reward_margins), strict=True)
    weights = [ensemble_weights([margin], rewards[:, None], beta) for margin, rewards in pairs]
    return np.mean(weights, axis=0)


def hull_weights(margins, reward_margins, beta):
    """The simplex weights at which `hull_distillation` has its minimum.

    argmin_{w in simplex} mean_b (sum_k w_k e_kb)^2,  e_kb = rho_kb - beta h_b

    Args:
        margins, reward_margins, beta: as in `hull_distillation`.

    Returns:
        Weights [K], non-negative, with sum 1. If several give the same mixture, one of them.
    Source: ours; `simplex.nearest_mixture` says how the minimum is computed.
    """
    return nearest_mixture(reward_margins - beta * np.asarray(margins))
