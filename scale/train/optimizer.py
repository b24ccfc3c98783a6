"""What a language model's training step consists of besides its loss: the optimiser and the z-loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import optax
from jax.tree_util import GetAttrKey

from minipref.batch import Batch
from minipref.training import Hyper, Loss, Metrics, TrainState, init_state, train_step, with_z_loss
from scale.model.response_logps import logps, logps_and_normalizers
from scale.parallel.sharding import constrain, initialise, runtime_of


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights follow from the gradients."""

    optimizer: Literal["adam", "adafactor"] = "adam"
    """adafactor: PaLM's, whose learning rates are relative to the size of the parameters."""
    z_loss: float = 0.0
    """Weight of log^2 Z (PaLM: 1e-4)."""


def by_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A stateless transformation of whole parameters, applied to each layer of the stacked ones by itself."""

    def one(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        def apply(u: jax.Array, p: jax.Array) -> jax.Array:
            return transform.update(u, optax.EmptyState(), p)[0]

        return jax.vmap(apply)(update, param) if GetAttrKey("blocks") in path else apply(update, param)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(one, updates, params))


ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))


ADAFACTOR = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_factored_rms(factored=False, decay_rate=0.8),
    by_layer(optax.clip_by_block_rms(1.0)),
    by_layer(optax.scale_by_param_block_rms()),
    optax.ema(0.9, debias=False),
)
"""PaLM's (arXiv 2204.02311, section 5): second moments unfactored, with decay 1 - t^-0.8; steps relative to each
parameter's RMS; momentum 0.9; global norm clipped to 1. Its weight decay of the squared learning rate is left out:
fine-tuning is anchored by its KL and by how short it is."""


OPTIMIZERS = {"adam": ADAM, "adafactor": ADAFACTOR}


def start_state(model: Any, optimizer_config: OptimizerConfig, values: Hyper) -> TrainState:
    """Step 0, the optimiser's state where the rules put it. Takes over the model's buffers."""
    return initialise(partial(init_state, optimizer=OPTIMIZERS[optimizer_config.optimizer], hyper=values), model, donate=(0,))


def language_step(
    loss: Loss, optimizer_config: OptimizerConfig, state: TrainState, batch: Batch, forward: Callable[..., Any] = logps
) -> tuple[TrainState, Metrics]:
    """One update of a language model by a loss of its responses' log-probabilities, or of what `forward` says."""
    if optimizer_config.z_loss:
        forward, loss = logps_and_normalizers, with_z_loss(loss, optimizer_config.z_loss)
    made = train_step(forward, loss, OPTIMIZERS[optimizer_config.optimizer], state, batch)
    return constrain(made, runtime_of(state.model))
