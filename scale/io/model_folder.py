"""A trained model and its tokenizer as a folder of plain files, saved and loaded.

The files are `config.json`, `tokenizer.json`, `tokenizer_config.json` and `weights.safetensors`.
Of a model with adapters the folder holds what was trained, and the name of the frozen model.
Another program's model (`scale.io.pretrained`) is loaded into the same `ModelFolder`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import equinox as eqx
import jax
import jax.numpy as jnp

from minipref.reward_models import RewardModel, stack
from scale.data import village
from scale.data.chat_tokenizer import load_tokenizer
from scale.data.dataset import Dataset, Limits, make_dataset
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError, as_input_error
from scale.files import fingerprint, read_json_object, write_json
from scale.io.arrays import all_finite, load_tree, save_tree
from scale.io.hub import downloaded
from scale.io.huggingface import MODEL_FILES, TOKENIZER_FILES
from scale.io.pretrained import pretrained, smollm2_path
from scale.model.adapters import (
    AdapterConfig,
    adapted,
    adapter_config,
    combine,
    merged,
    partition,
    stored,
)
from scale.model.config import ModelConfig, checked
from scale.model.transformer import Transformer
from scale.parallel.mesh import ONE_DEVICE, Dtype, Runtime
from scale.parallel.sharding import abstract_sharded, runtime_of

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
IN_MEMORY: WeakValueDictionary[Any, "ModelFolder"] = WeakValueDictionary()
"""The policies of `load_policy` that are in use, by file, time of change, and runtime."""
VILLAGE = Path("village")  # the true reward of `scale.data.village`, where a judge is asked for


@dataclass(frozen=True)
class ModelFolder:
    """A policy or a stack of reward models, with the tokenizer that it was trained with."""

    path: Path
    model: Any
    config: ModelConfig
    tokenizer: Tokenizer
    trunk: "ModelFolder | None" = None
    """The model below its adapters."""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The provenance of columns that are computed with this model."""
        if not is_ours(self.path):
            return dict.fromkeys(("model", "tokenizer"), identity(self.path))
        model, tokenizer = (WEIGHTS, CONFIG), present(self.path, TOKENIZER_FILES)
        return {
            "model": fingerprint(*(self.path / name for name in model)),
            "tokenizer": fingerprint(*tokenizer),
        }

    def make_dataset(
        self,
        rows: Sequence[dict],
        fields: Sequence[str],
        limits: Limits,
        source: str = "",
    ) -> Dataset:
        """The rows for this model; arguments as in `scale.data.dataset.make_dataset`.

        Raises:
            InputError: The limits are longer than the model's sequences, or no row fits them.
        """
        require_length(limits, self.config, str(self.path))
        with_layout = bool(fields) and runtime_of(self.model).needs_layout
        return make_dataset(self.tokenizer, rows, fields, limits, source, with_layout)


def require_length(limits: Limits, config: ModelConfig, name: str) -> None:
    """Refuse limits that are longer than the sequences of the model of this name."""
    if limits.prompt + limits.response > config.max_seq_len:
        raise InputError(
            f"--limits: {limits.prompt} + {limits.response} tokens, but {name} is made for "
            f"{config.max_seq_len}"
        )


def save(folder: ModelFolder) -> None:
    """Write a policy, or a stack of reward models, into its folder, which may hold other files.

    Of a model with adapters what was trained is written, and the name of the model below them.
    """
    path, model, trunk = folder.path, folder.model, folder.trunk
    path.mkdir(parents=True, exist_ok=True)
    folder.tokenizer.save(path)
    num_reward_models = len(model.head) if isinstance(model, RewardModel) else 0
    record: dict[str, Any] = {"num_reward_models": num_reward_models}
    record["model"] = asdict(folder.config)
    if adapter := adapter_config(model):
        assert trunk is not None
        place = os.path.relpath(trunk.path, path) if trunk.path.exists() else str(trunk.path)
        record["adapter"] = asdict(adapter)
        record["trunk"] = {"path": place, "model": trunk.hashes["model"]}
    write_json(path / CONFIG, record)
    save_tree(path / WEIGHTS, partition(model)[0])


