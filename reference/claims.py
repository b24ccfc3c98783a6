"""What the paper claims, one function a claim, as evidence on one instance.

Policies, references and rivals are log-probabilities [X, Y] ([M, X, Y] for M rivals), rewards are [K, X, Y], responses
are token ids [n]. Statements that are false as printed, and their corrections, are in `errata`.
"""

from typing import NamedTuple

import numpy as np

from reference import bag_of_words, bandit, loglinear, objectives, tabular
from reference.loglinear import log_softmax
from reference.methods import METHODS
from reference.objectives import dpo, forward_kl, log_ratio_margin, pessimistic_rlhf, rlhf
from reference.tabular import implicit_rewards, optimal_policy


class Evidence(NamedTuple):
    """What was measured and its bound, and by how much the claim holds (margin >= 0) or fails (< 0 or NaN)."""

    measured: float
    bound: float
    margin: float


def identity(measured, expected, tolerance=1e-9):
    """Evidence that two things are equal: the largest error, allowed up to tolerance (1 + max |expected|)."""
    error, allowed = np.max(np.abs(measured - expected)), tolerance * (1 + np.max(np.abs(expected)))
    return Evidence(float(error), float(allowed), float(allowed - error))


def at_most(measured, bound, slack=1e-9):
    """Evidence that measured <= bound everywhere, up to rounding, slack (1 + |bound|)."""
    measured, bound = np.broadcast_arrays(np.asarray(measured, float), np.asarray(bound, float))
    margins = (bound - measured + slack * (1 + np.abs(bound))).ravel()
    at = int(np.argmin(margins))
    return Evidence(float(measured.flat[at]), float(bound.flat[at]), float(margins[at]))


def worst(*evidence):
    """Of several pieces of evidence, the one closest to failing."""
    return min(evidence, key=lambda each: -np.inf if np.isnan(each.margin) else each.margin)


def closed_form_is_optimal(ref_logps, rewards, beta, rivals):
    """Eq. 3 maximises Eq. 1, with value beta log Z. Proof: Eq. 1 is beta log Z - beta KL(pi || Eq. 3)."""
    best = optimal_policy(ref_logps, rewards[0], beta)
    most = beta * tabular.log_partition(ref_logps, rewards[0], beta)
    values = rlhf(rivals, ref_logps, rewards[0], beta)
    gaps = most - beta * forward_kl(rivals, best)
    return worst(identity(rlhf(best, ref_logps, rewards[0], beta), most), at_most(values, most), identity(values, gaps))


def rewards_and_policies_invert(policy_logps, ref_logps, rewards, beta):
    """Eq. 3 and Eq. 4 undo each other. Proof: Eq. 4 is the logarithm of Eq. 3."""
    implied = implicit_rewards(optimal_policy(ref_logps, rewards[0], beta), ref_logps, beta)
    constants = beta * tabular.log_partition(ref_logps, rewards[0], beta)
    back = optimal_policy(ref_logps, implicit_rewards(policy_logps, ref_logps, beta), beta)
    return worst(identity(implied + constants[:, None], rewards[0]), identity(back, policy_logps))


def dpo_is_bradley_terry(policy_logps, ref_logps, beta):
    """Eq. 5 and DPO, Eq. 6, are Bradley-Terry, Eq. 2, of implicit rewards. Proof: log Z cancels in log-odds."""
    rewards = implicit_rewards(policy_logps, ref_logps, beta)
    gap = rewards[:, 0] - rewards[:, 1]
    loss = dpo(log_ratio_margin(policy_logps[:, 0], policy_logps[:, 1], ref_logps[:, 0], ref_logps[:, 1]), beta)
    wins = tabular.preference_probability(policy_logps, ref_logps, beta)[:, 0, 1]
    back = objectives.bradley_terry(-gap)
    return worst(
        identity(back - loss, gap), identity(np.exp(-back) + np.exp(-loss), 1.0), identity(wins, np.exp(-loss))
    )


def bag_log_probability(theta, chosen):
    """A response's log-probability is its tokens' sum, whose counts suffice in bags of words. Sections 3.1, 4.1."""
    logps = np.insert(log_softmax(theta)[chosen], [0, 1, len(chosen)], [np.nan, -np.inf, np.nan])
    total = objectives.sequence_logp(logps, np.isfinite(logps))
    expected = np.sum(theta[chosen]) - len(chosen) * np.log(np.sum(np.exp(theta)))
    count = bag_of_words.counts(chosen, len(theta))
    return worst(identity(total, expected), identity(bag_of_words.log_prob(theta, count), expected))


