"""`plan` on the real TPU compiler, for small machines that compile in seconds; its arithmetic."""

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
from scale.plan import search as search_module
from scale.plan import step as step_module
from scale.plan.attention_flops import kernel_flops, visited_pairs
from scale.plan.command import Plan, show
from scale.plan.report import report
from scale.plan.search import best
from scale.plan.step import batch_of, compiler_message, row_layout, start
from scale.plan.topology import meshes, spanned, topology_devices, torus
from scale.run import parse
from scale.train.optimizer import OptimizerConfig

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the TPU compiler is in the extra `tpu`"
)
SMALL = ModelConfig(vocab_size=1024, num_layers=6, d_model=256, num_heads=2, head_dim=128, d_ff=512)
PLAN = Plan(model="small", topology="v5e:2x2", batch=8, tokens=512)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35), ("llama-3-8b", 8.03),
     ("llama-3-70b", 70.55), ("smollm2-135m", 0.1345)],
)
def test_parameter_counts_are_the_published_ones(name, billions):
    """arXiv 2204.02311, Table 1; the Hugging Face cards of Llama 3 and SmolLM2."""
    state = start(MODELS[name], OptimizerConfig(), make_runtime(RuntimeConfig(fsdp=1)))
    assert parameter_count(state.model) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_the_presets_shapes_are_palms():
    shapes = {
        name: (c.num_layers, c.num_heads, c.d_model, c.head_dim, c.d_ff, c.vocab_size)
        for name, c in MODELS.items()
    }
    assert shapes["palm-8b"] == (32, 16, 4096, 256, 16384, 256_000)
    assert shapes["palm-62b"] == (64, 32, 8192, 256, 32768, 256_000)
    assert shapes["palm-540b"] == (118, 48, 18432, 256, 73728, 256_000)
    palm = MODELS["palm-540b"]
    assert (palm.num_kv_heads, palm.block, palm.norm) == (1, "parallel", "layer")
    assert palm.tie_embeddings and palm.scaled_logits


@pytest.mark.parametrize(
    ("method", "layout"),
    [("dpo", (1024, 512, 2)), ("d-dpo", (1024, 512, 2)), ("e-dpo", (1040, 336, 3))],
)
def test_half_of_a_row_is_its_responses(method, layout):
    row = row_layout(Plan(method=method))
    assert row == Layout(*layout) and row.length == 2048


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_row_that_would_be_compiled_longer_is_refused(tokens):
    with pytest.raises(InputError, match=f"--tokens {tokens}: must be a multiple of 128"):
        row_layout(Plan(tokens=tokens))


def test_blocks_that_the_mask_skips_are_not_counted():
    """Blocks of 512 x 512: the prompt's first row has 1, its second 2, a response's row 3."""
    assert visited_pairs(Layout(1024, 512, 2)) == (1 + 2 + 3 + 3) * 512**2


def test_kernel_flops_by_hand():
    """Six heads of rows, head size 128: forward 2 products, the two backward kernels 4 and 3."""
    calls = {"fwd_residuals": 12, "dkv_no_residuals": 6, "dq_no_residuals": 6}
    uncounted = {f"tpu_custom_call splash_mha_{name}": times for name, times in calls.items()}
    flops = kernel_flops(uncounted | {"SliceId custom-call": 9}, Layout(1024, 512, 2), 6.0, 128)
    assert flops == 6 * 2 * 128 * 9 * 512**2 * (12 * 2 + 6 * 4 + 6 * 3)


def test_the_torus_and_what_lies_along_it():
    assert torus("v4:12x16x16") == (12, 16, 16)
    spans = [spanned(size, (12, 16, 16)) for size in (12, 16, 256, 192, 3072, 8, 2)]
    assert spans == [1, 1, 2, 2, 3, 1, 1]
    with pytest.raises(InputError, match="--topology v4: not a chip and its numbers"):
        torus("v4")


@pytest.fixture(scope="module")
def four_chips():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SMALL)
        return report(PLAN)


