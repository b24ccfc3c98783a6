"""Policies whose log-probabilities are linear in their parameters: what the paper's three settings have in common.

The same functions as in `reference/loglinear.py`, which says what they mean. Strengths, KL weights, rates and problems
may be traced, so that `jit` compiles a whole training run once and `vmap` sweeps them; a method and a number of steps
are static. A sweep over gamma gives the method traced ones: `method._replace(gamma=(first, last))`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minipref.methods import Method, method_loss
from minipref.objectives import Loss, Scalar, forward_kl


class Problem(NamedTuple):
    """What a method is given; stack the arrays of several to `vmap` over datasets.

    ref:            logits of the reference policy [X, Y].
    differences:    features of the chosen less those of the rejected response of each pair [B, X, Y].
    reward_margins: of each pair under K reward models [K, B]; K may be 0.
    draws:          independent draws that make up a response: 1, or the length of a bag of words.
    """

    ref: Float[Array, "X Y"]
    differences: Float[Array, "B X Y"]
    reward_margins: Float[Array, "K B"]
    draws: int | Int[Array, ""] = 1


def log_softmax(logits: Float[Array, "*batch Y"]) -> Float[Array, "*batch Y"]:
    """Log-probabilities from logits, over the last axis.

    theta_y - log sum_y' exp theta_y'
    """
    return jax.nn.log_softmax(logits)


def margins(problem: Problem, theta: Float[Array, "X Y"]) -> Float[Array, " B"]:
    """The log-ratio margin h of each pair: [X, Y] -> [B]. Source: the argument of Eq. 6."""
    return jnp.tensordot(problem.differences, theta - problem.ref, 2, precision=lax.Precision.HIGHEST)


def kls(problem: Problem, theta: Float[Array, "X Y"]) -> Float[Array, " X"]:
    """KL(pi_ref || pi_theta) at each prompt, exactly: [X, Y] -> [X]. Independent draws add up. Source: Eq. 9."""
    return problem.draws * forward_kl(log_softmax(problem.ref), log_softmax(theta))


def loss(
    problem: Problem, method: Method, theta: Float[Array, "X Y"], beta: Scalar, progress: Scalar = 1.0
) -> Loss:
    """What a row of `METHODS` minimises, with the exact KL: logits [X, Y] -> scalar. Source: Eq. 11, Eq. 13."""
    pair_margins = margins(problem, theta)
    return method_loss(method, pair_margins, problem.reward_margins, kls(problem, theta), beta, progress)


def gradient(
    problem: Problem, method: Method, theta: Float[Array, "X Y"], beta: Scalar, progress: Scalar = 1.0
) -> Float[Array, "X Y"]:
    """The gradient of `loss` in theta [X, Y], by automatic differentiation; the reference has it analytically."""
    return jax.grad(loss, argnums=2)(problem, method, theta, beta, progress)


def descend(
    problem: Problem,
    method: Method,
    beta: Scalar,
    rate: Scalar,
    steps: int,
    start: Float[Array, "X Y"] | None = None,
) -> Float[Array, "T X Y"]:
    """Gradient descent from `start`, by default pi_ref, gamma annealed over the steps: the path [steps + 1, X, Y].

    theta_{t+1} = theta_t - rate gradient(theta_t)
    """

    def update(theta, step):
        moved = theta - rate * gradient(problem, method, theta, beta, step / max(steps - 1, 1))
        return moved, moved

    first = problem.ref if start is None else start
    _, path = lax.scan(update, first, jnp.arange(steps))
    return jnp.concatenate([first[None], path])
