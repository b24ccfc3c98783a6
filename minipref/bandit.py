"""The multi-arm bandit (section 7.2): one weight psi_i for each arm, and preferences between arms.

psi_i = log pi(y_i) up to a constant. The reference is indifferent between all arms. Pairs are
(preferred, dispreferred) arms [B, 2], counted from 0. The same functions as in
`reference/bandit.py`; here a pair (-1, -1) is padding that adds nothing, so datasets of different
sizes stack. `arms` and `steps` are static; beta, tau and alpha may be traced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minipref.loglinear import log_softmax
from minipref.objectives import Loss, Scalar, dpo, ipo

Weights = Float[Array, " arms"]
Pairs = Int[Array, "B 2"]


def chain(arms: int) -> Pairs:
    """The preferences of each arm over the next one.

    D = {(1, 2), (2, 3), ..}

    Args:
        arms: The number of arms.

    Returns:
        Pairs [arms - 1, 2].

    Source: Proposition 7.
    """
    return jnp.stack([jnp.arange(arms - 1), jnp.arange(1, arms)], axis=1)


def closure(arms: int) -> Pairs:
    """The transitive closure of `chain`.

    D = {(i, j): i < j}

    Args:
        arms: The number of arms.

    Returns:
        Pairs [arms (arms - 1) / 2, 2].

    Source: Proposition 7.
    """
    return jnp.stack(jnp.triu_indices(arms, 1), axis=1)


def spread(weights: Weights) -> Loss:
    """The difference between the largest and the smallest weight.

    max_i psi_i - min_i psi_i

    Args:
        weights: psi [arms], in nats.

    Returns:
        The spread, a scalar in nats.

    Source: Proposition 7.
    """
    return jnp.max(weights) - jnp.min(weights)


def ipo_loss(weights: Weights, pairs: Pairs, tau: Scalar) -> Loss:
    """IPO, summed over pairs of arms.

    sum_{(w, l) in D} (psi_w - psi_l - 1/tau)^2

    Args:
        weights: psi [arms], in nats.
        pairs: D, (preferred, dispreferred) arms [B, 2].
        tau: The inverse of the target margin, per nat, above 0.

    Returns:
        The loss, a scalar in nats squared.

    Source: sections 7.1 and 7.2.
    """
    return _sum_over_pairs(ipo, weights, pairs, tau)


def ipo_solution(pairs: Pairs, arms: int, tau: Scalar) -> Weights:
    """The minimiser of `ipo_loss` with the least norm, by least squares.

    argmin_psi sum_{(w, l) in D} (psi_w - psi_l - 1/tau)^2

    Args:
        pairs: D, (preferred, dispreferred) arms [B, 2].
        arms: The number of arms.
        tau: The inverse of the target margin, per nat, above 0.

    Returns:
        psi [arms], in nats, with mean 0.

    Source: sections 7.1 and 7.2.
    """
    better, worse = _one_hot(pairs, arms)
    return jnp.linalg.lstsq(better - worse, jnp.full(len(pairs), 1 / tau))[0]


def pessimistic_dpo_loss(weights: Weights, pairs: Pairs, beta: Scalar, alpha: Scalar) -> Loss:
    """p-DPO with the forward KL estimated on the preference data, as section 7.1 analyses it.

    sum_{(w, l) in D} -log sigmoid(beta (psi_w - psi_l)) - (beta / alpha) [log pi(w) + log pi(l)]

    Args:
        weights: psi [arms], in nats.
        pairs: D, (preferred, dispreferred) arms [B, 2].
        beta: The weight of the KL in Eq. 1, above 0.
        alpha: The weight of the loss in Eq. 10, above 0.

    Returns:
        The loss, a scalar in nats.

    Source: section 7.1, Proposition 5.
    """
    occurrences = jnp.sum(_one_hot(pairs, len(weights)), axis=(0, 1))
    pair_loss = _sum_over_pairs(dpo, weights, pairs, beta)
    return pair_loss - beta / alpha * jnp.sum(occurrences * log_softmax(weights))


def pessimistic_dpo_gradient(
    weights: Weights, pairs: Pairs, beta: Scalar, alpha: Scalar
) -> Weights:
    """The gradient of `pessimistic_dpo_loss` in the weights.

    It is by automatic differentiation; the reference has it in closed form.

    Args:
        weights: psi [arms], in nats.
        pairs: D, (preferred, dispreferred) arms [B, 2].
        beta: The weight of the KL in Eq. 1, above 0.
        alpha: The weight of the loss in Eq. 10, above 0.

    Returns:
        The gradient [arms], with mean 0.

    Source: section 7.1, Proposition 5.
    """
    return jax.grad(pessimistic_dpo_loss)(weights, pairs, beta, alpha)


def pessimistic_dpo_solution(
    pairs: Pairs, arms: int, beta: Scalar, alpha: Scalar, steps: int = 2000
) -> Weights:
    """The minimiser of `pessimistic_dpo_loss`, by projected gradient descent with momentum.

    The loss is convex in psi, and its curvature is at most 1 / rate. The descent is projected on
    weights of mean 0. Momentum restarts where it points uphill.

    Args:
        pairs: D, (preferred, dispreferred) arms [B, 2].
        arms: The number of arms.
        beta: The weight of the KL in Eq. 1, above 0.
        alpha: The weight of the loss in Eq. 10, above 0.
        steps: The number of gradient steps.

    Returns:
        psi [arms], in nats, with mean 0.

    Source: section 7.2; the momentum is O'Donoghue and Candes's (2015).
    """
    rate = _descent_rate(pairs, arms, beta, alpha)

    def update(_, state):
        weights, ahead, count = state
        slope = pessimistic_dpo_gradient(ahead, pairs, beta, alpha)
        moved = ahead - rate * (slope - jnp.mean(slope))
        count = jnp.where(jnp.dot(slope, moved - weights) > 0, 0, count + 1)
        return moved, moved + count / (count + 3) * (moved - weights), count

    start = jnp.zeros(arms)
    return lax.fori_loop(0, steps, update, (start, start, jnp.array(0)))[0]


def _descent_rate(pairs: Pairs, arms: int, beta: Scalar, alpha: Scalar) -> Scalar:
    """The inverse of a bound on the curvature of `pessimistic_dpo_loss`."""
    occurrences = jnp.sum(_one_hot(pairs, arms), axis=(0, 1))
    most_pairs, total = jnp.max(occurrences), jnp.sum(occurrences)
    return 1 / (beta**2 / 2 * most_pairs + beta / alpha * total / 2)


def _one_hot(pairs: Pairs, arms: int) -> Float[Array, "2 B arms"]:
    """The preferred and the dispreferred arm of each pair: one-hot, and all 0 for padding."""
    return jax.nn.one_hot(pairs.T, arms)


def _sum_over_pairs(objective: Callable, weights: Weights, pairs: Pairs, beta: Scalar) -> Loss:
    """The sum of an objective of one margin over the pairs that are not padding."""
    margins = weights[pairs[:, 0]] - weights[pairs[:, 1]]
    return jnp.sum(jnp.where(pairs[:, 0] >= 0, jax.vmap(objective, (0, None))(margins, beta), 0.0))
