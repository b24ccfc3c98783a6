"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen model with a few weights that are trained.

An adapter stands in a model in the place of a product's weights. Which arrays of a model are
trained is thereby a property of the model itself: `partition` tells them apart.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from minipref.reward_models import RewardModel

Product = Literal["query", "key_value", "attention_out", "gate_up", "mlp_out"]
PRODUCTS: tuple[Product, ...] = get_args(Product)
INPUT_AXES = {"attention_out": 2}  # H and k; the input of every other product has one axis


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters, which are trained in place of a model's weights."""

    rank: int = 0
    """Rank of each adapter. 0: no adapters, all weights are trained."""
    scale: float = 2.0
    """Factor of what an adapter adds: LoRA's alpha / rank."""
    products: tuple[Product, ...] = PRODUCTS
    """The products with weights that have an adapter."""


class Adapted(eqx.Module):
    """The weights W + scale * down @ up of a product, of which W is frozen.

    `key_value` and `gate_up` are two products each; both read one `down`.

    Attributes:
        weights: W, with the axes of the inputs and then of the results.
        down: The axes of the inputs, and then the rank.
        up: The rank, and then the axes of the results. 0 at first.
        scale: LoRA's alpha / rank.
    """

    weights: Float[Array, "..."]
    down: Float[Array, "*inputs"]
    up: Float[Array, "*results"]
    scale: float = eqx.field(static=True)

    def __getitem__(self, index: Any) -> "Adapted":
        """One of two products that read the same inputs."""
        return Adapted(self.weights[index], self.down, self.up[index], self.scale)


def adapted(model: Any, config: AdapterConfig, key: PRNGKeyArray) -> Any:
    """A model with new adapters, which computes what it did before.

    Args:
        model: A `Transformer`; its own adapters, if it has any, are replaced.
        config: The adapters; none where the rank is 0.
        key: `down` is normal with variance 1 / inputs.

    Returns:
        The model; its own arrays are those of `model`.
    """
    if not config.rank:
        return model

    def places(model: Any) -> list[Any]:
        return [getattr(model.blocks, name) for name in config.products]

    keys = jax.random.split(key, len(config.products))
    products = zip(config.products, places(model), keys, strict=True)
    adapters = [adapter(weights_of(node), name, config, key) for name, node, key in products]
    return eqx.tree_at(places, model, adapters)


def adapter(
    weights: Float[Array, "..."], product: Product, config: AdapterConfig, key: PRNGKeyArray
) -> Adapted:
    """An adapter of weights [layers, *inputs, *results], which adds nothing yet."""
    axes = 1 + INPUT_AXES.get(product, 1)
    (layers, *inputs), results = weights.shape[:axes], weights.shape[axes:]
    down = jax.random.normal(key, (layers, *inputs, config.rank)) / jnp.sqrt(prod(inputs))
    return Adapted(weights, down, jnp.zeros((layers, config.rank, *results)), config.scale)


def merged(model: Any) -> Any:
    """A model without adapters that computes the same: each is added to its weights, in float32."""

    def merge(node: Any) -> Any:
        if not isinstance(node, Adapted):
            return node
        rank, layers = node.up.shape[1], len(node.up)
        down, up = node.down.reshape(layers, -1, rank), node.up.reshape(layers, rank, -1)
        added = jnp.einsum("lir,lro->lio", down, up).reshape(node.weights.shape)
        return node.weights.astype(jnp.float32) + node.scale * added

    return jax.tree.map(merge, model, is_leaf=is_adapter)


def partition(model: Any) -> tuple[Any, Any]:
    """The arrays of a model that are trained, and the rest.

    Args:
        model: A `Transformer`, or one or several stacked `RewardModel`s.

    Returns:
        Two trees for `combine`: adapters and the head of a reward model, and the frozen model.
        Without adapters the model itself, and None.
    """
    if adapter_config(model) is None:
        return model, None
    trained = jax.tree.map(lambda leaf: False, model)
    trained = eqx.tree_at(
        lambda tree: [array for a in adapters_of(tree) for array in (a.down, a.up)],
        trained,
        replace_fn=lambda _: True,
    )
    if isinstance(model, RewardModel):
        trained = eqx.tree_at(lambda tree: tree.head, trained, True)
    return eqx.partition(model, trained)


def combine(trained: Any, frozen: Any) -> Any:
    """The model of the two trees of `partition`."""
    return trained if frozen is None else eqx.combine(trained, frozen)


def adapter_config(model: Any) -> AdapterConfig | None:
    """The adapters that a model has, or None."""
    blocks = trunk_of(model).blocks
    products = tuple(name for name in PRODUCTS if is_adapter(getattr(blocks, name)))
    if not products:
        return None
    first = getattr(blocks, products[0])
    return AdapterConfig(first.down.shape[-1], first.scale, products)


def adapters_of(tree: Any) -> list[Adapted]:
    """The adapters in a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_adapter) if is_adapter(node)]


def weights_of(node: Any) -> Any:
    """The weights of a product, without its adapter."""
    return node.weights if is_adapter(node) else node


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is an adapter."""
    return isinstance(node, Adapted)


def stored(model: Any, dtype: Any) -> Any:
    """A model whose matrices have a dtype: that of its activations loses nothing.

    Norms, biases and adapters stay as they are.
    """
    return eqx.tree_at(matrices, model, replace_fn=lambda weights: weights.astype(dtype))


def matrices(model: Any) -> list[Any]:
    """The weights of all products, the embedding, and the head of a `Transformer`."""
    trunk = trunk_of(model)
    products = (getattr(trunk.blocks, name) for name in PRODUCTS)
    head = [] if trunk.head is None else [trunk.head]
    return [*map(weights_of, products), trunk.embedding, *head]


def trunk_of(model: Any) -> Any:
    """The `Transformer` of a policy, which it is itself, or of reward models."""
    return model.trunk if isinstance(model, RewardModel) else model
