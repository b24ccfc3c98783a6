"""Section 6 on a made corpus and in the village: what comes out, the same again, and the same after
a kill."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import pytest

from minipref.methods import METHODS
from scale.data.dataset import Limits
from scale.data.rows import read
from scale.data.village import assess, read_page
from scale.errors import InputError
from scale.io.model_folder import VILLAGE
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.paper import presets
from scale.paper.pipeline import PRESETS, Paper, best, by_cell
from scale.paper.presets import LEARNING_RATE, searched
from scale.paper.repetition import REWARD_MODELS, Repetition
from scale.paper.results import COLUMNS, Outcome, Policy, write_results
from scale.stages.evaluate import Evaluate
from scale.stages.score import Score
from scale.stages.stage import Stage, execute, input_paths, needs
from scale.train.loop import TrainingConfig

OPTIONS = shlex.split("""
    --rhos 0.5 --methods dpo e-dpo --pairs 24 --length-biases 0.4 0.6 --snapshots 1
    --model.vocab-size 300 --model.d-model 16 --model.num-heads 2 --model.num-kv-heads 1
    --model.head-dim 8 --model.d-ff 32
    --limits.prompt 40 --limits.response 24
    --sft.steps 80 --sft.batch-size 32 --oracle.steps 4 --oracle.batch-size 8
    --reward.steps 4 --reward.batch-size 8 --align.steps 8 --align.batch-size 4
    --betas 0.1 1.0 --most-kl 1e9
""")
WORDS = shlex.split("map set list tree heap sort join split read write open close")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completions of different lengths, so that both biases can be drawn."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "made.jsonl"

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    rows = [
        {"prompt": f"{i} {text(5)}", "completion": text(rng.integers(1, 5))} for i in range(240)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(corpus: Path, out: Path, *more: str) -> list[str]:
    paths = ["--data", str(corpus), "--seeds", "1", "--out", str(out)]
    return [sys.executable, "-m", "scale.run", *paths, *OPTIONS, *more]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(corpus, out), check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_a_row_for_each_policy_and_every_file_of_the_report(run: Path) -> None:
    """Of the candidates, the best on validation prompts has test values."""
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    policies = [(row["rho"], row["method"], row["beta"]) for row in rows]
    assert policies == [("0.5", m, beta) for m in ("dpo", "e-dpo") for beta in ("0.1", "1.0")]
    for cell in (rows[:2], rows[2:]):
        selected = max(cell, key=lambda row: float(row["validation_advantage"]))
        assert [row["selected"] == "1" for row in cell] == [row is selected for row in cell]
        assert [row["advantage"] != "" for row in cell] == [row is selected for row in cell]
        assert float(selected["low"]) <= float(selected["advantage"]) <= float(selected["high"])
        shares = [float(selected[name]) for name in ("win", "tie", "loss")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    for name in ("report.md", "figure2.png", "collapse.png", "ensemble.png", "config.json"):
        assert (run / name).stat().st_size > 0
    assert json.loads((run / "config.json").read_text())["rhos"] == [0.5]
    report = (run / "report.md").read_text()
    assert re.search(r"^\| 0\.5 \| \**e-dpo\** \| \**[+-]\d", report, re.M)
    assert re.search(r"^\| oracle \| held-out pairs \| \d+ \|$", report, re.M)
    assert "One seed." in report and "What the summaries say" not in report
    assert "| rho | method | for each | b = 0.4 | b = 0.6 |" in report
    assert len(re.findall(r"^\| human \| \w", report, re.M)) == 4


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(command(corpus, out), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "seed-0/oracle/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.csv").exists()
    sft = out / "seed-0/sft/weights.safetensors"
    before = sft.stat().st_mtime_ns
    subprocess.run(command(corpus, out), check=True, capture_output=True)
    assert sft.stat().st_mtime_ns == before
    for name in ("results.csv", "summary.csv"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_a_complete_run_is_skipped_and_other_options_are_refused(run: Path, corpus: Path) -> None:
    before = (run / "results.csv").stat().st_mtime_ns
    subprocess.run(command(corpus, run), check=True, capture_output=True)
    assert (run / "results.csv").stat().st_mtime_ns == before
    refused = subprocess.run(command(corpus, run, "--pairs", "23"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pairs" in refused.stdout and "Traceback" not in refused.stderr


VILLAGE_OPTIONS = shlex.split("""
    --pages 1000 --seeds 2 --seed 3 --rhos 0.5 --methods dpo e-dpo --pairs 32
    --length-biases 0.4 0.6 --samples 2
    --betas 0.1 --learning-rates 0.01 --snapshots 1
    --model.vocab-size 400 --model.d-model 32 --model.num-heads 2 --model.num-kv-heads 1
    --model.head-dim 16 --model.d-ff 64 --sft.steps 150 --sft.batch-size 32 --sft.learning-rate 0.02
    --reward.steps 8 --reward.batch-size 8 --align.steps 12 --align.batch-size 8
