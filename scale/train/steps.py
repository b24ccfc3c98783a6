"""The compiled training steps: what a policy, a language model and a reward model minimise.

Each is `minipref.train_step` with a loss of this model's outputs; no formula stands here.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from minipref.batch import Batch, Inputs
from minipref.losses import Metrics, preference_loss, reward_loss, sft_loss, z_loss
from minipref.methods import METHODS
from minipref.reward_models import RewardModel
from minipref.training import Hyperparameters, LossFn, TrainState, init_state, train_step
from scale.model.adapters import combine
from scale.model.response_logps import response_logps, total_logp
from scale.model.transformer import Transformer
from scale.parallel.sharding import constrain, initialise, runtime_of
from scale.train.optimizer import OptimizerConfig, Schedule, learning_rate, make_optimizer

Loss = tuple[Any, Metrics]
Step = tuple[TrainState, Metrics]


def start_state(
    model: Any,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    peak_lr: float,
    hyperparameters: Hyperparameters | None = None,
) -> TrainState:
    """The state before the first step, sharded by the rules. It takes over the model's buffers."""
    transform = make_optimizer(optimizer.optimizer, schedule, peak_lr)

    def start(model: Any) -> TrainState:
        return init_state(model, transform, schedule.num_steps, hyperparameters)

    return initialise(start, model, donate=(0,))


def start_reward_states(models: RewardModel, schedule: Schedule, peak_lr: float) -> TrainState:
    """The states of K stacked reward models before the first `reward_step`, as `start_state`."""
    transform = make_optimizer(OptimizerConfig().optimizer, schedule, peak_lr)

    @eqx.filter_vmap
    def start(model: RewardModel) -> TrainState:
        return init_state(model, transform, schedule.num_steps)

    return initialise(start, models, donate=(0,))


def over_parts(function: Callable[[Inputs], Any], inputs: Inputs) -> Any:
    """`function` of the inputs, or of each of M parts [M, ...] in turn.

    The backward pass computes a part again, so that the activations of one are in memory at a time.
    What the loss reads is of all parts, so that its gradient is the whole batch's for every method,
    also where a minimum over reward models is taken over the batch.
    """
    if inputs.tokens.ndim == 2:
        return function(inputs)
    return jax.lax.map(jax.checkpoint(function), inputs)


def policy_loss(
    method: str,
    z_loss_weight: float,
    model: Transformer,
    batch: Batch,
    hyperparameters: Hyperparameters,
    progress: Any,
) -> Loss:
    """The loss of a row of `METHODS`, and the z-loss where it has a weight."""
    logps, log_normalizers = over_parts(partial(response_logps, model), batch.inputs)
    penalty, penalty_metrics = z_loss_penalty(log_normalizers, batch.inputs, z_loss_weight)
    row, (beta, gamma) = METHODS[method], hyperparameters
    loss, metrics = preference_loss(
        method,
        logps.reshape(batch.targets.ref_logps.shape),
        batch.targets.ref_logps,
        rewards=None if row.rewards == "none" else jnp.moveaxis(batch.targets.rewards, 2, 0),
        beta=beta,
        gamma=None if row.gamma is None else gamma,
        progress=progress,
    )
    return loss + penalty, metrics | penalty_metrics


def language_model_loss(z_loss_weight: float, model: Transformer, batch: Batch, *_: Any) -> Loss:
    """The negative log-likelihood of responses, and the z-loss where it has a weight."""
    num_tokens = batch.inputs.response_mask.sum()
    if not z_loss_weight:
        return sft_loss(over_parts(partial(total_logp, model), batch.inputs), num_tokens)
    logps, log_normalizers = over_parts(partial(response_logps, model), batch.inputs)
    penalty, metrics = z_loss_penalty(log_normalizers, batch.inputs, z_loss_weight)
    return sft_loss(logps, num_tokens)[0] + penalty, metrics


def reward_model_loss(model: RewardModel, batch: Batch, *_: Any) -> Loss:
    """The Bradley-Terry loss of a reward model."""
    rewards = over_parts(lambda inputs: model(inputs), batch.inputs)  # JAX hashes the function
    return reward_loss(rewards.reshape(-1, rewards.shape[-1]))


def z_loss_penalty(log_normalizers: Array, inputs: Inputs, weight: float) -> Loss:
    """The weighted z-loss and its metric; neither without a weight."""
    if not weight:
        return 0.0, {}
    penalty = z_loss(log_normalizers, inputs.response_mask)
    return weight * penalty, {"z_loss": penalty}


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def policy_step(
    method: str,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    state: TrainState,
    batch: Batch,
    frozen: Any = None,
) -> Step:
    """One step of alignment; of the model, `frozen` is not trained."""
    loss_fn = partial(policy_loss, method, optimizer.z_loss)
    return update(loss_fn, optimizer, schedule, state, batch, frozen)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def sft_step(
    optimizer: OptimizerConfig,
    schedule: Schedule,
    state: TrainState,
    batch: Batch,
    frozen: Any = None,
) -> Step:
    """One step of supervised fine-tuning; of the model, `frozen` is not trained."""
    loss_fn = partial(language_model_loss, optimizer.z_loss)
    return update(loss_fn, optimizer, schedule, state, batch, frozen)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def reward_step(
    schedule: Schedule, states: TrainState, batches: Batch, frozen: Any = None
) -> Step:
    """One step of each of K reward models, each on its own batch; all have `frozen` in common.

    They take turns: side by side (`vmap`) is twice as slow on a CPU, and needs K times the memory
    for activations.
    """
    step = partial(update, reward_model_loss, OptimizerConfig(), schedule, frozen=frozen)
    steps = jax.lax.map(lambda both: step(*both), (states, batches))
    return constrain(steps, runtime_of(states.model))


def update(
    loss_fn: LossFn,
    optimizer: OptimizerConfig,
    schedule: Schedule,
    state: TrainState,
    batch: Batch,
    frozen: Any = None,
) -> Step:
    """`train_step`, sharded by the rules, with the metrics of a run."""
    transform = make_optimizer(optimizer.optimizer, schedule)

    def loss_of_whole(trained: Any, *rest: Any) -> Loss:
        return loss_fn(combine(trained, frozen), *rest)

    new, metrics = train_step(loss_of_whole, transform, state, batch)
    metrics["learning_rate"] = learning_rate(schedule, state)
    metrics["tokens"] = (batch.inputs.segment_ids >= 0).sum()
    return constrain((new, metrics), runtime_of(state.model))
