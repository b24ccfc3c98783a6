"""Where the paper's statement, or a step of a proof, is false as printed or depends on how it is read.

`ERRATA` names the counterexample that refutes each printed claim, and the corrected claim, which holds.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference import bag_of_words, bandit, claims, objectives, tabular
from reference.claims import at_most, bag_descent, identity
from reference.objectives import dpo, forward_kl, rlhf


def printed_theorem_2(ref_logps, rewards, beta):
    """The policy of Eq. 9 for a FINITE S maximises Eq. 8. (The proof swaps min and max, which needs a convex S.)"""
    best, _, finite, _ = claims.maximin_values(ref_logps, rewards, beta)
    return at_most(best, finite)


def printed_advantage(ref_logps, rewards, beta):
    """If the true r is in S, Eq. 8's maximiser has a "large" advantage under it. Here: any, above rounding."""
    return at_most(1e-6, tabular.advantages(tabular.maximin(ref_logps, rewards, beta)[1], ref_logps, rewards))


def printed_pessimism(ref_logps, rewards, beta, gamma):
    """Of all rewards as near to S as its own, those are the worst for Eq. 11's minimiser. (Not in a union of balls.)"""
    _, policy = claims.equation_11(ref_logps, rewards, beta, gamma)
    own = tabular.advantages(policy, ref_logps, tabular.implicit_rewards(policy, ref_logps, beta)[None])
    return at_most(own, tabular.advantages(policy, ref_logps, rewards))


def _halfway(policy_logps, ref_logps, rewards, beta):
    """Eq. 8's bracket for one reward model, Eq. 1, at the mean of a policy and pi_ref, and the mean of it at both."""
    policies = np.logaddexp(policy_logps, ref_logps) - np.log(2), policy_logps, ref_logps
    middle, *ends = (rlhf(each, ref_logps, rewards[0], beta) for each in policies)
    return middle, np.mean(ends, axis=0)


def printed_convexity(policy_logps, ref_logps, rewards, beta):
    """What Eq. 8 maximises is convex in pi for each reward model. (-KL(pi || pi_ref) is not.)"""
    middle, ends = _halfway(policy_logps, ref_logps, rewards, beta)
    return at_most(middle, ends)


def value_is_concave(policy_logps, ref_logps, rewards, beta):
    """It is concave in pi, as exchanging the maximum over pi with a minimum needs. Proof: KL is convex."""
    middle, ends = _halfway(policy_logps, ref_logps, rewards, beta)
    return at_most(ends, middle)


def printed_strictness(theta, chosen, rejected, beta):
    """The bound on log pi(y_w) falls strictly where y_w and y_l differ in more than one count."""
    path, count, *_ = bag_descent(theta, chosen, rejected, beta)
    return at_most(np.diff([bag_of_words.log_prob_bound(each, count) for each in path]), -1e-6)


def strictness(theta, chosen, rejected, beta):
    """It falls with every step of tau, if a token of y_w is outside argmax Delta, else never. Proof: it is tau k."""
    path, count, difference, tau = bag_descent(theta, chosen, rejected, beta)
    falls = np.diff([bag_of_words.log_prob_bound(each, count) for each in path])
    inside = np.all(difference[chosen] == np.max(difference))
    return identity(falls, 0.0) if inside else at_most(falls, -np.diff(tau))


def _steps(theta, chosen, rejected, beta, sign, end):
    """Steps of tau are sigmoid(-beta Delta . theta(t) - sign beta log rho), t where they start (end 0) or end (1)."""
    path, _, difference, tau = bag_descent(theta, chosen, rejected, beta)
    losing = np.exp(-np.logaddexp(0.0, beta * (path + sign * theta) @ difference))
    return identity(np.diff(tau), losing[end : end + len(tau) - 1] * np.any(difference))


def printed_ratio(theta, chosen, rejected, beta):
    """DPO is -log sigmoid(beta Delta . theta + beta log rho) for rho = pi_ref(y_w) / pi_ref(y_l)."""
    return _steps(theta, chosen, rejected, beta, 1, 0)


def printed_step(theta, chosen, rejected, beta):
    """Step t of gradient descent has the size p(y_l > y_w; theta(t)), of where it ends."""
    return _steps(theta, chosen, rejected, beta, -1, 1)