""")


@pytest.fixture(scope="module")
def village(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds, 3 and 4, of the default data."""
    out = tmp_path_factory.mktemp("village") / "run"
    argv = [sys.executable, "-m", "scale.run", "--out", str(out), *VILLAGE_OPTIONS]
    subprocess.run(argv, check=True, capture_output=True)
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
def test_the_summary_has_students_interval_of_the_seeds_in_results(village: Path) -> None:
    """Of two values a and b: (a + b) / 2 +- tan(0.475 pi) |a - b| / 2, for Student's t of one
    degree of freedom is Cauchy's. Values are read with six digits."""
    results, summary = rows_of(village / "results.csv"), rows_of(village / "summary.csv")
    assert [(r["method"], r["seed"]) for r in results] == [
        ("dpo", "3"), ("e-dpo", "3"), ("dpo", "4"), ("e-dpo", "4")
    ]  # fmt: skip
    assert [(r["rho"], r["method"], r["seeds"]) for r in summary] == [
        ("0.5", "dpo", "2"), ("0.5", "e-dpo", "2")
    ]  # fmt: skip
    for row in summary:
        a, b = (float(r["advantage"]) for r in results if r["method"] == row["method"])
        assert a != b
        half = np.tan(0.475 * np.pi) * abs(a - b) / 2
        numbers = [float(row[name]) for name in ("advantage", "low", "high")]
        assert numbers == pytest.approx([(a + b) / 2 + d for d in (0, -half, half)], abs=1e-4)


@pytest.mark.slow
def test_each_seed_has_a_folder_in_which_all_is_drawn_anew(village: Path) -> None:
    assert sorted(path.name for path in village.glob("seed-*")) == ["seed-3", "seed-4"]
    folders = [village / "seed-3", village / "seed-4"]
    for name in (
        "corpus/test.parquet", "sft/weights.safetensors", "samples/train/rows.parquet",
        "labelled/train/rows.parquet", "rho-0.5/single/data/rows.parquet",
        "rho-0.5/ensemble/rewards/weights.safetensors", "rho-0.5/test/rows.parquet",
    ):  # fmt: skip
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first != second, name
    prompts = [{row["prompt"] for row in read(f / "corpus/test.parquet", ("prompt",))}
               for f in folders]  # fmt: skip
    assert len(prompts[0] & prompts[1]) < 0.1 * len(prompts[0])
    assert not (folders[0] / "oracle").exists()


@pytest.mark.slow
def test_labels_and_evaluation_have_the_true_reward(village: Path) -> None:
    """As `assess`, whose values are tested by hand, gives it of the texts in the files. Of dpo the
    first policy evaluated is its snapshot, and the second its end."""
    for row in read(village / "seed-3/labelled/train/rows.parquet"):
        page = read_page(row["prompt"])
        assert assess(page, row["chosen"]).reward > assess(page, row["rejected"]).reward
    evaluated = read(village / "seed-4/rho-0.5/test/rows.parquet", need=("prompt",))
    for row in evaluated:
        page = read_page(row["prompt"])
        for texts, name in (("samples", "reward"), ("reference_samples", "reference_reward")):
            assert row[name] == np.mean([assess(page, text).reward for text in row[texts]])
    [result] = [
        r for r in rows_of(village / "results.csv") if (r["seed"], r["method"]) == ("4", "dpo")
    ]
    advantages = [r["reward"] - r["reference_reward"] for r in evaluated if r["policy"] == 1]
    assert float(result["advantage"]) == pytest.approx(np.mean(advantages), abs=1e-5)


