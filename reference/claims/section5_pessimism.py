"""Claims of section 5.2: Eq. 8-9 and Theorem 2. The arguments are listed in `reference.claims`."""

import numpy as np

from reference import loglinear, tabular
from reference.claims.evidence import at_most, identity, worst
from reference.methods import METHODS
from reference.objectives import forward_kl, pessimistic_rlhf, rlhf
from reference.tabular import optimal_policy


def one_reward_model_is_rlhf(policy_logps, ref_logps, rewards, beta):
    """With one reward model Eq. 8 is Eq. 1 minus a constant; each model's own constants cancel.

    Proof: the reference's expected reward is subtracted.
    Source: section 5.2, footnote 3.
    """
    ref_values = np.sum(np.exp(ref_logps) * rewards[0], axis=-1)
    expected = np.mean(rlhf(policy_logps, ref_logps, rewards[0], beta) - ref_values)
    one, several, shifted = (
        pessimistic_rlhf(policy_logps, ref_logps, models, beta)
        for models in (rewards[:1], rewards, rewards - rewards[:, :, :1])
    )
    return worst(
        identity(one, expected),
        identity(shifted, several, 1e-9 * (1 + np.ptp(rewards))),
    )


def theorem_2(ref_logps, rewards, beta):
    """Over the convex hull of S, the policy of Eq. 9 maximises Eq. 8, with the value of Eq. 9.

    Proof: `weak_duality` bounds all policies by all mixtures, so a policy and a mixture of the same
    value are both optimal. The theorem is corrected here; `errata.printed_theorem_2` fails.
    Source: Theorem 2.
    """
    weights, policy = tabular.maximin(ref_logps, rewards, beta)
    mixed = optimal_policy(ref_logps, np.tensordot(weights, rewards, 1), beta)
    dual = beta * np.mean(forward_kl(ref_logps, mixed))
    value = pessimistic_rlhf(policy, ref_logps, rewards, beta)
    return worst(
        identity(value, dual, 1e-10 * (1 + np.ptp(rewards))),
        at_most(-weights, 0.0),
        identity(np.sum(weights), 1.0),
    )


def weak_duality(ref_logps, rewards, beta, rivals):
    """No policy's value of Eq. 8 exceeds beta KL(pi_ref || pi_w) for any mixture w.

    min_k [adv_k(pi) - beta KL(pi || pi_ref)] <= beta KL(pi_ref || pi_w)

    Proof: min_k <= sum_k w_k, then Eq. 29; no minimum is exchanged with a maximum. Here w is the
    mean of all reward models and each single one, so Eq. 9's least is among the bounds.
    Source: the proof of Theorem 2.
    """
    mean = np.mean(rewards, axis=0, keepdims=True)
    policies = optimal_policy(ref_logps, np.append(rewards, mean, axis=0), beta)
    kls = beta * np.mean(forward_kl(ref_logps, policies), axis=-1)
    nearest_policy = tabular.finite_minimum(ref_logps, rewards, beta)
    nearest = beta * np.mean(forward_kl(ref_logps, nearest_policy))
    values = [pessimistic_rlhf(policy, ref_logps, rewards, beta) for policy in [*rivals, *policies]]
    return worst(at_most(values, np.min(kls), 1e-8), identity(nearest, np.min(kls[:-1])))


def maximin_values(ref_logps, rewards, beta):
    """The value of Eq. 8 at its maximiser and at the limits of three methods as gamma -> 0.

    min_k mean_x [E_{y ~ pi} r_k - E_{y ~ pi_ref} r_k - beta KL(pi || pi_ref)]

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        Values [4], in nats, of the maximiser, hull, e-DPO and the mean of the ensemble.
    Source: Eq. 8, 9.
    """
    policies = [
        tabular.maximin(ref_logps, rewards, beta)[1],
        tabular.hull_policy(ref_logps, rewards, beta, 1e-7 * beta),
        tabular.finite_minimum(ref_logps, rewards, beta),
        optimal_policy(ref_logps, np.mean(rewards, axis=0), beta),
    ]
    return np.array([pessimistic_rlhf(policy, ref_logps, rewards, beta) for policy in policies])


def hull_is_exact(ref_logps, rewards, beta):
    """The hull method maximises Eq. 8 as gamma -> 0, to 1e-6; e-DPO and the mean do no better.

    Proof: residuals are at most gamma Y / (4 beta), so Eq. 9 over the hull remains.
    Source: ours.
    """
    best, hull, finite, mean = maximin_values(ref_logps, rewards, beta)
    return worst(identity(hull, best, 1e-6), at_most([hull, finite, mean], best))


def hull_policy_is_stationary(ref_logps, rewards, beta, gamma):
    """Eq. 11 over the convex hull is least at `hull_policy`, where its gradient is 0, at any gamma.

    Proof: it is a minimum over w of a function that is convex in w and log pi together. Pairs weigh
    Y / (Y - 1), as in `proposition_4`. The tolerance is 1e-7, since a minimiser has half of the
    digits of its value.
    Source: ours.
    """
    prompts, responses = ref_logps.shape
    problem = tabular.problem(ref_logps, tabular.all_pairs(prompts, responses), rewards)
    method = METHODS["hull"]._replace(gamma=(gamma * responses / (responses - 1),) * 2)
    policy = tabular.hull_policy(ref_logps, rewards, beta, gamma)
    slope = loglinear.gradient(problem, method, policy, beta)
    return identity(slope / (gamma + beta * (1 + np.ptp(rewards))), 0.0, 1e-7)


def pessimism_never_loses(ref_logps, rewards, beta):
    """The maximiser of Eq. 8 is no worse than pi_ref under any reward model of S.

    min_k adv_k(pi) >= beta KL(pi || pi_ref) >= 0

    Proof: pi_ref has value 0, so the maximum is at least 0.
    Source: section 5.2.
    """
    _, policy = tabular.maximin(ref_logps, rewards, beta)
    floor = beta * np.mean(forward_kl(policy, ref_logps))
    advantages = tabular.advantages(policy, ref_logps, rewards)
    return at_most(floor, advantages, 1e-10 * (1 + np.ptp(rewards)))
