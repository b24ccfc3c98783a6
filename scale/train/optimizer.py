"""The optimizer of a run and its learning rate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import optax
from jax.tree_util import GetAttrKey
from jaxtyping import Array, Float

from minipref.training import TrainState


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights follow from the gradients."""

    optimizer: Literal["adam", "adafactor"] = "adam"
    """adafactor: PaLM's, whose learning rates are relative to the size of the parameters."""
    z_loss: float = 0.0
    """Weight of log^2 Z in the loss (PaLM: 1e-4)."""


class Schedule(NamedTuple):
    """The learning rate as a share of its peak: a linear warm-up times a linear decay."""

    warmup: int
    end_lr_ratio: float
    num_steps: int

    def __call__(self, step: Any) -> Float[Array, ""]:
        """The share at a step, counted from 0."""
        first = 1 / max(self.warmup, 1)
        warmup = optax.linear_schedule(first, 1.0, max(self.warmup - 1, 1))
        decay = optax.linear_schedule(1.0, self.end_lr_ratio, max(self.num_steps - 1, 1))
        return warmup(step) * decay(step)


def by_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A stateless transformation of whole parameters, applied to each layer of stacked ones."""

    def apply(update: jax.Array, param: jax.Array) -> jax.Array:
        return transform.update(update, optax.EmptyState(), param)[0]

    def apply_at(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        function = jax.vmap(apply) if GetAttrKey("blocks") in path else apply
        return function(update, param)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(apply_at, updates, params)
    )


ADAM = (optax.scale_by_adam(b2=0.99),)
ADAFACTOR = (
    optax.scale_by_factored_rms(factored=False, decay_rate=0.8),
    by_layer(optax.clip_by_block_rms(1.0)),
    by_layer(optax.scale_by_param_block_rms()),
    optax.ema(0.9, debias=False),
)
"""PaLM's (arXiv 2204.02311, section 5): second moments unfactored, with decay 1 - t^-0.8; updates
relative to the RMS of each parameter; momentum 0.9. Its weight decay of the squared learning rate
is left out: a fine-tuning is short, and its KL term anchors it."""

OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, ...]] = {
    "adam": ADAM,
    "adafactor": ADAFACTOR,
}


def make_optimizer(
    name: str, schedule: Schedule, peak_lr: float = 0.0
) -> optax.GradientTransformation:
    """An optimizer of OPTIMIZERS, with gradients clipped to a global norm of 1.

    The peak learning rate is part of the optimizer's state, so that one compiled step serves every
    rate; `peak_lr` matters to `init` alone.

    Args:
        name: A key of OPTIMIZERS.
        schedule: Static: another schedule is another compiled step.
        peak_lr: The peak learning rate.

    Returns:
        An optax optimizer.
    """

    def chain(peak_lr: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            *OPTIMIZERS[name],
            optax.scale_by_schedule(schedule),
            optax.scale_by_learning_rate(peak_lr),
        )

    inject: Callable[..., Any] = optax.inject_hyperparams(chain)
    return inject(peak_lr=peak_lr)


def learning_rate(schedule: Schedule, state: TrainState) -> Float[Array, ""]:
    """The learning rate of the next step."""
    return state.opt_state.hyperparams["peak_lr"] * schedule(state.step)
