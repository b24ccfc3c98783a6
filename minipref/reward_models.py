"""Explicit reward models r(x, y) and ensembles of them (sections 3.1 and 5.2)."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from minipref.batch import Batch, response_rewards


class RewardModel(eqx.Module):
    """A trunk (batch -> hidden states [B, T, D]) and a scalar head, read at each response's last slot."""

    trunk: Callable
    head: Float[Array, "*K D"]

    def __init__(self, trunk: Callable, width: int, key: PRNGKeyArray):
        self.trunk = trunk
        self.head = jax.random.normal(key, (width,)) / width

    def __call__(self, batch: Batch) -> Float[Array, "B n"]:
        return response_rewards(self.trunk(batch), self.head, batch)


def stack(members: list[Any]) -> Any:
    """K modules of one shape as one module whose arrays have a leading axis K, for `eqx.filter_vmap`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0], *members)


def ensemble_rewards(models: RewardModel, batch: Batch) -> Float[Array, "B n K"]:
    """Rewards of one batch under each of the K stacked reward models, one after another: memory for one."""
    arrays, static = eqx.partition(models, eqx.is_array)
    return jnp.moveaxis(jax.lax.map(lambda member: eqx.combine(member, static)(batch), arrays), 0, -1)
