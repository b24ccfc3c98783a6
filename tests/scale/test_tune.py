"""`tune`: the composition of stages, its plan, its report, and what it refuses."""

import json
import shlex
from dataclasses import replace

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from minipref.methods import METHODS
from scale.console import console
from scale.data.dataset import Limits
from scale.data.rows import read
from scale.errors import InputError
from scale.files import read_json
from scale.io import model_folder
from scale.model.adapters import AdapterConfig, adapter_config, merged
from scale.model.config import ModelConfig
from scale.parallel.mesh import RuntimeConfig
from scale.run import parse
from scale.stages.align import Align
from scale.stages.command_line import command_line
from scale.stages.export import Export
from scale.stages.rates import Rates, rates_for
from scale.stages.reward import Reward
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.stages.stage import execute
from scale.train.loop import TrainingConfig
from scale.train.metrics import WALL_CLOCK, logged
from scale.tune import pipeline, plan, report
from scale.tune.command import Tune
from scale.tune.options import TuneLimits
from scale.tune.pipeline import Pipeline, parts_of, shares_of
from scale.tune.plan import COSTS, Work, duration, print_plan, rows_text
from scale.tune.survey import survey, usable

NO_ADAPTERS = AdapterConfig()
LLAMA = ModelConfig(
    vocab_size=300, num_layers=1, d_model=16, num_heads=2, head_dim=8, d_ff=16,
    block="sequential", norm="rms", scaled_logits=False,
)  # fmt: skip
WORDS = ["alpha", "beta", "gamma", "delta"]


