"""Where parameters lie, by hand; what is wrong with rules, named; and that no device holds more
than its share."""

import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from minipref.reward_models import RewardModel, stack
from minipref.training import Hyperparameters, init_state
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.presets import MODELS
from scale.model.transformer import Transformer
from scale.parallel.mesh import ONE_DEVICE, Runtime, RuntimeConfig, mesh_shape
from scale.parallel.sharding import RULES, partition_spec, runtime_of, shardings
from scale.train.optimizer import Schedule, make_optimizer

CONFIG = ModelConfig(
    vocab_size=24,
    num_layers=2,
    d_model=8,
    num_heads=4,
    head_dim=2,
    d_ff=16,
    num_kv_heads=2,
    block="sequential",
    tie_embeddings=False,
    qkv_bias=True,
    qk_norm=True,
)
MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

BY_HAND = {
    "embedding": P("fsdp", "tensor"),
    "head": P("fsdp", "tensor"),
    "norm": P("fsdp"),
    "blocks.norm": P(None, "fsdp"),
    "blocks.mlp_norm": P(None, "fsdp"),
    "blocks.query": P(None, "fsdp", "tensor", None),
    "blocks.key_value": P(None, "fsdp", None, "tensor", None),
    "blocks.query_bias": P(None, "tensor", None),
    "blocks.key_value_bias": P(None, None, "tensor", None),
    "blocks.query_norm": P(None, None),
    "blocks.key_norm": P(None, None),
    "blocks.gate_up": P(None, "fsdp", None, "tensor"),
    "blocks.attention_out": P(None, "tensor", None, "fsdp"),
    "blocks.mlp_out": P(None, "tensor", "fsdp"),
}


def shapes(config=CONFIG):
    return eqx.filter_eval_shape(Transformer, config, jax.random.key(0))


def specs(tree, mesh=MESH, **rules):
    leaves = jax.tree_util.tree_leaves_with_path(shardings(tree, mesh, RULES | rules))
    return {jax.tree_util.keystr(path).lstrip("."): sharding.spec for path, sharding in leaves}


def test_every_parameter_by_hand():
    assert specs(shapes()) == BY_HAND


def test_the_one_head_of_multi_query_attention_is_on_every_device():
    config = ModelConfig(vocab_size=24, d_model=8, num_heads=4, head_dim=2, d_ff=16)
    assert specs(shapes(config))["blocks.key_value"] == P(None, "fsdp", None, None, None)


def reward_models(runtime=ONE_DEVICE):
    key = jax.random.key(0)
    model = RewardModel(Transformer(CONFIG, key, runtime), 8, key)
    return stack([model] * 3)


def test_members_of_an_ensemble_are_not_split():
    by_name = specs(eqx.filter_eval_shape(reward_models))
    assert by_name["head"] == P(None, "fsdp")
    assert by_name["trunk.blocks.query"] == P(None, None, "fsdp", "tensor", None)


def test_the_runtime_is_that_of_the_model_in_a_tree():
    runtime = Runtime(remat="full")
    assert runtime_of(eqx.filter_eval_shape(reward_models, runtime)) == runtime
    model = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0), runtime)
    assert runtime_of(model) == runtime_of({"a": [model]}) == runtime
    assert runtime_of({"a": 1}) == ONE_DEVICE


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [("adam", ("[1].mu", "[1].nu")), ("adafactor", ("[1].v", "[4].ema"))],
)
def test_the_moments_of_an_optimizer_lie_where_their_parameters_do(optimizer, moments):
    def start():
        transform = make_optimizer(optimizer, Schedule(10, 0.1, 200), 1e-3)
        hyperparameters = Hyperparameters(jnp.asarray(0.1), jnp.zeros(2))
        return init_state(Transformer(CONFIG, jax.random.key(0)), transform, 200, hyperparameters)

    by_name = specs(eqx.filter_eval_shape(start))
    for moment in moments:
        prefix = f"opt_state.inner_state{moment}."
        of_moment = {k.removeprefix(prefix): v for k, v in by_name.items() if k.startswith(prefix)}
        assert of_moment == BY_HAND
    assert by_name["step"] == by_name["opt_state.inner_state[1].count"] == P()
    assert by_name["opt_state.hyperparams['peak_lr']"] == P()
    assert by_name["hyperparameters.gamma"] == P(None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"F": "model"},
            r"\.blocks\.gate_up: the rule F -> 'model' names no mesh axis, which are data, fsdp",
        ),
        (
            {"F": "fsdp"},
            r"parameter \.blocks\.gate_up \(D 2 F\): mesh axis 'fsdp' is used twice",
        ),
        ({"H": "fsdp", "D": "tensor", "F": None, "G": None}, None),
    ],
)
def test_rules_are_checked(rules, message):
    if message is None:
        assert specs(shapes(), **rules)["blocks.query"] == P(None, "tensor", "fsdp", None)
        return
    with pytest.raises(InputError, match=message):
        specs(shapes(), **rules)


