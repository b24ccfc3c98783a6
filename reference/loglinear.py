"""Policies whose log-probabilities are linear in their parameters: what the paper's three settings have in common.

A policy is a table of logits theta [X, Y]. Row x gives, by its softmax, the distribution of one draw at prompt x:
of a response (`tabular`), of a token (`bag_of_words`, whose responses are `draws` independent tokens) or of an arm
(`bandit`). The log-partitions cancel between two responses to a prompt, so a pair's margin is linear in theta and
every gradient has a closed form.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference.methods import gamma_at, method_loss
from reference.objectives import distillation, dpo, forward_kl, ipo


class Problem(NamedTuple):
    """What a method is given.

    ref:            logits of the reference policy [X, Y].
    differences:    features of the chosen less those of the rejected response of each pair [B, X, Y].
    reward_margins: of each pair under K reward models [K, B]; K may be 0.
    draws:          independent draws that make up a response: 1, or the length of a bag of words.
    """

    ref: np.ndarray
    differences: np.ndarray
    reward_margins: np.ndarray
    draws: int = 1


def log_softmax(logits):
    """Log-probabilities from logits, over the last axis.

    theta_y - log sum_y' exp theta_y'
    """
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def margins(problem, theta):
    """The log-ratio margin h of each pair: [X, Y] -> [B]. Source: the argument of Eq. 6."""
    return np.tensordot(problem.differences, theta - problem.ref, 2)


def kls(problem, theta):
    """KL(pi_ref || pi_theta) at each prompt, exactly: [X, Y] -> [X]. Independent draws add up. Source: Eq. 9."""
    return problem.draws * forward_kl(log_softmax(problem.ref), log_softmax(theta))


def loss(problem, method, theta, beta, progress=1.0):
    """What a row of `METHODS` minimises, with the exact KL: logits [X, Y] -> scalar. Source: Eq. 11, Eq. 13."""
    pair_margins = margins(problem, theta)
    return method_loss(method, pair_margins, problem.reward_margins, kls(problem, theta), beta, progress)


def gradient(problem, method, theta, beta, progress=1.0):
    """The gradient of `loss` in theta [X, Y], analytically.

    sum_b (d pair_loss / d h_b) d h_b / d theta + gamma mean_x draws (pi_theta - pi_ref)
    """
    slopes = margin_slopes(method, margins(problem, theta), problem.reward_margins, beta)
    excess = np.exp(log_softmax(theta)) - np.exp(log_softmax(problem.ref))
    gamma = gamma_at(method.gamma or (0.0, 0.0), progress)
    pull = gamma * problem.draws * excess / len(theta)
    return np.tensordot(slopes, problem.differences, 1) + pull


def margin_slopes(method, pair_margins, reward_margins, beta):
    """d pair_loss / d h_b for each pair [B].

    A minimum over reward models, or over their mixtures, has the slope of what it chose (envelope theorem).
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
    """Gradient descent from `start`, by default pi_ref, gamma annealed over the steps: the path [steps + 1, X, Y].

    theta_{t+1} = theta_t - rate gradient(theta_t)
    """
    path = [problem.ref if start is None else start]
    for step in range(steps):
        progress = step / max(steps - 1, 1)
        path.append(path[-1] - rate * gradient(problem, method, path[-1], beta, progress))
    return np.stack(path)