def proposition_1(ref_logps, beta):
    """On disjoint pairs DPO's loss vanishes if and only if every pair's log-ratio h diverges. Proposition 1.

    Proof: for B pairs -log(exp(B loss) - 1) <= beta h and loss <= mean exp(-beta h). Shown along gradient descent, on
    which the loss falls and every h rises. Responses 2i beat responses 2i + 1 (Assumption 1).
    """
    pairs = [(x, y, y + 1) for x in range(len(ref_logps)) for y in range(0, ref_logps.shape[1] - 1, 2)]
    problem = tabular.problem(ref_logps, np.array(pairs), np.zeros((0, *ref_logps.shape)))
    path = loglinear.descend(problem, METHODS["dpo"], beta, len(pairs) / beta**2, 20)
    margins = np.array([loglinear.margins(problem, theta) for theta in path])
    losses = np.array([loglinear.loss(problem, METHODS["dpo"], theta, beta) for theta in path])
    floors = -np.log(np.expm1(len(pairs) * losses))
    ceilings = np.mean(np.exp(-beta * margins), axis=1)
    rise = beta * np.diff(margins, axis=0)
    return worst(at_most(floors[:, None], beta * margins), at_most(losses, ceilings), at_most(1e-3, rise))


def corollary_1(policy_logps, ref_logps, beta):
    """DPO's loss is 0, its least, if and only if pi(y_l) = 0 < pi(y_w), however small pi(y_w) is. Corollary 1.

    Proof: the log-ratio is infinite exactly there. Otherwise it is at most what pi(y_w) = 1 gives, and the loss is > 0.
    """
    refs = ref_logps[:, 0], ref_logps[:, 1]
    degenerate = dpo(log_ratio_margin(np.log(1e-300), -np.inf, *refs), beta)
    h = log_ratio_margin(policy_logps[:, 0], policy_logps[:, 1], *refs)
    most = log_ratio_margin(0.0, policy_logps[:, 1], *refs)
    loss = identity(dpo(h, beta), np.logaddexp(0.0, -beta * h))
    return worst(identity(degenerate, 0.0), at_most(h, most), loss)


def bag_descent(theta, chosen, rejected, beta, steps=20):
    """DPO's gradient descent from theta(0) = 0 on one pair of bags, for reference logits theta. Source: Proposition 2.

    Returns the path [steps + 1, V], c(y_w) [V], Delta [V], and tau of theta(t) = tau(t) Delta [steps + 1] (Eq. 36).
    """
    count, other = (bag_of_words.counts(tokens, len(theta)) for tokens in (chosen, rejected))
    problem = bag_of_words.problem(theta, [count], [other], np.zeros((0, 1)))
    path = loglinear.descend(problem, METHODS["dpo"], beta, 1 / beta, steps, np.zeros((1, len(theta))))[:, 0]
    difference = count - other
    return path, count, difference, path @ difference / max(difference @ difference, 1)


def proposition_2(theta, chosen, rejected, beta):
    """DPO never raises the bound c(y_w) . theta - n max theta on log pi(y_w). Proposition 2 (strictness: `errata`).

    Proof: theta moves along Delta, whose argmax is theta's, so the bound moves by delta (c . Delta - n max Delta) <= 0.
    """
    path, count, *_ = bag_descent(theta, chosen, rejected, beta)
    bounds = np.array([bag_of_words.log_prob_bound(each, count) for each in path])
    logps = np.array([bag_of_words.log_prob(each, count) for each in path])
    return worst(at_most(np.diff(bounds), 0.0), at_most(logps, bounds), identity(bounds[0], 0.0))


def proposition_3(theta, chosen, rejected, beta):
    """log pi(y_w) - log pi(yhat) = tau(t) k, yhat n copies of a token of argmax Delta. Proposition 3.

    k <= 0, and 0 if and only if all tokens of y_w are in argmax Delta. Proof: k = sum_{i in y_w} (Delta_i - max Delta).
    """
    path, count, difference, tau = bag_descent(theta, chosen, rejected, beta)
    copies = len(chosen) * np.eye(len(theta), dtype=int)[np.argmax(difference)]
    gaps = [bag_of_words.log_prob(each, count) - bag_of_words.log_prob(each, copies) for each in path]
    k = np.sum(difference[chosen] - np.max(difference))
    inside = np.all(difference[chosen] == np.max(difference))
    return worst(identity(np.array(gaps), tau * k), at_most(-np.diff(tau), 0.0), at_most(k, float(inside) - 1))


