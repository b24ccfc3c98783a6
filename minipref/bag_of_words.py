"""Bags of words (section 4.1): a response is n independent tokens, so only its counts matter.

The same functions as in `reference/bag_of_words.py`.

log pi_theta(y) = c(y) . theta - n log sum_i exp theta_i
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minipref.loglinear import Problem, log_softmax
from minipref.objectives import Loss

Counts = Int[Array, " V"]


def counts(tokens: Int[Array, " n"], vocabulary: int) -> Counts:
    """c(y): how often each of the V tokens occurs, [n] -> [V]."""
    return jnp.bincount(tokens, length=vocabulary)


def problem(
    ref: Float[Array, " V"],
    chosen: Int[Array, "B V"],
    rejected: Int[Array, "B V"],
    reward_margins: Float[Array, "K B"],
) -> Problem:
    """Counts [B, V] of pairs whose responses all have one length, and reward margins [K, B], as a `Problem`.

    `ref` [V] are the reference's logits. Errors: RuntimeError, when the compiled program runs, where lengths differ,
    since log Z would not cancel.
    """
    lengths = jnp.sum(jnp.concatenate([chosen, rejected]), axis=-1)
    uneven = jnp.any(lengths != lengths[0])
    draws = eqx.error_if(lengths[0], uneven, "all responses must have one length")
    return Problem(ref[None], (chosen - rejected)[:, None, :].astype(ref.dtype), reward_margins, draws)


def log_prob(theta: Float[Array, " V"], count: Counts) -> Loss:
    """log pi_theta(y) of a response with these counts: [V], [V] -> scalar, nats. Source: Proposition 2."""
    return jnp.sum(count * log_softmax(theta))


def log_prob_bound(theta: Float[Array, " V"], count: Counts) -> Loss:
    """The upper bound that Proposition 2 follows: log pi_theta(y) <= c(y) . theta - n max_j theta_j."""
    return jnp.sum(count * (theta - jnp.max(theta)))
