"""Bags of words (section 4.1): a response is n independent tokens, so only its counts matter.

log pi_theta(y) = c(y) . theta - n log sum_i exp theta_i

The same functions as in `reference/bag_of_words.py`.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minipref.loglinear import Problem, log_softmax
from minipref.objectives import Loss

Counts = Int[Array, " V"]


def counts(tokens: Int[Array, " n"], vocabulary: int) -> Counts:
    """How often each token of the vocabulary occurs in a response.

    c(y)_i = #{t: y_t = i}

    Args:
        tokens: Token ids [n].
        vocabulary: V, the number of tokens; static.

    Returns:
        Counts [V].

    Source: section 4.1.
    """
    return jnp.bincount(tokens, length=vocabulary)


def problem(
    ref: Float[Array, " V"],
    chosen: Int[Array, "B V"],
    rejected: Int[Array, "B V"],
    reward_margins: Float[Array, "K B"],
) -> Problem:
    """The `Problem` of pairs of bags, all of one length.

    h_b = [c(y_w) - c(y_l)] . (theta - theta_ref)

    Args:
        ref: The logits theta_ref of the reference [V].
        chosen: The counts of each pair's chosen response [B, V].
        rejected: The counts of each pair's rejected response [B, V].
        reward_margins: rho [K, B], in nats.

    Returns:
        The problem, with one prompt whose responses are n draws.

    Raises:
        RuntimeError: Responses differ in length, so log Z would not cancel in h. It is raised when
            the compiled program runs.

    Source: Proposition 2.
    """
    lengths = jnp.sum(jnp.concatenate([chosen, rejected]), axis=-1)
    uneven = jnp.any(lengths != lengths[0])
    draws = eqx.error_if(lengths[0], uneven, "all responses must have one length")
    differences = (chosen - rejected)[:, None, :].astype(ref.dtype)
    return Problem(ref[None], differences, reward_margins, draws)


def log_prob(theta: Float[Array, " V"], count: Counts) -> Loss:
    """The log-probability of a response.

    log pi_theta(y) = c(y) . log_softmax(theta)

    Args:
        theta: Logits [V].
        count: The response's counts c(y) [V].

    Returns:
        The log-probability, a scalar in nats.

    Source: Proposition 2.
    """
    return jnp.sum(count * log_softmax(theta))


def log_prob_bound(theta: Float[Array, " V"], count: Counts) -> Loss:
    """The upper bound on the log-probability of a response that Proposition 2 follows.

    log pi_theta(y) <= c(y) . theta - n max_j theta_j

    Args:
        theta: Logits [V].
        count: The response's counts c(y) [V], with sum n.

    Returns:
        The bound, a scalar in nats.

    Source: Proposition 2.
    """
    return jnp.sum(count * (theta - jnp.max(theta)))
