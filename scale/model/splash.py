"""TODO scale.model.splash."""

from dataclasses import dataclass
from functools import partial
from math import lcm, prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from scale.data.layout import LANES, Layout
from scale.errors import InputError
from scale.parallel.mesh import BATCH

LARGEST_BLOCK = 512


@dataclass(frozen=True)
class SharedPrefix(kernels.splash_attention_mask.Mask):
    """Splash attention's mask of a layout, padding apart; computed block by block, never T x T."""

    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.length, self.layout.length

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(self.layout.length)[part] for part in block)
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

    Errors: InputError where rows or heads do not split, or the rows have not the layout's width.
    """
    if q.shape[1] != layout.length:
        rows = f"rows of {q.shape[1]} tokens"
        raise InputError(f"attention 'splash': {rows} are not packed with {layout}")
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
            raise InputError(f"attention 'splash': {total} {name} do not divide among {parts} devices of {over}")


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
    kernel = kernels.make_splash_mha_single_device(mask, block_sizes=block_sizes(layout.length), interpret=interpret)
    regions = layout.region(np.arange(layout.length))
    fits = jnp.all((segments < 0) | (segments == regions), axis=1)
    scale = jnp.where(fits, q.shape[-1] ** -0.5, jnp.nan)[:, None, None, None]
    real = (segments >= 0).astype(jnp.int32)
    by_head = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (q * scale, k, v))
    out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(real, real))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)
