"""Claims of sections 5.2.1 and 5.3: Eq. 11-14. The arguments are listed in `reference.claims`."""

import numpy as np

from reference import loglinear, objectives, tabular, weights
from reference.claims.evidence import at_most, identity, worst
from reference.claims.section5_distillation import uniform_distillation
from reference.loglinear import log_softmax
from reference.methods import METHODS
from reference.objectives import forward_kl
from reference.tabular import implicit_rewards, optimal_policy


def minimum_over_models(margins, reward_margins, beta):
    """Eq. 11's minimum is the loss of the nearest reward model; hull's is that of a mixture.

    e = sum_k w_k e_k is the mixture nearest to 0 if e . e <= e . e_k for all k

    Proof: by definition.
    Source: section 5.2.1.
    """
    residuals = (reward_margins - beta * margins) / np.sqrt(len(margins))
    nearest = weights.hull_weights(margins, reward_margins, beta) @ residuals
    bounds = {
        "hull": residuals @ nearest,
        "ensemble": np.sum(residuals**2, axis=-1),
        "mean": np.sum(np.mean(residuals, axis=0) ** 2),
    }
    evidence = []
    for name, bound in bounds.items():
        loss = getattr(objectives, f"{name}_distillation")(margins, reward_margins, beta)
        chosen = getattr(weights, f"{name}_weights")(margins, reward_margins, beta)
        evidence += [at_most(loss, bound), identity(np.sum((chosen @ residuals) ** 2), loss)]
        evidence += [identity(np.sum(np.abs(chosen)), 1.0)]
    return worst(*evidence)


def minibatch_minima(margins, reward_margins, beta):
    """The mean of minibatches' minima is at most the minimum of the mean.

    mean_b min_k (rho_kb - beta h_b)^2 <= min_k mean_b (rho_kb - beta h_b)^2

    Proof: each batch takes its own minimum. Here a minibatch is one pair, as in Figure B.3.
    Source: footnote 5.
    """
    distances = (reward_margins - beta * margins) ** 2
    whole = objectives.ensemble_distillation(margins, reward_margins, beta)
    counts = np.bincount(np.argmin(distances, axis=0), minlength=len(reward_margins))
    shares = weights.nearest_shares(margins, reward_margins, beta)
    return worst(
        at_most(np.mean(np.min(distances, axis=0)), whole),
        identity(shares, counts / len(margins)),
    )


def sampled_kl_is_unbiased(policy_logps, ref_logps):
    """The mean of Eq. 11's KL estimate over y ~ pi_ref is the forward KL, which is at least 0.

    Source: Eq. 9, Eq. 11.
    """
    estimates = objectives.sampled_forward_kl(ref_logps, policy_logps)
    mean = np.sum(np.exp(ref_logps) * estimates, axis=-1)
    exact = forward_kl(ref_logps, policy_logps)
    return worst(identity(mean, exact), at_most(-exact, 0.0))


def equation_11(ref_logps, rewards, beta, gamma):
    """The exact minimiser of Eq. 11 over all pairs of responses.

    argmin_pi min_k mean_x [mean_{y1, y2} (r_k(y1) - r_k(y2) - beta h)^2 + gamma KL_x]

    Args:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: r [K, X, Y], in nats.
        beta: the weight of the KL in Eq. 1, above 0.
        gamma: the weight of the forward KL, above 0.

    Returns:
        The index k of the reward model that it distils, and log pi [X, Y], in nats.
    Source: Eq. 11.
    """
    policies = np.array(
        [tabular.distil(ref_logps, model_rewards, beta, gamma) for model_rewards in rewards]
    )
    kls = np.mean(forward_kl(ref_logps, policies), axis=-1)
    fits = uniform_distillation(policies, ref_logps, rewards, beta)
    best = np.argmin(objectives.pessimistic(fits, kls, gamma))
    return best, policies[best]


def proposition_4(ref_logps, rewards, beta, gamma, rivals):
    """Eq. 11's minimiser has the least forward KL of all policies that are as near to S.

    Proof: a policy that is as near and has less KL would have a smaller loss + gamma KL. That
    `distil` returns the minimiser shows in its gradient (`_distillation_slope`).
    Source: Proposition 4.
    """
    best, policy = equation_11(ref_logps, rewards, beta, gamma)
    ball = _equally_far(policy, ref_logps, rewards[best], beta, rivals)
    other_ball = ball - rewards[best] + rewards[0]
    feasible = optimal_policy(ref_logps, np.concatenate([ball, other_ball]), beta)
    kls = np.mean(forward_kl(ref_logps, np.array([policy, *feasible])), axis=-1)
    slope = _distillation_slope(ref_logps, rewards, beta, gamma)
    return worst(
        at_most(kls[0], kls[1:], 1e-8),
        identity(slope / (gamma + beta * (1 + np.ptp(rewards))), 0.0),
    )


