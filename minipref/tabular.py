"""Tabular policies over finitely many prompts and responses: a logit of its own for each, everything exact.

The same functions as in `reference/tabular.py`, which says what they mean; its exact solvers (`maximin`, `distil`,
`hull_policy`) are there alone. Log-probabilities and rewards are [X, Y], an ensemble's rewards [K, X, Y]; prompts are
equally likely.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minipref.loglinear import Problem
from minipref.objectives import Scalar, forward_kl

Table = Float[Array, "X Y"]
Tables = Float[Array, "K X Y"]


def problem(ref_logps: Table, pairs: Int[Array, "B 3"], rewards: Tables) -> Problem:
    """Pairs [B, 3] of (prompt, chosen, rejected) indices and rewards [K, X, Y] as a `Problem`."""
    prompts, chosen, rejected = pairs.T
    rows = jnp.arange(len(pairs))
    differences = jnp.zeros((len(pairs), *ref_logps.shape), ref_logps.dtype)
    differences = differences.at[rows, prompts, chosen].add(1).at[rows, prompts, rejected].add(-1)
    return Problem(ref_logps, differences, rewards[:, prompts, chosen] - rewards[:, prompts, rejected])


def all_pairs(prompts: int, responses: int) -> Int[Array, "B 3"]:
    """Every ordered pair of different responses to every prompt, once: full support, as Theorem 1 asks."""
    prompt, chosen, other = jnp.indices((prompts, responses, responses - 1)).reshape(3, -1)
    return jnp.stack([prompt, chosen, other + (other >= chosen)], axis=1)


def log_partition(ref_logps: Table, rewards: Table, beta: Scalar) -> Float[Array, " X"]:
    """log Z(x): [X, Y] -> [X].

    log sum_y pi_ref(y) exp(r(y) / beta)

    Source: below Eq. 3.
    """
    return jax.nn.logsumexp(ref_logps + rewards / beta, axis=-1)


def optimal_policy(ref_logps: Table, rewards: Table, beta: Scalar) -> Table:
    """The maximiser of the RLHF objective: log-probabilities [X, Y].

    log pi(y) = log pi_ref(y) + r(y) / beta - log Z

    Source: Eq. 3.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[:, None]  # Eq. 3


def implicit_rewards(policy_logps: Table, ref_logps: Table, beta: Scalar) -> Table:
    """The rewards that a policy is optimal for, up to a constant a prompt (beta log Z).

    beta log pi(y) / pi_ref(y)

    Source: Eq. 4.
    """
    return (policy_logps - ref_logps) * beta  # Eq. 4


def preference_probability(policy_logps: Table, ref_logps: Table, beta: Scalar) -> Float[Array, "X Y Y"]:
    """How likely, by the policy's implicit rewards, each response beats each other one: [X, Y] -> [X, Y, Y].

    sigmoid(beta log [pi(y1) pi_ref(y2)] / [pi(y2) pi_ref(y1)])

    Source: Eq. 5.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta)
    return jax.nn.sigmoid(rewards[:, :, None] - rewards[:, None, :])  # Eq. 5


def advantages(policy_logps: Table, ref_logps: Table, rewards: Tables) -> Float[Array, " K"]:
    """By how much a policy's expected reward exceeds the reference's under each of K models: [K, X, Y] -> [K].

    mean_x [E_pi r_k - E_pi_ref r_k]

    Source: the marked term of Eq. 8.
    """
    excess = jnp.exp(policy_logps) - jnp.exp(ref_logps)
    return jnp.mean(jnp.sum(excess * rewards, axis=-1), axis=-1)


def finite_minimum(ref_logps: Table, rewards: Tables, beta: Scalar) -> Table:
    """Theorem 2 as printed: of the K models' optimal policies, the one nearest to pi_ref in forward KL: [X, Y]."""
    policies = jax.vmap(optimal_policy, (None, 0, None))(ref_logps, rewards, beta)
    distances = jnp.mean(jax.vmap(forward_kl, (None, 0))(ref_logps, policies), axis=-1)  # Eq. 9
    return policies[jnp.argmin(distances)]
