"""`plan` on the real TPU compiler, for machines small enough to compile for in seconds; its arithmetic by hand."""

import importlib.util
import json
import math
from dataclasses import replace

import jax
import pytest

from scale.data.layout import Layout
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.presets import MODELS
from scale.model.transformer import parameter_count
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.plan import command as module
from scale.plan.command import (
    Plan,
    batch_of,
    best,
    kernel_flops,
    meshes,
    out_of_memory,
    report,
    row_layout,
    start,
    visited_products,
)
from scale.plan.hlo import Counts
from scale.plan.topology import spanned, topology_devices, torus
from scale.run import parse

tpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the TPU compiler is in the extra `tpu`")
SMALL = ModelConfig(vocab_size=1024, num_layers=6, d_model=256, num_heads=2, head_dim=128, d_ff=512)
PLAN = Plan(model="small", topology="v5e:2x2", batch=8, tokens=512)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)


@pytest.mark.parametrize(
    ("name", "billions"), [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35), ("llama-3-8b", 8.03),
                           ("llama-3-70b", 70.55), ("smollm2-135m", 0.1345)],
)
def test_parameter_counts_are_the_published_ones(name, billions):
    """arXiv 2204.02311, Table 1; the Hugging Face cards of Llama 3 and SmolLM2."""
    count = parameter_count(start(MODELS[name], module.OptimizerConfig(), make_runtime(RuntimeConfig(fsdp=1))).model)
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_presets_shapes_are_palms():
    shapes = {name: (c.layers, c.heads, c.d_model, c.head_dim, c.d_ff, c.vocab_size) for name, c in MODELS.items()}
    assert shapes["palm-8b"] == (32, 16, 4096, 256, 16384, 256_000)
    assert shapes["palm-62b"] == (64, 32, 8192, 256, 32768, 256_000)
    assert shapes["palm-540b"] == (118, 48, 18432, 256, 73728, 256_000)
    palm = MODELS["palm-540b"]
    assert (palm.num_kv_heads, palm.block, palm.norm, palm.tie_embeddings, palm.scaled_logits) == (1, "parallel", "layer", True, True)


@pytest.mark.parametrize(
    ("method", "layout"), [("dpo", (1024, 512, 2)), ("d-dpo", (1024, 512, 2)), ("e-dpo", (1040, 336, 3))]
)
def test_half_of_a_row_is_its_responses(method, layout):
    found = row_layout(Plan(method=method))
    assert found == Layout(*layout) and found.width == 2048


def test_blocks_that_the_mask_skips_are_not_counted():
    """Blocks of 512 x 512; rows of them: prompt 1, prompt 2, each response 3 (both prompt blocks and itself)."""
    assert visited_products(Layout(1024, 512, 2)) == (1 + 2 + 3 + 3) * 512**2


def test_kernel_flops_by_hand():
    """Six heads of rows, head size 128: forward 2 products, the two backward kernels 4 and 3."""
    calls = {"splash_mha_fwd_residuals": 12, "splash_mha_dkv_no_residuals": 6, "splash_mha_dq_no_residuals": 6}
    uncounted = {f"tpu_custom_call {name}": times for name, times in calls.items()} | {"SliceId custom-call": 9}
    layout = Layout(1024, 512, 2)
    pairs = 9 * 512**2
    found = kernel_flops(Counts(uncounted=uncounted), SMALL, layout, 6.0)
    assert found == 6 * 2 * 128 * pairs * (12 * 2 + 6 * 4 + 6 * 3)


def test_the_torus_and_what_lies_along_it():
    assert torus("v4:12x16x16") == (12, 16, 16)
    assert [spanned(n, (12, 16, 16)) for n in (12, 16, 256, 192, 3072, 8, 2)] == [1, 1, 2, 2, 3, 1, 1]
    with pytest.raises(InputError, match="--topology v4: not a chip and its numbers"):
        torus("v4")


@pytest.fixture(scope="module")
def of_four_chips():
    with pytest.MonkeyPatch.max_seq_len() as patch:
        patch.setitem(MODELS, "small", SMALL)
        return report(PLAN)