def distillation_is_symmetric(policy_logps, ref_logps, rewards, beta):
    """Eq. 7 does not care which of its responses comes first. Section 5.1. Proof: both differences change sign."""
    pairs = tabular.all_pairs(*ref_logps.shape)
    both = [tabular.problem(ref_logps, each, rewards[:1]) for each in (pairs, pairs[:, [0, 2, 1]])]
    there, back = (objectives.distillation(loglinear.margins(p, policy_logps), p.reward_margins[0], beta) for p in both)
    return identity(there, back)


def theorem_1(ref_logps, rewards, beta, rivals):
    """Eq. 7 over all pairs is 0 at the policy of Eq. 3 and nowhere else; descent gets there. Theorem 1.

    Proof: it is 2 Y / (Y - 1) times the variance over responses of r - beta log pi / pi_ref: 0 where that is constant.
    It is a quadratic, whose curvature is the same in all directions, so a rate of half its inverse always converges.
    """
    prompts, responses = ref_logps.shape
    problem = tabular.problem(ref_logps, tabular.all_pairs(prompts, responses), rewards[:1])
    rate = prompts * (responses - 1) / (8 * beta**2)
    reached = log_softmax(loglinear.descend(problem, METHODS["d-dpo"], beta, rate, 60)[-1])
    best = optimal_policy(ref_logps, rewards[0], beta)
    policies = np.array([*rivals, best])
    losses = np.array([loglinear.loss(problem, METHODS["d-dpo"], each, beta) for each in policies])
    variances = _fit(policies, ref_logps, rewards[0], beta) * responses / (responses - 1)
    most = beta * tabular.log_partition(ref_logps, rewards[0], beta)
    values = identity(rlhf(reached, ref_logps, rewards[0], beta), most)
    return worst(identity(losses, variances), identity(losses[-1], 0.0), identity(reached, best), values)


def ipo_is_distillation(margin, beta):
    """IPO with tau = beta is Eq. 7 for rewards 1 and 0: (1 - beta h)^2 = beta^2 (h - 1 / beta)^2. Section 5.1."""
    return identity(objectives.distillation(margin, 1.0, beta), beta**2 * objectives.ipo(margin, beta))


def one_reward_model_is_rlhf(policy_logps, ref_logps, rewards, beta):
    """With one reward model Eq. 8 is Eq. 1 less a constant. Each model's own constants cancel. Section 5.2, footnote 3.

    Proof: the reference's expected reward is subtracted.
    """
    expected = np.mean(rlhf(policy_logps, ref_logps, rewards[0], beta) - np.sum(np.exp(ref_logps) * rewards[0], -1))
    sets = rewards[:1], rewards, rewards - rewards[:, :, :1]
    one, all_models, shifted = (pessimistic_rlhf(policy_logps, ref_logps, each, beta) for each in sets)
    return worst(identity(one, expected), identity(shifted, all_models, 1e-9 * (1 + np.ptp(rewards))))


def theorem_2(ref_logps, rewards, beta):
    """Over the convex hull of S, the policy of Eq. 9 maximises Eq. 8, whose value is Eq. 9's. Theorem 2, corrected.

    Proof: `weak_duality` bounds all policies by all mixtures, so a policy and a mixture with one value are both best.
    """
    weights, policy = tabular.maximin(ref_logps, rewards, beta)
    mixed = optimal_policy(ref_logps, np.tensordot(weights, rewards, 1), beta)
    dual = beta * np.mean(forward_kl(ref_logps, mixed))
    gap = identity(pessimistic_rlhf(policy, ref_logps, rewards, beta), dual, 1e-10 * (1 + np.ptp(rewards)))
    return worst(gap, at_most(-weights, 0.0), identity(np.sum(weights), 1.0))


