"""Boxes, which are parts of arrays, between devices and host: no host needs a whole array."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TypeAlias

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

Box: TypeAlias = tuple[slice, ...]
"""A part of an array: one `slice(start, stop)` for each axis."""


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole array."""
    return tuple(slice(0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """The shape of the array that a box cuts out."""
    return tuple(side.stop - side.start for side in box)


def relative(box: Box, origin: Box) -> Box:
    """The same box, counted from where another one begins."""
    return tuple(
        slice(side.start - first.start, side.stop - first.start)
        for side, first in zip(box, origin, strict=True)
    )


def split_box(box: Box, itemsize: int, max_bytes: int) -> Iterator[Box]:
    """Boxes of at most `max_bytes` that cover a box in the order of its memory."""
    row = itemsize * math.prod(box_shape(box[1:]))
    if not box or row * (box[0].stop - box[0].start) <= max_bytes:
        yield box
        return
    num_rows = max(1, max_bytes // row)
    for start in range(box[0].start, box[0].stop, num_rows):
        rows = slice(start, min(start + num_rows, box[0].stop))
        for rest in split_box(box[1:], itemsize, max_bytes):
            yield (rows, *rest)


def to_host(array: jax.Array, box: Box) -> np.ndarray:
    """A part of an array, out of the shards that hold some of it: no device gets more of it.

    Where other processes hold some of the array, all of these call this, and all get the part.
    """
    if array.is_fully_replicated and box == whole(array.shape):
        return np.asarray(array.addressable_data(0))
    part = np.zeros(box_shape(box), array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            _copy_overlap(shard.data, _resolved(shard.index, array.shape), part, box)
    if array.is_fully_addressable:
        return part
    parts = multihost_utils.process_allgather(part.reshape(-1).view(np.uint8))
    # every byte is 0 in all parts but one
    return parts.sum(0, dtype=np.uint8).view(part.dtype).reshape(part.shape)


def _copy_overlap(shard: jax.Array, shard_box: Box, part: np.ndarray, box: Box) -> None:
    """Copy what a shard holds of a box into the array of that box."""
    sides = zip(shard_box, box, strict=True)
    overlap = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in sides)
    sizes = box_shape(overlap)
    if all(size > 0 for size in sizes):
        starts = [side.start for side in relative(overlap, shard_box)]
        part[relative(overlap, box)] = _dynamic_slice(shard, starts, sizes)


_dynamic_slice = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


def to_devices(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[Box], np.ndarray]
) -> jax.Array:
    """An array on the devices, of which this process reads the shards of its own devices.

    Args:
        shape: The shape of the array.
        sharding: Its sharding.
        read: Reads a box. It is called once for a box that several devices hold.
    """
    # before Python 3.12 a slice cannot be a key of a cache
    cached = cache(lambda bounds: read(tuple(slice(*bound) for bound in bounds)))
    shards = []  # `jax.make_array_from_callback` holds two arrays more in host memory
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = ((side.start, side.stop) for side in _resolved(index or (), shape))
        shards.append(jax.device_put(cached(tuple(bounds)), device))
    return jax.make_array_from_single_device_arrays(shape, sharding, jax.block_until_ready(shards))


def _resolved(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """An index of slices as a box, without None."""
    return tuple(slice(*side.indices(size)[:2]) for side, size in zip(index, shape, strict=True))