def gradient_step(theta, chosen, rejected, beta):
    """It has the size of where it starts, and DPO has - beta log rho. Proof: Eq. 6 divides by pi_ref."""
    return _steps(theta, chosen, rejected, beta, -1, 0)


def printed_norm(difference):
    """The infinity norm of Delta is max Delta. (k <= 0 needs only c(y_w) >= 0.)"""
    return identity(np.max(np.abs(difference)), np.max(difference))


def printed_similarity(chosen, similar, distinct):
    """The more similar y_w and y_l are, the more rapidly pi(y_w) degrades. (k depends on WHICH tokens differ.)"""
    ends = (bag_descent(np.zeros(3), chosen, each, 1.0, 200)[:2] for each in (similar, distinct))
    return at_most(*(bag_of_words.log_prob(path[-1], count) for path, count in ends))


def printed_limit(ref_logps, policy_logps, beta):
    """DPO's loss vanishes as pi(C(y_l)^c) -> 1 with pi(y_w) > 0. (All that counts is pi(y_w) / pi(y_l).)"""
    loss = dpo(objectives.log_ratio_margin(*policy_logps[:2], *ref_logps[:2]), beta)
    return at_most(loss, np.exp(policy_logps[1]), 1e-6)


def printed_special_case(arms, tau):
    """IPO is distillation for r(x, y) = 1{y = y_w}, so its least loss is 0. (Not where a response wins AND loses.)"""
    pairs = bandit.closure(arms)
    return identity(bandit.ipo_loss(bandit.ipo_solution(pairs, arms, tau), pairs, tau), 0.0)


def _gamma_is(weight, margin, beta, alpha):
    """Eq. 10, beta KL + alpha loss, is alpha times Eq. 11 with this gamma; any numbers serve as KL and loss."""
    kl, loss = abs(margin), margin**2
    return identity(objectives.pessimistic(loss, kl, weight), (beta * kl + alpha * loss) / alpha)


def printed_gamma(margin, beta, alpha):
    """Eq. 11 has gamma = alpha / beta."""
    return _gamma_is(alpha / beta, margin, beta, alpha)


def gamma(margin, beta, alpha):
    """Eq. 11 has gamma = beta / alpha. Proof: divide Eq. 10 by alpha."""
    return _gamma_is(beta / alpha, margin, beta, alpha)


def _pair_kl(policy_logps, ref_logps):
    """The mean of sum_{y = y1, y2} log pi_ref(y) - log pi(y) over independent draws from pi_ref: [X, Y] -> [X]."""
    joint, gaps = ref_logps[:, :, None] + ref_logps[:, None], ref_logps - policy_logps
    return np.sum(np.exp(joint) * (gaps[:, :, None] + gaps[:, None]), axis=(1, 2))


def printed_sampled_kl(policy_logps, ref_logps):
    """-(log pi(y_w) + log pi(y_l)) estimates the forward KL, but for a constant."""
    return identity(_pair_kl(policy_logps, ref_logps), forward_kl(ref_logps, policy_logps))


def sampled_kl(policy_logps, ref_logps):
    """It estimates TWICE the KL, so the alpha of Proposition 5 is 2 beta / gamma for the gamma of Eq. 13."""
    return identity(_pair_kl(policy_logps, ref_logps), 2 * forward_kl(ref_logps, policy_logps))


def printed_convexity_in_psi(psi, beta):
    """-log sigmoid(beta log psi_w / psi_l) is convex in psi_l. Three values at equal distances, psi_w = 1."""
    below, middle, above = dpo(-np.log(psi), beta)
    return at_most(2 * middle, below + above)


def convexity_in_log_psi(beta):
    """It is convex in log psi_l, and so is the loss; its local minimum is global. Proof: softplus is convex."""
    losses = dpo(np.linspace(-5, 5, 41) / beta, beta)
    return at_most(2 * losses[1:-1], losses[2:] + losses[:-2])


def printed_alpha(beta, alpha):
    """For alpha > 1, p-DPO's optimum log psi_w / psi_l is IPO's, 1 / tau > 0."""
    return at_most(1e-6, np.log(alpha - 1) / beta)


def winner_needs_alpha_above_2(beta, alpha):
    """It is positive if and only if alpha > 2. Proof: the loss falls from 0 by beta / 2 - beta / alpha."""
    ahead, behind = (dpo(h / beta, beta) + h / alpha for h in (1e-5, -1e-5))
    return at_most(np.sign(alpha - 2) * (ahead - behind), 0.0)


