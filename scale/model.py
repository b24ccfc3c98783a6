"""A decoder as one Equinox module with scanned layers; its configuration makes it PaLM-shaped or Llama-shaped.

PaLM (arXiv 2204.02311), the default: parallel block y = x + MLP(LN x) + Attn(LN x) with one LayerNorm, SwiGLU,
multi-query attention, RoPE, tied embeddings with logits scaled by 1/sqrt(d), no biases. Llama: sequential block
z = x + Attn(RMS x), y = z + MLP(RMS z), grouped-query attention, logits not scaled; and what Qwen adds to it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from minipref.sequences import Batch, ResponseLogps, response_logps_and_normalizers, row_by_row, total_logp
from scale.attention import Attend, attention
from scale.execution import BATCH, ONE_DEVICE, Execution
from scale.packing import layout_of
from scale.sharding import constrain


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder."""

    vocab: int = 1024
    """Rows of the embedding: the tokenizer's vocabulary."""
    layers: int = 2
    """Transformer blocks."""
    d_model: int = 64
    """Width of the residual stream."""
    heads: int = 2
    """Query heads."""
    head_size: int = 32
    """Width of a head, an even number."""
    d_ff: int = 256
    """Width of the SwiGLU's hidden layer."""
    rope_base: float = 10_000.0
    """Base of the rotary angles."""
    kv_heads: int = 1
    """Key/value heads, a divisor of the query heads."""
    block: Literal["parallel", "sequential"] = "parallel"
    """Attention and MLP side by side (PaLM), or one after the other (Llama)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm without bias, or RMSNorm."""
    norm_eps: float = 1e-6
    """What is added to the variance."""
    tied: bool = True
    """Whether the embedding is the output layer too."""
    scaled_logits: bool = True
    """Whether logits are divided by sqrt(d_model) (PaLM)."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether queries and keys are normalised, each head by itself (Qwen3)."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3.1's slower rotation: factor, low and high frequency factor, original length. None: as it is."""
    context: int = 2048
    """Longest sequence that other programs shall allow an exported model."""


Rotation: TypeAlias = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
LOGITS = {"cpu": 2**25, "gpu": 2**28, "tpu": 2**28}  # a device at a time
DRAWN = 2**24  # numbers of an embedding that are drawn at a time
UNROLLED = {"cpu": 8, "gpu": 16, "tpu": 8}  # layers at most that are laid out one after another, which compiles slowly
KERNELS = "pallas_call", "dot_product_attention_fwd_wrapper"  # of splash attention, and cuDNN's


def saves_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """What `remat` "dots" keeps: products with weights, and what attention's kernels give."""
    product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    return product or primitive.name in KERNELS


REMAT = {"dots": saves_products, "full": None}


class Cache(NamedTuple):
    """Keys and values, of every layer or of one."""

    keys: Float[Array, "*layers B S G k"]
    values: Float[Array, "*layers B S G k"]


def normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape) / jnp.sqrt(fan_in)