def weak_duality(ref_logps, rewards, beta, rivals):
    """No policy's Eq. 8 exceeds beta KL(pi_ref || pi_w) for any mixture w. Theorem 2's proof, without its swap.

    Proof: min_k <= sum_k w_k, then Eq. 29. Here for the mean of all reward models and for each, so for Eq. 9's least.
    """
    policies = optimal_policy(ref_logps, np.append(rewards, np.mean(rewards, axis=0, keepdims=True), axis=0), beta)
    kls = beta * np.mean(forward_kl(ref_logps, policies), axis=-1)
    nearest = beta * np.mean(forward_kl(ref_logps, tabular.finite_minimum(ref_logps, rewards, beta)))
    values = [pessimistic_rlhf(each, ref_logps, rewards, beta) for each in [*rivals, *policies]]
    return worst(at_most(values, np.min(kls), 1e-8), identity(nearest, np.min(kls[:-1])))


def maximin_values(ref_logps, rewards, beta):
    """Eq. 8 at its maximiser, and where hull, e-DPO and the ensemble's mean end as gamma -> 0: [4]."""
    policies = [
        tabular.maximin(ref_logps, rewards, beta)[1],
        tabular.hull_policy(ref_logps, rewards, beta, 1e-7 * beta),
        tabular.finite_minimum(ref_logps, rewards, beta),
        optimal_policy(ref_logps, np.mean(rewards, axis=0), beta),
    ]
    return np.array([pessimistic_rlhf(each, ref_logps, rewards, beta) for each in policies])


def hull_is_exact(ref_logps, rewards, beta):
    """Distilling the nearest mixture maximises Eq. 8 as gamma -> 0, to 1e-6; e-DPO and the mean do no better. Ours.

    Proof: residuals are at most gamma Y / (4 beta), which leaves Eq. 9 over the hull.
    """
    best, hull, finite, mean = maximin_values(ref_logps, rewards, beta)
    return worst(identity(hull, best, 1e-6), at_most([hull, finite, mean], best))


def hull_policy_is_stationary(ref_logps, rewards, beta, gamma):
    """At any gamma, Eq. 11 over the convex hull is least where its gradient in log pi vanishes: `hull_policy`. Ours.

    Proof: it is a minimum over w of what is convex in w and log pi together. Pairs weigh Y / (Y - 1) as in Prop. 4.
    """
    prompts, responses = ref_logps.shape
    problem = tabular.problem(ref_logps, tabular.all_pairs(prompts, responses), rewards)
    method = METHODS["hull"]._replace(gamma=(gamma * responses / (responses - 1),) * 2)
    slope = loglinear.gradient(problem, method, tabular.hull_policy(ref_logps, rewards, beta, gamma), beta)
    return identity(slope / (gamma + beta * (1 + np.ptp(rewards))), 0.0, 1e-7)  # minimiser: half of the value's digits


def pessimism_never_loses(ref_logps, rewards, beta):
    """The maximiser of Eq. 8 is no worse than pi_ref under any reward model of S. Section 5.2.

    Proof: pi_ref has value 0, so min_k adv_k(pi) >= beta KL(pi || pi_ref) >= 0.
    """
    _, policy = tabular.maximin(ref_logps, rewards, beta)
    floor = beta * np.mean(forward_kl(policy, ref_logps))
    return at_most(floor, tabular.advantages(policy, ref_logps, rewards), 1e-10 * (1 + np.ptp(rewards)))


def minimum_over_models(margins, reward_margins, beta):
    """Eq. 11's minimum is the nearest reward model's loss, hull's the nearest mixture's. Section 5.2.1.

    Proof: by definition. A mixture e = sum_k w_k e_k of residuals is the nearest to 0 if e . e <= e . e_k for all k.
    """
    residuals = (reward_margins - beta * margins) / np.sqrt(len(margins))
    nearest = objectives.hull_weights(margins, reward_margins, beta) @ residuals
    losses, mean = np.sum(residuals**2, axis=-1), np.sum(np.mean(residuals, axis=0) ** 2)
    bounds = {"hull": residuals @ nearest, "ensemble": losses, "mean": mean}
    evidence = []
    for name, bound in bounds.items():
        loss = getattr(objectives, f"{name}_distillation")(margins, reward_margins, beta)
        weights = getattr(objectives, f"{name}_weights")(margins, reward_margins, beta)
        evidence += [at_most(loss, bound), identity(np.sum((weights @ residuals) ** 2), loss)]
        evidence += [identity(np.sum(np.abs(weights)), 1.0)]
    return worst(*evidence)


