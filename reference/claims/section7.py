"""Claims of section 7: Propositions 5-7 and bandits. The arguments are in `reference.claims`."""

import numpy as np

from reference import bandit, loglinear, objectives, tabular
from reference.claims.evidence import at_most, identity, worst
from reference.loglinear import log_softmax
from reference.methods import METHODS
from reference.objectives import distillation, dpo, log_ratio_margin


def proposition_5(policy_logps, ref_logps, beta, alpha):
    """p-DPO's best pi(y_l), for a fixed pi(y_w), has h = log psi_w / psi_l = log(alpha - 1) / beta.

    Where no pi(y_l) <= 1 - pi(y_w) has this h, the best pi(y_l) is 1 - pi(y_w).

    Proof: -log sigmoid(beta h) + (beta / alpha) h is convex, and its slope is 0 there.
    Source: Proposition 5.
    """
    best, rivals = _losers(policy_logps, ref_logps, np.log(alpha - 1) / beta)
    loss = lambda h: dpo(h, beta) + beta / alpha * h  # noqa: E731
    return at_most(loss(best), loss(rivals), 1e-12)


def ipo_and_pessimistic_dpo_agree(beta, alpha):
    """IPO's optimum h = 1 / tau is p-DPO's where 1 / tau = log(alpha - 1) / beta, alpha != 2.

    Proof: Proposition 5. For alpha < 2 this tau is negative: see `errata.printed_alpha`.
    Source: section 7.1.
    """
    tau = beta / np.log(alpha - 1)
    step = 1e-4 / beta
    slope = (dpo(1 / tau + step, beta) - dpo(1 / tau - step, beta)) / 2e-4
    return worst(identity(slope, -1 / alpha, 1e-7), identity(objectives.ipo(1 / tau, tau), 0.0))


def proposition_6(policy_logps, ref_logps, rewards, beta):
    """Distillation's best pi(y_l), for a fixed pi(y_w), has h = (r_w - r_l) / beta.

    Where no pi(y_l) <= 1 - pi(y_w) has this h, the best pi(y_l) is 1 - pi(y_w).

    Proof: Eq. 7 is 0 there, and it falls towards it.
    Source: Proposition 6.
    """
    gap = rewards[0, 0, 0] - rewards[0, 0, 1]
    best, rivals = _losers(policy_logps, ref_logps, gap / beta)
    return at_most(distillation(best, gap, beta), distillation(rivals, gap, beta), 1e-12)


def proposition_7(arms, tau):
    """IPO spreads a chain of n > 2 arms by (n - 1) / tau, its closure by 2 (n - 1) / (n tau) only.

    Proof: least squares, by symmetry with equal steps; the closure's best step is 2 / (n tau).
    Source: Proposition 7.
    """
    chain, closure = bandit.chain(arms), bandit.closure(arms)
    chain_weights, closure_weights = (
        bandit.ipo_solution(pairs, arms, tau) for pairs in (chain, closure)
    )
    spreads = tau * np.array([bandit.spread(chain_weights), bandit.spread(closure_weights)])
    points = [*(closure_weights + np.eye(arms) / tau), closure_weights]
    losses = np.array([bandit.ipo_loss(weights, closure, tau) for weights in points]) * tau**2
    return worst(
        identity(spreads, (arms - 1) * np.array([1, 2 / arms])),
        at_most(spreads[1], spreads[0], -1e-3),
        identity(bandit.ipo_loss(chain_weights, chain, tau) * tau**2, 0.0),
        at_most(losses[-1], losses),
    )


def dpo_on_a_chain(arms, beta):
    """On a chain of preferences DPO lowers the last arm, which is never preferred, without end.

    Proof: the loss vanishes only as every step psi_i - psi_{i + 1} diverges.
    Source: section 7.2.
    """
    pairs = np.insert(bandit.chain(arms), 0, 0, axis=1)
    problem = tabular.problem(np.zeros((1, arms)), pairs, np.zeros((0, 1, arms)))
    rate = (arms - 1) / beta**2
    path = loglinear.descend(problem, METHODS["dpo"], beta, rate, 30)[:, 0]
    return at_most(np.diff(log_softmax(path)[:, -1]) * beta, -1e-6)


def pessimistic_dpo_on_arms(arms, beta, alpha):
    """p-DPO, with section 7.1's KL on the pairs, has a finite optimum if every arm is in a pair.

    Proof: the loss is convex, and -log pi of every arm grows without bound. The slopes are central
    differences.
    Source: section 7.2.
    """
    pairs = bandit.closure(arms)
    weights = bandit.pessimistic_dpo_solution(pairs, arms, beta, alpha)
    step = 1e-4 / max(beta, 1)
    points = [*(weights + step * np.eye(arms)), *(weights - step * np.eye(arms)), weights]
    losses = np.array([bandit.pessimistic_dpo_loss(point, pairs, beta, alpha) for point in points])
    start = bandit.pessimistic_dpo_gradient(np.zeros(arms), pairs, beta, alpha)
    return worst(
        identity((losses[:arms] - losses[arms:-1]) / (2 * step * beta), 0.0, 1e-4),
        at_most(losses[-1], losses),
        identity(start / beta, np.arange(arms) - (arms - 1) / 2),
    )


def _losers(policy_logps, ref_logps, log_ratio):
    """Log-ratios h of responses 0 and 1 of prompt 0, for a fixed pi(y_w): the best one and rivals.

    The best is `log_ratio`, or the least possible h, which is that of pi(y_l) = 1 - pi(y_w).
    """
    most_rejected = np.logaddexp.reduce(policy_logps[0, 1:])
    least = log_ratio_margin(policy_logps[0, 0], most_rejected, *ref_logps[0, :2])
    return max(least, log_ratio), np.maximum(log_ratio + np.linspace(-5, 5, 41), least)