@pytest.mark.slow
def test_the_report_of_a_village(village: Path) -> None:
    report = (village / "report.md").read_text()
    for name in ("The run", "Results", "What the summaries say", "Tests", "Equal KL",
                 "The paper's claims", "Samples", "Definitions"):  # fmt: skip
        assert f"\n## {name}\n" in report
    assert "2 seeds, each with its own test prompts" in report
    sections = dict(part.split("\n", 1) for part in report.split("\n## ")[1:])
    said = re.findall(r"^\| *([\d.]*) *\| ([\w-]+) \| \d", sections["What the summaries say"], re.M)
    assert said == [("", "human"), ("", "pi_ref"), ("0.5", "dpo"), ("0.5", "e-dpo")]
    rows = re.findall(
        r"^\| (\S+) \| .* \| \d of \d \| .* ?\| [+-]\d\.\d \|$", sections["Samples"], re.M
    )
    assert rows == ["human", "pi_ref", "dpo", "e-dpo"] * 4
    human = re.findall(
        r"^\| human \| [A-Z][a-z]+ .* \|  \| [+-]\d\.\d \|$", sections["Samples"], re.M
    )
    assert len(human) == 4  # they state nothing false
    assert "| oracle |" not in report and "logit of the oracle" not in report
    assert re.search(r"^\| corpus \| train \| \d{3}; \d{3} \|$", sections["The run"], re.M)


def repetition(seed: int = 0, **options: Any) -> Repetition:
    return Repetition(replace(Paper(), **options), seed)


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A search that knows dpo and hull at two length biases."""
    rows = "dpo,0.2,0.1,0.001 dpo,0.8,1,0.003 hull,0.2,0.3,0.001 hull,0.8,3,0.01"
    path = tmp_path / "searched.csv"
    path.write_text("\n".join(["method,rho,beta,learning_rate", *rows.split()]) + "\n")
    monkeypatch.setattr(presets, "SEARCHED_FILE", path)
    presets.searched_table.cache_clear()
    yield
    presets.searched_table.cache_clear()


@pytest.mark.usefixtures("found")
def test_the_search_is_the_same_for_every_method() -> None:
    run = repetition(betas=(0.1, 1.0), learning_rates=(1e-3, 1e-2))
    for method in METHODS:
        candidates = [(p.beta, p.learning_rate) for p in run.policies(0.2, method)]
        assert candidates == [(0.1, 1e-3), (0.1, 1e-2), (1.0, 1e-3), (1.0, 1e-2)]
    [policy] = repetition(7).policies(0.9, "hull")
    assert (policy.beta, policy.learning_rate, policy.seed) == (3.0, 0.01, 7)
    assert policy.path == Path("runs/paper/seed-7/rho-0.9/policies/hull-3-0.01")


@pytest.mark.usefixtures("found")
def test_searched_takes_the_nearest_rho() -> None:
    assert searched("dpo", 0.3) == (0.1, 0.001)
    assert searched("dpo", 0.9) == (1.0, 0.003)


def test_a_method_that_was_not_searched_has_its_own_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ninth", METHODS["hull"]._replace(beta=0.7))
    assert searched("ninth", 0.5) == (0.7, LEARNING_RATE)


def stages_of(one: Repetition) -> list[Stage]:
    """The stages of one rho and method, in order."""
    [policy] = one.policies(0.5, "e-dpo")
    stages = [*one.shared_stages().values()]
    stages += [stage for name in REWARD_MODELS for stage in one.reward_stages(0.5, name)]
    stages.append(one.alignment(policy))
    paths = [*one.points(policy).values()]
    return [*stages, *(one.evaluation(part, 0.5, paths) for part in ("validation", "test"))]


@pytest.mark.parametrize("data", [Path("rows.jsonl"), None])
def test_stages_read_what_earlier_stages_wrote(data: Path | None) -> None:
    """An input is the user's file, the true reward, or an earlier stage's folder or a file in it.

    So a repetition reads nothing of another one.
    """
    one = repetition(data=data, snapshots=1)
    written = {data or VILLAGE}
    for stage in stages_of(one):
        for option, path in input_paths(stage):
            assert written & {path, *path.parents}, (type(stage), option, path)
        assert one.out in stage.out.parents
        written.add(stage.out)
    [policy] = one.policies(0.5, "e-dpo")
    scored = Path("runs/paper/seed-0/rho-0.5/ensemble/scored/rows.parquet")
    assert one.alignment(policy).data == scored
    assert one.points(policy) == {25: policy.path / "step-25", 100: policy.path}


def test_who_judges() -> None:
    """With rows of the user's: an oracle reward model, trained on human preferences."""
    oracle = Path("runs/paper/seed-2/oracle")
    assert repetition(2, data=Path("rows.jsonl")).judge == oracle and repetition(2).judge == VILLAGE
    stages = repetition(2, data=Path("rows.jsonl")).shared_stages()
    assert stages["oracle"].out == oracle
    assert "oracle" not in repetition().shared_stages()
    for one in (repetition(2), repetition(2, data=Path("rows.jsonl"))):
        judged = [stage.rewards for stage in stages_of(one) if isinstance(stage, Evaluate)]
        judged += [
            one.shared_stages()[f"labels, {part}"].rewards for part in ("train", "validation")
        ]
        assert judged == [one.judge] * 4