def table(
    key: PRNGKeyArray, vocab: int, width: int, fan_in: int, execution: Execution
) -> Float[Array, "V E"]:
    """A normal [V, E] array, drawn in parts of its columns: memory for the random bits of `DRAWN` numbers."""
    parts = next(n for n in range(1, width + 1) if width % n == 0 and (vocab * width <= n * DRAWN or n == width))
    if parts == 1:
        return normal(key, (vocab, width), fan_in)

    def part(key: PRNGKeyArray) -> Float[Array, "V e"]:
        return execution.constrain(normal(key, (vocab, width // parts), fan_in), "fsdp", None)

    columns = jax.lax.map(part, jax.random.split(key, parts))
    return jnp.moveaxis(columns, 0, 1).reshape(vocab, width)


def frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """Radians a position of each of RoPE's planes: base^(-2i/size), the slow ones slowed further by `rope_scaling`."""
    half = config.head_size // 2
    turn = config.rope_base ** (-np.arange(half) / half)
    if config.rope_scaling is None:
        return turn
    factor, low, high, length = config.rope_scaling
    kept = np.clip((length * turn / (2 * np.pi) - low) / (high - low), 0, 1)
    return turn * (kept + (1 - kept) / factor)


def angles(positions: Int[Array, "B T"], turn: Float[np.ndarray, " half"]) -> Rotation:
    """RoPE's cosines and sines at each position."""
    turned = positions[..., None] * jnp.asarray(turn, jnp.float32)
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x: Float[Array, "B T *H k"], rotation: Rotation) -> Float[Array, "B T *H k"]:
    """RoPE: the two halves of each head turn together."""
    cos, sin = (jnp.expand_dims(a, tuple(range(2, x.ndim - 1))) for a in rotation)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def layer_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """LayerNorm without bias, in float32."""
    wide = x.astype(jnp.float32)
    return rms_norm(wide - wide.mean(-1, keepdims=True), scale, eps).astype(x.dtype)


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """RMSNorm, in float32."""
    wide = x.astype(jnp.float32)
    return times(wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + eps), scale).astype(x.dtype)


@jax.custom_vjp
def times(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    """x * scale. The scale's gradient is, on a CPU, a product with ones: XLA's sum of rows takes much longer."""
    return x * scale


def times_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, scale = kept
    by_scale = jax.lax.platform_dependent(
        slope * x,
        cpu=lambda rows: jnp.einsum("...,...d->d", jnp.ones(rows.shape[:-1]), rows),
        default=lambda rows: rows.sum(range(rows.ndim - 1)),
    )
    return slope * scale, by_scale


times.defvjp(lambda x, scale: (x * scale, (x, scale)), times_backward)


NORMS = {"layer": layer_norm, "rms": rms_norm}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(pattern: str, x: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """An `einsum` whose gradient by the weights is that of x and the result's gradient, in this order.

    JAX's own has the other order, for which XLA on a CPU first writes the result's gradient transposed.
    """
    return jnp.einsum(pattern, x, weights)


def product_forward(pattern: str, x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.einsum(pattern, x, weights), (x, weights)  # not `product`, in which `saves_products` would see none


def product_backward(pattern: str, kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    (x, weights), (of_x, of_weights, of_result) = kept, re.split(",|->", pattern)
    by_x = jnp.einsum(f"{of_result},{of_weights}->{of_x}", slope, weights)
    return by_x, jnp.einsum(f"{of_x},{of_result}->{of_weights}", x, slope)


product.defvjp(product_forward, product_backward)


def project(pattern: str, x: Float[Array, "..."], weights: Float[Array, "..."]) -> Float[Array, "..."]:
    """A product in the type of the activations, whatever that of the weights."""
    return product(pattern, x, weights.astype(x.dtype))


class Block(eqx.Module):
    norm: Float[Array, "*layers D"]
    mlp_norm: Float[Array, "*layers D"] | None
    query: Float[Array, "*layers D H k"]
    key_value: Float[Array, "*layers D 2 G k"]
    query_bias: Float[Array, "*layers H k"] | None
    key_value_bias: Float[Array, "*layers 2 G k"] | None
    query_norm: Float[Array, "*layers k"] | None
    key_norm: Float[Array, "*layers k"] | None
    gate_up: Float[Array, "*layers D 2 F"]
    attention_out: Float[Array, "*layers H k D"]
    mlp_out: Float[Array, "*layers F D"]
    config: ModelConfig = eqx.field(static=True)

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        d, h, g, k, f = config.d_model, config.heads, config.kv_heads, config.head_size, config.d_ff
        keys = jax.random.split(key, 5)
        self.norm = jnp.ones(d)
        self.mlp_norm = jnp.ones(d) if config.block == "sequential" else None
        self.query = normal(keys[0], (d, h, k), d)
        self.key_value = normal(keys[1], (d, 2, g, k), d)
        self.query_bias = jnp.zeros((h, k)) if config.qkv_bias else None
        self.key_value_bias = jnp.zeros((2, g, k)) if config.qkv_bias else None
        self.query_norm = jnp.ones(k) if config.qk_norm else None
        self.key_norm = jnp.ones(k) if config.qk_norm else None
        self.gate_up = normal(keys[2], (d, 2, f), d)
        self.attention_out = normal(keys[3], (h, k, d), h * k)
        self.mlp_out = normal(keys[4], (f, d), f)
        self.config = config

    def __call__(self, x, rotation, attend, cache, slot):
        """`cache`, where given, holds earlier keys and values; this call's go in at `slot`."""
        h = self.normalise(x, self.norm)
        q, new = self.heads(h, rotation)
        if cache is not None:
            new = jax.tree.map(lambda old, n: jax.lax.dynamic_update_slice_in_dim(old, n, slot, axis=1), cache, new)
        attended = project("bthk,hkd->btd", attend(q, *new), self.attention_out)
        if self.mlp_norm is None:
            return x + attended + self.mlp(h), new
        x = x + attended
        return x + self.mlp(self.normalise(x, self.mlp_norm)), new

    def normalise(self, x, scale):
        return NORMS[self.config.norm](x, scale, self.config.norm_eps)

    def heads(self, h, rotation):
        """Queries, and keys and values."""
        q = project("btd,dhk->bthk", h, self.query)
        kv = project("btd,dcgk->btcgk", h, self.key_value)
        if self.query_bias is not None and self.key_value_bias is not None:
            q, kv = q + self.query_bias.astype(q.dtype), kv + self.key_value_bias.astype(q.dtype)
        k, v = jnp.moveaxis(kv, 2, 0)
        if self.query_norm is not None:
            q, k = self.normalise(q, self.query_norm), self.normalise(k, self.key_norm)
        return rotate(q, rotation), Cache(rotate(k, rotation), v)

    def mlp(self, h):
        gate, up = (project("btd,df->btf", h, self.gate_up[:, i]) for i in (0, 1))
        return project("btf,fd->btd", jax.nn.swish(gate) * up, self.mlp_out)


class Transformer(eqx.Module):
    embedding: Float[Array, "V E"]
    head: Float[Array, "V E"] | None
    blocks: Block
    norm: Float[Array, " D"]
    execution: Execution = eqx.field(static=True)

    def __init__(self, config: ModelConfig, key: PRNGKeyArray, execution: Execution = ONE_DEVICE):
        embedding_key, blocks_key = jax.random.split(key)
        d = config.d_model
        draw = partial(table, vocab=config.vocab, width=d, execution=execution)
        self.embedding = draw(embedding_key, fan_in=1 if config.scaled_logits else d)
        self.head = None if config.tied else draw(jax.random.fold_in(key, 2), fan_in=d)
        keys = jax.random.split(blocks_key, config.layers)
        self.blocks = jax.lax.map(lambda k: constrain(Block(config, k), execution), keys)  # bits of one layer at a time
        self.norm = jnp.ones(d)
        self.execution = execution

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
            block = constrain(block, self.execution)  # and so its gradient, which is then scattered and not copied
            x, new = block(x, rotation, attend, layer_cache, slot)
            return self.residual(x), new if keeps else None

        keeps = keep or cache is not None
        x = self.residual(self.embedding[tokens].astype(self.execution.dtype))
        step = layer if keeps else self.checkpointed(layer)
        x, new = jax.lax.scan(step, x, (self.blocks, cache), unroll=self.laid_out)
        return NORMS[self.config.norm](x, self.norm * scale, self.config.norm_eps), new

    @property
    def laid_out(self) -> bool:
        """Whether layers are compiled one after another, not as one loop."""
        return self.config.layers <= UNROLLED[self.execution.platform]

    def checkpointed(self, layer: Callable) -> Callable:
        """`layer`, of which the backward pass computes again what `remat` says."""
        fastest = "none" if self.laid_out and self.execution.platform == "cpu" else "dots"
        remat = fastest if self.execution.remat == "auto" else self.execution.remat
        return layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=self.laid_out)

    def residual(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What a layer hands on, and the backward pass keeps, is split over every axis of the mesh."""
        return self.execution.constrain(x, BATCH, None, "tensor")

    def __call__(self, batch: Batch) -> Float[Array, "R W D"]:
        """Hidden states of shared-prefix rows, along their lines."""
        attend = attention(self.execution.attention, batch.segments, layout_of(batch), self.execution.mesh)
        return self.hidden(batch.tokens, batch.positions, row_by_row(attend, batch))[0]


def parameter_count(model: Transformer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def logps(model: Transformer, batch: Batch) -> Float[Array, "B n"]:
    """log pi(y_i | x) of each row's responses."""
    return logps_and_normalizers(model, batch).logps


def logps_and_normalizers(model: Transformer, batch: Batch) -> ResponseLogps:
    return response_logps_and_normalizers(model(batch), model.unembedding, batch, rows_at_a_time(model))


def sum_of_logps(model: Transformer, batch: Batch) -> Float[Array, ""]:
    """The sum of `logps`, for a loss that reads no more."""
    return total_logp(model(batch), model.unembedding, batch, rows_at_a_time(model))


def rows_at_a_time(model: Transformer) -> int:
    """Label positions, of all devices, that meet the vocabulary at a time."""
    most = LOGITS[model.execution.platform]
    return max(1, most // len(model.unembedding)) * model.execution.batch_shards
