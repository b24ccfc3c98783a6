"""Bags of words (section 4.1): a response is n independent tokens, so only its counts matter.

log pi_theta(y) = c(y) . theta - n log sum_i exp theta_i
"""

import numpy as np

from reference.loglinear import Problem, log_softmax


def counts(tokens, vocabulary):
    """How often each token of the vocabulary occurs in a response.

    c(y)_i = #{t: y_t = i}

    Args:
        tokens: token ids [n].
        vocabulary: V, the number of tokens.

    Returns:
        Counts [V].
    Source: section 4.1.
    """
    return np.bincount(tokens, minlength=vocabulary)


def problem(ref, chosen, rejected, reward_margins):
    """The `Problem` of pairs of bags, all of one length.

    h_b = [c(y_w) - c(y_l)] . (theta - theta_ref)

    Args:
        ref: the logits theta_ref of the reference [V].
        chosen, rejected: the counts of each pair's responses [B, V].
        reward_margins: rho [K, B], in nats.

    Returns:
        The problem, with one prompt whose responses are n draws.

    Raises:
        ValueError: responses differ in length, so log Z would not cancel in h.
    Source: Proposition 2.
    """
    lengths = np.unique(np.sum([chosen, rejected], axis=-1))
    if len(lengths) > 1:
        raise ValueError(f"all responses must have one length, not {lengths.tolist()}")
    differences = (np.asarray(chosen) - np.asarray(rejected))[:, None, :].astype(float)
    return Problem(np.asarray(ref, float)[None], differences, reward_margins, int(lengths[0]))


def log_prob(theta, count):
    """The log-probability of a response.

    log pi_theta(y) = c(y) . log_softmax(theta)

    Args:
        theta: logits [V].
        count: the response's counts c(y) [V].

    Returns:
        The log-probability, a scalar in nats.
    Source: Proposition 2.
    """
    return count @ log_softmax(theta)


def log_prob_bound(theta, count):
    """The upper bound on the log-probability of a response that Proposition 2 follows.

    log pi_theta(y) <= c(y) . theta - n max_j theta_j

    Args:
        theta: logits [V].
        count: the response's counts c(y) [V], with sum n.

    Returns:
        The bound, a scalar in nats.
    Source: Proposition 2.
    """
    return count @ (theta - np.max(theta))
