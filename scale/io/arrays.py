"""Files: whole or not there at all, known by their contents' hash; arrays as safetensors, never a pickle."""

import json
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open

from scale.files import atomic

Box: TypeAlias = tuple[slice, ...]  # a part of an array, with one `slice(start, stop)` an axis


PIECE = 2**24  # bytes that are fetched and written, or read, at a time


NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
         "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}


CODES = {jnp.dtype(name): code for code, name in NAMES.items()}


def save_tree(path: Path, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write a pytree's array leaves to one safetensors file, named by their paths (`.layers[0].weight`).

    Leaves that are no arrays (functions, Python numbers) belong to the structure, which `load_tree` is given.
    `metadata` is any JSON object. PRNG keys must be converted by `jax.random.key_data` first: ValueError.

    No more than `PIECE` bytes are fetched from a device at a time. Arrays may be sharded, over several processes
    too: then all of these call this, process 0 writes, and all return when the file is whole.
    """
    # safetensors' own order: it keeps every array aligned
    leaves = dict(sorted(named(tree).items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header = _header(path, leaves, metadata or {})
    pieces = (piece for leaf in leaves.values() for piece in _pieces(leaf))
    if jax.process_index() == 0:
        _write(path, header, pieces)
    else:
        deque(pieces, maxlen=0)  # takes part in the gathering
    multihost_utils.sync_global_devices(f"{path.name} is written")


def load_tree(path: Path, like: Any) -> Any:
    """`like` with its array leaves read from `path`; `like` may hold `jax.ShapeDtypeStruct`s.

    A leaf with a sharding is read into it, each shard by the process that holds it, so that host memory holds one
    leaf's shards at most. NumPy leaves stay NumPy arrays; others become JAX arrays on the default device. Raises
    ValueError, naming the file and the leaf, where one is missing, unexpected, or of another shape or dtype.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: f"{NAMES.get(s.get_dtype(), s.get_dtype())}{s.get_shape()}" for name, s in slices.items()}
    require_alike(path, like, found)
    return jax.tree_util.tree_map_with_path(lambda key, leaf: _restored(path, key, leaf), like)


def require_alike(path: Path, like: Any, found: dict[str, str]) -> None:
    """ValueError naming the first leaf that only one side has, or whose dtype and shape (`float32[2, 3]`) differ."""
    wanted = leaf_types(like)
    for name in sorted(wanted.keys() ^ found.keys()):
        raise ValueError(f"{path}: {'missing' if name in wanted else 'unexpected'} leaf {name}")
    for name in wanted:
        if found[name] != wanted[name]:
            raise ValueError(f"{path}: leaf {name} is {found[name]}, expected {wanted[name]}")


def all_finite(tree: Any) -> bool:
    """Whether no floating-point array of a tree, sharded or not, holds a NaN or an infinity."""
    return all(bool(_finite(leaf)) for leaf in named(tree).values() if jnp.issubdtype(leaf.dtype, jnp.inexact))


