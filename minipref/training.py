"""The training step, a pure function `(state, batch) -> (state, metrics)`, and the three losses that it takes.

A loss sees one number for each response (its log-probability or its reward), never a model: it maps
`(outputs [B, n], batch, hyper, fraction)` to `(loss, metrics)`. `fraction` in [0, 1] is the progress of the run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from minipref.batch import Batch, ResponseLogps
from minipref.methods import METHODS, method_loss
from minipref.objectives import bradley_terry, log_ratio_margin, nearest_shares, sampled_forward_kl

Metrics = dict[str, Float[Array, "..."]]
Outputs = Float[Array, "B n"]
Loss = Callable[[Any, Batch, "Hyper", Any], tuple[Any, Metrics]]


class Hyper(NamedTuple):
    """What a sweep varies, as arrays in the state: one compiled step serves every value, and `vmap` sweeps them."""

    strength: Float[Array, ""]  # beta, or IPO's tau
    gamma: Float[Array, "2"]  # the KL weight at the first and at the last step
    learning_rate: Float[Array, ""]
    warmup: Float[Array, ""]  # steps of linear warm-up
    end_lr_ratio: Float[Array, ""]  # learning rate at the last step, as a share of its peak; linear decay
    steps: Float[Array, ""]


class TrainState(NamedTuple):
    model: Any
    opt_state: Any
    hyper: Hyper
    step: Int[Array, ""]


def init_state(model: Any, optimizer: optax.GradientTransformation, hyper: Hyper) -> TrainState:
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return TrainState(model, opt_state, hyper, jnp.zeros((), jnp.int32))


def progress(state: TrainState) -> Float[Array, ""]:
    """0 at the first step, 1 at the last: the clock of gamma's annealing (section 6.1)."""
    return state.step / jnp.maximum(state.hyper.steps - 1, 1)


def learning_rate(state: TrainState) -> Float[Array, ""]:
    warm = jnp.minimum(1.0, (state.step + 1) / jnp.maximum(state.hyper.warmup, 1))
    decay = 1 - (1 - state.hyper.end_lr_ratio) * progress(state)
    return state.hyper.learning_rate * warm * decay


def train_step(
    forward: Callable, loss: Loss, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update. `forward(model, batch)` gives the outputs [B, n]; `optimizer` must not scale by a learning rate."""
    def objective(model):
        return loss(forward(model, batch), batch, state.hyper, progress(state))

    (value, metrics), grads = eqx.filter_value_and_grad(objective, has_aux=True)(state.model)
    params = eqx.filter(state.model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    rate = learning_rate(state)
    model = eqx.apply_updates(state.model, jax.tree.map(lambda u: (-rate * u).astype(u.dtype), updates))
    metrics |= {"loss": value, "grad_norm": optax.tree.norm(grads), "learning_rate": rate}
    metrics["tokens"] = (batch.segments >= 0).sum()
    return TrainState(model, opt_state, state.hyper, state.step + 1), metrics


def z_loss(log_normalizers: Float[Array, "R L"], response_mask: Bool[Array, "R L"]) -> Float[Array, ""]:
    """The mean of log^2 Z over the positions that predict a response's token: 0 where logits are log-probabilities.

    Source: PaLM (arXiv 2204.02311), section 5, which adds 1e-4 of it.
    """
    return jnp.sum(jnp.where(response_mask, log_normalizers, 0.0) ** 2) / response_mask.sum()


def with_z_loss(loss: Loss, weight: float) -> Loss:
    """A loss of `ResponseLogps`: that of their log-probabilities, and `weight` times their z-loss."""

    def total(outputs: ResponseLogps, batch: Batch, hyper: Hyper, fraction: Any) -> tuple[Any, Metrics]:
        value, metrics = loss(outputs.logps, batch, hyper, fraction)
        z = z_loss(outputs.log_normalizers, batch.response_mask)
        return value + weight * z, metrics | {"z_loss": z}

    return total


def sft_loss(logps: Float[Array, "..."], batch: Batch, hyper: Hyper, fraction: Any) -> tuple[Any, Metrics]:
    """Negative log-likelihood per response token (nats) of the responses, end of sequence included; it reads no more
    of the log-probabilities than their sum, which will do."""
    return -jnp.sum(logps) / batch.response_mask.sum(), {}


def reward_loss(rewards: Outputs, batch: Batch, hyper: Hyper, fraction: Any) -> tuple[Any, Metrics]:
    """Eq. 2 over the batch; responses 0 and 1 are chosen and rejected."""
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {"rewards/accuracies": (margins > 0).mean(), "rewards/margins": margins.mean()}
    return jax.vmap(bradley_terry)(margins).mean(), metrics


def preference_loss(
    method: str, logps: Outputs, batch: Batch, hyper: Hyper, fraction: Any
) -> tuple[Any, Metrics]:
    """The loss of one row of `METHODS`; responses are chosen, rejected and any samples y ~ pi_ref (Eq. 11's KL)."""
    ref = batch.ref_logps
    margins = jax.vmap(log_ratio_margin)(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1])
    reward_margins = (batch.scores[:, 0] - batch.scores[:, 1]).T
    kls = jax.vmap(jax.vmap(sampled_forward_kl))(ref[:, 2:], logps[:, 2:]).ravel()
    row = METHODS[method]
    if kls.size:
        row = row._replace(gamma=(hyper.gamma[0], hyper.gamma[1]))  # type: ignore[arg-type]  # traced floats
    loss = method_loss(row, margins, reward_margins, kls, hyper.strength, fraction)
    metrics = preference_metrics(logps, margins, batch, hyper)
    if kls.size:
        metrics["kl"] = kls.mean()
    if row.weights:
        metrics["ensemble/weights"] = row.weights(margins, reward_margins, hyper.strength)
        metrics["ensemble/nearest"] = nearest_shares(margins, reward_margins, hyper.strength)
    return loss, metrics


def preference_metrics(logps: Outputs, margins: Float[Array, " B"], batch: Batch, hyper: Hyper) -> Metrics:
    """Batch means under the names that users of other trainers know; rewards are implicit: beta log pi / pi_ref."""
    rewards = hyper.strength * (logps[:, :2] - batch.ref_logps[:, :2])
    return {
        "logps/chosen": logps[:, 0].mean(),
        "logps/rejected": logps[:, 1].mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": hyper.strength * margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
    }


def loss_of(method: str) -> Loss:
    return partial(preference_loss, method)