@tpu
def test_the_step_of_a_small_model_on_four_chips(of_four_chips):
    found = of_four_chips
    json.dumps(found)
    assert found["devices"] == 4 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1} and found["fits"]
    layer = 256 * (2 * 2 * 128 + 2 * 128 + 3 * 512) + 256
    assert found["params"] == 1024 * 256 + 6 * layer + 256
    held = found["hbm_parts"]
    # a quarter of: 4 bytes a parameter; of Adafactor's two moments
    assert held["parameters"] == found["params"] and held["optimizer"] == pytest.approx(2 * found["params"], rel=0.01)
    assert held["activations"] == 2 * 8 * 512 * 256 * 6 / 4
    products = 6 * 8 * (512 * 6 * (layer - 256) + 252 * 1024 * 256) + 12 * 6 * 2 * 128 * 512**2 * 8
    assert found["model_flops"] == pytest.approx(products, rel=2e-3)  # and norms, which PaLM's N counts
    assert 1.1 < found["recompute_factor"] < 1.5  # here attention is much, and its backward kernels repeat QK
    assert found["bytes_moved_per_device"].keys() == {"fsdp"} and 0 < found["mfu_bound"] < 1
    assert found["step_seconds_bound"] == max(found["seconds"].values()) == found["seconds"][found["binding"]]


@tpu
def test_e_dpo_costs_what_dpo_does(of_four_chips):
    other = report(replace(PLAN, method="dpo"))
    assert of_four_chips["compiled_flops"] <= 1.01 * other["compiled_flops"]


@tpu
def test_plan_compiles_the_step_that_align_runs(monkeypatch):
    """The very function: its cache is asked for the method, recipe, state and batch of the plan."""
    asked = []

    class Spy:
        @staticmethod
        def lower(*arguments):
            asked.extend(arguments)
            pytest.fail("asked")

    monkeypatch.setattr(module, "align_step", Spy)
    with pytest.raises(pytest.fail.Exception, match="asked"):
        report(PLAN)
    method, optimizer_config, state, batch = asked
    assert method == "e-dpo" and optimizer_config == PLAN.optimizer_config and state.model.config == SMALL
    assert batch.scores.shape == (8, 2, 5) and batch.ref_logps.shape == (8, 3)
    assert state.model.runtime.attention == "splash" and state.model.runtime.remat == "full"


@tpu
def test_out_of_memory_is_a_sentence_with_sizes():
    with pytest.raises(InputError, match=r"palm-8b on v5e:2x2: does not fit: .* needs [\d.]+G of [\d.]+G HBM; try"):
        report(replace(PLAN, model="palm-8b", batch=4))


def test_what_else_the_compiler_says():
    assert out_of_memory(PLAN, "INTERNAL: broken\nmore") == "small on v5e:2x2: the TPU compiler says: INTERNAL: broken"


@tpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:2x2"}, "--topology v9:2x2"),
        ({"model": "gpt-5"}, "--model gpt-5: not one of palm-8b, palm-62b"),
        ({"mesh": (1, 1, 4)}, r"parameter \.query: axis H of 2 is not divisible by tensor = 4"),
        ({"mesh": (4, 4, 1)}, "--runtime: data 4 x fsdp 4 x tensor 1 devices, of 4"),
        ({"mesh": (1, 3, 1), "batch": 3}, r"mesh \(1, 3, 1\): 3 devices; a plan and several processes must use all 4"),
        ({"batch": 0}, "--batch 0: no mesh of 4 devices divides it"),
    ],
)
def test_plans_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        report(replace(PLAN, **change))


@tpu
def test_search_takes_the_best_that_fits(monkeypatch):
    """Every candidate is asked; those that do not fit are left out."""
    def pretend(plan):
        if plan.remat == "none":
            raise InputError("does not fit")
        return {"mfu_bound": 0.5 + 0.1 * (plan.remat == "dots") + plan.batch / 1000, "plan": plan}

    monkeypatch.setattr(module, "report", pretend)
    found = best(replace(PLAN, json=True))
    assert found["plan"].batch == 16 and found["plan"].remat == "dots"
    assert meshes(PLAN, 8) == [(1, 4, 1), (1, 2, 2), (1, 1, 4)] and meshes(PLAN, 2) == [(1, 2, 2), (1, 1, 4)]


@tpu
def test_two_slices_lie_along_data():
    devices = topology_devices("v5e:2x2", 2)
    runtime = make_runtime(RuntimeConfig(2, 2, 2), devices)
    slices = [[[d.slice_index for d in row] for row in plane] for plane in runtime.mesh.devices]
    assert slices == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    with pytest.raises(InputError, match="data 1: does not run over 2 slices"):
        make_runtime(RuntimeConfig(1, 8, 1), devices)


def test_the_command_line():
    found = parse(["plan", "--model", "palm-62b", "--mesh", "1", "256", "1", "--json"])
    assert (found.model, found.mesh, found.json, found.method) == ("palm-62b", (1, 256, 1), True, "e-dpo")


def test_the_batch_is_split_over_rows_alone():
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("the TPU compiler is in the extra `tpu`")
    runtime = make_runtime(RuntimeConfig(1, 2, 2), topology_devices("v5e:2x2", 1))
    batch = batch_of(PLAN, row_layout(PLAN), runtime)
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch)} == {4}
    assert all(math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))
