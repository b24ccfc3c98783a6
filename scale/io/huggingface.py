"""Folders as the Hugging Face hub has them: `config.json`, safetensors files, tokenizer files."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from safetensors import SafetensorError
from safetensors.numpy import save_file

from scale.data.tokenizer import Tokenizer
from scale.errors import InputError, as_input_error
from scale.files import read_json_object, remove_temporaries, write_json
from scale.io.arrays import opened, read_box
from scale.io.hf_config import config_from, settings_for
from scale.io.weight_table import ModelTensor, Weights, tensors_of
from scale.model.transformer import Transformer

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template*", "generation_config.json"),
)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILE_BYTES = 2**30
DTYPES = ("F32", "F16", "BF16")


def open_weights(path: Path) -> Weights:
    """A folder's config and the names and shapes of its tensors, which are read only on demand.

    Raises:
        InputError: Something is missing, malformed or not supported; the message names the file.
    """
    settings = read_json_object(path / "config.json")
    with as_input_error(path / "config.json"):
        config = config_from(settings, path / "config.json")
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(path):
        in_file = tensor_shapes(file)
        files |= dict.fromkeys(in_file, file)
        shapes |= in_file
    return Weights(path, config, shapes, lambda name, box: read_box(files[name], name, box))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those of its index."""
    files = [path / SINGLE]
    if (path / INDEX).exists():
        shards = shard_files(path)
        if not files[0].exists():
            files = shards
        elif shards != files and all(shard.exists() for shard in shards):
            raise InputError(
                f"{files[0]}: and {INDEX} with its files are both here; remove one of the two "
                "models"
            )
    for file in files:
        if not file.exists():
            raise InputError(
                f"{file}: no such file; weights are read from safetensors, never from a pickle"
            )
    return files


def shard_files(path: Path) -> list[Path]:
    """The files that the index of a folder names, all of them in that folder.

    Raises:
        InputError: A name leads elsewhere, as `../x` does, or a link does, except into the hub's
            cache.
    """
    weight_map = read_json_object(path / INDEX).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    here, blobs = path.resolve(), path.resolve().parent.parent / "blobs"
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise InputError(f"{path / INDEX}: weight_map: {name!r} is no name of a file beside it")
        with as_input_error(path / name):
            place = (here / name).resolve().parent  # of a link to itself there is none
        if place not in (here, blobs):
            raise InputError(f"{path / name}: a link that leads out of the folder")
    return [path / name for name in sorted(set(names))]


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a file, whose dtypes must be of floating-point numbers."""
    with opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        for name, tensor in slices.items():
            dtype = tensor.get_dtype()
            if dtype not in DTYPES:
                supported = ", ".join(DTYPES)
                raise InputError(f"{file}: tensor {name} is {dtype}; supported are {supported}")
        return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}


def export(path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a folder that `transformers` loads, in float32: whole, or not at all.

    With several processes, all must call this; process 0 writes, and all return when it has.

    Raises:
        InputError: No Llama architecture can hold the model, or `path` has files already.
    """
    settings = settings_for(model.config, tokenizer)
    require_new(path)
    sync_global_devices("export begins")
    if jax.process_index() == 0:
        with new_folder(path) as folder:
            write_json(folder / "config.json", settings)
            tokenizer.save(folder)
            save_weights(folder, tensors_of(model))
    else:
        for tensor in tensors_of(model).values():
            tensor.array()  # takes part in the gathering
    sync_global_devices("export ends")


def require_new(path: Path) -> None:
    """Refuse to write into a folder that has files."""
    if not path.name:
        raise InputError(f"{path}: is the current folder; name a new one")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, moved onto it on success and removed on failure."""
    remove_temporaries(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_weights(
    folder: Path, tensors: dict[str, ModelTensor], max_bytes: int = FILE_BYTES
) -> None:
    """Write safetensors files, one of which is in memory at a time.

    Args:
        folder: A folder that exists.
        tensors: The tensors by name.
        max_bytes: The size of a file, at most; a larger tensor has a file of its own.
    """
    sizes = {name: 4 * prod(tensor.shape) for name, tensor in tensors.items()}
    groups = grouped(sizes, max_bytes)
    files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    files = [SINGLE] if len(groups) == 1 else files
    for file, names in zip(files, groups, strict=True):
        arrays = {name: tensors[name].array().astype(np.float32, copy=False) for name in names}
        try:
            save_file(arrays, folder / file, {"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / file}: cannot be written: {error}") from error
        (folder / file).chmod(0o644)  # as the other files: safetensors makes it the owner's alone
    if len(groups) > 1:
        file_of = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        metadata = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": file_of})


def grouped(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups whose sizes sum to at most `limit`, or groups of one."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
