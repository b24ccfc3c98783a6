"""A decoder as one Equinox module with scanned layers, PaLM-shaped or Llama-shaped by its config.

PaLM (arXiv 2204.02311), the default: the parallel block y = x + MLP(LN x) + Attn(LN x) with one
LayerNorm, SwiGLU, multi-query attention, RoPE, tied embeddings with logits scaled by 1/sqrt(d), no
biases. Llama: the sequential block z = x + Attn(RMS x), y = z + MLP(RMS z), grouped-query
attention, logits not scaled. Qwen: Llama with biases or norms of queries and keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from minipref.batch import Inputs
from scale.data.layout import layout_of
from scale.model.attention import attention
from scale.model.config import ModelConfig
from scale.model.layers import (
    NORMS,
    Block,
    normal_embedding,
    rope_frequencies,
    rope_rotation,
)
from scale.model.packed_attention import by_example
from scale.parallel.mesh import BATCH, ONE_DEVICE, Runtime
from scale.parallel.sharding import constrain

UNROLLED = {"cpu": 8, "gpu": 16, "tpu": 8}
"""The most layers that are compiled one after another: faster than a loop, but slow to compile."""

KERNELS = "pallas_call", "dot_product_attention_fwd_wrapper"  # splash attention's, and cuDNN's


def saves_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """The policy of `remat` "dots": keep products with weights, and what attention kernels give."""
    product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return product or primitive.name in KERNELS


REMAT = {"dots": saves_products, "full": None}


class Transformer(eqx.Module):
    """A decoder. `blocks` are stacked along a leading axis; `head` is None for tied embeddings."""

    embedding: Float[Array, "V E"]
    head: Float[Array, "V E"] | None
    blocks: Block
    norm: Float[Array, " D"]
    runtime: Runtime = eqx.field(static=True)

    def __init__(self, config: ModelConfig, key: PRNGKeyArray, runtime: Runtime = ONE_DEVICE):
        embedding_key, blocks_key = jax.random.split(key)
        d = config.d_model
        draw = partial(normal_embedding, vocab_size=config.vocab_size, width=d, runtime=runtime)
        self.embedding = draw(embedding_key, fan_in=1 if config.scaled_logits else d)
        self.head = None if config.tie_embeddings else draw(jax.random.fold_in(key, 2), fan_in=d)
        keys = jax.random.split(blocks_key, config.num_layers)
        # map, not vmap: random bits need memory for one layer only
        self.blocks = jax.lax.map(lambda k: constrain(Block(config, k), runtime), keys)
        self.norm = jnp.ones(d)
        self.runtime = runtime

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.blocks.config

    @property
    def unembedding(self) -> Float[Array, "V E"]:
        """The output layer."""
        return self.embedding if self.head is None else self.head

    def __call__(self, inputs: Inputs) -> Float[Array, "R W D"]:
        """Final hidden states along packed sequences, as `hidden` scales them."""
        kind, mesh = self.runtime.attention, self.runtime.mesh
        attend = attention(kind, inputs.segment_ids, layout_of(inputs), mesh)
        return self.hidden(inputs.tokens, inputs.positions, by_example(attend, inputs))[0]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Callable[..., Array],
        cache: Any = None,
        return_keys: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states of tokens, and their keys and values for sampling.

        Args:
            tokens: Token ids [B, T].
            positions: Positions of the tokens in RoPE [B, T].
            attend: Attention of queries over keys and values of these T tokens; where there is a
                cache, with the layer's part of it as `cache`.
            cache: Arrays about earlier tokens, with a leading axis for the layers.
            return_keys: Whether to return keys and values.

        Returns:
            Hidden states [B, T, D], scaled so that their product with `unembedding` is the logits;
            and the `KeysValues` of these tokens [L, B, T, G, k], or None.
        """
        rotation = rope_rotation(positions, rope_frequencies(self.config))
        scale = self.config.d_model**-0.5 if self.config.scaled_logits else 1.0

        def layer(x, block_and_cache):
            block, layer_cache = block_and_cache
            block = constrain(block, self.runtime)  # so that its gradient is scattered, not copied
            own = attend if layer_cache is None else partial(attend, cache=layer_cache)
            x, new = block(x, rotation, own)
            return self.residual(x), new if return_keys else None

        x = self.residual(self.embedding[tokens].astype(self.runtime.dtype))
        step = layer if return_keys else self.checkpointed(layer)
        x, new = jax.lax.scan(step, x, (self.blocks, cache), unroll=self.unrolled)
        return NORMS[self.config.norm](x, self.norm * scale, self.config.norm_eps), new

    @property
    def unrolled(self) -> bool:
        """Whether layers are compiled one after another, not as one loop."""
        return self.config.num_layers <= UNROLLED[self.runtime.platform]

    def checkpointed(self, layer: Callable) -> Callable:
        """The layer, whose activations the backward pass recomputes as `remat` says."""
        fastest = "none" if self.unrolled and self.runtime.platform == "cpu" else "dots"
        remat = fastest if self.runtime.remat == "auto" else self.runtime.remat
        if remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=self.unrolled)

    def residual(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream between layers, split over every axis of the mesh.

        The backward pass keeps it, so its memory counts.
        """
        return self.runtime.constrain(x, BATCH, None, "tensor")


def parameter_count(model: Transformer) -> int:
    """The numbers that the model's arrays hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))
