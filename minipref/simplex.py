"""The nearest mixture: the simplex weights at which a mixture of residuals is smallest.

`reference/simplex.py` finds the same weights by enumeration of the simplex's faces.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

Weights = Float[Array, " K"]
Mask = Bool[Array, " K"]
Matrix = Float[Array, "K K"]


class ActiveSet(NamedTuple):
    """The state of the solver: a point u >= 0, and which of its entries are free to be positive."""

    point: Weights
    free: Mask
    done: Bool[Array, ""]
    steps: Int[Array, ""]


@jax.jit
def nearest_mixture(residuals: Float[Array, "K B"]) -> Weights:
    """The simplex weights whose mixture of residuals has the least mean square.

    argmin_{w in simplex} mean_b (sum_k w_k e_kb)^2 = argmin w' Q w,  Q_jk = mean_b e_jb e_kb

    The sum of w is 1, so adding 1 to every entry of Q does not move the minimum. It is u / sum(u)
    for the u >= 0 that minimises u' (Q + 11') u / 2 - 1' u. The active-set method finds this u. It
    starts at the best corner, and the objective only falls from there.

    The weights are exact up to a ridge of 8 K machine epsilons on the diagonal of Q. The ridge also
    chooses among weights that give the same mixture. Each change of the active set costs one solve
    of a K x K system; there are rarely more than 2 K changes.

    Args:
        residuals: e [K, B], in float32 or float64.

    Returns:
        Weights [K], non-negative, with sum 1.

    Source: ours; the active-set method is Lawson and Hanson's (1974, chapter 23).
    """
    gram = jnp.matmul(residuals, residuals.T, precision=lax.Precision.HIGHEST) / residuals.shape[1]
    size = len(gram)
    ridge = 8 * size * jnp.finfo(gram.dtype).eps
    shifted = _rescaled(gram) + 1.0
    matrix = shifted + ridge * jnp.diag(jnp.diag(shifted))
    corner = jax.nn.one_hot(jnp.argmin(jnp.diag(gram)), size, dtype=bool)
    start = ActiveSet(jnp.zeros(size, gram.dtype), corner, jnp.array(False), jnp.array(0))
    end = lax.while_loop(
        lambda state: ~state.done & (state.steps < 10 * size),
        lambda state: _update(matrix, ridge, state),
        start,
    )
    return end.point / jnp.sum(end.point)


def _rescaled(gram: Matrix) -> Matrix:
    """Q in units of its smallest diagonal entry; a larger unit would round the others to 0."""
    diagonal = jnp.diag(gram)
    smallest = jnp.finfo(gram.dtype).eps ** 2 * jnp.max(diagonal)
    unit = jnp.maximum(jnp.min(diagonal), smallest)
    return gram / jnp.where(unit > 0, unit, 1.0)


def _update(matrix: Matrix, ridge: Float[ArrayLike, ""], state: ActiveSet) -> ActiveSet:
    """Move to the minimum over the free entries and free one more entry.

    Where an entry would turn negative on the way, stop there instead and fix that entry at 0.
    """
    target = _minimum_over(matrix, state.free)
    negative = state.free & (target <= 0)
    feasible = ~jnp.any(negative)
    entering, optimal = _steepest_entry(matrix, ridge, target, state.free)
    boundary, positive = _move_to_boundary(state.point, target, state.free, negative)
    point = jnp.where(feasible, target, boundary)
    free = jnp.where(feasible, state.free | entering, positive)
    return ActiveSet(point, free, feasible & optimal, state.steps + 1)


def _minimum_over(matrix: Matrix, free: Mask) -> Weights:
    """The minimum over the free entries, with the others at 0."""
    both = free[:, None] & free[None, :]
    masked = jnp.where(both, matrix, jnp.eye(len(matrix), dtype=matrix.dtype))
    return jax.scipy.linalg.solve(masked, free.astype(matrix.dtype), assume_a="pos")


def _steepest_entry(
    matrix: Matrix, ridge: Float[ArrayLike, ""], point: Weights, free: Mask
) -> tuple[Mask, Bool[Array, ""]]:
    """The fixed entry along which the objective falls fastest (one-hot), and whether none does."""
    descent = (1.0 - jnp.sum(matrix * point, axis=-1)) / jnp.sqrt(jnp.diag(matrix))
    descent = jnp.where(free, -jnp.inf, descent)
    steepest = jax.nn.one_hot(jnp.argmax(descent), len(free), dtype=bool)
    return steepest, ~(jnp.max(descent) > 4 * ridge)


def _move_to_boundary(
    point: Weights, target: Weights, free: Mask, negative: Mask
) -> tuple[Weights, Mask]:
    """The last non-negative point on the way to the target, and the entries positive there."""
    gap = jnp.where(negative & (point > target), point - target, 1.0)
    distances = jnp.where(negative, point / gap, jnp.inf)
    distance = jnp.min(distances, initial=1.0)
    positive = free & ~(distances <= distance)
    boundary = jnp.maximum(point + distance * (target - point), 0.0)
    return jnp.where(positive, boundary, 0.0), positive
