"""Splash attention, a Pallas kernel for TPUs, under the static mask of a layout."""

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
class SharedPrefixMask(kernels.splash_attention_mask.Mask):
    """The mask of a layout: a token attends to the prompt and to its own region, up to itself.

    It is computed block by block, never as [T, T]. Padding is not part of it.
    """

    layout: Layout

    @property
    def shape(self) -> tuple[int, int]:
        """[T, T]."""
        return self.layout.length, self.layout.length

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """The mask of a block of queries and keys."""
        queries, keys = (np.arange(self.layout.length)[part] for part in block)
        same_region = self.layout.region(queries)[:, None] == self.layout.region(keys)
        return (queries[:, None] >= keys) & (same_region | (keys < self.layout.start))


def block_sizes(length: int) -> kernels.splash_attention_kernel.BlockSizes:
    """Square blocks of the largest size, at most `LARGEST_BLOCK`, that divides a row.

    The fused backward kernel stays off: it writes a query gradient for each block of keys, in the
    compute dtype, and adds them afterwards.
    """
    size = next(s for s in range(LARGEST_BLOCK, 0, -LANES) if length % s == 0)
    return kernels.splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size,
        block_kv_dkv=size, block_q_dq=size, block_kv_dq=size,
    )  # fmt: skip


def splash(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B T G k"],
    v: Float[Array, "B T G k"],
    segment_ids: Int[Array, "B T"],
    layout: Layout,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H k"]:
    """Splash attention within rows that are packed with a layout.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        segment_ids: One example in each row [B, T], as in `minipref.batch`.
        layout: The layout of the rows.
        mesh: Splits rows over (data, fsdp) and heads over tensor. Key/value heads are repeated
            where tensor does not divide them.
        interpret: Run the kernel without a TPU.

    Returns:
        Outputs [B, T, H, k], finite but meaningless at padding. A row whose segments do not fit the
        layout gets NaN, because its mask would be wrong.

    Raises:
        InputError: The mesh does not divide the rows or the heads, or the rows have not the
            layout's length.
    """
    if q.shape[1] != layout.length:
        raise InputError(
            f"attention 'splash': rows of {q.shape[1]} tokens are not packed with {layout}"
        )
    dtype = kernel_dtype(mesh, q.dtype)
    run = partial(splash_rows, layout=layout, dtype=dtype, interpret=interpret)
    if mesh is None:
        return run(q, k, v, segment_ids)
    require_divisible(mesh, q.shape[0], q.shape[2])
    copies = lcm(k.shape[2], mesh.shape["tensor"]) // k.shape[2]
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    heads = P(BATCH, None, "tensor", None)
    specs = (heads, heads, heads, P(BATCH, None))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return sharded(q, k, v, segment_ids)


def kernel_dtype(mesh: Mesh | None, dtype: jnp.dtype) -> jnp.dtype:
    """float32 on a TPU v3, for which Pallas has no bfloat16 product; elsewhere `dtype`."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return jnp.dtype(jnp.float32) if device.device_kind == "TPU v3" else dtype


def require_divisible(mesh: Mesh, rows: int, heads: int) -> None:
    """Raise InputError where the mesh does not divide rows or heads."""
    for name, count, axes in (("rows", rows, BATCH), ("heads", heads, ("tensor",))):
        devices = prod(mesh.shape[axis] for axis in axes)
        if count % devices:
            raise InputError(
                f"attention 'splash': {count} {name} do not divide among {devices} devices of "
                f"{axes}"
            )


def splash_rows(
    q: Float[Array, "B T H k"],
    k: Float[Array, "B T G k"],
    v: Float[Array, "B T G k"],
    segment_ids: Int[Array, "B T"],
    layout: Layout,
    dtype: jnp.dtype,
    interpret: bool,
) -> Float[Array, "B T H k"]:
    """`splash` on the rows and heads of one device. The kernel itself does not scale the scores."""
    mask = kernels.splash_attention_mask.MultiHeadMask([SharedPrefixMask(layout)] * q.shape[2])
    kernel = kernels.make_splash_mha_single_device(
        mask, block_sizes=block_sizes(layout.length), interpret=interpret
    )
    regions = layout.region(np.arange(layout.length))
    fits = jnp.all((segment_ids < 0) | (segment_ids == regions), axis=1)
    scale = jnp.where(fits, q.shape[-1] ** -0.5, jnp.nan)[:, None, None, None]
    real = (segment_ids >= 0).astype(jnp.int32)
    by_head = (jnp.swapaxes(x, 1, 2).astype(dtype) for x in (q * scale, k, v))
    out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(real, real))
    return jnp.swapaxes(out, 1, 2).astype(q.dtype)
