"""A trained model as a folder of plain files: `config.json`, `tokenizer.json`, `weights.safetensors`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from minipref.reward_models import RewardModel, stack
from scale.data.chat_template import load_tokenizer
from scale.data.dataset import Dataset, Limits, make_dataset
from scale.data.tokenizer import Tokenizer, json_object
from scale.errors import InputError
from scale.files import fingerprint, read_json, write_json
from scale.io.arrays import all_finite, load_tree, save_tree
from scale.io.pretrained import pretrained, smollm2_path
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import ONE_DEVICE, Runtime
from scale.parallel.sharding import abstract_sharded, runtime_of


@dataclass(frozen=True)
class ModelFolder:
    """A policy or a stack of reward models, with what is needed to run it."""

    path: Path
    model: Any
    config: ModelConfig
    tokenizer: Tokenizer

    @cached_property
    def hashes(self) -> dict[str, str]:
        """What a file of columns computed with this folder records."""
        if not is_ours(self.path):
            return dict.fromkeys(("model", "tokenizer"), fingerprint(located(self.path)))
        return {"model": fingerprint(self.path / "weights.safetensors", self.path / "config.json"),
                "tokenizer": fingerprint(self.path / "tokenizer.json", self.path / "tokenizer_config.json")}

    def make_dataset(
        self,
        rows: Sequence[dict],
        fields: Sequence[str],
        limits: Limits,
        source: str = "",
        cache: Path | None = None,
    ) -> Dataset:
        """The rows for this model; arguments as in `scale.data.dataset.make_dataset`.

        Raises:
            InputError: The limits are longer than the model's sequences, or no row fits them.
        """
        if limits.prompt + limits.response > self.config.max_seq_len:
            raise InputError(
                f"--limits: {limits.prompt} + {limits.response} tokens, but {self.path} is made for "
                f"{self.config.max_seq_len}"
            )
        with_layout = bool(fields) and runtime_of(self.model).needs_layout
        return make_dataset(self.tokenizer, rows, fields, limits, source, with_layout, cache)


def save(path: Path, model: Any, config: ModelConfig, tokenizer: Tokenizer, members: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    write_json(path / "config.json", {"num_reward_models": members, "model": asdict(config)})
    save_tree(path / "weights.safetensors", model)


def is_ours(path: Path) -> bool:
    return (path / "weights.safetensors").exists()


def is_pretrained(path: Path) -> bool:
    """Whether a path means another program's model: a GGUF file or a Hugging Face folder."""
    config = path / "config.json"
    return located(path).is_file() or (config.exists() and not is_ours(path) and "num_reward_models" not in json_object(config))


def located(path: Path) -> Path:
    """The file or folder that a path means: `smollm2` is a file of its package."""
    return smollm2_path() if str(path) == "smollm2" else path


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a model of ours or another program's."""
    return pretrained(str(path))[1] if is_pretrained(path) else load_tokenizer(path)


def load_pretrained(path: Path, runtime: Runtime) -> ModelFolder:
    weights, tokenizer = pretrained(str(path))
    return ModelFolder(path, weights.load(runtime), weights.config, tokenizer)


def load(path: Path, reward: bool, runtime: Runtime) -> ModelFolder:
    if is_pretrained(path) and not reward:
        return load_pretrained(path, runtime)
    if not is_ours(path):
        raise InputError(f"{path}: no trained model here (config.json, tokenizer.json, weights.safetensors)")
    try:
        return read_folder(path, reward, runtime)
    except InputError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise InputError(f"{path}: cannot be read: {error}") from error


def read_folder(path: Path, reward: bool, runtime: Runtime) -> ModelFolder:
    record = read_json(path / "config.json")
    if bool(record["num_reward_models"]) != reward:
        raise InputError(f"{path}: holds a {'policy' if reward else 'reward model'}, "
                        f"not a {'reward model' if reward else 'policy'}")
    config = read_config(record["model"])
    like = eqx.filter_eval_shape(skeleton, config, record["num_reward_models"], runtime)
    model = load_tree(path / "weights.safetensors", abstract_sharded(like, runtime))
    if not all_finite(model):
        raise InputError(f"{path / 'weights.safetensors'}: a weight is not finite")
    return ModelFolder(path, model, config, load_tokenizer(path))


def read_config(record: dict[str, Any]) -> ModelConfig:
    scaling = record.pop("rope_scaling", None)
    return ModelConfig(**record, rope_scaling=scaling and tuple(scaling))


def skeleton(config: ModelConfig, members: int, runtime: Runtime) -> Any:
    key = jax.random.key(0)
    policy = Transformer(config, key, runtime)
    return stack([RewardModel(policy, config.d_model, key)] * members) if members else policy


def load_policy(path: Path, runtime: Runtime = ONE_DEVICE) -> ModelFolder:
    return load(path, False, runtime)


def load_rewards(path: Path, runtime: Runtime = ONE_DEVICE) -> ModelFolder:
    return load(path, True, runtime)
