"""A trained model as a folder of plain files: `config.json`, `tokenizer.json`, `weights.safetensors`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from minipref.reward_models import RewardModel, stack
from scale.files import all_finite, fingerprint, load_tree, read_json, save_tree, write_json
from scale.model import ModelConfig, Transformer
from scale.rows import DataError
from scale.tokenizer import Codec, load_codec


@dataclass(frozen=True)
class Folder:
    """A policy or a stack of reward models, with what is needed to run it."""

    path: Path
    model: Any
    config: ModelConfig
    codec: Codec

    @property
    def hashes(self) -> dict[str, str]:
        """What a file of columns computed with this folder records."""
        return {"model": fingerprint(self.path / "weights.safetensors", self.path / "config.json"),
                "tokenizer": fingerprint(self.path / "tokenizer.json")}


def save(path: Path, model: Any, config: ModelConfig, codec: Codec, members: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    codec.save(path / "tokenizer.json")
    write_json(path / "config.json", {"members": members, "model": asdict(config)})
    save_tree(path / "weights.safetensors", model)


def load(path: Path, reward: bool) -> Folder:
    if not (path / "weights.safetensors").exists():
        raise DataError(f"{path}: no trained model here (config.json, tokenizer.json, weights.safetensors)")
    try:
        return read_folder(path, reward)
    except DataError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_folder(path: Path, reward: bool) -> Folder:
    record = read_json(path / "config.json")
    if bool(record["members"]) != reward:
        raise DataError(f"{path}: holds a {'policy' if reward else 'reward model'}, "
                        f"not a {'reward model' if reward else 'policy'}")
    config = ModelConfig(**record["model"])
    like = eqx.filter_eval_shape(skeleton, config, record["members"])
    model = load_tree(path / "weights.safetensors", like)
    if not all_finite(model):
        raise DataError(f"{path / 'weights.safetensors'}: a weight is not finite")
    return Folder(path, model, config, load_codec(path / "tokenizer.json"))


def skeleton(config: ModelConfig, members: int) -> Any:
    key = jax.random.key(0)
    policy = Transformer(config, key)
    return stack([RewardModel(policy, config.d_model, key)] * members) if members else policy


def load_policy(path: Path) -> Folder:
    return load(path, reward=False)


def load_rewards(path: Path) -> Folder:
    return load(path, reward=True)