@jax.jit
def _finite(array):
    return jnp.isfinite(array).all()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_tree` was given; ValueError where the file is no safetensors."""
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get("metadata", "{}"))


def named(tree: Any) -> dict[str, Any]:
    """The array leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): leaf for key, leaf in leaves if _is_array(leaf)}


def leaf_types(tree: Any) -> dict[str, str]:
    """Of each array leaf, `float32[2, 3]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(tree).items()}


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def _header(path: Path, leaves: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    """The start of a safetensors file: the length of the rest in 8 bytes, and JSON filled up to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"metadata": json.dumps(metadata, allow_nan=False)}}
    end = 0
    for name, leaf in leaves.items():
        if leaf.dtype not in CODES:
            raise ValueError(f"{path}: leaf {name}: safetensors has no dtype {leaf.dtype}")
        start, end = end, end + _bytes(leaf.shape, leaf.dtype)
        entries[name] = {"dtype": CODES[leaf.dtype], "shape": leaf.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, header: bytes, pieces: Iterator[np.ndarray]) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        for piece in pieces:
            piece.tofile(file)


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * dtype.itemsize


def _boxes(shape: tuple[int, ...], dtype: Any) -> Iterator[Box]:
    """Parts of at most `PIECE` bytes that cover an array in the order of its memory."""
    if not shape or 0 in shape:
        yield tuple(slice(0, n) for n in shape)
        return
    axis = next(a for a in range(len(shape)) if _bytes(shape[a + 1 :], dtype) <= PIECE)
    rows = PIECE // _bytes(shape[axis + 1 :], dtype)
    for outer in np.ndindex(shape[:axis]):
        for start in range(0, shape[axis], rows):
            box = [*((i, i + 1) for i in outer), (start, min(start + rows, shape[axis]))]
            yield tuple(slice(*ends) for ends in [*box, *((0, n) for n in shape[axis + 1 :])])


def _pieces(leaf: Any) -> Iterator[np.ndarray]:
    """An array's parts in the order of its memory, in host memory one after another."""
    if not isinstance(leaf, jax.Array) or not leaf.shape or (leaf.is_fully_replicated and leaf.nbytes <= PIECE):
        yield np.asarray(leaf)
        return
    for box in _boxes(leaf.shape, leaf.dtype):
        yield piece(leaf, box)


def piece(leaf: jax.Array, box: Box) -> np.ndarray:
    """A part of an array, on the host, out of the shards that hold some of it: no device gets more than it has.

    Where other processes hold some of the array, all of these call this.
    """
    part = np.zeros([side.stop - side.start for side in box], leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            _copy(shard, leaf.shape, box, part)
    if leaf.is_fully_addressable:
        return part
    parts = multihost_utils.process_allgather(part.reshape(-1).view(np.uint8))  # each byte is 0 in all but one
    return parts.sum(0, dtype=np.uint8).view(part.dtype).reshape(part.shape)


def _copy(shard: Any, shape: tuple[int, ...], box: Box, part: np.ndarray) -> None:
    """What a shard holds of a box, into its place in `part`."""
    firsts, ends = zip(*(side.indices(n)[:2] for side, n in zip(shard.index, shape, strict=True)), strict=True)
    lows = [max(side.start, first) for side, first in zip(box, firsts, strict=True)]
    highs = [min(side.stop, end) for side, end in zip(box, ends, strict=True)]
    sizes = tuple(high - low for low, high in zip(lows, highs, strict=True))
    if min(sizes) > 0:
        starts = [low - first for low, first in zip(lows, firsts, strict=True)]
        place = tuple(slice(low - side.start, low - side.start + size)
                      for low, side, size in zip(lows, box, sizes, strict=True))
        part[place] = _cut(shard.data, starts, sizes)


_cut = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


def _restored(path: Path, key: tuple[Any, ...], leaf: Any) -> Any:
    if not _is_array(leaf):
        return leaf
    read = partial(_read, path, jax.tree_util.keystr(key), leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic):
        return read(leaf.shape)
    if not isinstance(leaf.sharding, NamedSharding):
        return jax.block_until_ready(jax.device_put(read(leaf.shape)))
    boxes = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    once = cache(lambda ends: read(leaf.shape, tuple(slice(*end) for end in ends)))  # copies are read once
    shards = [jax.device_put(once(tuple(s.indices(n)[:2] for s, n in zip(box or (), leaf.shape, strict=True))), device)
              for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, jax.block_until_ready(shards))


def _read(path: Path, name: str, dtype: Any, shape: tuple[int, ...], box: Box | None = None) -> np.ndarray:
    """A box of the array `name`, of the given shape, in a file. Opened once a piece: a file's pages count as this
    process's memory until it is closed."""
    ends = [side.indices(n)[:2] for side, n in zip(box or [slice(None)] * len(shape), shape, strict=True)]
    array = np.empty([stop - start for start, stop in ends], dtype)
    for part in _boxes(array.shape, dtype) if array.size else ():
        there = tuple(slice(p.start + start, p.stop + start) for p, (start, _) in zip(part, ends, strict=True))
        with _opened(path) as file:
            array[part] = file.get_slice(name)[there]
    return array
