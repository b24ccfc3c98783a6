"""The paper's objectives, on one example each: jit, vmap and differentiate at will.

The same functions, in the same order, as `reference/objectives.py`, which is the place to read what they
mean. Inputs of lower precision are promoted to float32 first. Everything is in nats (a squared loss: nats
squared). Functions take scalars of ONE pair, so callers `vmap` and reduce; those that minimise over a batch
say so.

h denotes `margin`, the log-ratio margin of Eq. 6; rho = r(y1) - r(y2) denotes a `reward_margin`.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real, Shaped

from minipref.simplex import nearest_mixture

Scalar: TypeAlias = Real[ArrayLike, ""]
Loss: TypeAlias = Float[Array, ""]


def sequence_logp(token_logps: Float[Array, " T"], mask: Shaped[Array, " T"]) -> Loss:
    """How probable one response is: the SUM of its tokens' log-probabilities, never their mean.

    log pi(y | x) = sum_t mask_t log pi(y_t | x, y_<t)

    Masked positions may hold NaN or -inf: neither value nor gradient reads them. A response without tokens
    has log-probability 0.

    Shapes: token_logps [T], mask [T] (0 or 1) -> scalar, nats. Source: section 3.1, where pi(y | x) is of
    sequences.
    """
    (token_logps,) = _wide(token_logps)
    return jnp.sum(jnp.where(mask, token_logps, 0.0))


def log_ratio_margin(
    policy_chosen: Scalar, policy_rejected: Scalar, ref_chosen: Scalar, ref_rejected: Scalar
) -> Loss:
    """By how much more than the reference the policy prefers the chosen response.

    h = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)]

    Shapes: four scalars, sequence log-probabilities -> scalar, nats. Source: the argument of Eq. 6 and Eq. 7.
    """
    logps = _wide(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = logps
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # Eq. 6


def bradley_terry(reward_margin: Scalar) -> Loss:
    """The loss that fits a reward model to preferences.

    -log sigmoid(r(y_w) - r(y_l))

    Shapes: scalar -> scalar, nats. Source: Eq. 2.
    """
    (reward_margin,) = _wide(reward_margin)
    return -jax.nn.log_sigmoid(reward_margin)  # Eq. 2


def dpo(margin: Scalar, beta: Scalar) -> Loss:
    """Direct preference optimization: Bradley-Terry with the policy's implicit reward beta log(pi / pi_ref).

    -log sigmoid(beta h)

    Shapes: scalars -> scalar, nats. Source: Eq. 6.
    """
    margin, beta = _wide(margin, beta)
    return bradley_terry(beta * margin)  # Eq. 6


def ipo(margin: Scalar, tau: Scalar) -> Loss:
    """Identity preference optimization: regress the margin on a constant.

    (h - 1/tau)^2

    The paper's convention. IPO's own authors use the target 1/(2 tau): their tau is half of this one. Margins
    are of summed token log-probabilities, where some implementations average.

    Shapes: scalars -> scalar, nats squared. Source: section 7.1; Azar et al. (2024), Eq. 17.
    """
    margin, tau = _wide(margin, tau)
    return (margin - 1.0 / tau) ** 2  # section 7.1


def distillation(margin: Scalar, reward_margin: Scalar, beta: Scalar) -> Loss:
    """Reward model distillation: match the policy's implicit reward difference to the reward model's.

    (r(y1) - r(y2) - beta h)^2

    Shapes: scalars -> scalar, nats squared. Source: Eq. 7.
    """
    margin, reward_margin, beta = _wide(margin, reward_margin, beta)
    return (reward_margin - beta * margin) ** 2  # Eq. 7


def mean_distillation(margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar) -> Loss:
    """Distil the ensemble's average: Eq. 7 averaged over the batch, against the mean of the K rewards.

    mean_b (mean_k rho_kb - beta h_b)^2

    With K = 1 this is Eq. 7 itself. With more it is the baseline without pessimism, which the paper does not
    run.

    Shapes: margins [B], reward_margins [K, B] -> scalar, nats squared. Source: Eq. 7.
    """
    margins, reward_margins, beta = _wide(margins, reward_margins, beta)
    return _batch_distillation(margins, jnp.mean(reward_margins, axis=0), beta)


def mean_weights(
    margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar
) -> Float[Array, " K"]:
    """The weight of each reward model in `mean_distillation`: 1/K.

    Shapes: margins [B], reward_margins [K, B] -> [K], sums to 1.
    """
    (reward_margins,) = _wide(reward_margins)
    return jnp.full(len(reward_margins), 1.0 / len(reward_margins), reward_margins.dtype)


def ensemble_distillation(
    margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar
) -> Loss:
    """Distil the reward model that is nearest to the policy on this batch.

    min_k mean_b (rho_kb - beta h_b)^2

    Eq. 11 has the minimum outside the whole expectation; footnote 5 takes it per minibatch, as here. The mean
    of such minima is below the minimum of the mean.

    Shapes: margins [B], reward_margins [K, B] -> scalar, nats squared. Source: first term of Eq. 11, footnote
    5.
    """
    return jnp.min(_member_losses(margins, reward_margins, beta))  # Eq. 11


def ensemble_weights(
    margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar
) -> Float[Array, " K"]:
    """Which reward model `ensemble_distillation` chose, as a one-hot vector (the first of equals).

    Shapes: margins [B], reward_margins [K, B] -> [K], sums to 1.
    """
    losses = _member_losses(margins, reward_margins, beta)
    return jax.nn.one_hot(jnp.argmin(losses), len(losses), dtype=losses.dtype)


def nearest_shares(
    margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar
) -> Float[Array, " K"]:
    """For what share of the pairs each reward model is the nearest to the policy, pair by pair.

    mean_b onehot(argmin_k (rho_kb - beta h_b)^2)

    What Figure B.3 tracks, while the loss itself takes its minimum over the batch (`ensemble_weights`).

    Shapes: margins [B], reward_margins [K, B] -> [K], sums to 1. Source: section 6.2, appendix B.3.
    """
    of_one_pair = jax.vmap(ensemble_weights, (0, 1, None))
    return jnp.mean(of_one_pair(margins[:, None], reward_margins[:, :, None], beta), axis=0)


def hull_distillation(margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar) -> Loss:
    """Distil the MIXTURE of reward models that is nearest to the policy on this batch.

    min_{w in simplex} mean_b (sum_k w_k rho_kb - beta h_b)^2

    Departs from the paper: the proof of Theorem 2 exchanges a minimum with a maximum, which needs a convex
    set of reward models; the finite set's corners (`ensemble_distillation`) are replaced by their convex
    hull. The weights are held constant in the gradient, which is exact at a minimum over them (envelope
    theorem).

    Shapes: margins [B], reward_margins [K, B] -> scalar, nats squared. Source: ours, after Theorem 2 and Eq.
    11.
    """
    margins, reward_margins, beta = _wide(margins, reward_margins, beta)
    weights = hull_weights(margins, reward_margins, beta)
    return _batch_distillation(margins, _mix(weights, reward_margins), beta)


def hull_weights(
    margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar
) -> Float[Array, " K"]:
    """The simplex weights at which `hull_distillation` has its minimum; constants to differentiation.

    argmin_{w in simplex} w' Q w, with residuals e_k = rho_k - beta h and Q_jk = mean_b e_jb e_kb

    Exact up to a ridge of 8 K machine epsilons on Q's diagonal, which also chooses among weights that give
    the same mixture. Costs a K x K solve for each change of the set of members in use, rarely more than 2 K
    of them.

    Shapes: margins [B], reward_margins [K, B] -> [K], non-negative, sums to 1. Source: ours.
    """
    margins, reward_margins, beta = lax.stop_gradient(_wide(margins, reward_margins, beta))
    return nearest_mixture(reward_margins - beta * margins)


def forward_kl(
    ref_logps: Float[Array, "*batch Y"], policy_logps: Float[Array, "*batch Y"]
) -> Float[Array, "*batch"]:
    """How badly the policy covers what the reference would say.

    KL(pi_ref || pi) = sum_y pi_ref(y) [log pi_ref(y) - log pi(y)]

    Outcomes of reference probability 0 contribute 0, whatever the policy. An outcome that the reference
    allows and the policy does not makes the divergence infinite.

    Shapes: [..., Y], [..., Y], normalised log-probabilities -> [...], nats. Source: Eq. 9.
    """
    ref_logps, policy_logps = _wide(ref_logps, policy_logps)
    possible = jnp.exp(ref_logps) > 0
    ref, policy = jnp.where(possible, ref_logps, 0.0), jnp.where(possible, policy_logps, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(ref) * (ref - policy), 0.0), axis=-1)  # Eq. 9


def sampled_forward_kl(ref_logp: Scalar, policy_logp: Scalar) -> Loss:
    """The one-sample estimate of `forward_kl` at a response y drawn from the reference.

    log pi_ref(y) - log pi(y)

    Unbiased, and so sometimes negative.

    Shapes: scalars, sequence log-probabilities of the same y -> scalar, nats. Source: second term of Eq. 11.
    """
    ref_logp, policy_logp = _wide(ref_logp, policy_logp)
    return ref_logp - policy_logp  # Eq. 11


def pessimistic(loss: Scalar, kl: Scalar, gamma: Scalar) -> Loss:
    """A pair loss with the pull towards the reference that makes it pessimistic.

    loss + gamma KL(pi_ref || pi)

    The paper defines gamma twice. Eq. 10 weighs the KL by beta and the loss by alpha, so Eq. 11 has gamma =
    beta / alpha; section 6.1 says gamma = alpha / beta. Either way gamma is the number that multiplies the KL
    here.

    Shapes: scalars -> scalar. Source: Eq. 11 (with a distillation), Eq. 13 (with DPO).
    """
    loss, kl, gamma = _wide(loss, kl, gamma)
    return loss + gamma * kl  # Eq. 11, Eq. 13


def rlhf(
    policy_logps: Float[Array, " Y"], ref_logps: Float[Array, " Y"], rewards: Float[Array, " Y"], beta: Scalar
) -> Loss:
    """A policy's value at one prompt, to be MAXIMISED: expected reward less divergence from the reference.

    E_{y ~ pi} r(y) - beta KL(pi || pi_ref)

    The divergence is the reverse of `forward_kl`'s.

    Shapes: policy_logps [Y], ref_logps [Y], rewards [Y] -> scalar, nats. Source: Eq. 1.
    """
    policy_logps, ref_logps, rewards, beta = _wide(policy_logps, ref_logps, rewards, beta)
    reverse_kl = forward_kl(policy_logps, ref_logps)
    return jnp.sum(jnp.exp(policy_logps) * rewards, axis=-1) - beta * reverse_kl  # Eq. 1


def pessimistic_rlhf(
    policy_logps: Float[Array, "X Y"],
    ref_logps: Float[Array, "X Y"],
    rewards: Float[Array, "K X Y"],
    beta: Scalar,
) -> Loss:
    """The value of a policy under the worst of K reward models, to be MAXIMISED.

    min_k mean_x [E_{y ~ pi} r_k - E_{y ~ pi_ref} r_k - beta KL(pi || pi_ref)]

    Prompts are equally likely, and the minimum is outside their mean. The reference's own `rlhf` value is its
    expected reward, so the bracket is a difference of two values.

    Shapes: policy_logps [X, Y], ref_logps [X, Y], rewards [K, X, Y] -> scalar, nats. Source: Eq. 8.
    """
    values = jax.vmap(jax.vmap(rlhf, (0, 0, 0, None)), (None, None, 0, None))
    advantages = values(policy_logps, ref_logps, rewards, beta) - values(ref_logps, ref_logps, rewards, beta)
    return jnp.min(jnp.mean(advantages, axis=-1))  # Eq. 8


def _wide(*inputs: Shaped[ArrayLike, "..."]) -> tuple[Array, ...]:
    """The inputs as arrays of one dtype, at least float32."""
    dtype = jnp.result_type(jnp.float32, *inputs)
    return tuple(jnp.asarray(x, dtype) for x in inputs)


def _mix(weights: Float[Array, " K"], reward_margins: Float[Array, "K B"]) -> Float[Array, " B"]:
    """The mixture's reward margins, in full float32 on every device."""
    return jnp.matmul(weights, reward_margins, precision=lax.Precision.HIGHEST)


def _batch_distillation(
    margins: Float[Array, " B"], reward_margins: Float[Array, " B"], beta: Scalar
) -> Loss:
    """The batch mean of Eq. 7 for one reward model."""
    return jnp.mean(jax.vmap(distillation, (0, 0, None))(margins, reward_margins, beta))


def _member_losses(
    margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], beta: Scalar
) -> Float[Array, " K"]:
    """The batch mean of Eq. 7 for each reward model."""
    return jax.vmap(_batch_distillation, (None, 0, None))(margins, reward_margins, beta)
