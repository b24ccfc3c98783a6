"""Policies whose log-probabilities are linear in their parameters: the paper's three settings.

A policy is a table of logits theta [X, Y]. The softmax of row x is the distribution of one draw at
prompt x: of a response (`tabular`), of a token (`bag_of_words`, whose responses are `draws`
independent tokens) or of an arm (`bandit`). The log-partitions cancel between two responses to one
prompt. So the margin of a pair is linear in theta.

The same functions as in `reference/loglinear.py`. beta, gamma, learning rates and problems may be
traced: `jit` compiles a training run once, and `vmap` sweeps them. Methods and numbers of steps are
static. A sweep over gamma gives the method traced ones: `method._replace(gamma=(first, last))`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from minipref.methods import Method, method_loss
from minipref.objectives import Loss, Scalar, forward_kl


class Problem(NamedTuple):
    """The data that a method is given; stack the arrays of several to `vmap` over datasets.

    Attributes:
        ref: The logits of the reference policy [X, Y].
        differences: The features of the chosen response minus those of the rejected one, for each
            pair [B, X, Y].
        reward_margins: rho of each pair under K reward models [K, B], in nats; K may be 0.
        draws: The independent draws that make up a response: 1, or the length of a bag of words.
    """

    ref: Float[Array, "X Y"]
    differences: Float[Array, "B X Y"]
    reward_margins: Float[Array, "K B"]
    draws: int | Int[Array, ""] = 1


def log_softmax(logits: Float[Array, "*batch Y"]) -> Float[Array, "*batch Y"]:
    """Log-probabilities from logits, over the last axis.

    theta_y - log sum_y' exp theta_y'

    Args:
        logits: theta [..., Y].

    Returns:
        Log-probabilities [..., Y], in nats.

    Source: section 4.1.
    """
    return jax.nn.log_softmax(logits)


def margins(problem: Problem, theta: Float[Array, "X Y"]) -> Float[Array, " B"]:
    """The log-ratio margin of each pair.

    h_b = differences_b . (theta - theta_ref)

    Args:
        problem: A `Problem` with B pairs.
        theta: The policy's logits [X, Y].

    Returns:
        h [B], in nats.

    Source: the argument of Eq. 6.
    """
    shift = theta - problem.ref
    return jnp.tensordot(problem.differences, shift, 2, precision=lax.Precision.HIGHEST)


def kls(problem: Problem, theta: Float[Array, "X Y"]) -> Float[Array, " X"]:
    """The exact forward KL at each prompt; those of independent draws add up.

    draws KL(pi_ref || pi_theta)

    Args:
        problem: A `Problem`.
        theta: The policy's logits [X, Y].

    Returns:
        The divergences [X], in nats.

    Source: Eq. 9.
    """
    return problem.draws * forward_kl(log_softmax(problem.ref), log_softmax(theta))


def loss(
    problem: Problem,
    method: Method,
    theta: Float[Array, "X Y"],
    beta: Scalar,
    progress: Scalar = 1.0,
) -> Loss:
    """The loss of a method, with the exact KL.

    pair_loss + gamma(progress) mean_x draws KL_x(pi_ref || pi_theta)

    Args:
        problem: A `Problem`.
        method: A row of `METHODS`.
        theta: The policy's logits [X, Y].
        beta: The beta of the pair term, above 0.
        progress: 0 at the first step, 1 at the last.

    Returns:
        The loss, a scalar.

    Source: Eq. 11, Eq. 13.
    """
    pair_margins, divergences = margins(problem, theta), kls(problem, theta)
    return method_loss(method, pair_margins, problem.reward_margins, divergences, beta, progress)


def gradient(
    problem: Problem,
    method: Method,
    theta: Float[Array, "X Y"],
    beta: Scalar,
    progress: Scalar = 1.0,
) -> Float[Array, "X Y"]:
    """The gradient of `loss` in theta.

    It is by automatic differentiation; the reference has it in closed form.

    Args:
        problem: A `Problem`.
        method: A row of `METHODS`.
        theta: The policy's logits [X, Y].
        beta: The beta of the pair term, above 0.
        progress: 0 at the first step, 1 at the last.

    Returns:
        The gradient [X, Y].

    Source: Eq. 11, Eq. 13.
    """
    return jax.grad(loss, argnums=2)(problem, method, theta, beta, progress)


def descend(
    problem: Problem,
    method: Method,
    beta: Scalar,
    rate: Scalar,
    steps: int,
    start: Float[Array, "X Y"] | None = None,
) -> Float[Array, "T X Y"]:
    """Gradient descent, with gamma annealed over the steps.

    theta_{t+1} = theta_t - rate gradient(theta_t)

    Args:
        problem: A `Problem`.
        method: A row of `METHODS`.
        beta: The beta of the pair term, above 0.
        rate: The learning rate, above 0.
        steps: T, the number of steps.
        start: theta_0 [X, Y]; None starts at the reference.

    Returns:
        The path theta_t [T + 1, X, Y].

    Source: section 4.1.
    """

    def update(theta, step):
        progress = step / max(steps - 1, 1)
        moved = theta - rate * gradient(problem, method, theta, beta, progress)
        return moved, moved

    first = problem.ref if start is None else start
    _, path = lax.scan(update, first, jnp.arange(steps))
    return jnp.concatenate([first[None], path])
