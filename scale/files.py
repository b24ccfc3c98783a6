"""Files: whole or not there at all, known by their contents' hash; arrays as safetensors, never a pickle."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` (same suffix), moved onto it on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON; a NaN or infinity, which JSON has not, raises ValueError."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(obj, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def fingerprint(*paths: Path) -> str:
    """The first 16 hex digits of a SHA-256: of a file's contents (as `sha256sum` has it), of a folder's
    sorted relative names with their contents, or of several such digests in the order given."""
    digests = [_digest(path) for path in paths]
    return (digests[0] if len(digests) == 1 else _sha256("".join(digests)))[:16]


def _digest(path: Path) -> str:
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        return _sha256(json.dumps([[name, _digest(files[name])] for name in sorted(files)]))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save_tree(path: Path, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Write a pytree's array leaves to one safetensors file, named by their paths (`.layers[0].weight`).

    Leaves that are no arrays (functions, Python numbers) belong to the structure, which `load_tree` is given.
    `metadata` is any JSON object. PRNG keys must be converted by `jax.random.key_data` first.
    """
    # safetensors 0.8 writes a Fortran-ordered array's bytes as they lie, so scrambled
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(tree).items()}
    with atomic(path) as temporary:
        save_file(arrays, temporary, {"metadata": json.dumps(metadata or {}, allow_nan=False)})


def load_tree(path: Path, like: Any) -> Any:
    """`like` with its array leaves read from `path`; `like` may hold `jax.ShapeDtypeStruct`s.

    NumPy leaves stay NumPy arrays, others become JAX arrays on the default device. Raises ValueError, naming
    the file and the leaf, where one is missing, unexpected, or of another shape or dtype than in `like`.
    """
    wanted = _named(like)
    arrays = _read_arrays(path)
    for name in sorted(wanted.keys() ^ arrays.keys()):
        raise ValueError(f"{path}: {'missing' if name in wanted else 'unexpected'} leaf {name}")
    for name, leaf in wanted.items():
        _check(f"{path}: leaf {name}", arrays[name], leaf)
    return jax.tree_util.tree_map_with_path(lambda key, leaf: _restored(arrays, key, leaf), like)


def all_finite(tree: Any) -> bool:
    """Whether no floating-point array of a tree holds a NaN or an infinity."""
    return all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `save_tree` was given; ValueError where the file is no safetensors."""
    with _opened(path) as file:
        return json.loads((file.metadata() or {}).get("metadata", "{}"))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): leaf for key, leaf in leaves if _is_array(leaf)}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with _opened(path) as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def _check(where: str, array: np.ndarray, like: Any) -> None:
    found, expected = (f"{a.dtype}{list(a.shape)}" for a in (array, like))
    if found != expected:
        raise ValueError(f"{where} is {found}, expected {expected}")


def _restored(arrays: dict[str, np.ndarray], key: tuple[Any, ...], leaf: Any) -> Any:
    if not _is_array(leaf):
        return leaf
    array = arrays[jax.tree_util.keystr(key)]
    return array if isinstance(leaf, np.ndarray | np.generic) else jnp.asarray(array)
