"""One attention under three implementations: query head h of H reads key/value head h // (H // G) of G.

`plain` is the meaning. `dot_product` reaches cuDNN's kernel on a GPU, `splash` the Pallas kernel on a TPU; they give
the same at every slot that is not padding.
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
from scale.parallel.mesh import Kind

Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""q [B T H k], k and v [B S G k] to [B T H k]."""


def attention(
    kind: Kind, segments: Int[Array, "B T"], layout: Layout | None = None, mesh: Mesh | None = None
) -> Attend:
    """Attention within shared-prefix rows (`minipref.batch.attention_mask`), for training and scoring.

    Errors: InputError where `splash` gets rows without a layout.
    """
    if kind == "splash":
        if layout is None:
            raise InputError("attention 'splash': the rows are packed compactly; it needs rows packed with a Layout")
        return partial(splash, segments=segments, layout=layout, mesh=mesh)
    return partial({"plain": plain_causal, "dot_product": dot_product}[kind], mask=attention_mask(segments))


def masked(mask: Bool[Array, "B T S"]) -> Attend:
    """`plain` under a mask: for a cache, or rows in any layout."""
    return partial(plain, mask=mask)


def plain(
    q: Float[Array, "B T H k"], k: Float[Array, "B S G k"], v: Float[Array, "B S G k"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T H k"]:
    """Attention by products, softmax in float32; a query that sees nothing gets an average, never NaN.

    The softmax's denominator comes with the product, from a column of ones beside the values: faster on a CPU.
    """
    (b, t, heads, size), groups = q.shape, k.shape[2]
    queries = q.reshape(b, t, groups, -1, size).transpose(0, 2, 3, 1, 4).reshape(b, groups, -1, size)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    scores = jnp.matmul(queries, keys, preferred_element_type=jnp.float32) / jnp.sqrt(size)
    by_head = scores.reshape(b, groups, heads // groups, t, -1)
    seen = jnp.where(mask[:, None, None], by_head, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(seen - jax.lax.stop_gradient(seen.max(-1, keepdims=True))).reshape(scores.shape)
    columns = jnp.concatenate([values, jnp.ones_like(values[..., :1])], -1)
    sums = jnp.matmul(weights.astype(v.dtype), columns, preferred_element_type=jnp.float32)
    found = (sums[..., :-1] / sums[..., -1:]).astype(v.dtype)
    return found.reshape(b, groups, -1, t, size).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def plain_causal(
    q: Float[Array, "B T H k"], k: Float[Array, "B T G k"], v: Float[Array, "B T G k"], mask: Bool[Array, "B T T"]
) -> Float[Array, "B T H k"]:
    """`plain` where no query sees a later key: a long row in quarters of its queries, each with the keys up to it."""
    part = max(LANES, -(-q.shape[1] // 4))
    ends = range(part, q.shape[1] + part, part)
    parts = [plain(q[:, i - part : i], k[:, :i], v[:, :i], mask[:, i - part : i, :i]) for i in ends]
    return jnp.concatenate(parts, axis=1)


def dot_product(
    q: Float[Array, "B T H k"], k: Float[Array, "B S G k"], v: Float[Array, "B S G k"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T H k"]:
    """Attention by JAX's own function: cuDNN's flash attention where it fits, else XLA."""
    implementation: Literal["cudnn", "xla"] = "cudnn" if cudnn_fits(q, k) else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def cudnn_fits(q: Float[Array, "B T H k"], k: Float[Array, "B S G k"]) -> bool:
    """What JAX asks of cuDNN with a mask: an NVIDIA GPU, half precision, even lengths, heads of 8s up to a limit."""
    device = jax.devices()[0]
    if not device.device_kind.startswith("NVIDIA") or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    limit = 256 if float(device.compute_capability) >= 9 else 128
    return q.shape[3] % 8 == 0 and q.shape[3] <= limit and q.shape[1] % 2 == k.shape[1] % 2 == 0