def test_what_fine_tuning_starts_from_and_where_pi_ref_is_sampled() -> None:
    for init in (None, Path("smollm2")):
        stages = repetition(init=init, prompts=7).shared_stages()
        assert stages["sft"].init == init
        assert [stages[f"samples, {part}"].prompts for part in ("train", "validation")] == [7, 7]


def test_every_stage_has_the_seed_of_its_repetition() -> None:
    """But for `score`, which draws nothing here: the reference samples are those of `pairs`."""
    for seed in (0, 7):
        for stage in stages_of(repetition(seed, data=Path("rows.jsonl"))):
            if isinstance(stage, Score):
                continue
            training = getattr(stage, "training", stage)
            assert training.seed == seed, stage


def test_chains_of_the_pipeline_need_what_is_before_them() -> None:
    """Two seeds' stages, as `Paper.train` puts them: no chain needs one of the other seed, but that
    of a method, whose policies are of both."""
    both = [repetition(seed, rhos=(0.5,), methods=("e-dpo",)) for seed in (0, 1)]
    chains: list[list[Stage]] = [[s] for one in both for s in one.shared_stages().values()]
    names = [f"{name} {one.seed}" for one in both for name in one.shared_stages()]
    chains += [one.reward_stages(0.5, name) for one in both for name in REWARD_MODELS]
    names += [f"{name} {one.seed}" for one in both for name in REWARD_MODELS]
    chains.append([one.alignment(policy) for one in both for policy in one.policies(0.5, "e-dpo")])
    found = [{names[i] for i in before} for before in needs(chains)]
    by_hand = {
        "corpus": (),
        "sft": ("corpus",),
        "samples, train": ("corpus", "sft"),
        "pairs, train": ("samples, train",),
        "labels, train": ("pairs, train", "sft"),
        "samples, validation": ("corpus", "sft"),
        "pairs, validation": ("samples, validation",),
        "labels, validation": ("pairs, validation", "sft"),
        "single": ("labels, train", "labels, validation", "sft"),
        "ensemble": ("labels, train", "labels, validation", "sft"),
    }
    for name, before in zip(names, found[:-1], strict=True):
        stage, seed = name.rsplit(" ", 1)
        assert before == {f"{other} {seed}" for other in by_hand[stage]}, name
    policies = ("sft", "ensemble", "labels, validation")
    assert found[-1] == {f"{other} {seed}" for other in policies for seed in (0, 1)}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rhos": ()}, "--rhos: none"),
        ({"length_biases": ()}, "--length-biases: none"),
        ({"rhos": (0.5, 0.5)}, "--rhos 0.5 0.5: the same twice, to six digits"),
        ({"methods": ("dpo", "dpo")}, "--methods dpo dpo: the same twice"),
        ({"snapshots": 11}, "--snapshots 11: too many for a run of 100 steps"),
    ],
)
def test_bad_options_are_named_before_the_first_stage(
    tmp_path: Path, options: dict, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        execute(replace(Paper(), out=tmp_path / "o", **options))
    assert not (tmp_path / "o").exists()


def test_cells_keep_their_candidates_together() -> None:
    choices = ((0.2, 1.0, 0), (0.2, 3.0, 0), (0.5, 1.0, 0), (0.5, 1.0, 1))
    policies = [Policy(Path(f"{rho}-{b}-{s}"), rho, "dpo", b, 1e-3, s) for rho, b, s in choices]
    assert [len(cell) for cell in by_cell(policies)] == [2, 1, 1]


def test_each_seed_and_rho_is_evaluated_in_the_order_of_the_policies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`benchmarks.study` relies on it."""
    paper = Paper(seeds=2, rhos=(0.8, 0.2))
    policies = [
        policy
        for seed in (0, 1)
        for rho in paper.rhos
        for method in METHODS
        for policy in Repetition(paper, seed).policies(rho, method)
    ]
    stages: list[Evaluate] = []

    def evaluated(pool: None, chains: list[list[Evaluate]], *_: Any) -> list[list[Any]]:
        stages.extend(stage for [stage] in chains)
        raise InterruptedError

    monkeypatch.setattr("scale.paper.pipeline.execute_all", evaluated)
    with pytest.raises(InterruptedError):
        paper.evaluate(None, "test", {policy: [policy.path] for policy in policies})
    assert [s.out.parts[-3:-1] for s in stages] == [
        ("seed-0", "rho-0.2"), ("seed-0", "rho-0.8"), ("seed-1", "rho-0.2"), ("seed-1", "rho-0.8")
    ]  # fmt: skip
    for stage in stages:
        methods = [path.name.rsplit("-", 2)[0] for path in stage.policies]
        assert methods == list(METHODS)


def test_model_selection_keeps_to_its_kl_budget() -> None:
    values = ((0.1, 2.0), (0.3, 9.0), (0.9, 11.0))
    cell = [Policy(Path(str(v)), 0.5, "dpo", 0.1, 1e-3, 0, v, kl) for v, kl in values]
    assert best(cell, 10.0).validation == 0.3
    assert best(cell, 5.0).validation == 0.1
    assert best(cell, 20.0).validation == best(cell, None).validation == 0.9
    assert best(cell[1:], 1.0).validation_kl == 9.0


def test_results_have_test_values_of_the_selected_alone(tmp_path: Path) -> None:
    """Values have six digits; a policy that had no rival has no validation values.

    Of the log: the change of held-out log-probs, the last KL, and the mean shares of two models.
    """
    first = Policy(Path("a"), 0.2, "ipo", 3.0, 1e-3, 1, 0.12345678, 2.0)
    second = Policy(tmp_path, 0.2, "ipo", 0.3, 1e-3, 1)
    log = [
        {"step": 0, "validation/logps/chosen": -9.0, "validation/kl": 0.0},
        {"step": 4, "ensemble/nearest": [0.25, 0.75]},
        {"step": 9, "ensemble/nearest": [0.75, 0.25]},
        {"step": 9, "validation/logps/chosen": -10.5, "validation/kl": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    means = {"advantage": 1 / 3, "low": 0.1, "high": 0.5, "win": 0.5, "tie": 0.0, "loss": 0.5}
    outcomes = [Outcome(second, [4, 9], [[], []], [{}, means | {"kl": 7.0, "tokens": 9.5}])]
    write_results(tmp_path / "results.csv", [first, second], outcomes, has_truth=False)
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert lines == [
        "ipo,0.2,1,3.0,0.001,0,0.123457,2" + "," * 21,
        "ipo,0.2,1,0.3,0.001,1,,,0.333333,0.1,0.5,0.5,0,0.5,7,9.5,,,,,,,,,-1.5,,0.25,,0.5 0.5",
    ]


def test_the_paper_preset_is_section_6_1() -> None:
    paper = PRESETS["paper"]
    assert paper.preset == "paper"
    assert paper.pairs == 30_000 and paper.prompts is None
    assert paper.align == TrainingConfig(10_000, 16, 1e-6, 0, 1.0)
    assert paper.reward == paper.oracle == TrainingConfig(3_000, 64, 4e-6, 0, 1.0)
    parameters = jax.tree.leaves(eqx.filter_eval_shape(Transformer, paper.model, jax.random.key(0)))
    assert sum(a.size for a in parameters) == pytest.approx(0.4e9, rel=0.03)
    assert paper.rhos == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    betas, taus = (0.01, 0.1, 1, 3, 10, 30, 100), (0.01, 0.1, 1, 3, 5, 10, 25)
    for method in METHODS:
        candidates = [(p.beta, p.learning_rate) for p in Repetition(paper, 0).policies(0.2, method)]
        assert candidates == [(beta, 1e-6) for beta in (taus if method == "ipo" else betas)]
    other = Repetition(replace(paper, betas=(2.0,)), 0)
    assert [p.beta for p in other.policies(0.2, "ipo")] == [2.0]
    assert paper.length_biases == (0.2, 0.4, 0.5, 0.6, 0.8)


def test_defaults_are_the_miniature() -> None:
    assert PRESETS["miniature"] == Paper()
    assert Paper().limits == Limits(56, 24) and Paper().seeds == 3 and Paper().data is None
    assert Paper().model == ModelConfig(
        vocab_size=576, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=64
    )
