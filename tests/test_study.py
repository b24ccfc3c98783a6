"""The study's tables, from made-up rows with values by hand, and the stages of its variations."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import search
from benchmarks.study import report, tables, variations
from benchmarks.study.__main__ import STUDY_COLUMNS
from benchmarks.study.protocol import BY_ORACLE, BY_TRUTH
from minipref.methods import METHODS
from scale.files import write_csv
from scale.paper import claims
from scale.paper.pipeline import Paper
from scale.paper.repetition import Repetition
from scale.stages.evaluate import Evaluate
from scale.stages.stage import needs

SEEDS = range(3)


def row(seed: int, rho: float, method: str, **values: Any) -> dict[str, str]:
    """A row of `study.csv` as it is read: text, and empty where there is no value."""
    every = dict.fromkeys(STUDY_COLUMNS, "") | {"seed": seed, "rho": rho, "method": method}
    return {name: str(value) for name, value in (every | values).items()}


def varied(experiment: str, seed: int, rho: float, method: str, **values: Any) -> dict[str, str]:
    every = dict.fromkeys(variations.COLUMNS, "") | {"experiment": experiment}
    every |= {"seed": seed, "rho": rho, "method": method}
    return {name: str(value) for name, value in (every | values).items()}


def test_a_column_has_the_seeds_of_each_cell_in_order() -> None:
    rows = [row(seed, 0.2, name, kl=seed) for seed in (4, 7) for name in ("ipo", "dpo")]
    cells = tables.column([*rows, row(4, 0.1, "mean", kl="1 2"), row(5, 0.1, "mean")], "kl")
    assert list(cells) == [(0.1, "mean"), (0.2, "dpo"), (0.2, "ipo")]
    np.testing.assert_array_equal(cells[0.2, "ipo"], [[4.0], [7.0]])
    np.testing.assert_array_equal(cells[0.1, "mean"], [[1.0, 2.0]])
    assert tables.means(rows, "kl") == {(0.2, "dpo"): 5.5, (0.2, "ipo"): 5.5}


def test_what_the_kl_term_changes() -> None:
    """p-dpo less dpo is -1, -2, -3 at rho .2 and 0 at .8: the means over the rhos are half."""
    rows = [
        row(seed, rho, name, forward_kl=value)
        for seed in SEEDS
        for rho, change in ((0.2, -1.0 - seed), (0.8, 0.0))
        for name, value in (("dpo", 5.0), ("p-dpo", 5.0 + change), ("d-dpo", 1.0), ("dp-dpo", 2.0))
    ]
    plain, distilled = tables.with_kl_term(rows, "forward_kl", -1)
    assert plain.what == "p-dpo against dpo" and distilled.what == "dp-dpo against d-dpo"
    np.testing.assert_array_equal(plain.values, [[0.5], [1.0], [1.5]])
    np.testing.assert_array_equal(distilled.values, [[-1.0]] * 3)


def test_the_bias_of_the_nearest_models_has_the_sign_of_the_claim() -> None:
    """All of rho .2 on b = .8, on the other side of .5: +.3. All of rho .8 on b = .6: -.1."""
    shares = {0.2: "0 0 0 0 1", 0.5: "0 0 1 0 0", 0.8: "0 0 0 1 0"}
    rows = [row(s, rho, "e-dpo", nearest=value) for s in SEEDS for rho, value in shares.items()]
    found = {d.what: np.mean(d.values) for d in tables.opposite(rows)}
    assert found == pytest.approx({"rho 0.2": 0.3, "rho 0.8": -0.1})
    assert tables.nearest(rows)[0.8][1].mean == pytest.approx(0.1)
    np.testing.assert_array_equal(tables.nearest(rows)[0.2][0], [0, 0, 0, 0, 1])


def test_an_annealed_gamma_is_compared_in_the_same_seeds() -> None:
    """Seed 9 has no constant gamma. Differences of .01 and .03 are within .05, .5 is not."""
    rows = [row(seed, 0.5, "e-dpo", advantage=1.0) for seed in (*SEEDS, 9)]
    for shift, word in ((0.02, "confirmed"), (0.5, "refuted")):
        constant = [
            varied("gamma", seed, 0.5, "e-dpo", advantage=1.0 - shift - 0.001 * seed)
            for seed in SEEDS
        ]
        [verdict] = claims.judge({"c": tables.annealing(rows, constant)})
        assert verdict.word == word and len(verdict.contrasts) == 2
        [contrast] = tables.annealed_table(rows, constant)
        assert contrast.what == "e-dpo, rho 0.5" and contrast.mean == pytest.approx(shift + 0.001)


def test_the_best_learning_rate_of_each_beta() -> None:
    """Over the seeds .1 has a mean of 2 at one rate and 1 at the other."""
    searched = [
        {"rho": "0.5", "method": "dpo", "beta": beta, "learning_rate": rate,
         "validation_advantage": value}
        for beta, rate, value in (
            ("1.0", "1e-3", "0"), ("0.1", "1e-3", "1"), ("0.1", "1e-3", "3"), ("0.1", "3e-3", "0"),
            ("0.1", "3e-3", "2"),
        )
    ]  # fmt: skip
    assert tables.candidates(searched) == {0.5: {"dpo": {0.1: 2.0, 1.0: 0.0}}}


def test_the_advantage_at_equal_kl() -> None:
    """dpo reaches 1 nat, and ipo 4, half-way to its snapshot at 2: half of the advantage there."""
    values = {
        "dpo": {"snapshot_kl": 0.5, "kl": 1.0, "snapshot_advantage": 3.0, "advantage": 7.0},
        "ipo": {"snapshot_kl": 2.0, "kl": 4.0, "snapshot_advantage": 8.0, "advantage": 0.0},
    }
    rows = [row(seed, 0.2, name, **v) for seed in SEEDS for name, v in values.items()]
    advantages, budgets = tables.equal_kl(rows)
    assert budgets == {0.2: (1.0, 0.5)}
    assert {key: c.mean for key, c in advantages.items()} == {(0.2, "dpo"): 7.0, (0.2, "ipo"): 4.0}


def test_the_epochs_table_by_hand() -> None:
    rows = [
        varied("epochs", seed, 0.5, "dpo", pairs=250, epochs=epochs, advantage=seed * epochs)
        for seed in SEEDS
        for epochs in (1.088, 9.984)
    ]
    table = tables.epochs_table([*rows, varied("gamma", 0, 0.5, "dpo", advantage=9)])
    assert {key: cell["dpo"].mean for key, cell in table.items()} == pytest.approx(
        {(250, 1.1): 1.088, (250, 10.0): 9.984}
    )


def test_where_an_ensemble_method_is_far_behind_the_mean() -> None:
    """e-dpo is .2 behind in the second seed of rho .8 alone, hull .11 there."""
    behind = {(0.2, 0): 0.1, (0.2, 1): 0.0, (0.8, 0): -0.3, (0.8, 1): 0.2}
    rows = [
        row(
            seed, rho, name, advantage=1.0 - lag, reward_accuracy="0.5 0.8",
            nearest="0.9 0.1" if lag > 0.15 else "0.3 0.7",
        )
        for (rho, seed), gap in behind.items()
        for name, lag in (("e-dpo", gap), ("hull", 0.55 * gap), ("mean", 0.0))
    ]  # fmt: skip
    found = tables.failures(rows)
    assert found["counts"] == {0.1: [1, 1], 0.15: [1, 0]} and found["of"] == 4
    assert found["accuracy"] == 0.5
    assert found["there"] == 0.9 and found["elsewhere"] == pytest.approx(0.3)


def test_what_longer_reward_models_change() -> None:
    """d-dpo is 1 behind dpo, and 2 ahead with better reward models. Seed 9 has none."""
    values = {"dpo": {"advantage": 4}, "d-dpo": {"advantage": 3, "reward_accuracy": "0.5 0.7"}}
    rows = [row(s, 0.2, name, **v) for s in (*SEEDS, 9) for name, v in values.items()]
    better = [
        varied("longer", s, 0.2, "d-dpo", advantage=6, reward_accuracy="0.8 1.0") for s in SEEDS
    ]
    [(rho, method, accuracies, found)] = tables.longer_table(rows, better)
    assert (rho, method, accuracies) == (0.2, "d-dpo", pytest.approx([0.6, 0.9]))
    assert [contrast.mean for contrast in found] == [3, 6, 3, -1, 2]


def test_orders_that_agree() -> None:
    """Of dpo, ipo and mean, the two judges differ about dpo and ipo alone: 2 of 3 pairs."""
    a = {(0.2, name): [np.array([x])] for name, x in (("dpo", 1.0), ("ipo", 2.0), ("mean", 3.0))}
    b = a | {(0.2, "dpo"): [np.array([2.5])]}
    assert tables.same_orders(a, b) == (2, 3)
    assert tables.same_orders(a | {(0.5, "dpo"): a[0.2, "dpo"]}, a) == (3, 3)


def repetition(**options: Any) -> Repetition:
    return Repetition(replace(Paper(seeds=1), **options), 0)


def test_the_variations_and_what_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage that a variation reads is one of the repetition's or of the variation's own."""
    monkeypatch.setattr(variations, "findings_of", lambda stage: {"that share of --data": 0.694})
    one = repetition()
    shared = [[stage] for stage in one.shared_stages().values()]
    every = [
        *variations.gammas(one), *variations.epochs(one), *variations.longer(one),
        *variations.unbiased(one),
    ]  # fmt: skip
    assert len({v.align.out for v in every}) == len(every) == 12 + 9 + 9 + 2
    for variation in every:
        chains = variation.chains()
        *_, reads = needs([*shared, *chains])
        assert len(shared) + chains.index([variation.align]) in reads
        assert isinstance(chains[-1][0], Evaluate)
    gammas = [v for v in every if v.experiment == "gamma"]
    assert {v.align.gamma for v in gammas} == {(1e-2, 1e-2)}
    assert {v.align.method for v in gammas} == {n for n, m in METHODS.items() if m.gamma}
    assert {v.rho for v in every if v.experiment == "unbiased"} == {0.69}