def printed_finite_optimum(pairs, arms, beta, alpha):
    """p-DPO, with section 7.1's KL on the pairs, has a finite optimum. (It sends down the arms that are in no pair.)"""
    solutions = [bandit.pessimistic_dpo_solution(pairs, arms, beta, alpha, steps) for steps in (1000, 4000)]
    return identity(solutions[1], solutions[0], 1e-3)


def printed_arms(arms, tau):
    """Pairs (i, i + 1) for i = 1, .., n have a spread of (n - 1) / tau. (They have n + 1 arms.)"""
    return identity(bandit.spread(bandit.ipo_solution(bandit.chain(arms + 1), arms + 1, tau)), (arms - 1) / tau)


class Erratum(NamedTuple):
    """A printed claim, its place, an instance that refutes it, and the corrected claim."""

    printed: Callable
    place: str
    counterexample: dict
    corrected: Callable


OPPOSITE = {"ref_logps": np.log([[0.5, 0.5]]), "rewards": np.array([[[1.0, -1.0]], [[-1.0, 1.0]]]), "beta": 1.0}
TILTED = {"policy_logps": np.log([[0.25, 0.75]]), "ref_logps": np.log([[0.5, 0.5]])}
UNREWARDED = {**TILTED, "rewards": np.zeros((1, 1, 2)), "beta": 1.0}
DOUBLED = {"theta": np.zeros(2), "chosen": np.array([0, 0]), "rejected": np.array([1, 1]), "beta": 1.0}  # aa, bb
LETTERS = {"theta": np.log([2.0, 1.0]), "chosen": np.array([0]), "rejected": np.array([1]), "beta": 1.0}  # a, b
WORDS = dict(zip(("chosen", "similar", "distinct"), np.array([[0, 0, 1], [0, 2, 1], [1, 1, 1]]), strict=True))
LIMIT = {"ref_logps": np.log([0.3, 0.3, 0.4]), "policy_logps": np.log([1e-12, 1e-6, 1 - 1e-6 - 1e-12]), "beta": 1.0}
UNPAIRED = {"pairs": np.array([[0, 1]]), "arms": 3, "beta": 1.0, "alpha": 5.0}
PSI = {"psi": np.array([1, 2, 3]), "beta": 1.0}

ERRATA = [
    Erratum(printed_theorem_2, "Theorem 2", OPPOSITE, claims.theorem_2),
    Erratum(printed_convexity, "Theorem 2, proof", UNREWARDED, value_is_concave),
    Erratum(printed_advantage, "Section 5.2", OPPOSITE, claims.pessimism_never_loses),
    Erratum(printed_pessimism, "Proposition 4", {**OPPOSITE, "gamma": 1.0}, claims.proposition_4_is_pessimistic),
    Erratum(printed_strictness, "Proposition 2", DOUBLED, strictness),
    Erratum(printed_ratio, "Proposition 2, proof", LETTERS, gradient_step),
    Erratum(printed_step, "Proposition 2, 3, proofs", LETTERS, gradient_step),
    Erratum(printed_norm, "Proposition 3, proof", {"difference": np.array([1, 1, -2])}, claims.proposition_3),
    Erratum(printed_similarity, "Section 4.1", WORDS, claims.proposition_3),  # aab, acb, bbb
    Erratum(printed_limit, "Corollary 1", LIMIT, claims.proposition_1),
    Erratum(printed_special_case, "Section 5.1", {"arms": 3, "tau": 1.0}, claims.ipo_is_distillation),
    Erratum(printed_gamma, "Section 6.1", {"margin": 1.0, "beta": 1.0, "alpha": 2.0}, gamma),
    Erratum(printed_sampled_kl, "Section 7.1", TILTED, sampled_kl),
    Erratum(printed_convexity_in_psi, "Proposition 5, proof", PSI, convexity_in_log_psi),
    Erratum(printed_alpha, "Section 7.1", {"beta": 1.0, "alpha": 1.5}, winner_needs_alpha_above_2),
    Erratum(printed_finite_optimum, "Section 7.2", UNPAIRED, claims.pessimistic_dpo_on_arms),
    Erratum(printed_arms, "Proposition 7", {"arms": 3, "tau": 1.0}, claims.proposition_7),
]
