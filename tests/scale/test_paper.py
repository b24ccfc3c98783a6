"""The whole of section 6 on a made corpus: what comes out, twice the same, and again after a
kill."""

import csv
import json
import os
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
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.paper.pipeline import PRESETS, SEARCHED, Paper, best, by_cell, searched
from scale.paper.results import Policy
from scale.train.loop import TrainingConfig

OPTIONS = shlex.split("""
    --rhos 0.5 --methods dpo e-dpo --pairs 24 --length-biases 0.4 0.6 --snapshots 1
    --model.vocab-size 300 --model.d-model 16 --model.num-heads 2 --model.head-dim 8 --model.d-ff 32
    --limits.prompt 40 --limits.response 24
    --sft.steps 80 --sft.batch-size 32 --oracle.steps 4 --oracle.batch-size 8
    --reward.steps 4 --reward.batch-size 8 --align.steps 8 --align.batch-size 4
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
    program = [sys.executable, "-m", "scale.run"]
    return [*program, "--data", str(corpus), "--out", str(out), *OPTIONS, *more]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(corpus, out), check=True, capture_output=True)
    return out


def test_a_row_for_each_policy_and_every_file_of_the_report(run: Path) -> None:
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    for row, method in zip(rows, ("dpo", "e-dpo"), strict=True):
        assert float(row["beta"]) == SEARCHED[method][0.5][0]
    assert [(row["rho"], row["method"]) for row in rows] == [("0.5", "dpo"), ("0.5", "e-dpo")]
    for row in rows:
        assert float(row["low"]) <= float(row["advantage"]) <= float(row["high"])
        shares = [float(row[name]) for name in ("win", "tie", "loss")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    for name in ("report.md", "figure2.png", "collapse.png", "ensemble.png", "config.json"):
        assert (run / name).stat().st_size > 0
    assert json.loads((run / "config.json").read_text())["rhos"] == [0.5]


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


def test_a_complete_run_is_skipped_and_other_options_are_refused(run: Path, corpus: Path) -> None:
    before = (run / "results.csv").stat().st_mtime_ns
    subprocess.run(command(corpus, run), check=True, capture_output=True)
    assert (run / "results.csv").stat().st_mtime_ns == before
    refused = subprocess.run(command(corpus, run, "--pairs", "23"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "pairs" in refused.stdout and "Traceback" not in refused.stderr


def test_the_search_is_the_same_for_every_method() -> None:
    run = replace(Paper(), betas=(0.1, 1.0), learning_rates=(1e-3, 1e-2))
    for method in ("e-dpo", "ipo"):
        expected = [(0.1, 1e-3), (0.1, 1e-2), (1.0, 1e-3), (1.0, 1e-2)]
        assert run.candidates(method, 0.2) == expected
    assert Paper().candidates("hull", 0.5) == [SEARCHED["hull"][0.5]]


def test_searched_takes_the_nearest_rho() -> None:
    assert searched("dpo", 0.3) == SEARCHED["dpo"][0.2]
    assert searched("dpo", 0.9) == SEARCHED["dpo"][0.8]


def test_cells_keep_their_candidates_together() -> None:
    choices = ((0.2, 1.0), (0.2, 3.0), (0.5, 1.0))
    policies = [Policy(Path(f"{rho}-{b}"), rho, "dpo", b, 1e-3, 0) for rho, b in choices]
    assert [len(cell) for cell in by_cell(policies)] == [2, 1]


def test_model_selection_keeps_to_its_kl_budget() -> None:
    values = (0.1, 2.0), (0.3, 9.0), (0.9, 11.0)
    cell = [Policy(Path(str(v)), 0.5, "dpo", 0.1, 1e-3, 0, v, kl) for v, kl in values]
    assert best(cell, 10.0).validation == 0.3
    assert best(cell, 5.0).validation == 0.1
    assert best(cell, 20.0).validation == 0.9
    assert best(cell[1:], 1.0).validation_kl == 9.0


def test_the_paper_preset_is_section_6_1() -> None:
    paper = PRESETS["paper"]
    assert paper.pairs == 30_000
    assert paper.align == TrainingConfig(10_000, 16, 1e-6, 0, 1.0)
    assert paper.reward == paper.oracle == TrainingConfig(3_000, 64, 4e-6, 0, 1.0)
    model = eqx.filter_eval_shape(Transformer, paper.model, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(model)) == pytest.approx(0.4e9, rel=0.03)
    assert paper.rhos == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    betas, taus = (0.01, 0.1, 1, 3, 10, 30, 100), (0.01, 0.1, 1, 3, 5, 10, 25)
    for method in METHODS:
        grid = taus if method == "ipo" else betas
        assert paper.candidates(method, 0.2) == [(beta, 1e-6) for beta in grid]
    assert replace(paper, betas=(2.0,)).candidates("ipo", 0.2) == [(2.0, 1e-6)]
    assert paper.length_biases == (0.2, 0.4, 0.5, 0.6, 0.8)


def test_defaults_are_the_miniature() -> None:
    assert PRESETS["miniature"] == Paper()
    assert Paper().limits == Limits(48, 24, "right")
    assert Paper().model == ModelConfig()
