"""One attention in three implementations.

Query head h of H reads key/value head h // (H // G) of G. `plain` defines the result. `dot_product`
uses cuDNN's kernel on a GPU and `splash` a Pallas kernel on a TPU; both give the same result at
every token that is not padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from minipref.batch import attention_mask
from scale.data.layout import LANES, Layout
from scale.errors import InputError
from scale.model.splash import splash
from scale.parallel.mesh import AttentionKind

Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""Queries [B, T, H, k], keys and values [B, S, G, k] -> outputs [B, T, H, k]."""


def attention(
    kind: AttentionKind,
    segment_ids: Int[Array, "B T"],
    layout: Layout | None = None,
    mesh: Mesh | None = None,
) -> Attend:
    """Attention under `minipref.batch.attention_mask`, for training and scoring.

    Args:
        kind: The implementation.
        segment_ids: One example in each row [B, T].
        layout: The layout of the rows; only `splash` needs it.
        mesh: The mesh over which `splash` runs.

    Returns:
        Attention of queries over keys and values, all [B, T, heads, k].

    Raises:
        InputError: `kind` is "splash" and there is no layout.
    """
    if kind == "splash":
        if layout is None:
            raise InputError(
                "attention 'splash': the rows are packed compactly; it needs rows packed with a "
                "Layout"
            )
        return partial(splash, segment_ids=segment_ids, layout=layout, mesh=mesh)
    attend = {"plain": plain_causal, "dot_product": dot_product}[kind]
    return partial(attend, mask=attention_mask(segment_ids))


def masked(mask: Bool[Array, "B T S"]) -> Attend:
    """`plain` under any mask, such as that of a cache."""
    return partial(plain, mask=mask)


def plain(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B S G k"],
    v: Float[Array, "B S G k"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H k"]:
    """Attention by two matrix products, with the softmax in float32.

    The mask says which keys a query attends to; one without keys gets the average of all
    values, never NaN. A column of ones beside the values gives the softmax's denominator: faster on
    a CPU than a sum.
    """
    (b, t, heads, size), groups = q.shape, k.shape[2]
    queries = q.reshape(b, t, groups, -1, size).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(b, groups, -1, size)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32) / jnp.sqrt(size)
    by_head = scores.reshape(b, groups, heads // groups, t, -1)
    seen = jnp.where(mask[:, None, None], by_head, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(seen - jax.lax.stop_gradient(seen.max(-1, keepdims=True)))
    weights = weights.reshape(scores.shape)
    columns = jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1)
    sums = jnp.matmul(weights.astype(v.dtype), columns, preferred_element_type=jnp.float32)
    outputs = (sums[..., :-1] / sums[..., -1:]).astype(v.dtype)
    return outputs.reshape(b, groups, -1, t, size).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def plain_causal(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B T G k"],
    v: Float[Array, "B T G k"],
    mask: Bool[Array, "B T T"],
) -> Float[Array, "B T H k"]:
    """`plain` under a causal mask: each quarter of a long row reads only the keys up to its end."""
    part = max(LANES, -(-q.shape[1] // 4))
    ends = range(part, q.shape[1] + part, part)
    parts = [
        plain(q[:, end - part : end], k[:, :end], v[:, :end], mask[:, end - part : end, :end])
        for end in ends
    ]
    return jnp.concatenate(parts, axis=1)


def dot_product(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B S G k"],
    v: Float[Array, "B S G k"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H k"]:
    """Attention by JAX's own function: cuDNN's flash attention where it fits, otherwise XLA."""
    implementation: Literal["cudnn", "xla"] = "cudnn" if cudnn_fits(q, k) else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def cudnn_fits(q: Float[Array, "B T H k"], k: Float[Array, "B S G k"]) -> bool:
    """Whether JAX lets cuDNN attend under a mask.

    It asks for an NVIDIA GPU, half precision, even lengths, and a head dimension that is a multiple
    of 8 up to a limit.
    """
    device = jax.devices()[0]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if not device.device_kind.startswith("NVIDIA") or not half:
        return False
    limit = 256 if float(device.compute_capability) >= 9 else 128
    return q.shape[3] % 8 == 0 and q.shape[3] <= limit and q.shape[1] % 2 == k.shape[1] % 2 == 0
