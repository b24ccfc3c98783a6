"""The training step: a pure function `(state, batch) -> (state, metrics)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from minipref.losses import Metrics

LossFn = Callable[[Any, Any, Any, Any], tuple[Float[Array, ""], Metrics]]


class Hyperparameters(NamedTuple):
    """What a preference loss takes, as arrays: one compiled step serves every value.

    Attributes:
        beta: Scalar.
        gamma: The weight of the KL term at the first and at the last step [2].
    """

    beta: Float[Array, ""]
    gamma: Float[Array, "2"]


class TrainState(NamedTuple):
    """All that a step changes or depends on besides the batch.

    Attributes:
        model: A pytree; its floating-point arrays are trained.
        opt_state: The state of the optimizer.
        hyperparameters: What the loss takes besides model and batch; any pytree.
        step: How many steps are done.
        num_steps: How many steps the run has.
    """

    model: Any
    opt_state: Any
    hyperparameters: Any
    step: Int[Array, ""]
    num_steps: Int[Array, ""]


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    num_steps: ArrayLike,
    hyperparameters: Any = None,
) -> TrainState:
    """The state before the first step.

    Args:
        model: A pytree; its floating-point arrays are trained.
        optimizer: Any optax optimizer, the learning rate included.
        num_steps: How many steps the run has.
        hyperparameters: What the loss takes besides model and batch.

    Returns:
        The state.
    """
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    zero, last = jnp.zeros((), jnp.int32), jnp.asarray(num_steps, jnp.int32)
    return TrainState(model, opt_state, hyperparameters, zero, last)


def progress(state: TrainState) -> Float[Array, ""]:
    """0 at the first step, 1 at the last: what anneals gamma (section 6.1)."""
    return state.step / jnp.maximum(state.num_steps - 1, 1)


def train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, state: TrainState, batch: Any
) -> tuple[TrainState, Metrics]:
    """One update of the model.

    Args:
        loss_fn: `(model, batch, hyperparameters, progress) -> (loss, metrics)`.
        optimizer: The optimizer that `init_state` was given.
        state: The state before the step.
        batch: Whatever `loss_fn` reads.

    Returns:
        The state after the step, and the metrics with `loss` and `grad_norm`.
    """

    def loss_of_model(model: Any) -> tuple[Float[Array, ""], Metrics]:
        return loss_fn(model, batch, state.hyperparameters, progress(state))

    (loss, metrics), grads = eqx.filter_value_and_grad(loss_of_model, has_aux=True)(state.model)
    params, rest = eqx.partition(state.model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, state.opt_state, params)
    model = eqx.combine(optax.apply_updates(params, updates), rest)
    metrics = metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state._replace(model=model, opt_state=opt_state, step=state.step + 1), metrics
