"""Adapters as a folder that `peft` loads: `adapter_config.json`, `adapter_model.safetensors`."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from safetensors.numpy import save_file

from scale.errors import InputError
from scale.files import write_json
from scale.io.boxes import to_host, whole
from scale.io.hf_config import refuse_palm
from scale.io.huggingface import new_folder, require_new
from scale.io.weight_table import TABLE
from scale.model.adapters import Adapted, Product, adapter_config
from scale.model.transformer import Transformer


def export_adapters(path: Path, model: Transformer, trunk: str) -> None:
    """Write the adapters of a policy for `peft`: whole, or not at all.

    With several processes, all must call this; process 0 writes, and all return when it has.

    Args:
        path: The folder; it must be empty or not exist.
        model: A policy with adapters.
        trunk: The model below them: a Hugging Face folder, or an id of its hub.

    Raises:
        InputError: The policy has no adapters or is PaLM-shaped, or `path` has files already.
    """
    config = adapter_config(model)
    if config is None:
        raise InputError("--adapters: the policy has none")
    refuse_palm(model.config)
    require_new(path)
    tensors = {
        f"base_model.model.{name}.{part}.weight": array
        for product in config.products
        for name, part, array in lora_tensors(product, getattr(model.blocks, product))
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": trunk,
        "r": config.rank,
        "lora_alpha": config.scale * config.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    sync_global_devices("export begins")
    if jax.process_index() == 0:
        with new_folder(path) as folder:
            write_json(folder / "adapter_config.json", settings)
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    sync_global_devices("export ends")


def lora_tensors(product: Product, adapter: Adapted) -> Iterator[tuple[str, str, np.ndarray]]:
    """Module, part and array of each tensor of a product's adapters.

    `lora_A` is [rank, inputs] and `lora_B` [results, rank]. Two modules that read one `down` have
    equal `lora_A`.
    """
    down, up = (to_host(array, whole(array.shape)) for array in (adapter.down, adapter.up))
    rank, names = up.shape[1], TABLE[f".blocks.{product}"].names
    for layer in range(len(up)):
        for part, name in enumerate(names):
            module = name.format(layer).removesuffix(".weight")
            results = up[layer] if len(names) == 1 else up[layer, :, part]
            yield module, "lora_A", np.ascontiguousarray(down[layer].reshape(-1, rank).T)
            yield module, "lora_B", np.ascontiguousarray(results.reshape(rank, -1).T)
