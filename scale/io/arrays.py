"""Trees of arrays to and from one safetensors file, at most `PIECE` bytes at a time.

The writer is ours. `save_file` of safetensors holds the whole file in host memory: 1042 MiB beyond
a model of 1024 MiB, or 270 MiB with a file for each array; ours holds 72 MiB. Orbax holds 26 MiB,
but two of its folders of equal arrays differ, and here the hash of the file identifies a model.
"""

import json
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from safetensors import SafetensorError, safe_open

from scale.errors import InputError
from scale.files import atomic
from scale.io.boxes import Box, box_shape, relative, split_box, to_devices, to_host, whole

PIECE = 2**24
DTYPES = {  # of safetensors: their names in NumPy
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
}
CODES = {jnp.dtype(name): code for code, name in DTYPES.items()}


def save_tree(path: Path, tree: Any) -> None:
    """Write the array leaves of a tree to one safetensors file, whole or not at all.

    Arrays may be sharded, over several processes too: then all of these call this, process 0
    writes, and all return when the file is whole.

    Args:
        path: The file.
        tree: A pytree. The path of an array leaf, such as `.layers[0].weight`, is its name in the
            file. Other leaves (functions, Python numbers) belong to the structure, which
            `load_tree` is given.

    Raises:
        ValueError: safetensors does not have the dtype of a leaf, such as that of a PRNG key.
    """
    # safetensors' own order, which keeps every array aligned
    ordered = sorted(named(tree).items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header = _header(path, ordered)
    pieces = (piece for _, leaf in ordered for piece in _pieces(leaf))
    if jax.process_index() == 0:
        with atomic(path) as temporary, temporary.open("wb") as file:
            file.write(header)
            for piece in pieces:
                piece.tofile(file)
    else:
        deque(pieces, maxlen=0)  # takes part in the gathering
    multihost_utils.sync_global_devices(f"{path.name} is written")


def load_tree(path: Path, like: Any) -> Any:
    """Read a tree that `save_tree` wrote. The host holds the shards of one leaf at most.

    Args:
        path: The file.
        like: The tree's structure, with arrays or `jax.ShapeDtypeStruct`s as leaves. A leaf with a
            sharding is read into it; a NumPy leaf stays a NumPy array; any other becomes a JAX
            array on the default device.

    Returns:
        `like` with the arrays of the file.

    Raises:
        InputError: The file is no safetensors, or a leaf is missing, unexpected, or of another
            shape or dtype.
    """
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        types = {name: f"{_dtype(tensor)}{tensor.get_shape()}" for name, tensor in slices.items()}
    require_alike(path, like, types)
    return tree_map_with_path(lambda key, leaf: _load_leaf(path, keystr(key), leaf), like)


def require_alike(path: Path, like: Any, types: dict[str, str]) -> None:
    """Compare the array leaves of a tree with those of a file, given as `leaf_types` gives them.

    Raises:
        InputError: A leaf is missing, unexpected, or of another shape or dtype.
    """
    expected = leaf_types(like)
    for name in sorted(expected.keys() ^ types.keys()):
        raise InputError(f"{path}: {'missing' if name in expected else 'unexpected'} leaf {name}")
    for name in expected:
        if types[name] != expected[name]:
            raise InputError(f"{path}: leaf {name} is {types[name]}, expected {expected[name]}")


def named(tree: Any) -> dict[str, Any]:
    """The array leaves of a tree by their paths."""
    leaves = {keystr(key): leaf for key, leaf in tree_leaves_with_path(tree)}
    return {name: leaf for name, leaf in leaves.items() if _is_array(leaf)}


def leaf_types(tree: Any) -> dict[str, str]:
    """The dtype and shape of each array leaf: `float32[2, 3]`."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(tree).items()}


def all_finite(tree: Any) -> bool:
    """Whether no floating-point array of a tree, sharded or not, holds a NaN or an infinity."""
    leaves = [leaf for leaf in named(tree).values() if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    large = [leaf for leaf in leaves if leaf.size > PIECE]
    small = [leaf for leaf in leaves if leaf.size <= PIECE]  # one program for all of them
    return bool(_finite(small)) and all(bool(_finite([leaf])) for leaf in large)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for one look: an open file's pages count as this process's memory.

    Raises:
        InputError: The file is no safetensors.
    """
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file: {error}") from error


def read_box(path: Path, name: str, box: Box) -> np.ndarray:
    """A part of a tensor of a safetensors file."""
    with opened(path) as file:
        dtype = jnp.dtype(_dtype(file.get_slice(name)))
    array = np.empty(box_shape(box), dtype)
    for piece in split_box(box, dtype.itemsize, PIECE) if array.size else ():
        with opened(path) as file:
            array[relative(piece, box)] = file.get_slice(name)[piece]
    return array


@jax.jit
def _finite(arrays):
    return jnp.all(jnp.array([jnp.isfinite(array).all() for array in arrays]))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _dtype(tensor: Any) -> str:
    return DTYPES.get(tensor.get_dtype(), tensor.get_dtype())


def _header(path: Path, leaves: list[tuple[str, Any]]) -> bytes:
    """The start of a safetensors file: 8 bytes of length, then JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {}
    end = 0
    for name, leaf in leaves:
        if leaf.dtype not in CODES:
            raise ValueError(f"{path}: leaf {name}: safetensors has no dtype {leaf.dtype}")
        start, end = end, end + leaf.size * leaf.dtype.itemsize
        code = CODES[leaf.dtype]
        entries[name] = {"dtype": code, "shape": leaf.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(leaf: Any) -> Iterator[np.ndarray]:
    """The parts of an array in the order of its memory, one after another on the host."""
    if not isinstance(leaf, jax.Array):
        yield np.asarray(leaf)
        return
    for box in split_box(whole(leaf.shape), leaf.dtype.itemsize, PIECE):
        yield to_host(leaf, box)


def _load_leaf(path: Path, name: str, like: Any) -> Any:
    if not _is_array(like):
        return like
    read = partial(read_box, path, name)
    if isinstance(like, np.ndarray | np.generic):
        return read(whole(like.shape))
    if isinstance(like.sharding, NamedSharding):
        return jax.block_until_ready(to_devices(like.shape, like.sharding, read))
    return jax.block_until_ready(jax.device_put(read(whole(like.shape))))
