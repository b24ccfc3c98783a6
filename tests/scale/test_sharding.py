"""Where parameters lie, by hand; what is wrong with rules, named; and that no device holds more than its share."""

import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from minipref.reward_models import RewardModel, stack
from minipref.training import init_state
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.presets import MODELS
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, mesh_shape
from scale.parallel.sharding import RULES, partition_spec, shardings
from scale.train.loop import TrainingConfig, hyper
from scale.train.optimizer import ADAFACTOR, ADAM

CONFIG = ModelConfig(vocab_size=24, num_layers=2, d_model=8, num_heads=4, head_dim=2, d_ff=16, num_kv_heads=2, block="sequential",
                     tie_embeddings=False, qkv_bias=True, qk_norm=True)
MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

BY_HAND = {
    "embedding": P("fsdp", "tensor"), "head": P("fsdp", "tensor"), "norm": P("fsdp"),
    "blocks.norm": P(None, "fsdp"), "blocks.mlp_norm": P(None, "fsdp"),
    "blocks.query": P(None, "fsdp", "tensor", None), "blocks.key_value": P(None, "fsdp", None, "tensor", None),
    "blocks.query_bias": P(None, "tensor", None), "blocks.key_value_bias": P(None, None, "tensor", None),
    "blocks.query_norm": P(None, None), "blocks.key_norm": P(None, None),
    "blocks.gate_up": P(None, "fsdp", None, "tensor"), "blocks.attention_out": P(None, "tensor", None, "fsdp"),
    "blocks.mlp_out": P(None, "tensor", "fsdp"),
}


def shapes(config=CONFIG):
    return eqx.filter_eval_shape(Transformer, config, jax.random.key(0))


def specs(tree, mesh=MESH, **rules):
    found = jax.tree_util.tree_leaves_with_path(shardings(tree, mesh, RULES | rules))
    return {jax.tree_util.keystr(path).lstrip("."): sharding.spec for path, sharding in found}


def test_every_parameter_by_hand():
    assert specs(shapes()) == BY_HAND


def test_the_one_head_of_multi_query_attention_is_on_every_device():
    found = specs(shapes(ModelConfig(vocab_size=24, d_model=8, num_heads=4, head_dim=2, d_ff=16)))
    assert found["blocks.key_value"] == P(None, "fsdp", None, None, None)


def test_members_of_an_ensemble_are_not_split():
    key = jax.random.key(0)
    models = eqx.filter_eval_shape(lambda: stack([RewardModel(Transformer(CONFIG, key), 8, key)] * 3))
    found = specs(models)
    assert found["head"] == P(None, "fsdp")
    assert found["trunk.blocks.query"] == P(None, None, "fsdp", "tensor", None)


@pytest.mark.parametrize(
    ("optimizer", "moments"), [(ADAM, ("[1].mu", "[1].nu")), (ADAFACTOR, ("[1].v", "[4].ema"))]
)
def test_the_optimisers_moments_lie_where_their_parameters_do(optimizer, moments):
    found = specs(eqx.filter_eval_shape(
        lambda: init_state(Transformer(CONFIG, jax.random.key(0)), optimizer, hyper(TrainingConfig()))
    ))
    for moment in moments:
        prefix = f"opt_state{moment}."
        assert {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)} == BY_HAND
    assert found["step"] == found["opt_state[1].count"] == P() and found["hyper.gamma"] == P(None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"F": "model"}, r"\.blocks\.gate_up: the rule F -> 'model' names no mesh axis, which are data, fsdp"),
        ({"F": "fsdp"}, r"parameter \.blocks\.gate_up \(D 2 F\): mesh axis 'fsdp' is used twice"),
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
    with pytest.raises(InputError, match=r"parameter \.w: no rule for its logical axis 'X'; rules are for D, H, G"):
        partition_spec(".w", ("D", "X"), (8, 8), MESH.shape, RULES)


def test_a_dimension_that_does_not_divide():
    odd = ModelConfig(vocab_size=24, d_model=8, num_heads=3, head_dim=2, d_ff=16)
    with pytest.raises(InputError, match=r"parameter \.blocks\.query: axis H of 3 is not divisible by tensor = 2"):
        specs(shapes(odd))


def test_palm_540b_by_hand():
    """On 12 x 256: FACTS' traps, 256,000 rows that 12 does not divide and attention that is not square."""
    mesh = AbstractMesh((2, 256, 12), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    model = shapes(MODELS["palm-540b"])
    shards = {k: s.shard_shape(leaf.shape) for (k, s), leaf in zip(
        ((jax.tree_util.keystr(p), s) for p, s in jax.tree_util.tree_leaves_with_path(shardings(model, mesh))),
        jax.tree.leaves(model), strict=True)}
    assert shards[".embedding"] == (1000, 1536) and shards[".blocks.query"] == (118, 72, 4, 256)
    assert shards[".blocks.mlp_out"] == (118, 6144, 72) and shards[".blocks.key_value"] == (118, 72, 2, 1, 256)


@pytest.mark.parametrize(
    ("compute", "shape"),
    [(RuntimeConfig(), (1, 8, 1)), (RuntimeConfig(2, 0, 2), (2, 2, 2)), (RuntimeConfig(1, 2, 2), (1, 2, 2)), (RuntimeConfig(2, 4), (2, 4, 1))],
)
def test_the_mesh_of_eight_devices(compute, shape):
    assert mesh_shape(compute, 8) == shape


@pytest.mark.parametrize("compute", [RuntimeConfig(3), RuntimeConfig(2, 8), RuntimeConfig(16), RuntimeConfig(1, 0, 3)])
def test_a_mesh_that_the_devices_do_not_make(compute):
    with pytest.raises(InputError, match=r"--runtime: data \d+ x fsdp (\d+|\?) x tensor \d+ devices, of 8"):
        mesh_shape(compute, 8)


INITIALISED = """
import jax, numpy as np
from scale.execution import RuntimeConfig, execution
from scale.model import ModelConfig, Transformer
from scale.sharding import initialise
config = ModelConfig(vocab=64, layers=2, d_model=16, heads=4, head_dim=4, d_ff=32, num_kv_heads=2)
make = lambda how: initialise(lambda: Transformer(config, jax.random.key(0), how))
whole, split = make(execution(RuntimeConfig(1, 1, 1))), make(execution(RuntimeConfig(1, 4, 2)))
for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
    np.testing.assert_array_equal(a, b)
assert {s.data.size * 8 for s in split.embedding.addressable_shards} == {split.embedding.size}
assert {s.data.size * 8 for s in split.blocks.gate_up.addressable_shards} == {split.blocks.gate_up.size}
"""


def test_sharded_initialisation_is_the_same_and_shared_out():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", INITIALISED], check=True, env=environment, cwd=Path(__file__).parents[2])