def load_policy(path: Path, runtime: Runtime = ONE_DEVICE) -> ModelFolder:
    """A policy to sample from or to measure, of ours or another program's.

    Its matrices have the dtype of activations. What it has of adapters stays beside them. A model
    that is still in memory is not read again, so that several with adapters have the one below them
    in common; therefore its arrays must not be donated.

    Raises:
        InputError: The path holds no policy, or one of its files cannot be read.
    """
    file = _dated_file(path)
    if not file.exists():
        return _policy(path, runtime, runtime.dtype)
    key = file.resolve(), file.stat().st_mtime_ns, runtime
    folder = IN_MEMORY.get(key)
    if folder is None:
        folder = IN_MEMORY[key] = _policy(path, runtime, runtime.dtype)
    return folder


def load_trunk(path: Path, runtime: Runtime, adapter: AdapterConfig, seed: int) -> ModelFolder:
    """A policy to train, itself or by new adapters. Adapters that it has are added to its weights.

    Args:
        path: As for `load_policy`.
        runtime: Its devices and dtype: matrices below adapters have the dtype of activations.
        adapter: The new adapters, if their rank is positive.
        seed: Of their weights.

    Returns:
        The policy.

    Raises:
        InputError: As `load_policy`.
    """
    if adapter.rank and len({*adapter.products}) != max(1, len(adapter.products)):
        raise InputError("--adapter.products: name some, each once")
    dtype = runtime.dtype if adapter.rank else "float32"
    folder = _policy(path, runtime, dtype)
    trunk = stored(merged(folder.model), dtype)
    if folder.trunk and not adapter.rank:  # the training may take over its arrays
        trunk = jax.tree.map(jnp.copy, trunk)
    plain = replace(folder, model=trunk, trunk=None)
    if not adapter.rank:
        return plain
    return replace(plain, model=adapted(trunk, adapter, jax.random.key(seed)), trunk=plain)


def load_rewards(
    path: Path, runtime: Runtime = ONE_DEVICE, dtype: Dtype | None = None
) -> ModelFolder:
    """A stack of reward models of ours.

    Args:
        path: Their folder.
        runtime: Their devices.
        dtype: Of their matrices. Default: that of activations.

    Raises:
        InputError: The path holds no reward models, or one of its files cannot be read.
    """
    return _load(path, runtime, dtype or runtime.dtype, reward=True)


def config_of(path: Path) -> ModelConfig:
    """The shape of a model, ours or another program's; its weights are not read."""
    if is_pretrained(path):
        return pretrained(located(path))[0].config
    with as_input_error(path / CONFIG):
        return _config(read_json_object(path / CONFIG)["model"])


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a model, ours or another program's."""
    return pretrained(located(path))[1] if is_pretrained(path) else load_tokenizer(path)


def identity(path: Path) -> str:
    """The hash of what a path means: of another program's folder, of the files of its model."""
    path = located(path)
    if path.is_dir() and is_pretrained(path):
        return fingerprint(*present(path, (*MODEL_FILES, *TOKENIZER_FILES)))
    return fingerprint(path)


