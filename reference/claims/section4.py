"""Claims of section 4: what DPO's loss does. The arguments are listed in `reference.claims`."""

import numpy as np

from reference import bag_of_words, loglinear, objectives, tabular
from reference.claims.evidence import at_most, identity, worst
from reference.loglinear import log_softmax
from reference.methods import METHODS
from reference.objectives import dpo, log_ratio_margin


def bag_log_probability(theta, chosen):
    """The log-probability of a response is the sum over its tokens; in bags, counts suffice.

    Source: sections 3.1, 4.1.
    """
    logps = log_softmax(theta)[chosen]
    padded = np.insert(logps, [0, 1, len(chosen)], [np.nan, -np.inf, np.nan])
    total = objectives.sequence_logp(padded, np.isfinite(padded))
    expected = np.sum(theta[chosen]) - len(chosen) * np.log(np.sum(np.exp(theta)))
    count = bag_of_words.counts(chosen, len(theta))
    return worst(
        identity(total, expected),
        identity(bag_of_words.log_prob(theta, count), expected),
    )


def proposition_1(ref_logps, beta):
    """On disjoint pairs DPO's loss vanishes if and only if the log-ratio h of every pair diverges.

    -log(exp(B loss) - 1) <= beta h  and  loss <= mean exp(-beta h), for B pairs

    Proof: the two bounds. Here they are measured along gradient descent, on which the loss falls
    and every h rises. Response 2i is preferred to response 2i + 1 (Assumption 1).
    Source: Proposition 1.
    """
    prompts, responses = ref_logps.shape
    pairs = [(x, y, y + 1) for x in range(prompts) for y in range(0, responses - 1, 2)]
    problem = tabular.problem(ref_logps, np.array(pairs), np.zeros((0, prompts, responses)))
    path = loglinear.descend(problem, METHODS["dpo"], beta, len(pairs) / beta**2, 20)
    margins = np.array([loglinear.margins(problem, theta) for theta in path])
    losses = np.array([loglinear.loss(problem, METHODS["dpo"], theta, beta) for theta in path])
    floors = -np.log(np.expm1(len(pairs) * losses))
    return worst(
        at_most(floors[:, None], beta * margins),
        at_most(losses, np.mean(np.exp(-beta * margins), axis=1)),
        at_most(1e-3, beta * np.diff(margins, axis=0)),
    )


def corollary_1(policy_logps, ref_logps, beta):
    """DPO's loss is 0, its least, if and only if pi(y_l) = 0 < pi(y_w), even for tiny pi(y_w).

    Proof: the log-ratio is infinite exactly there. Otherwise it is at most its value at
    pi(y_w) = 1, and the loss is above 0.
    Source: Corollary 1.
    """
    ref_pair = ref_logps[:, 0], ref_logps[:, 1]
    degenerate = dpo(log_ratio_margin(np.log(1e-300), -np.inf, *ref_pair), beta)
    h = log_ratio_margin(policy_logps[:, 0], policy_logps[:, 1], *ref_pair)
    most = log_ratio_margin(0.0, policy_logps[:, 1], *ref_pair)
    loss = identity(dpo(h, beta), np.logaddexp(0.0, -beta * h))
    return worst(identity(degenerate, 0.0), at_most(h, most), loss)


def bag_descent(theta, chosen, rejected, beta, steps=20):
    """DPO's gradient descent on one pair of bags, from theta(0) = 0.

    theta(t) = tau(t) Delta,  Delta = c(y_w) - c(y_l)

    Args:
        theta: the logits of the reference [V].
        chosen, rejected: token ids [n] of y_w and y_l.
        beta: the weight of the KL in Eq. 1, above 0.
        steps: T, the number of gradient steps.

    Returns:
        The path theta(t) [T + 1, V], c(y_w) [V], Delta [V] and tau(t) [T + 1].
    Source: Proposition 2, Eq. 36.
    """
    count, other = (bag_of_words.counts(tokens, len(theta)) for tokens in (chosen, rejected))
    problem = bag_of_words.problem(theta, [count], [other], np.zeros((0, 1)))
    start = np.zeros((1, len(theta)))
    path = loglinear.descend(problem, METHODS["dpo"], beta, 1 / beta, steps, start)[:, 0]
    difference = count - other
    return path, count, difference, path @ difference / max(difference @ difference, 1)


def proposition_2(theta, chosen, rejected, beta):
    """DPO never raises the bound c(y_w) . theta - n max theta on log pi(y_w).

    Proof: theta moves along Delta, whose argmax is theta's, so the bound moves by
    delta (c . Delta - n max Delta) <= 0. `errata.strictness` says when it falls.
    Source: Proposition 2.
    """
    path, count, *_ = bag_descent(theta, chosen, rejected, beta)
    bounds = np.array([bag_of_words.log_prob_bound(point, count) for point in path])
    logps = np.array([bag_of_words.log_prob(point, count) for point in path])
    return worst(at_most(np.diff(bounds), 0.0), at_most(logps, bounds), identity(bounds[0], 0.0))


def proposition_3(theta, chosen, rejected, beta):
    """The response yhat, n copies of a token of argmax Delta, gains on y_w where k < 0.

    log pi(y_w) - log pi(yhat) = tau(t) k,  k = sum_{i in y_w} (Delta_i - max Delta) <= 0

    Proof: the normalisers cancel. k = 0 if and only if all tokens of y_w are in argmax Delta.
    Source: Proposition 3.
    """
    path, count, difference, tau = bag_descent(theta, chosen, rejected, beta)
    copies = len(chosen) * np.eye(len(theta), dtype=int)[np.argmax(difference)]
    chosen_logps = np.array([bag_of_words.log_prob(point, count) for point in path])
    copies_logps = np.array([bag_of_words.log_prob(point, copies) for point in path])
    k = np.sum(difference[chosen] - np.max(difference))
    inside = np.all(difference[chosen] == np.max(difference))
    return worst(
        identity(chosen_logps - copies_logps, tau * k),
        at_most(-np.diff(tau), 0.0),
        at_most(k, float(inside) - 1),
    )
