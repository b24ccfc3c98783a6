"""The paper's objectives, on one example each, in float64.

Everything here is a log-probability, a difference of log-probabilities (a margin) or a reward, all in nats,
so every loss is in nats or nats squared. Functions take scalars of ONE pair; those that minimise over a batch
say so. The same functions, in the same order, are in `minipref/objectives.py`.

h denotes `margin`, the log-ratio margin of Eq. 6; rho = r(y1) - r(y2) denotes a `reward_margin`.
"""

from itertools import chain, combinations

import numpy as np


def sequence_logp(token_logps, mask):
    """How probable one response is: the SUM of its tokens' log-probabilities, never their mean.

    log pi(y | x) = sum_t mask_t log pi(y_t | x, y_<t)

    Masked positions are not read, so they may hold NaN or -inf; a response without tokens has log-probability
    0.

    Shapes: token_logps [T], mask [T] (0 or 1) -> scalar, nats. Source: section 3.1, where pi(y | x) is of
    sequences.
    """
    return np.sum(np.where(mask, token_logps, 0.0))


def log_ratio_margin(policy_chosen, policy_rejected, ref_chosen, ref_rejected):
    """By how much more than the reference the policy prefers the chosen response.

    h = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)]

    Shapes: four scalars, sequence log-probabilities -> scalar, nats. Source: the argument of Eq. 6 and Eq. 7.
    """
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # Eq. 6


def bradley_terry(reward_margin):
    """The loss that fits a reward model to preferences.

    -log sigmoid(r(y_w) - r(y_l))

    Shapes: scalar -> scalar, nats. Source: Eq. 2.
    """
    return np.logaddexp(0.0, -reward_margin)  # Eq. 2


def dpo(margin, beta):
    """Direct preference optimization: Bradley-Terry with the policy's implicit reward beta log(pi / pi_ref).

    -log sigmoid(beta h)

    Shapes: scalars -> scalar, nats. Source: Eq. 6.
    """
    return bradley_terry(beta * margin)  # Eq. 6


def ipo(margin, tau):
    """Identity preference optimization: regress the margin on a constant.

    (h - 1/tau)^2

    The paper's convention. IPO's own authors use the target 1/(2 tau): their tau is half of this one. Margins
    are of summed token log-probabilities, where some implementations average.

    Shapes: scalars -> scalar, nats squared. Source: section 7.1; Azar et al. (2024), Eq. 17.
    """
    return (margin - 1.0 / tau) ** 2  # section 7.1


def distillation(margin, reward_margin, beta):
    """Reward model distillation: match the policy's implicit reward difference to the reward model's.

    (r(y1) - r(y2) - beta h)^2

    Shapes: scalars -> scalar, nats squared. Source: Eq. 7.
    """
    return (reward_margin - beta * margin) ** 2  # Eq. 7


def mean_distillation(margins, reward_margins, beta):
    """Distil the ensemble's average: Eq. 7 averaged over the batch, against the mean of the K rewards.

    mean_b (mean_k rho_kb - beta h_b)^2

    With K = 1 this is Eq. 7 itself. With more it is the baseline without pessimism, which the paper does not
    run.

    Shapes: margins [B], reward_margins [K, B] -> scalar, nats squared. Source: Eq. 7.
    """
    return _batch_distillation(margins, np.mean(reward_margins, axis=0), beta)


def mean_weights(margins, reward_margins, beta):
    """The weight of each reward model in `mean_distillation`: 1/K.

    Shapes: margins [B], reward_margins [K, B] -> [K], sums to 1.
    """
    return np.full(len(reward_margins), 1.0 / len(reward_margins))


def ensemble_distillation(margins, reward_margins, beta):
    """Distil the reward model that is nearest to the policy on this batch.

    min_k mean_b (rho_kb - beta h_b)^2

    Eq. 11 has the minimum outside the whole expectation; footnote 5 takes it per minibatch, as here. The mean
    of such minima is at most the minimum of the mean.

    Shapes: margins [B], reward_margins [K, B] -> scalar, nats squared. Source: first term of Eq. 11, footnote
    5.
    """
    return np.min(_member_losses(margins, reward_margins, beta))  # Eq. 11


def ensemble_weights(margins, reward_margins, beta):
    """Which reward model `ensemble_distillation` chose, as a one-hot vector (the first of equals).

    Shapes: margins [B], reward_margins [K, B] -> [K], sums to 1.
    """
    return np.eye(len(reward_margins))[np.argmin(_member_losses(margins, reward_margins, beta))]


def nearest_shares(margins, reward_margins, beta):
    """For what share of the pairs each reward model is the nearest to the policy, pair by pair.

    mean_b onehot(argmin_k (rho_kb - beta h_b)^2)

    What Figure B.3 tracks, while the loss itself takes its minimum over the batch (`ensemble_weights`).

    Shapes: margins [B], reward_margins [K, B] -> [K], sums to 1. Source: section 6.2, appendix B.3.
    """
    pairs = zip(margins, np.transpose(reward_margins), strict=True)
    return np.mean([ensemble_weights([margin], rewards[:, None], beta) for margin, rewards in pairs], axis=0)


def hull_distillation(margins, reward_margins, beta):
    """Distil the MIXTURE of reward models that is nearest to the policy on this batch.

    min_{w in simplex} mean_b (sum_k w_k rho_kb - beta h_b)^2

    Departs from the paper: the proof of Theorem 2 exchanges a minimum with a maximum, which needs a convex
    set of reward models; the finite set's corners (`ensemble_distillation`) are replaced by their convex
    hull.

    Shapes: margins [B], reward_margins [K, B] -> scalar, nats squared. Source: ours, after Theorem 2 and Eq.
    11.
    """
    weights = hull_weights(margins, reward_margins, beta)
    return _batch_distillation(margins, weights @ reward_margins, beta)


