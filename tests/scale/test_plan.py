"""`plan` on the real TPU compiler, for small machines that compile in seconds; its arithmetic."""

import importlib.util
import json
import math
import shlex
from dataclasses import asdict, replace
from functools import partial

import equinox as eqx
import jax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from scale.data.dataset import Limits
from scale.data.layout import Layout
from scale.errors import InputError
from scale.model.adapters import AdapterConfig
from scale.model.config import ModelConfig
from scale.model.presets import MODELS
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.mesh import Runtime, RuntimeConfig, make_mesh, make_runtime
from scale.plan import command as command_module
from scale.plan import search as search_module
from scale.plan import step as step_module
from scale.plan.attention_flops import kernel_flops, visited_pairs
from scale.plan.command import REALISTIC, Plan, duration, show
from scale.plan.options import RECIPES, PlanOptions
from scale.plan.report import step_flops
from scale.plan.search import best, planned
from scale.plan.step import SCHEDULE, advice, batch_of, compiler_message, on_mesh, place
from scale.plan.topology import meshes, spanned, topology_devices, torus
from scale.run import parse
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import policy_step

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the TPU compiler is in the extra `tpu`"
)
SMALL = ModelConfig(vocab_size=1024, num_layers=6, d_model=256, num_heads=2, head_dim=128, d_ff=512)
UNTIED = replace(
    SMALL, num_layers=2, block="sequential", norm="rms", tie_embeddings=False, scaled_logits=False,
    num_kv_heads=1,
)  # fmt: skip
PLAN = PlanOptions(
    model="small", topology="v5e:2x2", batch=8, limits=Limits(256, 80), **RECIPES["palm"]
)