def minibatch_minima(margins, reward_margins, beta):
    """The mean of minibatches' minima is at most the minimum of the mean. Footnote 5. Proof: each batch may choose.

    Minibatches of one pair are what Figure B.3 counts.
    """
    distances = (reward_margins - beta * margins) ** 2
    whole = objectives.ensemble_distillation(margins, reward_margins, beta)
    shares = np.bincount(np.argmin(distances, axis=0), minlength=len(reward_margins)) / len(margins)
    nearest = identity(objectives.nearest_shares(margins, reward_margins, beta), shares)
    return worst(at_most(np.mean(np.min(distances, axis=0)), whole), nearest)


def sampled_kl_is_unbiased(policy_logps, ref_logps):
    """Eq. 11's KL estimate at y ~ pi_ref has the forward KL for its mean, which is never negative. Eq. 9, Eq. 11."""
    mean = np.sum(np.exp(ref_logps) * objectives.sampled_forward_kl(ref_logps, policy_logps), axis=-1)
    exact = forward_kl(ref_logps, policy_logps)
    return worst(identity(mean, exact), at_most(-exact, 0.0))


def gradients_are_slopes(ref_logps, policy_logps, rewards, beta, rivals):
    """Every method's analytic gradient is the slope of its loss, where models tie that of either side. Section 6.

    By differences to both sides, for three draws a response.
    """
    pairs = tabular.all_pairs(*ref_logps.shape)
    problem = tabular.problem(ref_logps, pairs[pairs[:, 1] < pairs[:, 2]], rewards)._replace(draws=3)
    points = [policy_logps + step * rivals[0] for step in (-1e-5, 0.0, 1e-5)]
    evidence = []
    for method in METHODS.values():
        losses = [loglinear.loss(problem, method, point, beta, 0.5) for point in points]
        slope = np.sum(loglinear.gradient(problem, method, policy_logps, beta, 0.5) * rivals[0])
        scale = 1 + losses[1] + beta**2 * np.max(rivals[0] ** 2)
        low, high = np.sort(np.diff(losses)) / 1e-5 / scale
        evidence += [at_most(low, slope / scale, 1e-4), at_most(slope / scale, high, 1e-4)]
    return worst(*evidence)


def _fit(policy_logps, ref_logps, rewards, beta):
    """Eq. 7 with y1 and y2 uniform and independent: [..., X, Y] -> [...]."""
    return 2 * np.mean(np.var(rewards - implicit_rewards(policy_logps, ref_logps, beta), axis=-1), axis=-1)


def _equally_far(policy_logps, ref_logps, rewards, beta, rivals):
    """Rewards as far from `rewards`, by Eq. 12, as the policy's own: towards it, roughly, and anywhere: [2M, X, Y]."""
    own = implicit_rewards(policy_logps, ref_logps, beta) - rewards
    directions = np.concatenate([own + 0.1 * np.std(own) * rivals, rivals])
    directions -= np.mean(directions, axis=-1, keepdims=True)
    spread = 2 * np.mean(directions**2, axis=(-1, -2), keepdims=True) + 1e-300
    return rewards + directions * np.sqrt(_fit(policy_logps, ref_logps, rewards, beta) / spread)


def equation_11(ref_logps, rewards, beta, gamma):
    """The exact minimiser of Eq. 11 over all pairs [X, Y], with the index of the reward model that it distils."""
    policies = np.array([tabular.distil(ref_logps, each, beta, gamma) for each in rewards])
    kls = np.mean(forward_kl(ref_logps, policies), axis=-1)
    best = np.argmin(objectives.pessimistic(_fit(policies, ref_logps, rewards, beta), kls, gamma))
    return best, policies[best]


def proposition_4(ref_logps, rewards, beta, gamma, rivals):
    """Eq. 11's minimiser has the least forward KL of all policies whose rewards are as near to S as its own.

    Proposition 4. Proof: a policy that is as near and has less KL would have less loss + gamma KL. That `distil` finds
    the minimiser shows in its gradient; Eq. 7 over different responses is Y / (Y - 1) times that over all.
    """
    responses = ref_logps.shape[1]
    problem = tabular.problem(ref_logps, tabular.all_pairs(*ref_logps.shape), rewards[:1])
    method = METHODS["dp-dpo"]._replace(gamma=(gamma * responses / (responses - 1),) * 2)
    best, policy = equation_11(ref_logps, rewards, beta, gamma)
    ball = _equally_far(policy, ref_logps, rewards[best], beta, rivals)
    feasible = optimal_policy(ref_logps, np.concatenate([ball, ball - rewards[best] + rewards[0]]), beta)
    kls = np.mean(forward_kl(ref_logps, np.array([policy, *feasible])), axis=-1)
    least = at_most(kls[0], kls[1:], 1e-8)
    slope = loglinear.gradient(problem, method, tabular.distil(ref_logps, rewards[0], beta, gamma), beta)
    return worst(least, identity(slope / (gamma + beta * (1 + np.ptp(rewards))), 0.0))


