"""The weight of each reward model in the pair term of a method: which models the policy follows.

The same functions, in the same order, are in `reference/weights.py`. They take a whole batch.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real, Shaped

from minipref.simplex import nearest_mixture

Scalar: TypeAlias = Real[ArrayLike, ""]
Margins: TypeAlias = Float[Array, " B"]
RewardMargins: TypeAlias = Float[Array, "K B"]
Weights: TypeAlias = Float[Array, " K"]


def mean_weights(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Weights:
    """The weight of each reward model in `mean_distillation`.

    w_k = 1/K

    Args:
        margins, reward_margins, beta: as in `mean_distillation`; only K is read.

    Returns:
        Weights [K], with sum 1.
    Source: Eq. 7.
    """
    dtype = jnp.result_type(jnp.float32, reward_margins)
    return jnp.full(len(reward_margins), 1.0 / len(reward_margins), dtype)


def ensemble_weights(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Weights:
    """The reward model that `ensemble_distillation` selects, as a one-hot vector.

    w = onehot(argmin_k mean_b (rho_kb - beta h_b)^2)

    Args:
        margins, reward_margins, beta: as in `ensemble_distillation`.

    Returns:
        Weights [K], with sum 1. Ties go to the first model.
    Source: the first term of Eq. 11, with footnote 5.
    """
    losses = jnp.mean(_residuals(margins, reward_margins, beta) ** 2, axis=1)
    return jax.nn.one_hot(jnp.argmin(losses), len(losses), dtype=losses.dtype)


def nearest_shares(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Weights:
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
    of_one_pair = jax.vmap(ensemble_weights, (0, 1, None))
    return jnp.mean(of_one_pair(margins[:, None], reward_margins[:, :, None], beta), axis=0)


def hull_weights(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> Weights:
    """The simplex weights at which `hull_distillation` has its minimum.

    argmin_{w in simplex} mean_b (sum_k w_k e_kb)^2,  e_kb = rho_kb - beta h_b

    Args:
        margins, reward_margins, beta: as in `hull_distillation`.

    Returns:
        Weights [K], non-negative, with sum 1. If several give the same mixture, one of them.
    Source: ours; `simplex.nearest_mixture` says how the minimum is computed.
    """
    return nearest_mixture(lax.stop_gradient(_residuals(margins, reward_margins, beta)))


def _residuals(margins: Margins, reward_margins: RewardMargins, beta: Scalar) -> RewardMargins:
    """rho_k - beta h [K, B], in float32 at least."""
    margins, reward_margins, beta = promote(margins, reward_margins, beta)
    return reward_margins - beta * margins


def promote(*inputs: Shaped[ArrayLike, "..."]) -> tuple[Array, ...]:
    """The inputs as arrays of one dtype, float32 at least."""
    dtype = jnp.result_type(jnp.float32, *inputs)
    return tuple(jnp.asarray(x, dtype) for x in inputs)