def test_an_axis_without_a_rule():
    message = r"parameter \.w: no rule for its logical axis 'X'; rules are for D, H, G"
    with pytest.raises(InputError, match=message):
        partition_spec(".w", ("D", "X"), (8, 8), MESH.shape, RULES)


def test_a_dimension_that_does_not_divide():
    odd = ModelConfig(vocab_size=24, d_model=8, num_heads=3, head_dim=2, d_ff=16)
    message = r"parameter \.blocks\.query: axis H of 3 is not divisible by tensor = 2"
    with pytest.raises(InputError, match=message):
        specs(shapes(odd))


def test_palm_540b_by_hand():
    """On 12 x 256: 256,000 rows that 12 does not divide, and attention that is not square."""
    mesh = AbstractMesh((2, 256, 12), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model = shapes(MODELS["palm-540b"])
    leaves = jax.tree_util.tree_leaves_with_path(shardings(model, mesh))
    shards = {
        jax.tree_util.keystr(path): sharding.shard_shape(leaf.shape)
        for (path, sharding), leaf in zip(leaves, jax.tree.leaves(model), strict=True)
    }
    assert shards[".embedding"] == (1000, 1536)
    assert shards[".blocks.query"] == (118, 72, 4, 256)
    assert shards[".blocks.mlp_out"] == (118, 6144, 72)
    assert shards[".blocks.key_value"] == (118, 72, 2, 1, 256)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (RuntimeConfig(), (1, 8, 1)),
        (RuntimeConfig(2, 0, 2), (2, 2, 2)),
        (RuntimeConfig(1, 2, 2), (1, 2, 2)),
        (RuntimeConfig(2, 4), (2, 4, 1)),
    ],
)
def test_the_mesh_of_eight_devices(config, shape):
    assert mesh_shape(config, 8) == shape


@pytest.mark.parametrize(
    "config",
    [RuntimeConfig(3), RuntimeConfig(2, 8), RuntimeConfig(16), RuntimeConfig(1, 0, 3)],
)
def test_a_mesh_that_the_devices_do_not_make(config):
    message = r"--runtime: data \d+ x fsdp (\d+|\?) x tensor \d+ devices, of 8"
    with pytest.raises(InputError, match=message):
        mesh_shape(config, 8)


INITIALISED = """
import jax, numpy as np
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.parallel.sharding import initialise

config = ModelConfig(
    vocab_size=64, num_layers=2, d_model=16, num_heads=4, head_dim=4, d_ff=32, num_kv_heads=2
)

def make(*axes):
    runtime = make_runtime(RuntimeConfig(*axes))
    return initialise(lambda: Transformer(config, jax.random.key(0), runtime))

whole, split = make(1, 1, 1), make(1, 4, 2)
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
    np.testing.assert_array_equal(a, b)
for array in (split.embedding, split.blocks.gate_up):
    assert {shard.data.size * 8 for shard in array.addressable_shards} == {array.size}
"""


@pytest.mark.slow
def test_sharded_initialisation_is_the_same_and_shared_out():
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command, root = [sys.executable, "-c", INITIALISED], Path(__file__).parents[2]
    subprocess.run(command, check=True, env=environment, cwd=root)
