"""The layers of the decoder: RoPE, norms, projections, and the block that consists of them."""

import re
from functools import partial
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from scale.model.adapters import Adapted
from scale.model.attention import Attend
from scale.model.config import ModelConfig
from scale.parallel.mesh import Runtime

MAX_DRAWS = 2**24  # random numbers of an embedding that are drawn at a time

Rotation: TypeAlias = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
"""RoPE's cosines and sines at each position."""


class KeysValues(NamedTuple):
    """Keys and values of T tokens, of every layer or of one."""

    keys: Float[Array, "*layers B T G k"]
    values: Float[Array, "*layers B T G k"]


def normal(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Float[Array, "..."]:
    """Normal weights with variance 1 / fan_in."""
    return jax.random.normal(key, shape) / jnp.sqrt(fan_in)


def normal_embedding(
    key: PRNGKeyArray, vocab_size: int, width: int, fan_in: int, runtime: Runtime
) -> Float[Array, "V E"]:
    """A `normal` array, drawn in blocks of columns: random bits need memory for one block only."""
    num_blocks = next(
        n
        for n in range(1, width + 1)
        if width % n == 0 and (vocab_size * width <= n * MAX_DRAWS or n == width)
    )
    if num_blocks == 1:
        return normal(key, (vocab_size, width), fan_in)

    def block(key: PRNGKeyArray) -> Float[Array, "V e"]:
        columns = normal(key, (vocab_size, width // num_blocks), fan_in)
        return runtime.constrain(columns, "fsdp", None)

    blocks = jax.lax.map(block, jax.random.split(key, num_blocks))
    return jnp.moveaxis(blocks, 0, 1).reshape(vocab_size, width)


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """How far RoPE turns each pair of coordinates from one position to the next.

    base^(-2i / head_dim)

    With `rope_scaling`, low frequencies are divided by its factor and high ones are kept; a linear
    ramp connects the two.

    Args:
        config: Gives `rope_base`, `head_dim` and `rope_scaling`.

    Returns:
        Radians for each position [head_dim / 2].
    """
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-np.arange(half) / half)
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, length = config.rope_scaling
    kept = np.clip((length * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rope_rotation(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, " half"]
) -> Rotation:
    """RoPE's cosines and sines at each position."""
    angles = positions[..., None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Float[Array, "B T *H k"], rotation: Rotation) -> Float[Array, "B T *H k"]:
    """Rotate each head: coordinate i of its first half forms a pair with i of its second half."""
    cos, sin = (jnp.expand_dims(a, tuple(range(2, x.ndim - 1))) for a in rotation)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """LayerNorm without bias, in float32."""
    wide = x.astype(jnp.float32)
    return rms_norm(wide - wide.mean(-1, keepdims=True), scale, eps).astype(x.dtype)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """RMSNorm, in float32."""
    wide = x.astype(jnp.float32)
    normalised = wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + eps)
    return times(normalised, scale).astype(x.dtype)


@jax.custom_vjp
def times(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    """x * scale.

    On a CPU the gradient of the scale is a product with ones: XLA takes much longer for a sum of
    rows.
    """
    return x * scale


def times_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """The gradients of x and scale."""
    x, scale = residuals
    scale_gradient = jax.lax.platform_dependent(
        gradient * x,
        cpu=lambda rows: jnp.einsum("...,...d->d", jnp.ones(rows.shape[:-1]), rows),
        default=lambda rows: rows.sum(range(rows.ndim - 1)),
    )
    return gradient * scale, scale_gradient


times.defvjp(lambda x, scale: (x * scale, (x, scale)), times_backward)

NORMS = {"layer": layer_norm, "rms": rms_norm}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    pattern: str, x: Float[Array, "..."], weights: Float[Array, "..."]
) -> Float[Array, "..."]:
    """An `einsum` that forms the gradient of the weights as x times the result's gradient.

    JAX's own einsum multiplies in the other order, and XLA on a CPU then transposes the result's
    gradient first.
    """
    return jnp.einsum(pattern, x, weights)


def product_forward(pattern: str, x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    """The result and the residuals."""
    # not by `product`: remat policies would not see its einsum
    return jnp.einsum(pattern, x, weights), (x, weights)


def product_backward(
    pattern: str, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    """The gradients of x and weights."""
    x, weights = residuals
    x_axes, weight_axes, result_axes = re.split(",|->", pattern)
    x_gradient = jnp.einsum(f"{result_axes},{weight_axes}->{x_axes}", gradient, weights)
    return x_gradient, jnp.einsum(f"{x_axes},{result_axes}->{weight_axes}", x, gradient)


product.defvjp(product_forward, product_backward)


def project(
    pattern: str, x: Float[Array, "..."], weights: Float[Array, "..."] | Adapted
) -> Float[Array, "..."]:
    """A `product` in the dtype of the activations x, whatever that of the weights.

    With an adapter it is x W + scale (x down) up.
    """
    if not isinstance(weights, Adapted):
        return product(pattern, x, weights.astype(x.dtype))
    x_axes, weight_axes, result_axes = re.split(",|->", pattern)
    inputs = "".join(axis for axis in weight_axes if axis not in result_axes)
    low_axes = x_axes.removesuffix(inputs) + "r"
    low = project(f"{x_axes},{inputs}r->{low_axes}", x, weights.down)
    up_axes = "r" + weight_axes.removeprefix(inputs)
    added = project(f"{low_axes},{up_axes}->{result_axes}", low, weights.up)
    return project(pattern, x, weights.weights) + weights.scale * added


class Block(eqx.Module):
    """A transformer block, or all blocks of a model stacked along a leading axis."""

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
        d, f = config.d_model, config.d_ff
        h, g, k = config.num_heads, config.num_kv_heads, config.head_dim
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

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        attend: Attend,
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """The residual stream after this block.

        Args:
            x: The residual stream [B, T, D].
            rotation: RoPE's at the positions of x.
            attend: Attention of queries over keys and values.

        Returns:
            The residual stream [B, T, D], and the keys and values of x.
        """
        h = self.normalise(x, self.norm)
        queries, new = self.heads(h, rotation)
        attended = project("bthk,hkd->btd", attend(queries, *new), self.attention_out)
        if self.mlp_norm is None:
            return x + attended + self.mlp(h), new
        x = x + attended
        return x + self.mlp(self.normalise(x, self.mlp_norm)), new

    def normalise(self, x: Array, scale: Array) -> Array:
        """The configured norm."""
        return NORMS[self.config.norm](x, scale, self.config.norm_eps)

    def heads(self, h: Float[Array, "B T D"], rotation: Rotation) -> tuple[Array, KeysValues]:
        """Queries [B, T, H, k], and keys and values [B, T, G, k]."""
        q = project("btd,dhk->bthk", h, self.query)
        kv = project("btd,dcgk->btcgk", h, self.key_value)
        if self.query_bias is not None and self.key_value_bias is not None:
            q, kv = q + self.query_bias.astype(q.dtype), kv + self.key_value_bias.astype(q.dtype)
        k, v = jnp.moveaxis(kv, 2, 0)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.normalise(q, self.query_norm), self.normalise(k, self.key_norm)
        return apply_rope(q, rotation), KeysValues(apply_rope(k, rotation), v)

    def mlp(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """SwiGLU."""
        gate, up = (project("btd,df->btf", h, self.gate_up[:, i]) for i in (0, 1))
        return project("btf,fd->btd", jax.nn.swish(gate) * up, self.mlp_out)