def test_ten_epochs_and_their_snapshots() -> None:
    """250 pairs in batches of 16: 156 steps, with snapshots after 17 and 68."""
    first = next(variations.epochs(repetition()))
    assert first.align.training.steps == 156 and first.align.data.parts[-4] == "250-pairs"
    assert list(first.points()) == pytest.approx([17 * 16 / 250, 68 * 16 / 250, 156 * 16 / 250])
    assert [path.name for path in first.points().values()][:2] == ["step-17", "step-68"]


def test_one_policy_against_another(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards: Iterator[np.ndarray] = iter([np.array([[2.0, 1.0]]), np.array([[1.0, 1.0]])])
    monkeypatch.setattr(variations.Variation, "true_rewards", lambda self: next(rewards))
    theirs, ours = (variations.variation("unbiased", repetition(), 0.6, m) for m in ("dpo", "ipo"))
    found = variations.versus(theirs, ours)
    assert found["baseline"] == "dpo" and found["method"] == "ipo"
    assert [found[n] for n in ("advantage", "win", "tie", "loss")] == [0.5, 0.5, 0.5, 0.0]


def test_the_report_of_made_up_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section renders, the summary has each cell, and nothing is written elsewhere."""
    monkeypatch.setattr(report, "STUDY", tmp_path / "summary.csv")
    rng = np.random.default_rng(0)
    numbers = {name: 1.0 for name in STUDY_COLUMNS if name not in ("method", "rho", "seed")}
    rows = [
        row(seed, rho, name, **numbers | {
            "advantage": rng.normal(), "nearest": "0 0 0 0 1" if name == "e-dpo" else "",
            "reward_accuracy": f"{rng.random()} 0.7"})
        for seed in SEEDS for rho in (0.2, 0.5, 0.8) for name in METHODS
    ]  # fmt: skip
    values = dict.fromkeys(variations.FINDINGS, 0.25)
    experiments = [
        *(("gamma", rho, name, {}) for rho in (0.2, 0.5, 0.8) for name in ("e-dpo", "p-dpo")),
        *(("epochs", 0.5, name, {"pairs": 250, "epochs": 1.1}) for name in ("dpo", "e-dpo")),
        *(("longer", rho, "d-dpo", {"reward_accuracy": "0.75"}) for rho in (0.2, 0.5)),
        ("unbiased", 0.6, "dpo", {}),
        ("unbiased", 0.6, "e-dpo", {"baseline": "dpo"}),
        *((by, rho, name, {}) for by in (BY_ORACLE, BY_TRUTH) for rho in (0.2, 0.5, 0.8)
          for name in METHODS),
    ]  # fmt: skip
    more = [
        varied(name, seed, rho, method, **values | others | {"advantage": rng.normal()})
        for seed in SEEDS
        for name, rho, method, others in experiments
    ]
    searched = [
        {"rho": 0.2, "method": "dpo", "beta": 1, "learning_rate": 1, "validation_advantage": 1}
    ]
    write_csv(tmp_path / "search.csv", list(searched[0]), searched)
    judged = [{"claim": claims.ANNEALING, "verdict": "confirmed"}]
    write_csv(tmp_path / "section6_verdicts.csv", ("claim", "verdict"), judged)
    report.write_report(tmp_path, rows, more)
    text = (tmp_path / "study.md").read_text()
    assert "cpu, Python" in text and "3 seeds" in text and "None" not in text
    assert text.count("\n## ") == 14
    assert re.search(r"\| 0.2 \| d-dpo \| 0.\d\d -> 0.75 \|", text)
    [annealing] = [line for line in text.splitlines() if line.startswith(f"| {claims.ANNEALING}")]
    assert annealing.endswith("| confirmed |") and "annealed - constant" in annealing
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 1 + 3 * len(METHODS)
    assert {path.name for path in tmp_path.iterdir()} == {
        "study.md", "study.png", "summary.csv", "search.csv", "section6_verdicts.csv"
    }  # fmt: skip


def test_the_search_takes_the_best_mean_over_seeds() -> None:
    """beta 1 is at 3 and 0, beta 2 at 2 and 2."""
    rows = [
        {
            "method": "dpo",
            "rho": "0.5",
            "beta": beta,
            "learning_rate": "1",
            "validation_advantage": v,
        }
        for beta, v in (("1", "3"), ("2", "2"), ("1", "0"), ("2", "2"))
    ]
    assert search.best(rows)["beta"] == "2"
    assert search.best(rows)["validation_advantage"] == "+2.000"
