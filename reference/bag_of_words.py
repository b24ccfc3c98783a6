"""Bags of words (section 4.1): a response is n independent tokens, so only its counts matter.

log pi_theta(y) = c(y) . theta - n log sum_i exp theta_i
"""

import numpy as np

from reference.loglinear import Problem, log_softmax


def counts(tokens, vocabulary):
    """c(y): how often each of the V tokens occurs, [n] -> [V]."""
    return np.bincount(tokens, minlength=vocabulary)


def problem(ref, chosen, rejected, reward_margins):
    """Counts [B, V] of pairs whose responses all have one length, and reward margins [K, B], as a `Problem`.

    `ref` [V] are the reference's logits. Errors: ValueError where lengths differ, since log Z would not cancel.
    """
    lengths = np.unique(np.sum([chosen, rejected], axis=-1))
    if len(lengths) > 1:
        raise ValueError(f"all responses must have one length, not {lengths.tolist()}")
    differences = (np.asarray(chosen) - np.asarray(rejected))[:, None, :].astype(float)
    return Problem(np.asarray(ref, float)[None], differences, reward_margins, int(lengths[0]))


def log_prob(theta, count):
    """log pi_theta(y) of a response with these counts: [V], [V] -> scalar, nats. Source: Proposition 2."""
    return count @ log_softmax(theta)


def log_prob_bound(theta, count):
    """The upper bound that Proposition 2 follows: log pi_theta(y) <= c(y) . theta - n max_j theta_j."""
    return count @ (theta - np.max(theta))