def made_rows(n):
    rng = np.random.default_rng(0)

    def text(k):
        return " ".join(rng.choice(WORDS, k))

    return [
        {"prompt": f"{text(2)} {i}", "chosen": text(2 + i % 2), "rejected": text(4)}
        for i in range(n)
    ]


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with rows and a small Llama that writes their words."""
    console.quiet = True
    folder = tmp_path_factory.mktemp("tune")
    data = jsonl(folder / "prefs.jsonl", made_rows(80))
    sft = Sft(
        out=folder / "model", data=data, model=LLAMA, limits=Limits(24, 12),
        training=TrainingConfig(80, 8, 3e-2, 5),
    )  # fmt: skip
    execute(sft)
    yield folder
    console.quiet = False


def tuned(made, name, method="dpo", **options) -> Tune:
    options = {"batch_size": 8, "learning_rate": 1e-2} | options
    return Tune(
        data=made / "prefs.jsonl", model=made / "model", out=made / name, method=method, **options
    )


@pytest.fixture(scope="module")
def done(made):
    """A complete run of dpo, and one of e-dpo with adapters."""
    commands = {
        "dpo": tuned(made, "dpo"),
        "e-dpo": tuned(made, "e-dpo", "e-dpo", adapter=AdapterConfig(4)),
    }
    return {method: (command, execute(command)) for method, command in commands.items()}


def planned(command):
    """Its survey and its stages, without running them."""
    rows = usable(command.data, None)[: command.used_rows]
    shares = shares_of(len(rows), command.quick)
    found = survey(command, rows, shares)
    pairs = {name: len(lengths) for name, lengths in found.kept.items()}
    return found, Pipeline(command, shares, found.limits, command.rates(found), pairs).stages


def work_of(found, reward_models, adapter=NO_ADAPTERS, dtype="float32"):
    return Work(found, reward_models, adapter, dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quick", [False, True])
def test_the_plan_is_commands_that_parse_to_its_stages(made, method, quick):
    command = tuned(made, "planned", method, quick=quick, seed=3, beta=0.2)
    found, stages = planned(command)
    for stage in stages.values():
        words = shlex.split(command_line(stage))
        assert words[:3] == ["python", "-m", "scale.run"]
        assert parse(words[3:]) == stage
        cost = COSTS[type(stage)](stage, work_of(found, command.num_reward_models))
        assert cost.seconds("float32") >= 0


@pytest.mark.parametrize("method", METHODS)
def test_a_method_gets_what_it_reads_and_nothing_more(made, method):
    command, row = tuned(made, "planned", method), METHODS[method]
    _, stages = planned(command)
    rewards = [stage for stage in stages.values() if isinstance(stage, Reward)]
    assert [s.out.name for s in rewards] == ["rewards"] * (row.rewards != "none") + ["judge"]
    if row.rewards != "none":
        assert rewards[0].num_reward_models == (3 if row.rewards == "ensemble" else 1)
    scored = next(stage for stage in stages.values() if isinstance(stage, Score))
    assert scored.reads_samples == (row.gamma is not None)
    assert (scored.rewards is None) == (row.rewards == "none")


def test_what_dpo_computes(done):
    command, findings = done["dpo"]
    rows = read(command.out / "scored/rows.parquet")
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= rows[0].keys()
    assert not {"ref_sample", "score_chosen"} & rows[0].keys()
    assert not (command.out / "rewards").exists()
    assert "verdict" in findings


def test_what_e_dpo_computes(done):
    command, _ = done["e-dpo"]
    rows = read(command.out / "scored/rows.parquet")
    assert len(rows[0]["score_chosen"]) == 3 and "ref_sample_ids" in rows[0]


@pytest.mark.parametrize("method", ["dpo", "e-dpo"])
def test_the_plan_counts_what_the_stages_then_keep(done, method):
    command, _ = done[method]
    found, stages = planned(command)
    pairs = {name: len(lengths) for name, lengths in found.kept.items()}
    align = stages["policy"]
    findings = read_json(align.out / "stage.json")["findings"]
    assert findings["pairs"] == pairs["train"]
    assert findings["pairs seen"] == align.training.steps * 8
    assert align.training.steps == round(pairs["train"] / 8)
    judge = read_json(command.out / "judge/stage.json")["findings"]
    assert judge["held-out pairs"] == pairs["test"]
    assert judge["pairs of each reward model"] == pairs["validation"]
    assert sum(pairs.values()) == 80 and not any(found.dropped.values())


@pytest.mark.parametrize("method", ["dpo", "e-dpo"])
def test_the_exported_folder_holds_the_policy(done, method):
    command, _ = done[method]
    exported = model_folder.load_policy(command.out / "hf")
    policy = model_folder.load_policy(command.out / "policy")
    both = jax.tree.leaves(exported.model), jax.tree.leaves(merged(policy.model))
    for theirs, ours in zip(*both, strict=True):
        np.testing.assert_array_equal(theirs, ours)
    assert (adapter_config(policy.model) is None) == (command.adapter.rank == 0)
    assert "Verdict on held-out prompts" in (command.out / "hf/README.md").read_text()


@pytest.mark.parametrize("method", ["dpo", "e-dpo"])
def test_the_report(done, method):
    command, findings = done[method]
    text = (command.out / "report.md").read_text()
    assert text.startswith(f"# {METHODS[method].label} of ")
    assert findings["verdict"][1:] in text and "rehearsal" not in text.lower()
    _, stages = planned(command)
    assert all(command_line(stage) in text for stage in stages.values())
    assert text.count("| ... ") + text.count("\n| alpha") + text.count("\n| beta") >= 1
    assert (command.out / "curves.png").stat().st_size > 10_000
    metrics = logged(command.out / "policy/metrics.jsonl")
    drawn = {name for names in report.CURVES.values() for name in names}
    absent = {"kl"} if method == "dpo" else set()  # dpo reads no samples
    assert drawn - {name for record in metrics for name in record} == absent


def without_clock(log):
    return [{k: v for k, v in record.items() if k not in WALL_CLOCK} for record in log]


def test_it_resumes_stage_by_stage(done, made, monkeypatch):
    """The run is stopped before the judge; the second call does not train the policy again."""
    command = tuned(made, "resumed")

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reward, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(command)
    assert not (command.out / "report.md").exists()
    monkeypatch.setattr(Align, "run", stop)
    monkeypatch.setattr(Score, "run", stop)
    findings = execute(command)
    whole, expected = done["dpo"]
    assert findings == expected
    for name in ("policy/weights.safetensors", "evaluation/rows.parquet"):
        assert (command.out / name).read_bytes() == (whole.out / name).read_bytes()
    logs = [logged(run.out / "policy/metrics.jsonl") for run in (command, whole)]
    assert [without_clock(log) for log in logs] == [without_clock(logs[0])] * 2
    monkeypatch.setattr(Reward, "run", stop)
    assert execute(command) == findings  # complete


def test_quick_says_so_in_all_that_it_writes(made, monkeypatch):
    titles = []
    monkeypatch.setattr(
        report, "save", lambda figure, path: titles.append(figure.get_suptitle())
    )
    command = tuned(made, "quick", quick=True)
    with console.capture() as captured:
        console.quiet = False
        execute(command)
        console.quiet = True
    assert "REHEARSAL" in captured.get()
    assert not (command.out / "hf").exists()
    for text in (
        (command.out / "report.md").read_text(),
        (command.out / "hf-rehearsal/README.md").read_text(),
        *titles,
    ):
        assert "rehearsal" in text
    assert len(titles) == 1


def test_the_plan_is_printed_before_anything_is_trained(made, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Reward, "run", stop)
    command = tuned(made, "printed", "d-dpo")
    with console.capture() as captured:
        console.quiet = False
        with pytest.raises(KeyboardInterrupt):
            execute(command)
        console.quiet = True
    text = captured.get()
    assert "80 rows: " in text and " tokens in all" in text and "in all, without" in text
    assert f"  {jax.device_count()} x cpu, float32, " in text
    assert "python -m scale.run align" in text and "GiB" in text


def test_rows_and_reasons_by_hand(made, tmp_path):
    """20 short rows, and 3 whose responses are too long."""
    rows = made_rows(20)
    rows += [{"prompt": f"long {i}", "chosen": "alpha " * 40, "rejected": "x"} for i in range(3)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    command = replace(
        tuned(made, "by hand"), data=data, limits=TuneLimits(prompt=3, response=12)
    )
    found, _ = planned(command)
    longer = "with a response over 12 tokens"
    assert found.dropped == {"with equal responses": 0, longer: 3}
    first, second, _ = rows_text(found, ["one"])
    assert first.startswith("23 rows: ")
    assert first.endswith(f"not used: 3 {longer}, 1 that cannot be read")
    tokenizer = model_folder.tokenizer_of(made / "model")
    cut = sum(len(tokenizer.prompt_ids(row["prompt"])) > 3 for row in rows[:20])
    assert cut and f"of {cut} prompts only the last 3 tokens are kept" in second
    assert max(lengths[:, 0].max() for lengths in found.kept.values()) == 3


def test_limits_follow_from_the_rows(made, tmp_path):
    """100 prompts, 4 of them long: the limit is that of the 95th percentile, rounded up to 16."""
    rows = [
        {"prompt": "alpha " * (200 if i < 4 else 20) + str(i), "chosen": "beta", "rejected": "x y"}
        for i in range(100)
    ]
    command = replace(tuned(made, "limits"), data=jsonl(tmp_path / "rows.jsonl", rows))
    found, _ = planned(command)
    tokenizer = model_folder.tokenizer_of(made / "model")
    usual = len(tokenizer.prompt_ids(rows[50]["prompt"]))
    assert found.limits.prompt % 16 == 0 and usual <= found.limits.prompt < usual + 16
    assert found.limits.response == 16 and found.limits.truncation_side == "left"


def test_shares_by_hand():
    assert shares_of(100, quick=False) == pytest.approx(
        {"train": 0.7, "validation": 0.2, "test": 0.1}
    )
    large = shares_of(100_000, quick=False)
    assert large == pytest.approx({"train": 0.978, "validation": 0.02, "test": 0.002})


@pytest.mark.parametrize(
    ("parameters", "rates"),
    [
        (135e6, Rates(5e-6, 2e-5)),
        (1.7e9, Rates(1e-6, 4e-6)),
        (7e9, Rates(5e-7, 2e-6)),
    ],
)
def test_learning_rates_follow_from_the_size(parameters, rates):
    assert rates_for(int(parameters), adapters=False) == rates
    tenfold = rates_for(int(parameters), adapters=True)
    assert tenfold == pytest.approx([10 * rate for rate in rates])


def test_a_learning_rate_scales_that_of_the_reward_models(made):
    _, stages = planned(tuned(made, "rates", "d-dpo", learning_rate=2e-6))
    assert stages["policy"].training.learning_rate == pytest.approx(2e-6)
    assert stages["rewards"].training.learning_rate == pytest.approx(8e-6)
    usual = replace(tuned(made, "rates"), learning_rate=None)
    assert planned(usual)[1]["policy"].training.learning_rate == 5e-6


@pytest.mark.parametrize(
    ("right", "longer", "result", "verdict"),
    [
        (50, 0.5, (0.1, 0.2), "unknown: the judge is no better than a coin"),
        (60, 0.6, (0.1, 0.2), "unknown: the judge is no better than one that looks at length"),
        (60, 0.3, (0.1, 0.2), "unknown: the judge is no better than one that looks at length"),
        (60, 0.5, (0.1, 0.2), "after training"),
        (60, 0.45, (-0.2, -0.1), "before training"),
        (60, 0.5, (-0.1, 0.1), "no difference"),
    ],
)
def test_verdicts(right, longer, result, verdict):
    """60 of 100: Wilson's interval is [.502, .691], as R's prop.test gives without correction."""
    judge = {
        "held-out pairs": 100,
        "held-out accuracy": [right / 100],
        "accuracy of picking the longer": longer,
    }
    assert verdict in report.verdict_of(dict(zip(("low", "high"), result, strict=True)), judge)
    if right == 60:
        np.testing.assert_allclose(report.accuracy_interval(judge), (0.5020, 0.6906), atol=5e-4)


def refused(command, match):
    with pytest.raises(InputError, match=match):
        execute(command)
    assert not command.out.exists()


def test_bad_input_is_refused_before_any_work(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = tuned(made, "refused")
    refused(replace(command, model=tmp_path / "none"), "none: no such file or folder")
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "mamba"}')
    refused(replace(command, model=unknown), "model_type 'mamba' is not supported")
    one = jsonl(tmp_path / "one.jsonl", made_rows(1))
    refused(replace(command, data=one), "one.jsonl: one row; nothing is left to evaluate on")
    few = jsonl(tmp_path / "few.jsonl", made_rows(2))
    refused(replace(command, data=few), "few.jsonl: 2 rows have too few prompts for a")
    long = TuneLimits(response=4096)
    longest = "the model has sequences of"
    refused(replace(command, limits=long), rf"--limits.response 4096: {longest}")
    both = TuneLimits(prompt=1500, response=1500)
    refused(replace(command, limits=both), rf"--limits: 1500 [+] 1500 tokens, but {longest}")
    refused(replace(command, rows=2), r"prefs.jsonl: 2 rows \(--rows\) have too few prompts")
    mixed = [row | {"id": i if i else "x"} for i, row in enumerate(made_rows(9))]
    mixed = jsonl(tmp_path / "mixed.jsonl", mixed)
    refused(replace(command, data=mixed), "mixed.jsonl: field 'id': no Parquet type holds all")
    refused(replace(command, epochs=1e9), "--epochs: must be above 0 and at most 10000, not 1")
    short = TuneLimits(prompt=24, response=1)
    refused(replace(command, limits=short), "80 rows, of which none within --limits of 24 [+] 1")
    bad = jsonl(tmp_path / "bad.jsonl", [*made_rows(3), {"prompt": "a", "chosen": "b"}])
    refused(replace(command, data=bad), "bad.jsonl:4: field 'rejected'")
    palm = tmp_path / "palm"
    sft = Sft(
        out=palm, data=made / "prefs.jsonl", model=replace(LLAMA, block="parallel"),
        limits=Limits(24, 12), training=TrainingConfig(1, 8),
    )  # fmt: skip
    execute(sft)
    refused(replace(command, model=palm), "no Llama architecture|parallel")


def test_a_bad_row_does_not_set_the_format_of_the_others(made, tmp_path):
    """Without `rejected` it is no pair, so it is skipped, and the pairs after it are read."""
    rows = [{"prompt": "a", "chosen": "b"}, *made_rows(40)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    command = replace(tuned(made, "format"), data=data, bad_rows="skip")
    pairs = jsonl(tmp_path / "pairs.jsonl", rows[1:])
    _, stages = planned(replace(command, bad_rows="error", data=pairs))
    parts = execute(replace(stages["data"], data=data, bad_rows="skip", out=tmp_path / "data"))
    assert sum(parts[name] for name in ("train", "validation", "test")) == 40


def test_a_batch_divides_among_the_devices(made, monkeypatch):
    monkeypatch.setattr(pipeline, "make_runtime", lambda config: Runtime4())
    for quick, size in ((False, 8), (True, 4)):
        _, stages = planned(tuned(made, "devices", "d-dpo", quick=quick, batch_size=10))
        sizes = {stages[name].training.batch_size for name in ("policy", "rewards", "judge")}
        assert sizes == {size}


class Runtime4:
    """Devices among which a batch is split."""

    batch_shards = 4


def test_the_end_of_a_prompt_without_spaces():
    assert report.end_of("a" * 300) == "... " + "a" * 200
    assert report.end_of("b " + "a" * 150 + " c" * 40) == "... " + ("a" * 119 + " c" * 40)[120:]


def test_what_a_model_writes_cannot_control_a_terminal_or_a_page():
    shown = report.shown("a\x1b[31m \x00&lt;b|c\x85d", 0.0)
    assert shown == "a\ufffd\\[31m \ufffd\\&lt;b\\|c d"


def test_a_sample_that_reached_the_limit_is_marked():
    assert report.shown("word " * 100, 1.0).endswith("word ... [limit]")
    assert not report.shown("word", 0.0).endswith("[limit]")


def test_conversations_for_a_tokenizer_without_template_are_refused(made, tmp_path):
    """Of text alone the same folder is accepted."""
    model = tmp_path / "plain"
    Export(policy=made / "model", out=model).run()
    words = WordLevel({word: i for i, word in enumerate(["</s>", "<unk>", *WORDS])}, "<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(model)
    command = replace(tuned(made, "refused"), model=model)
    planned(command)
    rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in made_rows(80)]
    turns = jsonl(tmp_path / "turns.jsonl", rows)
    reason = "plain: the tokenizer has no chat template, so a prompt must be text, not turns"
    refused(replace(command, data=turns), rf"turns\.jsonl:1: .*{reason}")


def test_bad_rows_are_skipped_and_listed(made, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    rows = [*made_rows(40), {"prompt": "a", "chosen": "b"}, {"prompt": "", "chosen": "b"}]
    data = jsonl(tmp_path / "bad.jsonl", rows)
    command = replace(tuned(made, "skipped"), data=data, bad_rows="skip")
    monkeypatch.setattr(Score, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(command)
    lines = (command.out / "data/bad_rows.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{data}:41", f"{data}:42"]
    parts = read_json(command.out / "data/stage.json")["findings"]
    assert sum(parts[name] for name in ("train", "validation", "test")) == 40


@pytest.mark.parametrize(
    ("size", "most", "parts"),
    [(16, 16, 1), (16, 4, 4), (16, 5, 4), (10, 4, 5), (7, 4, 7), (3, 4, 1)],
)
def test_a_batch_is_cut_into_few_equal_parts_of_at_most_so_many_rows(size, most, parts):
    assert parts_of(size, most) == parts


def test_parts_of_a_batch_and_less_precision_need_less_memory(made):
    """Half of the bytes of activations in bfloat16; a quarter in four parts."""
    found, stages = planned(tuned(made, "memory"))
    work, lengths, align = work_of(found, 0), found.kept["train"], stages["policy"]
    whole = work.activations(lengths, align.training, align.runtime)
    half = work.activations(lengths, align.training, RuntimeConfig(dtype="bfloat16"))
    quarter = work.activations(lengths, replace(align.training, accumulation=4), align.runtime)
    full = work.activations(lengths, align.training, RuntimeConfig(remat="full"))
    assert whole == 2 * half == 4 * quarter > full > 0


def test_adapters_need_no_gradient_of_what_they_lie_over(made):
    """16 bytes and 6 FLOPs a token for each of their own parameters; the rest of the model as it is
    read, in bfloat16."""
    found, _ = planned(tuned(made, "memory"))
    full, low = work_of(found, 0), work_of(found, 0, AdapterConfig(2), "bfloat16")
    blocks = LLAMA.num_layers * (
        2 * (LLAMA.d_model + LLAMA.num_heads * LLAMA.head_dim) * 2
        + 2 * (LLAMA.d_model + 2 * LLAMA.num_kv_heads * LLAMA.head_dim)
        + 2 * (LLAMA.d_model + 2 * LLAMA.d_ff)
        + 2 * (LLAMA.d_ff + LLAMA.d_model)
    )
    assert low.state == 16 * blocks and full.state == 16 * found.parameters
    assert (full.trunk, low.trunk) == (4 * found.parameters, 2 * found.parameters)
    lengths = found.kept["train"]
    twice = work_of(found, 0, AdapterConfig(4), "bfloat16")
    more = twice.training(lengths) - low.training(lengths)
    assert more == pytest.approx(6 * blocks * int(lengths.sum()))
    assert low.training(lengths) < full.training(lengths)


def test_a_plan_that_needs_more_memory_than_there_is_says_what_helps(made, monkeypatch):
    found, stages = planned(tuned(made, "memory"))
    printed = []
    for memory in (2.0**40, 2.0**30):
        monkeypatch.setattr(plan, "device_memory", lambda memory=memory: memory)
        console.quiet = False
        with console.capture() as captured:
            print_plan(stages, work_of(found, 0), [])
        console.quiet = True
        printed.append(captured.get())
    assert "may be more than there is" not in printed[0]
    assert "may be more than there is: shorter --limits, --accumulation" in printed[1]


def test_times_are_told_to_two_digits():
    assert [duration(x) for x in (0.4, 59.0, 61.0, 5000.0, 7000.0)] == [
        "0 s", "59 s", "1 min", "83 min", "1.9 h"
    ]  # fmt: skip


def test_an_ensemble_costs_as_many_times_one_reward_model(made):
    found, stages = planned(tuned(made, "cost", "e-dpo"))
    one = replace(stages["rewards"], num_reward_models=1)
    cost = COSTS[Reward]
    work = work_of(found, 3)
    assert cost(stages["rewards"], work).trained == pytest.approx(3 * cost(one, work).trained)
    print_plan(stages, work, [])
