"""Claims of section 5.1: distillation, Eq. 7. The arguments are listed in `reference.claims`."""

import numpy as np

from reference import loglinear, objectives, tabular
from reference.claims.evidence import identity, worst
from reference.loglinear import log_softmax
from reference.methods import METHODS
from reference.objectives import rlhf
from reference.tabular import implicit_rewards, optimal_policy


def uniform_distillation(policy_logps, ref_logps, rewards, beta):
    """Eq. 7 where y1 and y2 are uniform and independent, at equally likely prompts.

    2 mean_x Var_y(r - beta log pi / pi_ref)

    Args:
        policy_logps, ref_logps: log pi and log pi_ref [..., X, Y], in nats.
        rewards: r [..., X, Y], in nats; all three broadcast.
        beta: the weight of the KL in Eq. 1, above 0.

    Returns:
        The loss [...], in nats squared.
    Source: Eq. 7, the proof of Theorem 1.
    """
    residuals = rewards - implicit_rewards(policy_logps, ref_logps, beta)
    return 2 * np.mean(np.var(residuals, axis=-1), axis=-1)


def distillation_is_symmetric(policy_logps, ref_logps, rewards, beta):
    """Eq. 7 does not change where its two responses are exchanged.

    Proof: both differences change sign.
    Source: section 5.1.
    """
    pairs = tabular.all_pairs(*ref_logps.shape)
    losses = []
    for ordered in (pairs, pairs[:, [0, 2, 1]]):
        problem = tabular.problem(ref_logps, ordered, rewards[:1])
        margins = loglinear.margins(problem, policy_logps)
        losses.append(objectives.distillation(margins, problem.reward_margins[0], beta))
    return identity(*losses)


def theorem_1(ref_logps, rewards, beta, rivals):
    """Eq. 7 over all pairs is 0 at the policy of Eq. 3 and nowhere else; descent converges to it.

    Proof: it is 2 Y / (Y - 1) times the variance of r - beta log pi / pi_ref over responses. It is
    a quadratic of the same curvature in all directions, so half the inverse of it is a safe rate.
    Source: Theorem 1.
    """
    prompts, responses = ref_logps.shape
    problem = tabular.problem(ref_logps, tabular.all_pairs(prompts, responses), rewards[:1])
    rate = prompts * (responses - 1) / (8 * beta**2)
    reached = log_softmax(loglinear.descend(problem, METHODS["d-dpo"], beta, rate, 60)[-1])
    best = optimal_policy(ref_logps, rewards[0], beta)
    policies = np.array([*rivals, best])
    loss = lambda policy: loglinear.loss(problem, METHODS["d-dpo"], policy, beta)  # noqa: E731
    losses = np.array([loss(policy) for policy in policies])
    variances = uniform_distillation(policies, ref_logps, rewards[0], beta)
    most = beta * tabular.log_partition(ref_logps, rewards[0], beta)
    return worst(
        identity(losses, variances * responses / (responses - 1)),
        identity(losses[-1], 0.0),
        identity(reached, best),
        identity(rlhf(reached, ref_logps, rewards[0], beta), most),
    )


def ipo_is_distillation(margin, beta):
    """IPO with tau = beta is Eq. 7 for the rewards 1 and 0.

    (1 - beta h)^2 = beta^2 (h - 1 / beta)^2

    Source: section 5.1.
    """
    loss = objectives.distillation(margin, 1.0, beta)
    return identity(loss, beta**2 * objectives.ipo(margin, beta))
