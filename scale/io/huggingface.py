"""Folders as the Hugging Face hub has them: `config.json`, safetensors in one file or several, tokenizer files."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from scale.data.tokenizer import Tokenizer, json_object
from scale.errors import InputError
from scale.files import write_json
from scale.io.hf_config import config_from, settings_for
from scale.io.weight_table import Entry, Weights, Window, entries
from scale.model.transformer import Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


FILE_BYTES = 2**30


DTYPES = ("F32", "F16", "BF16")


def open_weights(path: Path) -> Weights:
    """A folder's config and its tensors' names and shapes; the tensors are read when they are asked for.

    Errors: InputError, naming the file, for what is missing, malformed or not supported.
    """
    settings = json_object(path / "config.json")
    config = config_from(settings, path / "config.json")
    found = {name: (file, shape) for file in weight_files(path) for name, shape in shapes(file).items()}
    sizes = {name: shape for name, (_, shape) in found.items()}
    return Weights(path, config, sizes, lambda name, window: read(found[name][0], name, window))


def weight_files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        names = set(json_object(path / INDEX).get("weight_map", {}).values())
        files = [path / Path(name).name for name in sorted(names)]
    else:
        files = [path / SINGLE]
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: no such file; weights are read from safetensors, never from a pickle")
    return files


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open for one look only: the pages of an open file count as this process's memory."""
    try:
        with safe_open(file, framework="np") as tensors:
            yield tensors
    except SafetensorError as error:
        raise InputError(f"{file}: not a safetensors file: {error}") from error


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with opened(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        for name, tensor in slices.items():
            if tensor.get_dtype() not in DTYPES:
                raise InputError(f"{file}: tensor {name} is {tensor.get_dtype()}; supported are {', '.join(DTYPES)}")
        return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}


def read(file: Path, name: str, window: Window) -> np.ndarray:
    with opened(file) as tensors:
        return tensors.get_slice(name)[window]


def export(path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a folder that `transformers` loads, in float32: whole, or not at all.

    Of several processes all call this, process 0 writes, and all return when it has. Errors: InputError for a model
    that no Llama architecture can hold, and where `path` has files already.
    """
    settings = settings_for(model.config, tokenizer)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty folder")
    sync_global_devices("export begins")
    if jax.process_index() == 0:
        with new_folder(path) as folder:
            write_json(folder / "config.json", settings)
            tokenizer.save(folder)
            save_weights(folder, entries(model))
    else:
        for entry in entries(model).values():
            entry.array()  # takes part in the gathering
    sync_global_devices("export ends")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which becomes `path` on success and is removed on failure."""
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_weights(folder: Path, tensors: dict[str, Entry], limit: int = FILE_BYTES) -> None:
    """safetensors files of at most `limit` bytes each (or of one tensor), of which one is in memory at a time."""
    parts = divided({name: 4 * prod(entry.shape) for name, entry in tensors.items()}, limit)
    files = [SINGLE] if len(parts) == 1 else [
        f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)
    ]
    for file, names in zip(files, parts, strict=True):
        arrays = {name: tensors[name].array().astype(np.float32, copy=False) for name in names}
        save_file(arrays, folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # as the other files: safetensors makes it the owner's alone
    if len(parts) > 1:
        total = sum(4 * prod(entry.shape) for entry in tensors.values())
        places = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def divided(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups whose sizes sum to at most `limit` where they can."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