def proposition_4_is_pessimistic(ref_logps, rewards, beta, gamma, rivals):
    """With S = {r}, Eq. 11's minimiser maximises Eq. 8 over all rewards as near to r as its own. Section 5.2.1.

    Proof: they are a ball, which is convex, so Theorem 2 holds: the policy's own rewards are the worst for it.
    """
    policy = tabular.distil(ref_logps, rewards[0], beta, gamma)
    ball = _equally_far(policy, ref_logps, rewards[0], beta, rivals)
    own = tabular.advantages(policy, ref_logps, implicit_rewards(policy, ref_logps, beta)[None])
    return at_most(own, tabular.advantages(policy, ref_logps, ball), 1e-8 * (1 + np.ptp(rewards)))


def _pessimistic_dpo(ref_logps, beta, gamma):
    """Eq. 13's minimiser with the exact KL, one pair (0, 1) a prompt: [X, Y] -> [X, Y].

    The loser gives the winner delta, all else stays: gamma delta = beta sigmoid(-beta h). By bisection on h.
    """
    ratio, mass = ref_logps[:, 0] - ref_logps[:, 1], np.logaddexp(ref_logps[:, 0], ref_logps[:, 1])
    low, high = np.zeros(len(ref_logps)), np.full(len(ref_logps), 2000 / beta)
    for _ in range(200):
        h = (low + high) / 2
        delta = np.exp(ref_logps[:, 1]) - np.exp(mass - np.logaddexp(0.0, h + ratio))
        rises = gamma * delta < beta * np.exp(-np.logaddexp(0.0, beta * h))
        low, high = np.where(rises, h, low), np.where(rises, high, h)
    loser = mass - np.logaddexp(0.0, low + ratio)
    return np.column_stack([loser + low + ratio, loser, ref_logps[:, 2:]])


def equation_14(ref_logps, beta, gamma, rivals):
    """p-DPO, Eq. 13, has a finite minimiser: of all policies of no more DPO loss, the one of least forward KL. Eq. 14.

    So it maximises Eq. 8 over their rewards, section 5.3. Proofs: as Proposition 4's. Here with one pair a prompt, and
    rivals of no lower log-ratio.
    """
    policy = _pessimistic_dpo(ref_logps, beta, gamma)
    pairs = np.array([(x, 0, 1) for x in range(len(ref_logps))])
    problem = tabular.problem(ref_logps, pairs, np.zeros((0, *ref_logps.shape)))
    slope = loglinear.gradient(problem, METHODS["p-dpo"]._replace(gamma=(gamma, gamma)), policy, beta)
    feasible = np.concatenate([rivals, policy + 0.1 * rivals])
    shortfall = policy[:, 0] - policy[:, 1] - feasible[..., 0] + feasible[..., 1]
    feasible[..., 0] += np.maximum(shortfall, 0.0)
    feasible = log_softmax(feasible)
    least = at_most(forward_kl(ref_logps, policy), forward_kl(ref_logps, feasible), 1e-8)
    own, *others = (implicit_rewards(each, ref_logps, 1.0)[None] for each in (policy, *feasible))
    values = [tabular.advantages(policy, ref_logps, each) for each in others]
    worst_case = at_most(tabular.advantages(policy, ref_logps, own), values, 1e-8)
    return worst(identity(slope / max(gamma, beta), 0.0), least, worst_case)


def _losers(policy_logps, ref_logps, log_ratio):
    """For prompt 0's pair (0, 1) and pi(y_w): h of the pi(y_l) that has this h, or is 1 - pi(y_w), and h of rivals."""
    least = log_ratio_margin(policy_logps[0, 0], np.logaddexp.reduce(policy_logps[0, 1:]), *ref_logps[0, :2])
    return max(least, log_ratio), np.maximum(log_ratio + np.linspace(-5, 5, 41), least)


