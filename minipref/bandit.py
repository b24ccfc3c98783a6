"""The multi-arm bandit (section 7.2): one weight psi_i an arm, and preferences between arms.

The same functions as in `reference/bandit.py`, which says what they mean. Pairs are [B, 2] of (preferred,
dispreferred) arms; here a pair (-1, -1) is padding that adds nothing, so that datasets of different sizes stack.
`arms` and `steps` are static; beta, tau and alpha may be traced.
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
    """D = {(1, 2), (2, 3), ...} over `arms` arms, from 0: [arms - 1, 2]. Source: Proposition 7."""
    return jnp.stack([jnp.arange(arms - 1), jnp.arange(1, arms)], axis=1)


def closure(arms: int) -> Pairs:
    """The transitive closure of `chain`: every (i, j) with i < j. Source: Proposition 7."""
    return jnp.stack(jnp.triu_indices(arms, 1), axis=1)


def spread(weights: Weights) -> Loss:
    """max_i psi_i - min_i psi_i. Source: Proposition 7."""
    return jnp.max(weights) - jnp.min(weights)


def ipo_loss(weights: Weights, pairs: Pairs, tau: Scalar) -> Loss:
    """sum over pairs of (psi_w - psi_l - 1/tau)^2. Source: sections 7.1 and 7.2."""
    return _sum_over_pairs(ipo, weights, pairs, tau)


def ipo_solution(pairs: Pairs, arms: int, tau: Scalar) -> Weights:
    """The minimiser of `ipo_loss` with the least norm, by least squares: [arms], of mean 0."""
    better, worse = _arms_of(pairs, arms)
    return jnp.linalg.lstsq(better - worse, jnp.full(len(pairs), 1 / tau))[0]


def pessimistic_dpo_loss(weights: Weights, pairs: Pairs, beta: Scalar, alpha: Scalar) -> Loss:
    """p-DPO with the forward KL estimated on the preference data, as section 7.1 analyses it.

    sum over pairs of -log sigmoid(beta (psi_w - psi_l)) - (beta / alpha) [log pi(w) + log pi(l)]

    Shapes: [arms] -> scalar, nats. Source: section 7.1, Proposition 5.
    """
    counts = jnp.sum(_arms_of(pairs, len(weights)), axis=(0, 1))
    return _sum_over_pairs(dpo, weights, pairs, beta) - beta / alpha * jnp.sum(counts * log_softmax(weights))


def pessimistic_dpo_gradient(weights: Weights, pairs: Pairs, beta: Scalar, alpha: Scalar) -> Weights:
    """The gradient of `pessimistic_dpo_loss`: [arms] -> [arms], of mean 0."""
    return jax.grad(pessimistic_dpo_loss)(weights, pairs, beta, alpha)


def pessimistic_dpo_solution(
    pairs: Pairs, arms: int, beta: Scalar, alpha: Scalar, steps: int = 2000
) -> Weights:
    """The minimiser of `pessimistic_dpo_loss`, by accelerated descent projected on weights of mean 0: [arms].

    The loss is convex in psi and its curvature at most 1 / rate. Momentum starts anew where it points uphill.

    Source: section 7.2 solves by projected gradient descent; O'Donoghue and Candes (2015) for the momentum.
    """
    counts = jnp.sum(_arms_of(pairs, arms), axis=(0, 1))
    rate = 1 / (beta**2 / 2 * jnp.max(counts) + beta / alpha * jnp.sum(counts) / 2)

    def update(_, state):
        weights, ahead, count = state
        slope = pessimistic_dpo_gradient(ahead, pairs, beta, alpha)
        moved = ahead - rate * (slope - jnp.mean(slope))
        count = jnp.where(jnp.dot(slope, moved - weights) > 0, 0, count + 1)
        return moved, moved + count / (count + 3) * (moved - weights), count

    start = jnp.zeros_like(counts)
    return lax.fori_loop(0, steps, update, (start, start, jnp.array(0)))[0]


def _arms_of(pairs: Pairs, arms: int) -> Float[Array, "2 B arms"]:
    """Which arm is preferred, and which is not, in each pair: one-hot, and 0 everywhere for padding."""
    return jax.nn.one_hot(pairs.T, arms)


def _sum_over_pairs(objective: Callable, weights: Weights, pairs: Pairs, beta: Scalar) -> Loss:
    """The sum of an objective of one margin over the pairs that are not padding."""
    margins = weights[pairs[:, 0]] - weights[pairs[:, 1]]
    return jnp.sum(jnp.where(pairs[:, 0] >= 0, jax.vmap(objective, (0, None))(margins, beta), 0.0))