def present(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder that match, in order."""
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


def is_ours(path: Path) -> bool:
    """Whether a folder holds a model that `save` wrote."""
    return (path / WEIGHTS).exists()


def is_pretrained(path: Path) -> bool:
    """Whether a path means another program's model: a GGUF file or a Hugging Face folder."""
    path = located(path)
    if path.is_file():
        return True
    config = path / CONFIG
    ours = is_ours(path) or not config.exists() or "num_reward_models" in read_json_object(config)
    return not ours


def located(path: Path) -> Path:
    """The file or folder that a path means: `smollm2` is a file of its package, `village` a module
    of ours, and an id of the hub a folder of its cache."""
    if path == VILLAGE:
        return Path(village.__file__)
    if str(path) == "smollm2":
        return smollm2_path()
    return path if path.exists() else downloaded(path) or path


def _policy(path: Path, runtime: Runtime, dtype: Dtype) -> ModelFolder:
    """A policy whose matrices have a dtype."""
    if not is_pretrained(path):
        return _load(path, runtime, dtype, reward=False)
    weights, tokenizer = pretrained(located(path))
    return ModelFolder(path, weights.load(runtime, dtype), weights.config, tokenizer)


def _load(path: Path, runtime: Runtime, dtype: Dtype, reward: bool) -> ModelFolder:
    if not is_ours(path):
        raise InputError(
            f"{path}: no trained model here (config.json, tokenizer.json, weights.safetensors)"
        )
    with as_input_error(path):
        return _read(path, runtime, dtype, reward)


def _read(path: Path, runtime: Runtime, dtype: Dtype, reward: bool) -> ModelFolder:
    record = read_json_object(path / CONFIG)
    num_reward_models = record["num_reward_models"]
    if bool(num_reward_models) != reward:
        kinds = ("policy", "reward model") if reward else ("reward model", "policy")
        raise InputError(f"{path}: holds a {kinds[0]}, not a {kinds[1]}")
    config = _config(record["model"])
    adapter = _adapter(record)
    below = _below(path, runtime, dtype, record["trunk"]["model"]) if adapter.rank else None
    if below:
        trunk = stored(merged(below.model), dtype)
    else:
        trunk = eqx.filter_eval_shape(Transformer, config, jax.random.key(0), runtime)

    def parts(trunk: Transformer) -> tuple[Any, Any]:
        policy = adapted(trunk, adapter, jax.random.key(0))
        model = RewardModel(policy, config.d_model, jax.random.key(0)) if reward else policy
        trained, frozen = partition(model)
        return (stack([trained] * num_reward_models) if reward else trained), frozen

    like, _ = eqx.filter_eval_shape(parts, trunk)
    trained = load_tree(path / WEIGHTS, abstract_sharded(like, runtime))
    if not all_finite(trained):
        raise InputError(f"{path / WEIGHTS}: a weight is not finite")
    model = combine(trained, parts(trunk)[1]) if adapter.rank else stored(trained, dtype)
    return ModelFolder(path, model, config, load_tokenizer(path), below)


def trunk_path(path: Path) -> Path | None:
    """The frozen model below the adapters of a folder; None where it has none."""
    if is_pretrained(path) or "trunk" not in (record := read_json_object(path / CONFIG)):
        return None
    beside = path / record["trunk"]["path"]
    return beside.resolve() if beside.exists() else Path(record["trunk"]["path"])


def _below(path: Path, runtime: Runtime, dtype: Dtype, expected: str) -> ModelFolder:
    """The frozen model below the adapters of a folder, whose hash is known."""
    place = trunk_path(path)
    assert place is not None
    if not located(place).exists():
        place = Path(os.path.normpath(path / place))
        raise InputError(f"{path}: the model below its adapters is not at {place}")
    is_shared = dtype == runtime.dtype
    trunk = load_policy(place, runtime) if is_shared else _policy(place, runtime, dtype)
    if trunk.hashes["model"] != expected:
        raise InputError(f"{place}: has changed since the adapters of {path} were trained on it")
    return trunk


def _dated_file(path: Path) -> Path:
    """The file whose time of change says that another model is there."""
    path = located(path)
    if path.is_file():
        return path
    return path / (WEIGHTS if is_ours(path) else CONFIG)


def _adapter(record: dict[str, Any]) -> AdapterConfig:
    """The adapters that a folder's record names."""
    options = record.get("adapter", {"products": ()})
    adapter = AdapterConfig(**options | {"products": tuple(options["products"])})
    is_scale = type(adapter.scale) in (int, float) and abs(adapter.scale) < math.inf
    if type(adapter.rank) is not int or not is_scale:
        raise ValueError(f"adapter: rank {adapter.rank!r}, scale {adapter.scale!r} are no numbers")
    return adapter


def _config(record: dict[str, Any]) -> ModelConfig:
    scaling = record.pop("rope_scaling", None)
    return checked(ModelConfig(**record, rope_scaling=scaling and tuple(scaling)))
