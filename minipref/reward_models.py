"""Explicit reward models r(x, y), and ensembles of them (sections 3.1 and 5.2)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from minipref.batch import Inputs
from minipref.logps import response_rewards


class RewardModel(eqx.Module):
    """A trunk and a scalar head, which reads the hidden state at the last token of each response.

    Attributes:
        trunk: `Inputs` -> hidden states [R, W, D].
        head: [D]; [K, D] for K stacked models.
    """

    trunk: Callable
    head: Float[Array, "*K D"]

    def __init__(self, trunk: Callable, width: int, key: PRNGKeyArray):
        self.trunk = trunk
        self.head = jax.random.normal(key, (width,)) / width

    def __call__(self, inputs: Inputs) -> Float[Array, "B n"]:
        return response_rewards(self.trunk(inputs), self.head, inputs)


def stack(models: list[Any]) -> Any:
    """K modules of one shape as one module, whose arrays have a leading axis K for `vmap`."""
    return jax.tree.map(
        lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *models
    )


def ensemble_rewards(
    models: RewardModel, inputs: Inputs, common: RewardModel | None = None
) -> Float[Array, "B n K"]:
    """The rewards by K stacked models, one after another, so that memory is that of one.

    Args:
        models: K reward models, stacked.
        inputs: The packed sequences.
        common: A reward model with the arrays that all K have in common, which `models` lacks.

    Returns:
        [B, n, K].
    """
    arrays, static = eqx.partition(models, eqx.is_array)
    rest = static if common is None else eqx.combine(static, common)
    rewards = jax.lax.map(lambda model: eqx.combine(model, rest)(inputs), arrays)
    return jnp.moveaxis(rewards, 0, -1)