def proposition_5(policy_logps, ref_logps, beta, alpha):
    """For a fixed pi(y_w), p-DPO's best pi(y_l) has h = log psi_w / psi_l = log(alpha - 1) / beta, or is 1 - pi(y_w).

    Proposition 5. Proof: -log sigmoid(beta h) + (beta / alpha) h is convex, with slope 0 there.
    """
    best, rivals = _losers(policy_logps, ref_logps, np.log(alpha - 1) / beta)
    return at_most(dpo(best, beta) + beta / alpha * best, dpo(rivals, beta) + beta / alpha * rivals, 1e-12)


def ipo_and_pessimistic_dpo_agree(beta, alpha):
    """IPO's optimum h = 1 / tau is p-DPO's where 1 / tau = log(alpha - 1) / beta, alpha != 2. Section 7.1.

    Proof: Proposition 5. For alpha < 2 this tau is negative: see `printed_alpha`.
    """
    tau = beta / np.log(alpha - 1)
    step = 1e-4 / beta
    slope = (dpo(1 / tau + step, beta) - dpo(1 / tau - step, beta)) / 2e-4
    return worst(identity(slope, -1 / alpha, 1e-7), identity(objectives.ipo(1 / tau, tau), 0.0))


def proposition_6(policy_logps, ref_logps, rewards, beta):
    """For a fixed pi(y_w), distillation's best pi(y_l) has h = (r_w - r_l) / beta, or is 1 - pi(y_w). Proposition 6.

    Proof: Eq. 7 is 0 there, and falls towards it.
    """
    gap = rewards[0, 0, 0] - rewards[0, 0, 1]
    best, rivals = _losers(policy_logps, ref_logps, gap / beta)
    return at_most(objectives.distillation(best, gap, beta), objectives.distillation(rivals, gap, beta), 1e-12)


def proposition_7(arms, tau):
    """IPO spreads a chain of n > 2 arms by (n - 1) / tau, its closure by only 2 (n - 1) / (n tau). Proposition 7.

    Proof: least squares, by symmetry with equal steps; the closure's best step is 2 / (n tau).
    """
    chain, closure = bandit.chain(arms), bandit.closure(arms)
    weights = [bandit.ipo_solution(pairs, arms, tau) for pairs in (chain, closure)]
    spreads = np.array([bandit.spread(each) for each in weights]) * tau
    losses = [bandit.ipo_loss(weights[1] + step, closure, tau) for step in [*np.eye(arms) / tau, np.zeros(arms)]]
    return worst(
        identity(spreads, (arms - 1) * np.array([1, 2 / arms])),
        at_most(spreads[1], spreads[0], -1e-3),
        identity(bandit.ipo_loss(weights[0], chain, tau) * tau**2, 0.0),
        at_most(losses[-1] * tau**2, np.array(losses) * tau**2),
    )


def dpo_on_a_chain(arms, beta):
    """On a chain of preferences DPO sends down, without end, the arm that is never preferred: the last. Section 7.2.

    Proof: the loss vanishes only as every step psi_i - psi_{i + 1} diverges.
    """
    pairs = np.insert(bandit.chain(arms), 0, 0, axis=1)
    problem = tabular.problem(np.zeros((1, arms)), pairs, np.zeros((0, 1, arms)))
    path = loglinear.descend(problem, METHODS["dpo"], beta, (arms - 1) / beta**2, 30)[:, 0]
    return at_most(np.diff(log_softmax(path)[:, -1]) * beta, -1e-6)


def pessimistic_dpo_on_arms(arms, beta, alpha):
    """p-DPO, with section 7.1's KL on the pairs, has a finite optimum if every arm is in a pair. Section 7.2.

    Proof: the loss is convex, and -log pi of every arm grows without bound. By central differences.
    """
    pairs = bandit.closure(arms)
    weights = bandit.pessimistic_dpo_solution(pairs, arms, beta, alpha)
    step = 1e-4 / max(beta, 1)
    nearby = weights + step * np.concatenate([np.eye(arms), -np.eye(arms)])
    losses = np.array([bandit.pessimistic_dpo_loss(each, pairs, beta, alpha) for each in [*nearby, weights]])
    start = bandit.pessimistic_dpo_gradient(np.zeros(arms), pairs, beta, alpha)
    return worst(
        identity((losses[:arms] - losses[arms:-1]) / (2 * step * beta), 0.0, 1e-4),
        at_most(losses[-1], losses),
        identity(start / beta, np.arange(arms) - (arms - 1) / 2),
    )