def silent(line):
    """A log that nobody reads."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setitem(MODELS, "untied", UNTIED)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("palm-8b", 8.63), ("palm-62b", 62.50), ("palm-540b", 540.35), ("llama-3-8b", 8.03),
     ("llama-3-70b", 70.55), ("smollm2-135m", 0.1345)],
)
def test_parameter_counts_are_the_published_ones(name, billions):
    """arXiv 2204.02311, Table 1; the Hugging Face cards of Llama 3 and SmolLM2."""
    like = eqx.filter_eval_shape(Transformer, MODELS[name], jax.random.key(0))
    assert parameter_count(like) / 1e9 == pytest.approx(billions, rel=1e-3)


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
    ("stage", "method", "responses"),
    [("align", "dpo", 2), ("align", "e-dpo", 3), ("reward", "e-dpo", 2), ("sft", "e-dpo", 1),
     ("score", "dpo", 2), ("score", "e-dpo", 3), ("sample", "dpo", 1)],
)
def test_a_row_has_the_responses_that_the_stage_reads(stage, method, responses):
    layout = Plan(stage=stage, method=method, limits=Limits(1024, 512)).layout
    assert layout == Layout(1024, 512, responses) and layout.length == 1024 + 512 * responses


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
        return planned(PLAN, silent)


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
    # blocks of attention of 512 x 512: one, of which the mask skips nothing
    attention = 12 * 6 * 2 * 128 * 512**2 * 8
    products = 6 * 8 * (512 * 6 * (layer - 256) + 240 * 1024 * 256) + attention
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
    dpo = planned(replace(PLAN, method="dpo", limits=Limits(256, 120)), silent)  # as many labels
    assert dpo["tokens"] == four_chips["tokens"]
    assert four_chips["compiled_flops"] <= 1.01 * dpo["compiled_flops"]


@pytest.mark.slow
@needs_libtpu
def test_plan_compiles_the_step_that_align_runs(monkeypatch):
    """The very function: it is lowered for the method, optimizer, state and batch of the plan."""
    asked = []

    class Spy:
        @staticmethod
        def lower(*arguments, frozen):
            asked.extend(arguments)
            pytest.fail("asked")

    monkeypatch.setattr(step_module, "policy_step", Spy)
    with pytest.raises(pytest.fail.Exception, match="asked"):
        planned(PLAN, silent)
    method, optimizer, _, state, batch = asked
    assert method == "e-dpo" and optimizer == OptimizerConfig("adafactor", 1e-4)
    assert state.model.config == SMALL
    assert batch.targets.rewards.shape == (8, 2, 5) and batch.targets.ref_logps.shape == (8, 3)
    assert state.model.runtime.attention == "splash" and state.model.runtime.remat == "full"
    assert state.model.runtime.dtype == "bfloat16"


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("stage", ["align", "sft", "score", "sample"])
def test_no_stage_does_less_than_the_model_needs(stage):
    """The compiler's FLOPs are at least the model's own, so that no bound is above 100%."""
    batch = 8 if stage in ("align", "sft") else None
    figures = planned(replace(PLAN, model="untied", stage=stage, batch=batch), silent)
    assert 1.0 <= figures["recompute_factor"] < 1.8 and 0 < figures["mfu_bound"] <= 1 + 1e-9


@pytest.mark.slow
@needs_libtpu
def test_reward_models_with_adapters_are_planned_over_one_frozen_model():
    options = replace(PLAN, model="untied", stage="reward", num_reward_models=2)
    full = planned(options, silent)
    low = planned(replace(options, adapter=AdapterConfig(4)), silent)
    # of each layer rank x (inputs + results) of the five products; keys and values are one
    per_layer = 4 * ((256 + 256) + (256 + 256) + (256 + 256) + (256 + 1024) + (512 + 256))
    assert low["adapter_params"] == 2 * per_layer and full["adapter_params"] is None
    assert low["params"] == full["params"] and low["compiled_flops"] < full["compiled_flops"]
    for figures in (full, low):
        assert 1.0 <= figures["recompute_factor"] < 1.8 and figures["reward_models"] == 2
    assert low["hbm_parts"]["optimizer"] < full["hbm_parts"]["optimizer"] / 5
    # two whole models of float32, or one of bfloat16
    assert full["hbm_parts"]["parameters"] > 3 * low["hbm_parts"]["parameters"]


@pytest.mark.slow
@needs_libtpu
def test_out_of_memory_is_a_sentence_with_sizes():
    message = r"palm-8b on v5e:2x2: does not fit: .* needs [\d.]+G of [\d.]+G HBM; try"
    with pytest.raises(InputError, match=message):
        planned(replace(PLAN, model="palm-8b", batch=4), silent)


def test_what_else_the_compiler_says():
    message = compiler_message(PLAN, "INTERNAL: broken\nmore")
    assert message == "small on v5e:2x2: the TPU compiler says: INTERNAL: broken"


def test_advice_names_what_is_not_done_already():
    """The recipe has remat and bfloat16; a stage that reads has nothing to accumulate."""
    assert advice(PLAN).startswith("try --accumulation, --adapter.rank, a smaller --batch")
    plain = PlanOptions(stage="score")
    assert advice(plain).startswith("try --runtime.dtype bfloat16, a smaller --batch")
    assert advice(PlanOptions()).startswith("try --runtime.remat full, --runtime.dtype bfloat16")


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:2x2"}, "--topology v9:2x2"),
        ({"model": "gpt-5"}, "--model gpt-5: not one of palm-8b, palm-62b"),
        ({"runtime": RuntimeConfig(1, 1, 4)},
         r"parameter \.query: axis H of 2 is not divisible by tensor = 4"),
        ({"runtime": RuntimeConfig(4, 4, 1)},
         "--runtime: data 4 x fsdp 4 x tensor 1 devices, of 4"),
        ({"runtime": RuntimeConfig(1, 3, 1), "batch": 3},
         r"mesh \(1, 3, 1\): 3 devices; a plan and several processes must use all 4"),
        ({"batch": 6}, "--batch 6: does not divide among 4 devices"),
        ({"batch": 12, "accumulation": 2}, "--batch 12: does not divide .* devices in 2 parts"),
    ],
)
def test_plans_that_cannot_be(change, message):
    with pytest.raises(InputError, match=message):
        planned(replace(PLAN, **change), silent)


def pretend(most):
    """Instead of `report`: steps of at most so many rows fit, without remat not one."""

    def figures(options, placed, rows):
        remat = options.runtime.remat
        if remat == "none":
            raise InputError("small on v5e:2x2: does not fit: a device needs 9G of 8G HBM; try")
        return {
            "batch": rows, "fits": rows <= most, "mfu_bound": 0.5 + 0.1 * (remat == "dots"),
            "hbm_bytes_per_chip": rows * 2**30, "hbm_limit_bytes": most * 2**30, "advice": "try",
            "remat": remat,
        }  # fmt: skip

    return figures


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("most", "found"), [(4, 4), (20, 20), (1000, 992), (10**9, 2**16)])
def test_without_a_batch_the_largest_that_fits_is_found(monkeypatch, most, found):
    """By doubling from the 4 rows of 4 devices, and then by bisection to a sixteenth."""
    monkeypatch.setattr(search_module, "report", pretend(most))
    lines = []
    assert planned(replace(PLAN, batch=None), lines.append)["batch"] == found
    assert lines[0] == f"batch 4: fits: a chip needs 4.00 of {most}.0 GiB HBM"
    if most == 20:
        tried = [int(line.split()[1].rstrip(":")) for line in lines]
        assert tried == [4, 8, 16, 32, 24, 20]
        refused = "does not fit: a chip needs 32.00 of 20.0 GiB HBM; try"
        assert lines[3] == f"batch 32: small on v5e:2x2: {refused}"


@pytest.mark.slow
@needs_libtpu
def test_a_model_that_fits_with_no_batch(monkeypatch):
    monkeypatch.setattr(search_module, "report", pretend(3))
    with pytest.raises(InputError, match=r"small on v5e:2x2: does not fit: a chip needs 4\.00 of"):
        planned(replace(PLAN, batch=None), silent)


@pytest.mark.slow
@needs_libtpu
def test_search_takes_the_best_that_fits(monkeypatch):
    """Every mesh with every remat policy is asked; those that do not fit are left out."""
    monkeypatch.setattr(search_module, "report", pretend(20))
    lines = []
    plan = best(replace(PLAN, batch=None), lines.append)
    assert (plan["batch"], plan["remat"]) == (20, "dots")
    assert len(lines) == 3 * 3 and lines[0].startswith("mesh 1 x 4 x 1, remat none: small on")
    assert lines[1] == (
        "mesh 1 x 4 x 1, remat dots: batch 20, fits: a chip needs 20.00 of 20.0 GiB HBM, "
        "MFU at most 60.0%"
    )
    assert "axis H of 2 is not divisible by tensor = 4" in lines[-1]
    assert meshes("v5e:2x2", 1) == [(1, 4, 1), (1, 2, 2), (1, 1, 4)]


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
    plan = parse(["plan", "--model", "palm-62b", "--runtime.fsdp", "256", "--json"])
    assert (plan.model, plan.runtime.fsdp, plan.json) == ("palm-62b", 256, True)
    assert (plan.stage, plan.method, plan.batch) == ("align", "e-dpo", None)


def test_rows_that_cannot_be_read_are_refused_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(command_module, "planned", lambda *_: pytest.fail("it compiles"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1: field 'prompt': missing"):
        Plan(data=rows).run()


def test_rows_longer_than_the_stage_takes_are_not_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(command_module, "planned", lambda *_: pytest.fail("it compiles"))
    record = {"num_reward_models": 0, "model": asdict(replace(SMALL, max_seq_len=64))}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"^--limits: 40 \+ 25 tokens, but .* is made for 64$"):
        Plan(model=str(tmp_path), limits=Limits(40, 25)).run()


@pytest.mark.parametrize(
    ("given", "optimizer", "remat", "dtype"),
    [
        ("--recipe palm", ("adafactor", 1e-4), "full", "bfloat16"),
        ("--runtime.remat auto --recipe=palm", ("adafactor", 1e-4), "auto", "bfloat16"),
        ("--recipe palm --runtime.dtype float32", ("adafactor", 1e-4), "full", "float32"),
        ("--recipe palm --optimizer.optimizer adam", ("adam", 1e-4), "full", "bfloat16"),
        ("--recipe palm --optimizer.z-loss 0", ("adafactor", 0.0), "full", "bfloat16"),
        ("--recipe None", ("adam", 0.0), "auto", "float32"),
    ],
)
def test_a_recipe_stands_for_what_is_not_given(given, optimizer, remat, dtype):
    plan = parse(["plan", *given.split()])
    assert plan.optimizer == OptimizerConfig(*optimizer)
    assert plan.runtime == RuntimeConfig(remat=remat, dtype=dtype)


@pytest.mark.parametrize(
    ("given", "option"),
    [
        ("--stage score --accumulation 2", "--accumulation"),
        ("--stage sample --adapter.rank 8", "--adapter.rank"),
        ("--stage reward --optimizer.z-loss 1", "--optimizer"),
        ("--stage sample --recipe palm --optimizer.optimizer adam", "--optimizer"),
    ],
)
def test_an_option_that_the_stage_does_not_have_is_refused(given, option, monkeypatch):
    monkeypatch.setattr(command_module, "planned", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(InputError, match=rf"^{option}: `\w+` has no such option$"):
        parse(["plan", *given.split()]).run()


@pytest.mark.parametrize(
    "given",
    ["--stage reward --recipe palm", "--stage score --recipe palm", "--stage sft --accumulation 2",
     "--stage reward --adapter.rank 8", "--optimizer.z-loss 1", "--stage sft --recipe palm"],
)  # fmt: skip
def test_options_that_the_stage_has_are_planned(given, monkeypatch, capsys):
    monkeypatch.setattr(command_module, "planned", lambda plan, log: dict(FIGURES))
    parse(["plan", *given.split()]).run()
    assert "bound" in capsys.readouterr().out


def test_rows_longer_than_a_published_model_are_not_planned():
    with pytest.raises(InputError, match=r"^--limits: 8000 \+ 193 tokens, but .* for 8192$"):
        Plan(model="llama-3-8b", limits=Limits(8000, 193)).run()


FIGURES = {
    "stage": "align", "model": "small", "method": "dpo", "topology": "v3:2x2", "slices": 2,
    "batch": 4, "tokens": 8, "remat": "full", "dtype": "bfloat16",
    "mesh": {"data": 2, "fsdp": 8, "tensor": 1}, "devices": 16, "params": 8_000_000_000,
    "adapter_params": 20_000_000, "reward_models": 1, "hbm_bytes_per_chip": 2**31,
    "hbm_limit_bytes": 2**30, "fits": False, "advice": "try more chips",
    "hbm_parts": {"parameters": 2**29, "program": 2**28}, "model_flops": 1e9,
    "compiled_flops": 2e9, "recompute_factor": 2.0, "bytes_moved_per_device": {"fsdp": 3e9},
    "seconds": {"compute": 0.5, "network fsdp": 1.25}, "binding": "network fsdp",
    "step_seconds_bound": 1.25, "mfu_bound": 0.125, "compile_seconds": 7.4, "command": "python",
}  # fmt: skip


@pytest.mark.parametrize("stage", ["align", "reward", "sft", "score", "sample"])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_plan_ends_with_a_command_that_parses(stage, rank):
    plan = Plan(
        stage=stage, model="llama-3-8b", adapter=AdapterConfig(rank), limits=Limits(96, 32),
        accumulation=2, **RECIPES["palm"],
    )  # fmt: skip
    words = shlex.split(plan.command_of(FIGURES))
    assert words[:4] == ["python", "-m", "scale.run", stage]
    command = parse(words[3:])
    runtime = RuntimeConfig(2, 8, 1, remat="full", dtype="bfloat16", processes=0)
    assert (command.runtime, command.limits) == (runtime, Limits(96, 32))
    if stage in ("align", "reward", "sft"):
        assert command.adapter == AdapterConfig(rank)
        assert (command.training.batch_size, command.training.accumulation) == (4, 2)
        rate = (4 if stage == "reward" else 50) * 5e-7 * (10 if rank else 1)
        assert command.training.learning_rate == pytest.approx(rate)
    if stage in ("align", "sft"):
        assert command.optimizer == OptimizerConfig("adafactor", 1e-4)


def test_hours_by_hand():
    """1,000 rows in batches of 4, twice: 500 steps of 1.25 s on 8 chips, which have 2 devices."""
    found = duration(Plan(epochs=2.0, topology="v3:2x2"), FIGURES, 1000)
    assert found["steps"] == 500
    assert found["hours"]["at the bound"] == pytest.approx(500 * 1.25 / 3600)
    assert found["chip_hours"]["at the bound"] == pytest.approx(8 * 500 * 1.25 / 3600)
    real = found["hours"]["at a realistic share"]
    assert real == pytest.approx(500 * 1.25 / 3600 / REALISTIC)


@pytest.mark.parametrize(
    ("stage", "method", "at_once", "passes"),
    [("reward", "e-dpo", 1, 5), ("reward", "e-dpo", 5, 1), ("score", "e-dpo", 1, 6),
     ("score", "d-dpo", 1, 2), ("score", "dpo", 1, 1), ("sample", "dpo", 1, 1)],
)  # fmt: skip
def test_reward_models_one_after_another_and_their_passes_count(stage, method, at_once, passes):
    plan = Plan(stage=stage, method=method, topology="v3:2x2")
    found = duration(plan, FIGURES | {"reward_models": at_once}, 400)
    assert found["hours"]["at the bound"] == pytest.approx(passes * 100 * 1.25 / 3600)


@pytest.mark.slow
@needs_libtpu
def test_the_batch_is_split_over_rows_alone():
    options = replace(PLAN, runtime=replace(PLAN.runtime, fsdp=2, tensor=2))
    batch = batch_of(options, place(options), 8)
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch)} == {4}
    assert all(math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))


def product_flops(jaxpr):
    """The FLOPs of all products of a jaxpr; a scan's as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), out = equation.params["dimension_numbers"], equation.outvars[0]
            sizes = [equation.invars[0].aval.shape[i] for i in contracted]
            total += 2 * math.prod(out.aval.shape) * math.prod(sizes)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(map(product_flops, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("name", ["palm-8b", "palm-62b", "palm-540b", "llama-3-8b", "llama-3-70b",
                                  "smollm2-135m"])
def test_the_flops_of_a_model_are_those_of_the_products_in_its_step(name, rank):
    """Counted in the step itself, without recomputation: so no bound of the MFU is above 100%."""
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    options = PlanOptions(
        model=name, method="dpo", limits=Limits(64, 32), adapter=AdapterConfig(rank)
    )
    placed = on_mesh(options, Runtime(mesh, remat="none"))
    state, batch = placed.state, batch_of(options, placed, 2)
    step = partial(policy_step, "dpo", OptimizerConfig(), SCHEDULE)
    traced = jax.make_jaxpr(step)(state, batch, placed.frozen)
    used, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    counted = product_flops(used)
    assert 1.0 <= counted / step_flops(options, placed, 2) < 1.06


def test_what_a_person_reads(capsys):
    """The figures of a step that does not fit, made up."""
    show(FIGURES | duration(Plan(topology="v3:2x2"), FIGURES, 8000))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "align of small, dpo, 4 rows x 8 tokens a step, bfloat16, remat full; compiled in 7 s"
    )
    assert lines[1] == "devices     16 of v3:2x2 x 2; mesh data 2 x fsdp 8 x tensor 1"
    assert lines[2] == "parameters  8.00B, frozen; 20.0M of adapters are trained"
    assert lines[3] == (
        "memory      does not fit: a chip needs 2.00 of 1.0 GiB HBM; try more chips"
    )
    assert lines[4] == "            GiB: parameters 0.50, program 0.25"
    assert lines[7].endswith("fsdp 3.0") and lines[8].endswith("compute 0.500, network fsdp 1.250")
    assert lines[9] == "bound       1.250 s a step by network fsdp: MFU at most 12.5%"
    assert lines[10] == "rows        8,000: 2,000 steps"
    assert lines[11] == (
        "hours       0.69 at the bound (5.6 chip-hours), 1.24 at 56% of it (9.9 chip-hours)"
    )
    assert lines[12] == "command     python"
