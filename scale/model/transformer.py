"""A decoder as one Equinox module with scanned layers; its configuration makes it PaLM-shaped or Llama-shaped.

PaLM (arXiv 2204.02311), the default: parallel block y = x + MLP(LN x) + Attn(LN x) with one LayerNorm, SwiGLU,
multi-query attention, RoPE, tied embeddings with logits scaled by 1/sqrt(d), no biases. Llama: sequential block
z = x + Attn(RMS x), y = z + MLP(RMS z), grouped-query attention, logits not scaled; and what Qwen adds to it.
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
from scale.model.attention import Attend, attention
from scale.model.config import ModelConfig
from scale.model.layers import NORMS, Block, Cache, angles, frequencies, table
from scale.model.packed_attention import by_example
from scale.parallel.mesh import BATCH, ONE_DEVICE, Runtime
from scale.parallel.sharding import constrain

UNROLLED = {"cpu": 8, "gpu": 16, "tpu": 8}  # layers at most that are laid out one after another, which compiles slowly


KERNELS = "pallas_call", "dot_product_attention_fwd_wrapper"  # of splash attention, and cuDNN's


def saves_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """What `remat` "dots" keeps: products with weights, and what attention's kernels give."""
    product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return product or primitive.name in KERNELS


REMAT = {"dots": saves_products, "full": None}


class Transformer(eqx.Module):
    embedding: Float[Array, "V E"]
    head: Float[Array, "V E"] | None
    blocks: Block
    norm: Float[Array, " D"]
    runtime: Runtime = eqx.field(static=True)

    def __init__(self, config: ModelConfig, key: PRNGKeyArray, runtime: Runtime = ONE_DEVICE):
        embedding_key, blocks_key = jax.random.split(key)
        d = config.d_model
        draw = partial(table, vocab_size=config.vocab_size, width=d, runtime=runtime)
        self.embedding = draw(embedding_key, fan_in=1 if config.scaled_logits else d)
        self.head = None if config.tie_embeddings else draw(jax.random.fold_in(key, 2), fan_in=d)
        keys = jax.random.split(blocks_key, config.num_layers)
        self.blocks = jax.lax.map(lambda k: constrain(Block(config, k), runtime), keys)  # bits of one layer at a time
        self.norm = jnp.ones(d)
        self.runtime = runtime

    @property
    def config(self) -> ModelConfig:
        return self.blocks.config

    @property
    def unembedding(self) -> Float[Array, "V E"]:
        return self.embedding if self.head is None else self.head

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        cache: Cache | None = None,
        slot: int | Int[Array, ""] = 0,
        keep: bool = False,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states, scaled so that their product with `unembedding` is the logits; the cache, if kept."""
        rotation = angles(positions, frequencies(self.config))
        scale = self.config.d_model**-0.5 if self.config.scaled_logits else 1.0

        def layer(x, block_and_cache):
            block, layer_cache = block_and_cache
            block = constrain(block, self.runtime)  # and so its gradient, which is then scattered and not copied
            x, new = block(x, rotation, attend, layer_cache, slot)
            return self.residual(x), new if keeps else None

        keeps = keep or cache is not None
        x = self.residual(self.embedding[tokens].astype(self.runtime.dtype))
        step = layer if keeps else self.checkpointed(layer)
        x, new = jax.lax.scan(step, x, (self.blocks, cache), unroll=self.laid_out)
        return NORMS[self.config.norm](x, self.norm * scale, self.config.norm_eps), new

    @property
    def laid_out(self) -> bool:
        """Whether layers are compiled one after another, not as one loop."""
        return self.config.num_layers <= UNROLLED[self.runtime.platform]

    def checkpointed(self, layer: Callable) -> Callable:
        """`layer`, of which the backward pass computes again what `remat` says."""
        fastest = "none" if self.laid_out and self.runtime.platform == "cpu" else "dots"
        remat = fastest if self.runtime.remat == "auto" else self.runtime.remat
        return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=self.laid_out)

    def residual(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What a layer hands on, and the backward pass keeps, is split over every axis of the mesh."""
        return self.runtime.constrain(x, BATCH, None, "tensor")

    def __call__(self, inputs: Inputs) -> Float[Array, "R W D"]:
        """Final hidden states along the packed sequences."""
        kind, mesh = self.runtime.attention, self.runtime.mesh
        attend = attention(kind, inputs.segment_ids, layout_of(inputs), mesh)
        return self.hidden(inputs.tokens, inputs.positions, by_example(attend, inputs))[0]


def parameter_count(model: Transformer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model))
