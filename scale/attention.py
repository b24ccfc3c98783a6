"""One attention under three implementations: query head h of H reads key/value head h // (H // G) of G.

`plain` is the meaning. `dot_product` reaches cuDNN's kernel on a GPU, `splash` the Pallas kernel on a TPU; they give
the same at every slot that is not padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import lcm, prod
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from minipref.sequences import attention_mask
from scale.packing import LANES, Layout
from scale.rows import DataError

Kind: TypeAlias = Literal["plain", "dot_product", "splash"]
Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""q [B T H k], k and v [B S G k] to [B T H k]."""
BATCH = ("data", "fsdp")  # the axes of the mesh that split rows
LARGEST_BLOCK = 512


def kind_for(platform: str) -> Kind:
    """The implementation for "cpu", "gpu" (also "cuda", "rocm") or "tpu"."""
    kinds: dict[str, Kind] = {"cpu": "plain", "tpu": "splash"}
    return kinds.get(platform, "dot_product")


def attention(
    kind: Kind, segments: Int[Array, "B T"], layout: Layout | None = None, mesh: Mesh | None = None
) -> Attend:
    """Attention within shared-prefix rows (`minipref.sequences.attention_mask`), for training and scoring.

    Errors: DataError where `splash` gets rows without a layout.
    """
    if kind == "splash":
        if layout is None:
            raise DataError("attention 'splash': the rows are packed compactly; it needs rows packed with a Layout")
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


@dataclass(frozen=True)
class SharedPrefix(kernels.splash_attention_mask.Mask):
    """Splash attention's mask of a layout, padding apart; computed block by block, never T x T."""

    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.width, self.layout.width

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(self.layout.width)[part] for part in block)
        own = self.layout.region(queries)[:, None] == self.layout.region(keys)
        return (queries[:, None] >= keys) & (own | (keys < self.layout.start))


def block_sizes(width: int) -> kernels.splash_attention_kernel.BlockSizes:
    """Square blocks of the largest size that divides the row. The fused backward kernel is not used: it writes one
    query gradient per block of keys, in the compute dtype, and adds them afterwards."""
    size = next(s for s in range(LARGEST_BLOCK, 0, -LANES) if width % s == 0)
    return kernels.splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )


def splash(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B T G k"],
    v: Float[Array, "B T G k"],
    segments: Int[Array, "B T"],
    layout: Layout,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H k"]:
    """Pallas splash attention within rows packed with `layout`; what a padded slot gets is finite, and no use.

    A row whose segments are not those of the layout gets NaN, since its mask would be another one's.
    Under a mesh rows are split over (data, fsdp) and heads over tensor; key/value heads are repeated where tensor
    does not divide them. `interpret` runs the kernel without a TPU.

    Errors: DataError where rows or heads do not split, or the rows have not the layout's width.
    """
    if q.shape[1] != layout.width:
        raise DataError(f"attention 'splash': rows of {q.shape[1]} slots are not packed with {layout}")
    run = partial(splash_rows, layout=layout, dtype=kernel_dtype(mesh, q.dtype), interpret=interpret)
    if mesh is None:
        return run(q, k, v, segments)
    require_divisible(mesh, q.shape[0], q.shape[2])
    copies = lcm(k.shape[2], mesh.shape["tensor"]) // k.shape[2]
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    heads = P(BATCH, None, "tensor", None)
    specs = (heads, heads, heads, P(BATCH, None))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, segments)


def kernel_dtype(mesh: Mesh | None, dtype: jnp.dtype) -> jnp.dtype:
    """The compiler of Pallas kernels has no bfloat16 product for TPU v3."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return jnp.dtype(jnp.float32) if device.device_kind == "TPU v3" else dtype


def require_divisible(mesh: Mesh, rows: int, heads: int) -> None:
    axes = {"rows": (rows, BATCH), "heads": (heads, ("tensor",))}
    for name, (total, over) in axes.items():
        parts = prod(mesh.shape[axis] for axis in over)
        if total % parts:
            raise DataError(f"attention 'splash': {total} {name} do not divide among {parts} devices of {over}")


def splash_rows(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B T G k"],
    v: Float[Array, "B T G k"],
    segments: Int[Array, "B T"],
    layout: Layout,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "B T H k"]:
    """The kernel on one device's rows and heads. It has no softmax scale of its own."""
    mask = kernels.splash_attention_mask.MultiHeadMask([SharedPrefix(layout)] * q.shape[2])
    kernel = kernels.make_splash_mha_single_device(mask, block_sizes=block_sizes(layout.width), interpret=interpret)
    regions = layout.region(np.arange(layout.width))
    fits = jnp.all((segments < 0) | (segments == regions), axis=1)
    scale = jnp.where(fits, q.shape[-1] ** -0.5, jnp.nan)[:, None, None, None]
    real = (segments >= 0).astype(jnp.int32)
    by_head = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (q * scale, k, v))
    out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(real, real))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)