def hull_weights(margins, reward_margins, beta):
    """The simplex weights at which `hull_distillation` has its minimum.

    argmin_{w in simplex} w' Q w, with residuals e_k = rho_k - beta h and Q_jk = mean_b e_jb e_kb

    By enumeration: the minimum lies inside one of the simplex's 2^K - 1 faces, where it is a least-squares
    solution on that face. Exact, and meant for small K. Where several w give the same mixture, one of them.

    Shapes: margins [B], reward_margins [K, B] -> [K], non-negative, sums to 1. Source: ours.
    """
    residuals = reward_margins - beta * np.asarray(margins)
    members = np.argsort(np.mean(residuals**2, axis=1))
    faces = chain.from_iterable(combinations(members, size) for size in range(1, len(members) + 1))
    candidates = [_nearest_on_face(residuals, list(face)) for face in faces]
    return min(candidates, key=lambda weights: np.mean((weights @ residuals) ** 2))


def forward_kl(ref_logps, policy_logps):
    """How badly the policy covers what the reference would say.

    KL(pi_ref || pi) = sum_y pi_ref(y) [log pi_ref(y) - log pi(y)]

    Outcomes of reference probability 0 contribute 0, whatever the policy. An outcome that the reference
    allows and the policy does not makes the divergence infinite.

    Shapes: [..., Y], [..., Y], normalised log-probabilities -> [...], nats. Source: Eq. 9.
    """
    possible = np.exp(ref_logps) > 0
    ref, policy = np.where(possible, ref_logps, 0.0), np.where(possible, policy_logps, 0.0)
    return np.sum(np.where(possible, np.exp(ref) * (ref - policy), 0.0), axis=-1)  # Eq. 9


def sampled_forward_kl(ref_logp, policy_logp):
    """The one-sample estimate of `forward_kl` at a response y drawn from the reference.

    log pi_ref(y) - log pi(y)

    Unbiased, and so sometimes negative.

    Shapes: scalars, sequence log-probabilities of the same y -> scalar, nats. Source: second term of Eq. 11.
    """
    return ref_logp - policy_logp  # Eq. 11


def pessimistic(loss, kl, gamma):
    """A pair loss with the pull towards the reference that makes it pessimistic.

    loss + gamma KL(pi_ref || pi)

    The paper defines gamma twice. Eq. 10 weighs the KL by beta and the loss by alpha, so Eq. 11 has gamma =
    beta / alpha; section 6.1 says gamma = alpha / beta. Either way gamma is the number that multiplies the KL
    here.

    Shapes: scalars -> scalar. Source: Eq. 11 (with a distillation), Eq. 13 (with DPO).
    """
    return loss + gamma * kl  # Eq. 11, Eq. 13


def rlhf(policy_logps, ref_logps, rewards, beta):
    """A policy's value at one prompt, to be MAXIMISED: expected reward less divergence from the reference.

    E_{y ~ pi} r(y) - beta KL(pi || pi_ref)

    The divergence is the reverse of `forward_kl`'s.

    Shapes: policy_logps [Y], ref_logps [Y], rewards [Y] -> scalar, nats. Source: Eq. 1.
    """
    reverse_kl = forward_kl(policy_logps, ref_logps)
    return np.sum(np.exp(policy_logps) * rewards, axis=-1) - beta * reverse_kl  # Eq. 1


def pessimistic_rlhf(policy_logps, ref_logps, rewards, beta):
    """The value of a policy under the worst of K reward models, to be MAXIMISED.

    min_k mean_x [E_{y ~ pi} r_k - E_{y ~ pi_ref} r_k - beta KL(pi || pi_ref)]

    Prompts are equally likely, and the minimum is outside their mean. The reference's own `rlhf` value is its
    expected reward, so the bracket is a difference of two values.

    Shapes: policy_logps [X, Y], ref_logps [X, Y], rewards [K, X, Y] -> scalar, nats. Source: Eq. 8.
    """
    advantages = rlhf(policy_logps, ref_logps, rewards, beta) - rlhf(ref_logps, ref_logps, rewards, beta)
    return np.min(np.mean(advantages, axis=-1))  # Eq. 8


def _batch_distillation(margins, reward_margins, beta):
    """The batch mean of Eq. 7 for one reward model: [B], [B] -> scalar."""
    pairs = zip(margins, reward_margins, strict=True)
    return np.mean([distillation(margin, reward_margin, beta) for margin, reward_margin in pairs])


def _member_losses(margins, reward_margins, beta):
    """The batch mean of Eq. 7 for each reward model: [B], [K, B] -> [K]."""
    return np.array([_batch_distillation(margins, member, beta) for member in reward_margins])


def _nearest_on_face(residuals, face):
    """Weights of the point nearest to 0 in the plane through a face's residuals, clipped to the simplex.

    A clipped point is a point of the simplex like any other, so it cannot undercut the true minimum.
    """
    first, *others = face
    weights = np.zeros(len(residuals))
    directions = (residuals[others] - residuals[first]).T
    weights[others] = np.linalg.lstsq(directions, -residuals[first])[0] if others else []
    weights[first] = 1.0 - np.sum(weights)
    return np.maximum(weights, 0.0) / np.sum(np.maximum(weights, 0.0))
