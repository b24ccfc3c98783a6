"""TODO scale.model.layers."""

import re
from functools import partial
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scale.model.config import ModelConfig
from scale.parallel.mesh import Runtime

Rotation: TypeAlias = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


DRAWN = 2**24  # numbers of an embedding that are drawn at a time


class Cache(NamedTuple):
    """Keys and values, of every layer or of one."""

    keys: Float[Array, "*layers B S G k"]
    values: Float[Array, "*layers B S G k"]


def normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape) / jnp.sqrt(fan_in)


def table(
    key: PRNGKeyArray, vocab_size: int, width: int, fan_in: int, runtime: Runtime
) -> Float[Array, "V E"]:
    """A normal [V, E] array, drawn in parts of its columns: memory for the random bits of `DRAWN` numbers."""
    parts = next(n for n in range(1, width + 1) if width % n == 0 and (vocab_size * width <= n * DRAWN or n == width))
    if parts == 1:
        return normal(key, (vocab_size, width), fan_in)

    def part(key: PRNGKeyArray) -> Float[Array, "V e"]:
        return runtime.constrain(normal(key, (vocab_size, width // parts), fan_in), "fsdp", None)

    columns = jax.lax.map(part, jax.random.split(key, parts))
    return jnp.moveaxis(columns, 0, 1).reshape(vocab_size, width)


def frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """Radians a position of each of RoPE's planes: base^(-2i/size), the slow ones slowed further by `rope_scaling`."""
    half = config.head_dim // 2
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
        d, h, g, k, f = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff
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
