"""Where the paper's statement, or a step of a proof, is false as printed or in one reading of it.

`ERRATA` has, for each printed claim, the instance that refutes it and the corrected claim, which
holds. The arguments are those of `reference.claims`, unless a function says more.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference import bag_of_words, bandit, claims, objectives, tabular
from reference.claims import at_most, bag_descent, identity
from reference.objectives import dpo, forward_kl, rlhf


def printed_theorem_2(ref_logps, rewards, beta):
    """As printed: the policy of Eq. 9 for a FINITE S maximises Eq. 8.

    It fails since the proof exchanges min and max, which needs a convex S.
    Source: Theorem 2.
    """
    best, _, finite, _ = claims.maximin_values(ref_logps, rewards, beta)
    return at_most(best, finite)


def printed_advantage(ref_logps, rewards, beta):
    """As printed: if the true r is in S, the maximiser of Eq. 8 has a "large" advantage under it.

    Here "large" is anything above rounding. It fails since the advantage may be 0.
    Source: section 5.2.
    """
    _, policy = tabular.maximin(ref_logps, rewards, beta)
    return at_most(1e-6, tabular.advantages(policy, ref_logps, rewards))


def printed_pessimism(ref_logps, rewards, beta, gamma):
    """As printed: of all rewards as near to S, its own are the worst for Eq. 11's minimiser.

    It fails since these rewards are a union of balls, which is not convex.
    Source: Proposition 4.
    """
    _, policy = claims.equation_11(ref_logps, rewards, beta, gamma)
    own_rewards = tabular.implicit_rewards(policy, ref_logps, beta)[None]
    own = tabular.advantages(policy, ref_logps, own_rewards)
    return at_most(own, tabular.advantages(policy, ref_logps, rewards))


def _halfway(policy_logps, ref_logps, rewards, beta):
    """Eq. 1 at the mean of a policy and pi_ref, and the mean of Eq. 1 at both: [X], [X]."""
    mixture = np.logaddexp(policy_logps, ref_logps) - np.log(2)
    middle, *ends = (
        rlhf(logps, ref_logps, rewards[0], beta) for logps in (mixture, policy_logps, ref_logps)
    )
    return middle, np.mean(ends, axis=0)


def printed_convexity(policy_logps, ref_logps, rewards, beta):
    """As printed: what Eq. 8 maximises is convex in pi for each reward model.

    It fails since -KL(pi || pi_ref) is not convex.
    Source: the proof of Theorem 2.
    """
    middle, ends = _halfway(policy_logps, ref_logps, rewards, beta)
    return at_most(middle, ends)


def value_is_concave(policy_logps, ref_logps, rewards, beta):
    """Corrected: what Eq. 8 maximises is concave in pi for each reward model.

    An exchange of the maximum over pi with a minimum needs this.

    Proof: KL is convex.
    Source: the proof of Theorem 2.
    """
    middle, ends = _halfway(policy_logps, ref_logps, rewards, beta)
    return at_most(ends, middle)


def printed_strictness(theta, chosen, rejected, beta):
    """As printed: the bound on log pi(y_w) falls strictly if more than one count differs.

    It fails where all tokens of y_w are in argmax Delta.
    Source: Proposition 2.
    """
    path, count, *_ = bag_descent(theta, chosen, rejected, beta)
    bounds = [bag_of_words.log_prob_bound(point, count) for point in path]
    return at_most(np.diff(bounds), -1e-6)


def strictness(theta, chosen, rejected, beta):
    """Corrected: the bound falls if and only if a token of y_w is outside argmax Delta.

    Then it falls at every step of tau, by at least that step.

    Proof: the bound is tau k.
    Source: Proposition 2.
    """
    path, count, difference, tau = bag_descent(theta, chosen, rejected, beta)
    falls = np.diff([bag_of_words.log_prob_bound(point, count) for point in path])
    inside = np.all(difference[chosen] == np.max(difference))
    return identity(falls, 0.0) if inside else at_most(falls, -np.diff(tau))


def _steps(theta, chosen, rejected, beta, sign, end):
    """Steps of tau are sigmoid(-beta Delta . theta(t) - sign beta log rho).

    Here theta(t) is where a step starts (end 0) or ends (end 1).
    """
    path, _, difference, tau = bag_descent(theta, chosen, rejected, beta)
    losing = np.exp(-np.logaddexp(0.0, beta * (path + sign * theta) @ difference))
    return identity(np.diff(tau), losing[end : end + len(tau) - 1] * np.any(difference))


def printed_ratio(theta, chosen, rejected, beta):
    """As printed: DPO is -log sigmoid(beta Delta . theta + beta log rho).

    It fails since rho = pi_ref(y_w) / pi_ref(y_l) divides in Eq. 6, so the second sign is minus.
    Source: the proof of Proposition 2.
    """
    return _steps(theta, chosen, rejected, beta, 1, 0)


def printed_step(theta, chosen, rejected, beta):
    """As printed: step t of gradient descent has the size p(y_l > y_w; theta(t)).

    It fails since theta(t) is where the step ends.
    Source: the proofs of Propositions 2 and 3.
    """
    return _steps(theta, chosen, rejected, beta, -1, 1)


def gradient_step(theta, chosen, rejected, beta):
    """Corrected: step t has the size p(y_l > y_w; theta(t - 1)), and DPO has - beta log rho.

    Proof: Eq. 6 divides by pi_ref.
    Source: the proof of Proposition 2.
    """
    return _steps(theta, chosen, rejected, beta, -1, 0)


def printed_norm(difference):
    """As printed: the infinity norm of Delta is max Delta.

    It fails where the smallest entry has the largest size. k <= 0 needs only c(y_w) >= 0.
    Source: the proof of Proposition 3.
    """
    return identity(np.max(np.abs(difference)), np.max(difference))


def printed_similarity(chosen, similar, distinct):
    """As printed: the more similar y_w and y_l are, the more rapidly pi(y_w) degrades.

    It fails since k depends on WHICH tokens differ.
    Source: section 4.1.
    """
    logps = []
    for rejected in (similar, distinct):
        path, count, *_ = bag_descent(np.zeros(3), chosen, rejected, 1.0, 200)
        logps.append(bag_of_words.log_prob(path[-1], count))
    return at_most(*logps)


def printed_limit(ref_logps, policy_logps, beta):
    """As printed: DPO's loss vanishes as pi(C(y_l)^c) -> 1 with pi(y_w) > 0.

    It fails since only the ratio pi(y_w) / pi(y_l) counts.
    Source: Corollary 1.
    """
    loss = dpo(objectives.log_ratio_margin(*policy_logps[:2], *ref_logps[:2]), beta)
    return at_most(loss, np.exp(policy_logps[1]), 1e-6)


def printed_special_case(arms, tau):
    """As printed: IPO is distillation for r(x, y) = 1{y = y_w}, so its least loss is 0.

    It fails where one response wins in one pair and loses in another.
    Source: section 5.1.
    """
    pairs = bandit.closure(arms)
    return identity(bandit.ipo_loss(bandit.ipo_solution(pairs, arms, tau), pairs, tau), 0.0)


def _gamma_is(weight, margin, beta, alpha):
    """Eq. 10, beta KL + alpha loss, is alpha times Eq. 11 with this weight of the KL.

    Any numbers serve as KL and loss.
    """
    kl, loss = abs(margin), margin**2
    return identity(objectives.pessimistic(loss, kl, weight), (beta * kl + alpha * loss) / alpha)


def printed_gamma(margin, beta, alpha):
    """As printed: Eq. 11 has gamma = alpha / beta.

    It fails since Eq. 10 weighs the KL by beta and the loss by alpha.
    Source: section 6.1.
    """
    return _gamma_is(alpha / beta, margin, beta, alpha)


def gamma(margin, beta, alpha):
    """Corrected: Eq. 11 has gamma = beta / alpha.

    Proof: divide Eq. 10 by alpha.
    Source: Eq. 10, 11.
    """
    return _gamma_is(beta / alpha, margin, beta, alpha)


def _pair_kl(policy_logps, ref_logps):
    """The mean of sum_{y = y1, y2} log pi_ref(y) - log pi(y), y1 and y2 ~ pi_ref: [X, Y] -> [X]."""
    joint, gaps = ref_logps[:, :, None] + ref_logps[:, None], ref_logps - policy_logps
    return np.sum(np.exp(joint) * (gaps[:, :, None] + gaps[:, None]), axis=(1, 2))


def printed_sampled_kl(policy_logps, ref_logps):
    """As printed: -(log pi(y_w) + log pi(y_l)) estimates the forward KL, up to a constant.

    It fails since two responses are summed.
    Source: section 7.1.
    """
    return identity(_pair_kl(policy_logps, ref_logps), forward_kl(ref_logps, policy_logps))


def sampled_kl(policy_logps, ref_logps):
    """Corrected: -(log pi(y_w) + log pi(y_l)) estimates TWICE the forward KL, up to a constant.

    So the alpha of Proposition 5 is 2 beta / gamma for the gamma of Eq. 13.
    Source: section 7.1.
    """
    return identity(_pair_kl(policy_logps, ref_logps), 2 * forward_kl(ref_logps, policy_logps))


def printed_convexity_in_psi(psi, beta):
    """As printed: -log sigmoid(beta log psi_w / psi_l) is convex in psi_l.

    It is measured at three equidistant psi_l, psi [3], for psi_w = 1. It fails for beta = 1, since
    log(1 + psi) is concave.
    Source: the proof of Proposition 5.
    """
    below, middle, above = dpo(-np.log(psi), beta)
    return at_most(2 * middle, below + above)


def convexity_in_log_psi(beta):
    """Corrected: it is convex in log psi_l, and so is p-DPO's loss; its local minimum is global.

    Proof: softplus is convex.
    Source: the proof of Proposition 5.
    """
    losses = dpo(np.linspace(-5, 5, 41) / beta, beta)
    return at_most(2 * losses[1:-1], losses[2:] + losses[:-2])


def printed_alpha(beta, alpha):
    """As printed: for alpha > 1, p-DPO's optimum log psi_w / psi_l is IPO's, 1 / tau > 0.

    It fails for alpha < 2, where log(alpha - 1) < 0.
    Source: section 7.1.
    """
    return at_most(1e-6, np.log(alpha - 1) / beta)


def winner_needs_alpha_above_2(beta, alpha):
    """Corrected: p-DPO's optimum log psi_w / psi_l is positive if and only if alpha > 2.

    Proof: the slope of the loss at 0 is beta / alpha - beta / 2.
    Source: Proposition 5, section 7.1.
    """
    ahead, behind = (dpo(h / beta, beta) + h / alpha for h in (1e-5, -1e-5))
    return at_most(np.sign(alpha - 2) * (ahead - behind), 0.0)


def printed_finite_optimum(pairs, arms, beta, alpha):
    """As printed: p-DPO, with section 7.1's KL on the pairs, has a finite optimum.

    It fails since it lowers, without end, the arms that are in no pair.
    Source: section 7.2.
    """
    early, late = (
        bandit.pessimistic_dpo_solution(pairs, arms, beta, alpha, steps) for steps in (1000, 4000)
    )
    return identity(late, early, 1e-3)


def printed_arms(arms, tau):
    """As printed: the pairs (i, i + 1) for i = 1, .., n have a spread of (n - 1) / tau.

    It fails since these pairs have n + 1 arms.
    Source: Proposition 7.
    """
    weights = bandit.ipo_solution(bandit.chain(arms + 1), arms + 1, tau)
    return identity(bandit.spread(weights), (arms - 1) / tau)


class Erratum(NamedTuple):
    """A printed claim, its place, an instance that refutes it, and the corrected claim."""

    printed: Callable
    place: str
    counterexample: dict
    corrected: Callable


def _words(**words):
    """Token ids of each word: a is 0, b is 1 and c is 2."""
    ids = {name: ["abc".index(letter) for letter in word] for name, word in words.items()}
    return {name: np.array(tokens) for name, tokens in ids.items()}


HALVES, OPPOSITE_REWARDS = np.log([[0.5, 0.5]]), np.array([[[1.0, -1.0]], [[-1.0, 1.0]]])
OPPOSITE = {"ref_logps": HALVES, "rewards": OPPOSITE_REWARDS, "beta": 1.0}
TILTED = {"policy_logps": np.log([[0.25, 0.75]]), "ref_logps": HALVES}
UNREWARDED = {**TILTED, "rewards": np.zeros((1, 1, 2)), "beta": 1.0}
DOUBLED = {"theta": np.zeros(2), "beta": 1.0, **_words(chosen="aa", rejected="bb")}
LETTERS = {"theta": np.log([2.0, 1.0]), "beta": 1.0, **_words(chosen="a", rejected="b")}
WORDS = _words(chosen="aab", similar="acb", distinct="bbb")
NEARLY_CERTAIN = np.log([1e-12, 1e-6, 1 - 1e-6 - 1e-12])
LIMIT = {"ref_logps": np.log([0.3, 0.3, 0.4]), "policy_logps": NEARLY_CERTAIN, "beta": 1.0}
UNPAIRED = {"pairs": np.array([[0, 1]]), "arms": 3, "beta": 1.0, "alpha": 5.0}
THREE_ARMS = {"arms": 3, "tau": 1.0}
DELTA = {"difference": np.array([1, 1, -2])}
WEIGHTS = {"margin": 1.0, "beta": 1.0, "alpha": 2.0}
LOW_ALPHA = {"beta": 1.0, "alpha": 1.5}
PSI = {"psi": np.array([1, 2, 3]), "beta": 1.0}

# fmt: off
ERRATA = [
    Erratum(printed_theorem_2, "Theorem 2", OPPOSITE, claims.theorem_2),
    Erratum(printed_convexity, "Theorem 2, proof", UNREWARDED, value_is_concave),
    Erratum(printed_advantage, "Section 5.2", OPPOSITE, claims.pessimism_never_loses),
    Erratum(printed_pessimism, "Proposition 4", {**OPPOSITE, "gamma": 1.0},
            claims.proposition_4_is_pessimistic),
    Erratum(printed_strictness, "Proposition 2", DOUBLED, strictness),
    Erratum(printed_ratio, "Proposition 2, proof", LETTERS, gradient_step),
    Erratum(printed_step, "Proposition 2, 3, proof", LETTERS, gradient_step),
    Erratum(printed_norm, "Proposition 3, proof", DELTA, claims.proposition_3),
    Erratum(printed_similarity, "Section 4.1", WORDS, claims.proposition_3),
    Erratum(printed_limit, "Corollary 1", LIMIT, claims.proposition_1),
    Erratum(printed_special_case, "Section 5.1", THREE_ARMS, claims.ipo_is_distillation),
    Erratum(printed_gamma, "Section 6.1", WEIGHTS, gamma),
    Erratum(printed_sampled_kl, "Section 7.1", TILTED, sampled_kl),
    Erratum(printed_convexity_in_psi, "Proposition 5, proof", PSI, convexity_in_log_psi),
    Erratum(printed_alpha, "Section 7.1", LOW_ALPHA, winner_needs_alpha_above_2),
    Erratum(printed_finite_optimum, "Section 7.2", UNPAIRED, claims.pessimistic_dpo_on_arms),
    Erratum(printed_arms, "Proposition 7", THREE_ARMS, claims.proposition_7),
]
# fmt: on
