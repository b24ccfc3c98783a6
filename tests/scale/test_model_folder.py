"""Models as folders of files."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.reward_models import RewardModel, stack
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.io.model_folder import ModelFolder, load_policy, load_rewards, save
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=270, num_layers=1, d_model=8, num_heads=2, head_dim=4, d_ff=8, rope_base=77.0
)
TOKENIZER = train_tokenizer(["a few words"], 270)


@pytest.fixture(scope="module")
def policy() -> Transformer:
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), like)


@pytest.fixture(scope="module")
def rewards(policy) -> RewardModel:
    return stack([RewardModel(policy, 8, key) for key in jax.random.split(jax.random.key(1), 3)])


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_policy_comes_back_to_the_bit(tmp_path, policy):
    save(ModelFolder(tmp_path / "p", policy, CONFIG, TOKENIZER))
    loaded = load_policy(tmp_path / "p")
    same(loaded.model, policy)
    assert loaded.config == CONFIG and loaded.model.config.rope_base == 77.0
    assert loaded.tokenizer.text_ids("a few words") == TOKENIZER.text_ids("a few words")


def test_an_ensemble_comes_back_to_the_bit(tmp_path, policy, rewards):
    save(ModelFolder(tmp_path / "r", rewards, CONFIG, TOKENIZER))
    loaded = load_rewards(tmp_path / "r")
    same(loaded.model, rewards)
    assert loaded.model.head.shape == (3, 8)


def test_a_policy_is_no_reward_model_and_the_reverse(tmp_path, policy, rewards):
    save(ModelFolder(tmp_path / "p", policy, CONFIG, TOKENIZER))
    save(ModelFolder(tmp_path / "r", rewards, CONFIG, TOKENIZER))
    with pytest.raises(InputError, match="p: holds a policy, not a reward model"):
        load_rewards(tmp_path / "p")
    with pytest.raises(InputError, match="r: holds a reward model, not a policy"):
        load_policy(tmp_path / "r")


def test_hashes_tell_models_and_tokenizers_apart(tmp_path, policy):
    other = eqx.tree_at(lambda m: m.norm, policy, policy.norm + 1e-6)
    save(ModelFolder(tmp_path / "a", policy, CONFIG, TOKENIZER))
    save(ModelFolder(tmp_path / "b", policy, CONFIG, TOKENIZER))
    save(ModelFolder(tmp_path / "weights", other, CONFIG, TOKENIZER))
    save(ModelFolder(tmp_path / "config", policy, replace(CONFIG, rope_base=78.0), TOKENIZER))
    other_tokenizer = train_tokenizer(["other words, other pieces"], 270)
    save(ModelFolder(tmp_path / "tokenizer", policy, CONFIG, other_tokenizer))
    a = load_policy(tmp_path / "a").hashes
    assert load_policy(tmp_path / "b").hashes == a
    expected = {"weights": {"model"}, "config": {"model"}, "tokenizer": {"tokenizer"}}
    for name, differing in expected.items():
        hashes = load_policy(tmp_path / name).hashes
        assert {key for key, value in hashes.items() if value != a[key]} == differing


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="no trained model here"):
        load_policy(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replacing(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.safetensors", cut),
        ("config.json", cut),
        ("tokenizer.json", cut),
        ("config.json", lambda p: p.unlink()),
        ("tokenizer.json", lambda p: p.unlink()),
        ("config.json", replacing('"d_model": 8', '"d_model": 16')),
        ("config.json", replacing('"d_ff"', '"width"')),
    ],
    ids=[
        "half weights",
        "half config",
        "half tokenizer",
        "no config",
        "no tokenizer",
        "other width",
        "unknown option",
    ],
)
def test_a_damaged_folder_is_an_input_error_that_names_it(tmp_path, policy, name, damage):
    """`InputError`, so that the command line says so in a line and not in a traceback."""
    save(ModelFolder(tmp_path / "p", policy, CONFIG, TOKENIZER))
    damage(tmp_path / "p" / name)
    with pytest.raises(InputError, match=str(tmp_path / "p")):
        load_policy(tmp_path / "p")
