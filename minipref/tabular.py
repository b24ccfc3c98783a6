"""Tabular policies over finitely many prompts and responses: one logit for each, all sums exact.

Log-probabilities and rewards are [X, Y], the rewards of an ensemble [K, X, Y], all in nats. Prompts
are equally likely. beta is the weight of the KL in Eq. 1, above 0. The same functions as in
`reference/tabular.py`, except its exact solvers `maximin`, `distil` and `hull_policy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minipref.loglinear import Problem
from minipref.objectives import Scalar, forward_kl

Table = Float[Array, "X Y"]
Tables = Float[Array, "K X Y"]


def problem(ref_logps: Table, pairs: Int[Array, "B 3"], rewards: Tables) -> Problem:
    """The `Problem` of preference pairs under K reward models.

    rho_kb = r_k(x_b, chosen_b) - r_k(x_b, rejected_b)

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        pairs: (prompt, chosen, rejected) indices [B, 3].
        rewards: r [K, X, Y], in nats.

    Returns:
        The problem, with differences [B, X, Y] and reward margins [K, B].

    Source: the pairs of Eq. 6 and Eq. 7.
    """
    prompts, chosen, rejected = pairs.T
    rows = jnp.arange(len(pairs))
    differences = jnp.zeros((len(pairs), *ref_logps.shape), ref_logps.dtype)
    differences = differences.at[rows, prompts, chosen].add(1).at[rows, prompts, rejected].add(-1)
    reward_margins = rewards[:, prompts, chosen] - rewards[:, prompts, rejected]
    return Problem(ref_logps, differences, reward_margins)


def all_pairs(prompts: int, responses: int) -> Int[Array, "B 3"]:
    """Every ordered pair of different responses to every prompt, once.

    {(x, y1, y2): y1 != y2}

    Args:
        prompts: X, the number of prompts; static.
        responses: Y, the number of responses; static.

    Returns:
        (prompt, chosen, rejected) indices [X Y (Y - 1), 3].

    Source: the full support that Theorem 1 assumes.
    """
    prompt, chosen, other = jnp.indices((prompts, responses, responses - 1)).reshape(3, -1)
    return jnp.stack([prompt, chosen, other + (other >= chosen)], axis=1)


def log_partition(ref_logps: Table, rewards: Table, beta: Scalar) -> Float[Array, " X"]:
    """The logarithm of the normaliser of the optimal policy.

    log Z = log sum_y pi_ref(y) exp(r(y) / beta)

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [X, Y], in nats.
        beta: The weight of the KL in Eq. 1, above 0.

    Returns:
        log Z [X], in nats.

    Source: below Eq. 3.
    """
    return jax.nn.logsumexp(ref_logps + rewards / beta, axis=-1)


def optimal_policy(ref_logps: Table, rewards: Table, beta: Scalar) -> Table:
    """The maximiser of the RLHF objective.

    log pi(y) = log pi_ref(y) + r(y) / beta - log Z

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [X, Y], in nats.
        beta: The weight of the KL in Eq. 1, above 0.

    Returns:
        log pi [X, Y], in nats.

    Source: Eq. 3.
    """
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)[:, None]  # Eq. 3


def implicit_rewards(policy_logps: Table, ref_logps: Table, beta: Scalar) -> Table:
    """The rewards for which a policy is optimal, up to a constant beta log Z for each prompt.

    r(y) = beta log[pi(y) / pi_ref(y)]

    Args:
        policy_logps: log pi [X, Y], in nats.
        ref_logps: log pi_ref [X, Y], in nats.
        beta: The weight of the KL in Eq. 1, above 0.

    Returns:
        r [X, Y], in nats.

    Source: Eq. 4.
    """
    return (policy_logps - ref_logps) * beta  # Eq. 4


def preference_probability(
    policy_logps: Table, ref_logps: Table, beta: Scalar
) -> Float[Array, "X Y Y"]:
    """The probability, by a policy's implicit rewards, that one response beats another.

    p(y1 > y2) = sigmoid(beta log [pi(y1) pi_ref(y2)] / [pi(y2) pi_ref(y1)])

    Args:
        policy_logps: log pi [X, Y], in nats.
        ref_logps: log pi_ref [X, Y], in nats.
        beta: The weight of the KL in Eq. 1, above 0.

    Returns:
        p(y1 > y2) [X, Y, Y] for y1 on the second axis and y2 on the third.

    Source: Eq. 5.
    """
    rewards = implicit_rewards(policy_logps, ref_logps, beta)
    return jax.nn.sigmoid(rewards[:, :, None] - rewards[:, None, :])  # Eq. 5


def advantages(policy_logps: Table, ref_logps: Table, rewards: Tables) -> Float[Array, " K"]:
    """A policy's expected reward minus the reference's, under each of K reward models.

    adv_k = mean_x [E_{y ~ pi} r_k - E_{y ~ pi_ref} r_k]

    Args:
        policy_logps: log pi [X, Y], in nats.
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.

    Returns:
        Advantages [K], in nats.

    Source: the marked term of Eq. 8.
    """
    excess = jnp.exp(policy_logps) - jnp.exp(ref_logps)
    return jnp.mean(jnp.sum(excess * rewards, axis=-1), axis=-1)


def finite_minimum(ref_logps: Table, rewards: Tables, beta: Scalar) -> Table:
    """The optimal policy of one of the K models that is nearest to the reference in forward KL.

    argmin_{pi in {pi_1, .., pi_K}} KL(pi_ref || pi),  pi_k the optimal policy for r_k

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.
        beta: The weight of the KL in Eq. 1, above 0.

    Returns:
        log pi [X, Y], in nats.

    Source: Eq. 9; Theorem 2 as printed.
    """
    policies = jax.vmap(optimal_policy, (None, 0, None))(ref_logps, rewards, beta)
    distances = jnp.mean(jax.vmap(forward_kl, (None, 0))(ref_logps, policies), axis=-1)  # Eq. 9
    return policies[jnp.argmin(distances)]
