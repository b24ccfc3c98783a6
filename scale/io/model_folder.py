"""A trained model and its tokenizer as a folder of plain files, saved and loaded.

The files are `config.json`, `tokenizer.json`, `tokenizer_config.json` and `weights.safetensors`.
Another program's model (`scale.io.pretrained`) is loaded into the same `ModelFolder`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from minipref.reward_models import RewardModel, stack
from scale.data import village
from scale.data.chat_tokenizer import load_tokenizer
from scale.data.dataset import Dataset, Limits, make_dataset
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError
from scale.files import fingerprint, read_json, read_json_object, write_json
from scale.io.arrays import all_finite, load_tree, save_tree
from scale.io.hub import downloaded
from scale.io.huggingface import MODEL_FILES, TOKENIZER_FILES
from scale.io.pretrained import pretrained, smollm2_path
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import ONE_DEVICE, Runtime
from scale.parallel.sharding import abstract_sharded, runtime_of

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
VILLAGE = Path("village")  # the true reward of `scale.data.village`, where a judge is asked for


@dataclass(frozen=True)
class ModelFolder:
    """A policy or a stack of reward models, with the tokenizer that it was trained with."""

    path: Path
    model: Any
    config: ModelConfig
    tokenizer: Tokenizer

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
        cache: Path | None = None,
    ) -> Dataset:
        """The rows for this model; arguments as in `scale.data.dataset.make_dataset`.

        Raises:
            InputError: The limits are longer than the model's sequences, or no row fits them.
        """
        if limits.prompt + limits.response > self.config.max_seq_len:
            raise InputError(
                f"--limits: {limits.prompt} + {limits.response} tokens, but {self.path} is made "
                f"for {self.config.max_seq_len}"
            )
        with_layout = bool(fields) and runtime_of(self.model).needs_layout
        return make_dataset(self.tokenizer, rows, fields, limits, source, with_layout, cache)


def save(
    path: Path, model: Any, config: ModelConfig, tokenizer: Tokenizer, num_reward_models: int = 0
) -> None:
    """Write a policy, or a stack of reward models.

    Args:
        path: The folder; it may hold other files.
        model: A `Transformer`, or `num_reward_models` stacked `RewardModel`s.
        config: The shape of the decoder.
        tokenizer: The tokenizer that the model was trained with.
        num_reward_models: 0 for a policy.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    write_json(path / CONFIG, {"num_reward_models": num_reward_models, "model": asdict(config)})
    save_tree(path / WEIGHTS, model)


def load_policy(path: Path, runtime: Runtime = ONE_DEVICE) -> ModelFolder:
    """A policy of ours, or another program's model.

    Raises:
        InputError: The path holds no policy, or one of its files cannot be read.
    """
    if is_pretrained(path):
        weights, tokenizer = pretrained(located(path))
        return ModelFolder(path, weights.load(runtime), weights.config, tokenizer)
    return _load(path, runtime, reward=False)


def load_rewards(path: Path, runtime: Runtime = ONE_DEVICE) -> ModelFolder:
    """A stack of reward models of ours.

    Raises:
        InputError: The path holds no reward models, or one of its files cannot be read.
    """
    return _load(path, runtime, reward=True)


def config_of(path: Path) -> ModelConfig:
    """The shape of a model, ours or another program's; its weights are not read."""
    if is_pretrained(path):
        return pretrained(located(path))[0].config
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


def _load(path: Path, runtime: Runtime, reward: bool) -> ModelFolder:
    if not is_ours(path):
        raise InputError(
            f"{path}: no trained model here (config.json, tokenizer.json, weights.safetensors)"
        )
    try:
        return _read(path, runtime, reward)
    except InputError:
        raise
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise InputError(f"{path}: cannot be read: {error}") from error


def _read(path: Path, runtime: Runtime, reward: bool) -> ModelFolder:
    record = read_json(path / CONFIG)
    num_reward_models = record["num_reward_models"]
    if bool(num_reward_models) != reward:
        kinds = ("policy", "reward model") if reward else ("reward model", "policy")
        raise InputError(f"{path}: holds a {kinds[0]}, not a {kinds[1]}")
    config = _config(record["model"])
    like = eqx.filter_eval_shape(_skeleton, config, num_reward_models, runtime)
    model = load_tree(path / WEIGHTS, abstract_sharded(like, runtime))
    if not all_finite(model):
        raise InputError(f"{path / WEIGHTS}: a weight is not finite")
    return ModelFolder(path, model, config, load_tokenizer(path))


def _config(record: dict[str, Any]) -> ModelConfig:
    scaling = record.pop("rope_scaling", None)
    return ModelConfig(**record, rope_scaling=scaling and tuple(scaling))


def _skeleton(config: ModelConfig, num_reward_models: int, runtime: Runtime) -> Any:
    key = jax.random.key(0)
    policy = Transformer(config, key, runtime)
    if not num_reward_models:
        return policy
    return stack([RewardModel(policy, config.d_model, key)] * num_reward_models)
