"""Policies whose log-probabilities are linear in their parameters: the paper's three settings.

A policy is a table of logits theta [X, Y]. The softmax of row x is the distribution of one draw at
prompt x: of a response (`tabular`), of a token (`bag_of_words`, whose responses are `draws`
independent tokens) or of an arm (`bandit`). The log-partitions cancel between two responses to one
prompt. So the margin of a pair is linear in theta, and every gradient has a closed form.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference.methods import gamma_at, method_loss
from reference.objectives import distillation, dpo, forward_kl, ipo


class Problem(NamedTuple):
    """The data that a method is given.

    Attributes:
        ref: The logits of the reference policy [X, Y].
        differences: The features of the chosen response minus those of the rejected one, for each
            pair [B, X, Y].
        reward_margins: rho of each pair under K reward models [K, B], in nats; K may be 0.
        draws: The independent draws that make up a response: 1, or the length of a bag of words.
    """

    ref: np.ndarray
    differences: np.ndarray
    reward_margins: np.ndarray
    draws: int = 1


def log_softmax(logits):
    """Log-probabilities from logits, over the last axis.

    theta_y - log sum_y' exp theta_y'

    Args:
        logits: theta [..., Y].

    Returns:
        Log-probabilities [..., Y], in nats.
    Source: section 4.1.
    """
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def margins(problem, theta):
    """The log-ratio margin of each pair.

    h_b = differences_b . (theta - theta_ref)

    Args:
        problem: a `Problem` with B pairs.
        theta: the policy's logits [X, Y].

    Returns:
        h [B], in nats.
    Source: the argument of Eq. 6.
    """
    return np.tensordot(problem.differences, theta - problem.ref, 2)


def kls(problem, theta):
    """The exact forward KL at each prompt; those of independent draws add up.

    draws KL(pi_ref || pi_theta)

    Args:
        problem: a `Problem`.
        theta: the policy's logits [X, Y].

    Returns:
        The divergences [X], in nats.
    Source: Eq. 9.
    """
    return problem.draws * forward_kl(log_softmax(problem.ref), log_softmax(theta))


def loss(problem, method, theta, beta, progress=1.0):
    """The loss of a method, with the exact KL.

    pair_loss + gamma(progress) mean_x draws KL_x(pi_ref || pi_theta)

    Args:
        problem: a `Problem`.
        method: a row of `METHODS`.
        theta: the policy's logits [X, Y].
        beta: the beta of the pair term, above 0.
        progress: 0 at the first step, 1 at the last.

    Returns:
        The loss, a scalar.
    Source: Eq. 11, Eq. 13.
    """
    pair_margins, divergences = margins(problem, theta), kls(problem, theta)
    return method_loss(method, pair_margins, problem.reward_margins, divergences, beta, progress)


def gradient(problem, method, theta, beta, progress=1.0):
    """The gradient of `loss` in theta, in closed form.

    sum_b (d pair_loss / d h_b) d h_b / d theta + gamma mean_x draws (pi_theta - pi_ref)

    Args:
        problem: a `Problem`.
        method: a row of `METHODS`.
        theta: the policy's logits [X, Y].
        beta: the beta of the pair term, above 0.
        progress: 0 at the first step, 1 at the last.

    Returns:
        The gradient [X, Y].
    Source: Eq. 11, Eq. 13.
    """
    slopes = margin_slopes(method, margins(problem, theta), problem.reward_margins, beta)
    excess = np.exp(log_softmax(theta)) - np.exp(log_softmax(problem.ref))
    gamma = gamma_at(method.gamma or (0.0, 0.0), progress)
    pull = gamma * problem.draws * excess / len(theta)
    return np.tensordot(slopes, problem.differences, 1) + pull


def margin_slopes(method, pair_margins, reward_margins, beta):
    """The derivative of a method's pair loss in the margin of each pair.

    d pair_loss / d h_b

    A minimum over reward models, or over their mixtures, has the slope of its minimiser (envelope
    theorem).

    Args:
        method: a row of `METHODS`.
        pair_margins: h [B], in nats.
        reward_margins: rho [K, B], in nats.
        beta: the beta of the pair term, above 0.

    Returns:
        Slopes [B].
    Source: Eq. 6, Eq. 7, section 7.1.
    """
    batch = len(pair_margins)
    if method.weights is None:
        return SLOPES[method.pair_loss.args[0]](pair_margins, beta) / batch
    weights = method.weights(pair_margins, reward_margins, beta)
    return SLOPES[distillation](pair_margins, weights @ reward_margins, beta) / batch


SLOPES: dict[Callable, Callable] = {  # d objective / d margin, of whole batches
    dpo: lambda h, beta: -beta * np.exp(-np.logaddexp(0.0, beta * h)),
    ipo: lambda h, tau: 2 * (h - 1 / tau),
    distillation: lambda h, reward_margins, beta: -2 * beta * (reward_margins - beta * h),
}


def descend(problem, method, beta, rate, steps, start=None):
    """Gradient descent, with gamma annealed over the steps.

    theta_{t+1} = theta_t - rate gradient(theta_t)

    Args:
        problem: a `Problem`.
        method: a row of `METHODS`.
        beta: the beta of the pair term, above 0.
        rate: the learning rate, above 0.
        steps: T, the number of steps.
        start: theta_0 [X, Y]; None starts at the reference.

    Returns:
        The path theta_t [T + 1, X, Y].
    Source: section 4.1.
    """
    path = [problem.ref if start is None else start]
    for step in range(steps):
        progress = step / max(steps - 1, 1)
        path.append(path[-1] - rate * gradient(problem, method, path[-1], beta, progress))
    return np.stack(path)