@pytest.mark.slow
@needs_libtpu
def test_the_step_of_a_small_model_on_four_chips(four_chips):
    json.dumps(four_chips)
    assert four_chips["devices"] == 4 and four_chips["fits"]
    assert four_chips["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    layer = 256 * (2 * 2 * 128 + 2 * 128 + 3 * 512) + 256
    params, parts = four_chips["params"], four_chips["hbm_parts"]
    assert params == 1024 * 256 + 6 * layer + 256
    # a quarter of: 4 bytes a parameter; of Adafactor's two moments
    assert parts["parameters"] == params
    assert parts["optimizer"] == pytest.approx(2 * params, rel=0.01)
    assert parts["activations"] == 2 * 8 * 512 * 256 * 6 / 4
    attention = 12 * 6 * 2 * 128 * 512**2 * 8
    products = 6 * 8 * (512 * 6 * (layer - 256) + 252 * 1024 * 256) + attention
    assert four_chips["model_flops"] == pytest.approx(products, rel=2e-3)  # PaLM's N counts norms
    # here attention is much, and its backward kernels repeat the product of queries and keys
    assert 1.1 < four_chips["recompute_factor"] < 1.5
    assert four_chips["bytes_moved_per_device"].keys() == {"fsdp"}
    assert 0 < four_chips["mfu_bound"] < 1
    seconds = four_chips["seconds"]
    longest = seconds[four_chips["binding"]]
    assert four_chips["step_seconds_bound"] == max(seconds.values()) == longest


@pytest.mark.slow
@needs_libtpu
def test_e_dpo_costs_what_dpo_does(four_chips):
    dpo = report(replace(PLAN, method="dpo"))
    assert four_chips["compiled_flops"] <= 1.01 * dpo["compiled_flops"]


@pytest.mark.slow
@needs_libtpu
def test_plan_compiles_the_step_that_align_runs(monkeypatch):
    """The very function: it is lowered for the method, optimizer, state and batch of the plan."""
    asked = []

    class Spy:
        @staticmethod
        def lower(*arguments):
            asked.extend(arguments)
            pytest.fail("asked")

    monkeypatch.setattr(step_module, "policy_step", Spy)
    with pytest.raises(pytest.fail.Exception, match="asked"):
        report(PLAN)
    method, optimizer, _, state, batch = asked
    assert method == "e-dpo" and optimizer == PLAN.optimizer and state.model.config == SMALL
    assert batch.targets.rewards.shape == (8, 2, 5) and batch.targets.ref_logps.shape == (8, 3)
    assert state.model.runtime.attention == "splash" and state.model.runtime.remat == "full"


@pytest.mark.slow
@needs_libtpu
def test_out_of_memory_is_a_sentence_with_sizes():
    message = r"palm-8b on v5e:2x2: does not fit: .* needs [\d.]+G of [\d.]+G HBM; try"
    with pytest.raises(InputError, match=message):
        report(replace(PLAN, model="palm-8b", batch=4))


def test_what_else_the_compiler_says():
    message = compiler_message(PLAN, "INTERNAL: broken\nmore")
    assert message == "small on v5e:2x2: the TPU compiler says: INTERNAL: broken"


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:2x2"}, "--topology v9:2x2"),
        ({"model": "gpt-5"}, "--model gpt-5: not one of palm-8b, palm-62b"),
        ({"mesh": (1, 1, 4)}, r"parameter \.query: axis H of 2 is not divisible by tensor = 4"),
        ({"mesh": (4, 4, 1)}, "--runtime: data 4 x fsdp 4 x tensor 1 devices, of 4"),
        ({"mesh": (1, 3, 1), "batch": 3},
         r"mesh \(1, 3, 1\): 3 devices; a plan and several processes must use all 4"),
        ({"batch": 0}, "--batch 0: no mesh of 4 devices divides it"),
    ],
)
def test_plans_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        report(replace(PLAN, **change))


@pytest.mark.slow
@needs_libtpu
def test_search_takes_the_best_that_fits(monkeypatch):
    """Every candidate is asked; those that do not fit are left out."""

    def pretend(plan):
        if plan.remat == "none":
            raise InputError("does not fit")
        return {"mfu_bound": 0.5 + 0.1 * (plan.remat == "dots") + plan.batch / 1000, "plan": plan}

    monkeypatch.setattr(search_module, "report", pretend)
    lines = []
    plan = best(PLAN, lines.append)["plan"]
    assert plan.batch == 16 and plan.remat == "dots"
    assert len(lines) == 3 * 3 * 3 and lines[0].endswith("remat none: does not fit")
    assert meshes("v5e:2x2", 1, 8) == [(1, 4, 1), (1, 2, 2), (1, 1, 4)]
    assert meshes("v5e:2x2", 1, 2) == [(1, 2, 2), (1, 1, 4)]


@pytest.mark.slow
@needs_libtpu
def test_two_slices_lie_along_data():
    devices = topology_devices("v5e:2x2", 2)
    runtime = make_runtime(RuntimeConfig(2, 2, 2), devices)
    slices = [[[d.slice_index for d in row] for row in plane] for plane in runtime.mesh.devices]
    assert slices == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    with pytest.raises(InputError, match="data 1: does not run over 2 slices"):
        make_runtime(RuntimeConfig(1, 8, 1), devices)


def test_the_command_line():
    plan = parse(["plan", "--model", "palm-62b", "--mesh", "1", "256", "1", "--json"])
    assert (plan.model, plan.mesh, plan.json) == ("palm-62b", (1, 256, 1), True)
    assert plan.method == "e-dpo"


@pytest.mark.slow
@needs_libtpu
def test_the_batch_is_split_over_rows_alone():
    runtime = make_runtime(RuntimeConfig(1, 2, 2), topology_devices("v5e:2x2", 1))
    batch = batch_of(PLAN, row_layout(PLAN), runtime)
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch)} == {4}
    assert all(math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))


def test_what_a_person_reads(capsys):
    """The figures of a step that does not fit, made up."""
    show({
        "model": "small", "method": "dpo", "topology": "v4:2x2x1", "slices": 2, "batch": 4,
        "tokens": 8, "remat": "full", "mesh": {"data": 2, "fsdp": 4}, "devices": 8, "params": 5e9,
        "hbm_bytes_per_chip": 2**31, "hbm_limit_bytes": 2**30, "fits": False,
        "hbm_parts": {"parameters": 2**29, "program": 2**28}, "model_flops": 1e9,
        "compiled_flops": 2e9, "recompute_factor": 2.0, "bytes_moved_per_device": {"fsdp": 3e9},
        "seconds": {"compute": 0.5, "network fsdp": 1.25}, "binding": "network fsdp",
        "step_seconds_bound": 1.25, "mfu_bound": 0.125, "compile_seconds": 7.4,
    })
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("4 pairs x 8 tokens a step, remat full; compiled in 7 s")
    assert lines[1] == "devices     8 of v4:2x2x1 x 2; mesh data 2 x fsdp 4"
    assert lines[2] == "parameters  5.00B"
    assert lines[3].startswith("HBM a chip  2.00 of 1.0 GiB: DOES NOT FIT")
    assert lines[4] == "            parameters 0.50, program 0.25"
    assert lines[7].endswith("fsdp 3.0") and lines[8].endswith("compute 0.500, network fsdp 1.250")
    assert lines[9] == "bound       1.250 s a step by network fsdp: MFU at most 12.5%"