def proposition_4_is_pessimistic(ref_logps, rewards, beta, gamma, rivals):
    """With S = {r}, Eq. 11's minimiser maximises Eq. 8 over all rewards that are as near to r.

    Proof: these rewards are a ball, which is convex, so Theorem 2 holds: the policy's own rewards
    are the worst for it.
    Source: section 5.2.1.
    """
    policy = tabular.distil(ref_logps, rewards[0], beta, gamma)
    ball = _equally_far(policy, ref_logps, rewards[0], beta, rivals)
    own_rewards = implicit_rewards(policy, ref_logps, beta)[None]
    own = tabular.advantages(policy, ref_logps, own_rewards)
    others = tabular.advantages(policy, ref_logps, ball)
    return at_most(own, others, 1e-8 * (1 + np.ptp(rewards)))


def equation_14(ref_logps, beta, gamma, rivals):
    """p-DPO, Eq. 13, has a finite minimiser: the least forward KL of all of no more DPO loss.

    So it maximises Eq. 8 over the rewards of these policies (section 5.3).

    Proof: as Proposition 4's. Here each prompt has one pair, and rivals have no lower log-ratio.
    Source: Eq. 13, 14.
    """
    policy = _pessimistic_dpo(ref_logps, beta, gamma)
    pairs = np.array([(x, 0, 1) for x in range(len(ref_logps))])
    problem = tabular.problem(ref_logps, pairs, np.zeros((0, *ref_logps.shape)))
    method = METHODS["p-dpo"]._replace(gamma=(gamma, gamma))
    slope = loglinear.gradient(problem, method, policy, beta)
    feasible = _no_lower_ratio(policy, rivals)
    kls = forward_kl(ref_logps, feasible)
    own, *values = (
        tabular.advantages(policy, ref_logps, implicit_rewards(rewarded, ref_logps, 1.0)[None])
        for rewarded in (policy, *feasible)
    )
    return worst(
        identity(slope / max(gamma, beta), 0.0),
        at_most(forward_kl(ref_logps, policy), kls, 1e-8),
        at_most(own, values, 1e-8),
    )


def _equally_far(policy_logps, ref_logps, rewards, beta, rivals):
    """Rewards as far from `rewards`, by Eq. 12, as the policy's own rewards are: [2 M, X, Y].

    Half of them are near the policy's own rewards, the others lie in any direction.
    """
    own = implicit_rewards(policy_logps, ref_logps, beta) - rewards
    directions = np.concatenate([own + 0.1 * np.std(own) * rivals, rivals])
    directions -= np.mean(directions, axis=-1, keepdims=True)
    spread = 2 * np.mean(directions**2, axis=(-1, -2), keepdims=True) + 1e-300
    distance = uniform_distillation(policy_logps, ref_logps, rewards, beta)
    return rewards + directions * np.sqrt(distance / spread)


def _distillation_slope(ref_logps, rewards, beta, gamma):
    """The gradient of Eq. 11 for the first reward model, at the policy that `distil` returns.

    Eq. 7 over different responses is Y / (Y - 1) times Eq. 7 over all, and gamma is scaled alike.
    """
    prompts, responses = ref_logps.shape
    problem = tabular.problem(ref_logps, tabular.all_pairs(prompts, responses), rewards[:1])
    method = METHODS["dp-dpo"]._replace(gamma=(gamma * responses / (responses - 1),) * 2)
    policy = tabular.distil(ref_logps, rewards[0], beta, gamma)
    return loglinear.gradient(problem, method, policy, beta)


def _pessimistic_dpo(ref_logps, beta, gamma):
    """Eq. 13's minimiser with the exact KL, one pair (0, 1) a prompt: [X, Y] -> [X, Y].

    The loser gives the winner delta, and all other responses keep their probability. At the
    minimum gamma delta = beta sigmoid(-beta h), which is solved by bisection on h.
    """
    ratio = ref_logps[:, 0] - ref_logps[:, 1]
    mass = np.logaddexp(ref_logps[:, 0], ref_logps[:, 1])
    low, high = np.zeros(len(ref_logps)), np.full(len(ref_logps), 2000 / beta)
    for _ in range(200):
        h = (low + high) / 2
        delta = np.exp(ref_logps[:, 1]) - np.exp(mass - np.logaddexp(0.0, h + ratio))
        rises = gamma * delta < beta * np.exp(-np.logaddexp(0.0, beta * h))
        low, high = np.where(rises, h, low), np.where(rises, high, h)
    loser = mass - np.logaddexp(0.0, low + ratio)
    return np.column_stack([loser + low + ratio, loser, ref_logps[:, 2:]])


def _no_lower_ratio(policy_logps, rivals):
    """Rivals, and policies near the policy, raised to its log-ratio of responses 0 and 1."""
    logits = np.concatenate([rivals, policy_logps + 0.1 * rivals])
    ratio = policy_logps[:, 0] - policy_logps[:, 1]
    logits[..., 0] += np.maximum(ratio - logits[..., 0] + logits[..., 1], 0.0)
    return log_softmax(logits)
