"""Section 6 on a made corpus: what comes out, the same again, and the same after a kill."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from minipref.methods import METHODS
from scale.data.dataset import Limits
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.paper.pipeline import PRESETS, Paper, best, by_cell, by_method
from scale.paper.presets import LEARNING_RATE, SEARCHED, searched
from scale.paper.results import COLUMNS, Outcome, Policy, write_results
from scale.stages.stage import execute, input_paths
from scale.train.loop import TrainingConfig

OPTIONS = shlex.split("""
    --rhos 0.5 --methods dpo e-dpo --pairs 24 --length-biases 0.4 0.6 --snapshots 1
    --model.vocab-size 300 --model.d-model 16 --model.num-heads 2 --model.head-dim 8 --model.d-ff 32
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
    paths = ["--data", str(corpus), "--out", str(out)]
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
    assert "| rho | method | for each | b = 0.4 | b = 0.6 |" in report
    assert len(re.findall(r"^\| human \| \w", report, re.M)) == 4


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(
    run: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(command(corpus, out), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "oracle/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.csv").exists()
    before = (out / "sft/weights.safetensors").stat().st_mtime_ns
    subprocess.run(command(corpus, out), check=True, capture_output=True)
    assert (out / "sft/weights.safetensors").stat().st_mtime_ns == before
    assert (out / "results.csv").read_bytes() == (run / "results.csv").read_bytes()


@pytest.mark.slow
def test_a_complete_run_is_skipped_and_other_options_are_refused(run: Path, corpus: Path) -> None:
    before = (run / "results.csv").stat().st_mtime_ns
    subprocess.run(command(corpus, run), check=True, capture_output=True)
    assert (run / "results.csv").stat().st_mtime_ns == before
    refused = subprocess.run(command(corpus, run, "--pairs", "23"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pairs" in refused.stdout and "Traceback" not in refused.stderr


def test_the_search_is_the_same_for_every_method() -> None:
    run = replace(Paper(), betas=(0.1, 1.0), learning_rates=(1e-3, 1e-2))
    for method in METHODS:
        candidates = [(p.beta, p.learning_rate) for p in run.policies(0.2, method, 0)]
        assert candidates == [(0.1, 1e-3), (0.1, 1e-2), (1.0, 1e-3), (1.0, 1e-2)]
    [policy] = Paper().policies(0.5, "hull", 7)
    assert (policy.beta, policy.learning_rate, policy.seed) == (*SEARCHED["hull"][0.5], 7)
    assert policy.path == Path("runs/paper/seed-7/rho-0.5/policies/hull-0.03-0.01")


def test_searched_takes_the_nearest_rho() -> None:
    assert searched("dpo", 0.3) == SEARCHED["dpo"][0.2]
    assert searched("dpo", 0.9) == SEARCHED["dpo"][0.8]


def test_a_method_that_was_not_searched_has_its_own_beta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ninth", METHODS["hull"]._replace(beta=0.7))
    assert searched("ninth", 0.5) == (0.7, LEARNING_RATE)


def test_stages_read_what_earlier_stages_wrote() -> None:
    """An input is the user's file, or a folder of an earlier stage or a file in it."""
    paper = Paper(data=Path("rows.jsonl"))
    policy = Policy(Path("runs/policy"), 0.5, "e-dpo", 0.1, 1e-3, 0)
    stages = [*paper.shared_stages().values()]
    stages += [s for name in ("single", "ensemble") for s in paper.rewards_of(0.5, name, 0)]
    written = {paper.data}
    for stage in [*stages, paper.alignment(policy)]:
        for option, path in input_paths(stage):
            assert written & {path, *path.parents}, (type(stage), option, path)
        written.add(stage.out)
    assert paper.alignment(policy).data == Path(
        "runs/paper/seed-0/rho-0.5/ensemble/scored/rows.parquet"
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rhos": ()}, "--rhos: none"),
        ({"length_biases": ()}, "--length-biases: none"),
        ({"rhos": (0.5, 0.5)}, "--rhos 0.5 0.5: the same twice, to six digits"),
        ({"methods": ("dpo", "dpo")}, "--methods dpo dpo: the same twice"),
        ({"snapshots": 11}, "--snapshots 11: too many for a run of 120 steps"),
    ],
)
def test_bad_options_are_named_before_the_first_stage(
    tmp_path: Path, options: dict, named: str
) -> None:
    with pytest.raises(InputError, match=named):
        execute(replace(Paper(), out=tmp_path / "o", **options))
    assert not (tmp_path / "o").exists()


def test_cells_keep_their_candidates_together() -> None:
    choices = ((0.2, 1.0), (0.2, 3.0), (0.5, 1.0))
    policies = [Policy(Path(f"{rho}-{b}"), rho, "dpo", b, 1e-3, 0) for rho, b in choices]
    assert [len(cell) for cell in by_cell(policies)] == [2, 1]
    assert [len(group) for group in by_method(policies)] == [3]


def test_model_selection_keeps_to_its_kl_budget() -> None:
    values = ((0.1, 2.0), (0.3, 9.0), (0.9, 11.0))
    cell = [Policy(Path(str(v)), 0.5, "dpo", 0.1, 1e-3, 0, v, kl) for v, kl in values]
    assert best(cell, 10.0).validation == 0.3
    assert best(cell, 5.0).validation == 0.1
    assert best(cell, 20.0).validation == best(cell, None).validation == 0.9
    assert best(cell[1:], 1.0).validation_kl == 9.0


def test_results_have_test_values_of_the_selected_alone(tmp_path: Path) -> None:
    """Values have six digits; a policy that had no rival has no validation values."""
    first = Policy(Path("a"), 0.2, "ipo", 3.0, 1e-3, 1, 0.12345678, 2.0)
    second = Policy(Path("b"), 0.2, "ipo", 0.3, 1e-3, 1)
    means = {"advantage": 1 / 3, "low": 0.1, "high": 0.5, "win": 0.5, "tie": 0.0, "loss": 0.5}
    outcomes = [Outcome(second, [4, 9], [[], []], [{}, means | {"kl": 7.0, "tokens": 9.5}])]
    write_results(tmp_path / "results.csv", [first, second], outcomes)
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    assert lines == [
        "ipo,0.2,1,3.0,0.001,0,0.123457,2,,,,,,,,",
        "ipo,0.2,1,0.3,0.001,1,,,0.333333,0.1,0.5,0.5,0,0.5,7,9.5",
    ]


def test_the_paper_preset_is_section_6_1() -> None:
    paper = PRESETS["paper"]
    assert paper.preset == "paper"
    assert paper.pairs == 30_000
    assert paper.align == TrainingConfig(10_000, 16, 1e-6, 0, 1.0)
    assert paper.reward == paper.oracle == TrainingConfig(3_000, 64, 4e-6, 0, 1.0)
    parameters = jax.tree.leaves(eqx.filter_eval_shape(Transformer, paper.model, jax.random.key(0)))
    assert sum(a.size for a in parameters) == pytest.approx(0.4e9, rel=0.03)
    assert paper.rhos == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    betas, taus = (0.01, 0.1, 1, 3, 10, 30, 100), (0.01, 0.1, 1, 3, 5, 10, 25)
    for method in METHODS:
        candidates = [(p.beta, p.learning_rate) for p in paper.policies(0.2, method, 0)]
        assert candidates == [(beta, 1e-6) for beta in (taus if method == "ipo" else betas)]
    assert [p.beta for p in replace(paper, betas=(2.0,)).policies(0.2, "ipo", 0)] == [2.0]
    assert paper.length_biases == (0.2, 0.4, 0.5, 0.6, 0.8)


def test_defaults_are_the_miniature() -> None:
    assert PRESETS["miniature"] == Paper()
    assert Paper().limits == Limits(48, 24, "right")
    assert Paper().model == ModelConfig()
