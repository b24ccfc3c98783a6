"""A PaLM-shaped decoder (arXiv 2204.02311) as one Equinox module with scanned layers.

Parallel block y = x + MLP(LN x) + Attn(LN x) with one LayerNorm; SwiGLU; multi-query attention (one key/value
head); RoPE; tied embeddings with logits scaled by 1/sqrt(d); no biases.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from minipref.sequences import Batch, attention_mask, response_logps


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
    """Query heads; keys and values have one."""
    head_size: int = 32
    """Width of a head, an even number."""
    d_ff: int = 256
    """Width of the SwiGLU's hidden layer."""
    rope_base: float = 10_000.0
    """Base of the rotary angles."""


Rotation: TypeAlias = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
UNROLLED = 4  # layers at most that are laid out one after another: faster on a CPU, and a deep model compiles slowly so


class Cache(NamedTuple):
    """Keys and values, of every layer or of one."""

    keys: Float[Array, "*layers B S k"]
    values: Float[Array, "*layers B S k"]


def normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape) / jnp.sqrt(fan_in)


def angles(positions: Int[Array, "B T"], size: int, base: float) -> Rotation:
    """RoPE's cosines and sines at each position: position x base^(-2i/size)."""
    turn = positions[..., None] * base ** (-jnp.arange(size // 2) / (size // 2))
    return jnp.cos(turn), jnp.sin(turn)


def rotate(x: Float[Array, "B T *H k"], rotation: Rotation) -> Float[Array, "B T *H k"]:
    """RoPE: the two halves of each head turn together."""
    cos, sin = (jnp.expand_dims(a, tuple(range(2, x.ndim - 1))) for a in rotation)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def attend(
    q: Float[Array, "B T H k"], k: Float[Array, "B S k"], v: Float[Array, "B S k"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T H k"]:
    """Multi-query attention, softmax in float32; a query that sees nothing gets an average, never NaN."""
    scores = jnp.einsum("bthk,bsk->bhts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min))
    return jnp.einsum("bhts,bsk->bthk", weights.astype(v.dtype), v)


class Block(eqx.Module):
    norm: Float[Array, "*layers D"]
    query: Float[Array, "*layers D H k"]
    key_value: Float[Array, "*layers D 2 k"]
    gate_up: Float[Array, "*layers D 2 F"]
    attention_out: Float[Array, "*layers H k D"]
    mlp_out: Float[Array, "*layers F D"]

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        d, h, k, f = config.d_model, config.heads, config.head_size, config.d_ff
        keys = jax.random.split(key, 5)
        self.norm = jnp.ones(d)
        self.query = normal(keys[0], (d, h, k), d)
        self.key_value = normal(keys[1], (d, 2, k), d)
        self.gate_up = normal(keys[2], (d, 2, f), d)
        self.attention_out = normal(keys[3], (h, k, d), h * k)
        self.mlp_out = normal(keys[4], (f, d), f)

    def __call__(self, x, rotation, mask, cache, slot):
        """`cache`, where given, holds earlier keys and values; this call's go in at `slot`."""
        h = layer_norm(x, self.norm)
        q = rotate(jnp.einsum("btd,dhk->bthk", h, self.query), rotation)
        k, v = jnp.moveaxis(jnp.einsum("btd,dck->btck", h, self.key_value), 2, 0)
        k = rotate(k, rotation)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.keys, k, slot, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.values, v, slot, axis=1)
        attention = jnp.einsum("bthk,hkd->btd", attend(q, k, v, mask), self.attention_out)
        gate, up = jnp.moveaxis(jnp.einsum("btd,dcf->btcf", h, self.gate_up), 2, 0)
        mlp = jnp.einsum("btf,fd->btd", jax.nn.swish(gate) * up, self.mlp_out)
        return x + attention + mlp, Cache(k, v)


def layer_norm(x: Float[Array, "B T D"], scale: Float[Array, " D"]) -> Float[Array, "B T D"]:
    """LayerNorm without bias, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


class Transformer(eqx.Module):
    embedding: Float[Array, "V D"]
    blocks: Block
    norm: Float[Array, " D"]
    rope_base: float = eqx.field(static=True)

    def __init__(self, config: ModelConfig, key: PRNGKeyArray):
        embedding_key, blocks_key = jax.random.split(key)
        self.embedding = jax.random.normal(embedding_key, (config.vocab, config.d_model))
        self.blocks = eqx.filter_vmap(lambda k: Block(config, k))(jax.random.split(blocks_key, config.layers))
        self.norm = jnp.ones(config.d_model)
        self.rope_base = config.rope_base

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: Cache | None = None,
        slot: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Final hidden states, scaled so that their product with the embedding is the logits; and the cache."""
        rotation = angles(positions, self.blocks.query.shape[-1], self.rope_base)

        def layer(x, block_and_cache):
            block, layer_cache = block_and_cache
            return block(x, rotation, mask, layer_cache, slot)

        unroll = len(self.blocks.norm) <= UNROLLED
        x, new = jax.lax.scan(layer, self.embedding[tokens], (self.blocks, cache), unroll=unroll)
        return layer_norm(x, self.norm) / jnp.sqrt(self.embedding.shape[1]), new

    def __call__(self, batch: Batch) -> Float[Array, "B T D"]:
        """Hidden states of shared-prefix rows."""
        return self.hidden(batch.tokens, batch.positions, attention_mask(batch.segments))[0]


def logps(model: Transformer, batch: Batch) -> Float[Array, "B n"]:
    """log pi(y_i | x) of each row's responses."""
    return response_logps(model(batch), model.embedding, batch)
