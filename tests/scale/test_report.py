"""The report and its figures: planted differences, hand-made paths, claims, and a ninth method."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import t as student

from minipref.methods import METHODS
from scale.paper import figures
from scale.paper import report as report_module
from scale.paper.claims import CLAIMS, PAPERS, Claim, Contrast, Verdict, verdicts
from scale.paper.comparisons import (
    REFERENCE,
    SIGNIFICANT,
    SUMMARY,
    Comparison,
    against_reference,
    at_equal_kl,
    between_methods,
    by_cell,
    final_values,
    summaries,
)
from scale.paper.contents import contents
from scale.paper.figures import choices, dodge, look, reward_model_names
from scale.paper.report import prompt_text, terminal_table, write_report
from scale.paper.results import Outcome, Policy
from scale.templates import escape

N = 60
PNG = b"\x89PNG"
NOISE = np.random.default_rng(0).normal(size=N)


def outcome(folder, method, rho=0.5, seed=0, *, points=((1.0, 0.5),), noise=NOISE, beta=0.3):
    """A policy whose advantage at each point (KL, mean) is mean + noise."""
    policy = Policy(folder / f"{method}-{rho}-{seed}", rho, method, beta, 0.003, seed)
    rows = [[row(i, mean + noise[i]) for i in range(len(noise))] for _, mean in points]
    shares = {"win": 0.5, "tie": 0.2, "loss": 0.3, "tokens": 9.0}
    findings = [
        {"advantage": mean, "low": mean, "high": mean, "kl": kl} | shares for kl, mean in points
    ]
    return Outcome(policy, [10 * (i + 1) for i in range(len(points))], rows, findings)


def row(i, advantage):
    texts = {"samples": [f"a | b_{i}", "second"], "reference_samples": [f"ref {i}", "second"]}
    rewards = {"reward": float(2 + advantage), "reference_reward": 2.0}
    return {"prompt": f"prompt {i}"} | texts | rewards


def log(outcome, steps=40, num_reward_models=0):
    """A training log: held-out values every 20 steps, and one-hot weights of a random model."""
    rng = np.random.default_rng(0)
    path = outcome.policy.path / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    held_out = dict(zip(figures.MONITORED, (-20.0, -22.0, 0.1), strict=True))
    records = [{"step": s} | (held_out if s % 20 == 0 else {}) for s in range(steps + 1)]
    for record in records[1:] if num_reward_models else []:
        one_hot = np.eye(num_reward_models)[rng.integers(num_reward_models)]
        record["ensemble/weights"] = one_hot.tolist()
        record["ensemble/nearest"] = rng.dirichlet(np.ones(num_reward_models)).tolist()
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return outcome


def report(out, outcomes, stages=None, completions=None, length_biases=(), has_truth=False):
    write_report(out, outcomes, stages or {}, completions or {}, length_biases, has_truth)
    return (out / "report.md").read_text()


def planted(folder):
    """e-dpo is ahead of dpo by 1 with small noise; ipo differs from dpo by noise alone."""
    rng = np.random.default_rng(1)
    small, other = (NOISE + 0.1 * rng.normal(size=N) for _ in range(2))
    return [
        outcome(folder, "e-dpo", points=((1.0, 1.5),), noise=small),
        outcome(folder, "dpo"),
        outcome(folder, "ipo", noise=other - other.mean() + NOISE.mean()),
    ]


def test_a_planted_difference_is_found_and_a_null_is_not(tmp_path):
    tested = between_methods(final_values(by_cell(planted(tmp_path))))
    by_pair = {(c.method, c.baseline): c for c in tested}
    significant = {pair for pair, c in by_pair.items() if c.significant}
    assert significant == {("dpo", "e-dpo"), ("ipo", "e-dpo")}
    assert by_pair["dpo", "e-dpo"].difference == pytest.approx(-1, abs=0.05)


def test_the_report_lists_the_planted_difference_alone(tmp_path):
    text = report(tmp_path, planted(tmp_path))
    assert "2 of 3 differences are significant, 1 not" in text
    wins = r"dpo \+(?:0\.9|1\.0)\d+ \(< 0\.001\), ipo \+\S+ \(< 0\.001\)"
    won = re.findall(rf"^\| 0\.5 \| ([\w-]+) \| {wins} \|$", text, re.M)
    assert won == ["e-dpo", "e-dpo"]  # at the end, and at equal KL
    assert not re.search(r"\| ipo \| dpo|\| dpo \| ipo", text)
    assert "**e-dpo**" in text and "**dpo**" not in text


def test_methods_are_listed_by_how_they_compare_with_the_reference(tmp_path):
    """Means 2 and -2 of noise that is 1 wide are significant; 0 is not."""
    cells = (("dpo", 0.2, 2.0), ("dpo", 0.8, 2.0), ("ipo", 0.2, -2.0), ("mean", 0.2, 0.0))
    noise = NOISE - NOISE.mean()
    outcomes = [
        outcome(tmp_path, method, rho, points=((1.0, mean),), noise=noise)
        for method, rho, mean in cells
    ]
    text = report(tmp_path, outcomes)
    assert "- significantly better: 2 (rho 0.2: dpo; rho 0.8: dpo)\n" in text
    assert "- significantly worse: 1 (rho 0.2: ipo)\n" in text
    assert "- not significantly different: 1 (rho 0.2: mean)\n" in text
    assert "| 0.2 | **dpo** | **+2.000 [" in text
    assert "| +2.00 | 50 / 20 / 30 | 1.00 | 9.0 | 0.3 | 0.003 |" in text


def test_no_significant_difference_is_said(tmp_path):
    same = [outcome(tmp_path, "dpo"), outcome(tmp_path, "ipo")]
    assert "no difference is significant, of 1." in report(tmp_path, same)


def test_methods_are_compared_within_a_rho_and_adjusted_over_all(tmp_path):
    outcomes = [outcome(tmp_path, m, rho) for m in ("dpo", "ipo", "mean") for rho in (0.2, 0.8)]
    tested = between_methods(final_values(by_cell(outcomes)))
    pairs = (("dpo", "ipo"), ("dpo", "mean"), ("ipo", "mean"))
    expected = [(rho, *pair) for rho in (0.2, 0.8) for pair in pairs]
    assert [(c.rho, c.method, c.baseline) for c in tested] == expected
    text = report(tmp_path, outcomes)
    assert text.count("over all 6 pairs") == 2 and "over all 6 cells" in text


def test_p_values_are_adjusted_over_all_rhos(tmp_path):
    """Two equal tests: Holm doubles the smaller p, and so both."""
    noise = NOISE + np.random.default_rng(2).normal(0.3, 1, size=N)

    def p_values(*rhos):
        dpo = [outcome(tmp_path, "dpo", rho) for rho in rhos]
        ipo = [outcome(tmp_path, "ipo", rho, noise=noise) for rho in rhos]
        return [c.p for c in between_methods(final_values(by_cell(dpo + ipo)))]

    [alone] = p_values(0.2)
    assert 0.001 < alone < 0.4
    assert p_values(0.2, 0.8) == pytest.approx([2 * alone, 2 * alone])


def test_equal_kl_by_hand(tmp_path):
    """ipo ends at KL 1 with 0.2; dpo comes to it halfway from (0.5, 0.3) to (1.5, 0.9).

    e-dpo's first point is beyond.
    """
    zeros = np.zeros(2)
    outcomes = [
        outcome(tmp_path, "dpo", points=((0.5, 0.3), (1.5, 0.9)), noise=np.array([1.0, -1.0])),
        outcome(tmp_path, "ipo", points=((0.5, 0.3), (1.0, 0.2)), noise=zeros),
        outcome(tmp_path, "e-dpo", points=((1.6, 5.0), (2.0, 9.0)), noise=zeros),
    ]
    [tested] = at_equal_kl(by_cell(outcomes))
    assert (tested.method, tested.baseline) == ("dpo", "ipo")
    assert tested.difference == pytest.approx(0.6 - 0.2)
    assert "1 of 3 pairs remain" in report(tmp_path, outcomes)


def two_paths(folder, seed, dpo_kl, ipo_kls):
    """dpo passes (0.5, 0.2) and ends at (dpo_kl, 0.4); ipo is worth 0 on its whole path."""
    points = ((ipo_kls[0], 0.0), (ipo_kls[1], 0.0))
    dpo = outcome(folder, "dpo", seed=seed, points=((0.5, 0.2), (dpo_kl, 0.4)), noise=np.zeros(2))
    return [dpo, outcome(folder, "ipo", seed=seed, points=points, noise=np.zeros(2))]


def test_equal_kl_is_that_of_each_seed(tmp_path):
    """Seed 0 is compared at KL 1, where dpo ends with 0.4. Seed 1 is compared at KL 1.5, where ipo
    ends and dpo is a quarter of the way from (0.5, 0.2) to (4.5, 0.4): 0.25."""
    seeds = [*two_paths(tmp_path, 0, 1.0, (0.1, 9.0)), *two_paths(tmp_path, 1, 4.5, (0.1, 1.5))]
    [tested] = at_equal_kl(by_cell(seeds))
    assert (tested.method, tested.baseline) == ("dpo", "ipo")
    assert tested.difference == pytest.approx((0.4 + 0.25) / 2)


def test_a_pair_is_left_out_where_one_seed_cannot_be_compared(tmp_path):
    """In seed 1 ipo's first point, at KL 5, is beyond dpo's end at 4.5."""
    seeds = [*two_paths(tmp_path, 0, 1.0, (0.1, 9.0)), *two_paths(tmp_path, 1, 4.5, (5.0, 9.0))]
    assert at_equal_kl(by_cell(seeds)) == []


def test_one_method_at_one_rho(tmp_path):
    text = report(tmp_path, [outcome(tmp_path, "mean")])
    assert "`--snapshots 3` keeps" in text
    assert "One seed." in text
    assert "collapse.png)" not in text and "ensemble.png" not in text and "## The run" not in text
    assert (tmp_path / "figure2.png").read_bytes().startswith(PNG)


def test_two_seeds(tmp_path):
    """Means 1 and 2: Student's interval is 1.5 +- 12.7062 x 0.5."""
    seeds = [
        outcome(tmp_path, "dpo", seed=s, points=((1.0, 1.0 + s),), noise=np.zeros(4), beta=0.1 + s)
        for s in range(2)
    ]
    text = report(tmp_path, seeds)
    assert "2 seeds, each with its own test prompts" in text and "One seed" not in text
    row = (
        "| 0.5 | **dpo** | **+1.500 [-4.853, +7.853]** | +1.00 +2.00 | 50 / 20 / 30 | 1.00 | 9.0 |"
    )
    assert f"{row} 0.1, 1.1 | 0.003 |" in text
    assert "Student's test over seeds" in text and "Wald" not in text
    [cell] = summaries(seeds)
    assert tuple(cell) == SUMMARY
    assert tuple(cell.values()) == (0.5, "dpo", 1.5, -4.8531, 7.8531, 2)  # six digits


def test_summaries_are_by_rho_and_then_in_the_order_of_the_methods(tmp_path):
    """One seed has the bootstrap's interval over prompts, here of prompts that are all alike."""
    cells = (("ipo", 0.8), ("dpo", 0.8), ("hull", 0.2))
    outcomes = [outcome(tmp_path, m, rho, noise=np.zeros(3)) for m, rho in cells]
    rows = [tuple(cell.values()) for cell in summaries(outcomes)]
    expected = ((0.2, "hull"), (0.8, "dpo"), (0.8, "ipo"))
    assert rows == [(*key, 0.5, 0.5, 0.5, 1) for key in expected]


def test_seeds_may_have_different_numbers_of_prompts(tmp_path):
    """Each seed has its own test prompts. The mean is that of the seeds' means, not of prompts."""
    noise = {0: np.zeros(2), 1: np.array([1.0, 2.0, 3.0])}
    seeds = [
        outcome(tmp_path, method, seed=s, points=((1.0, mean),), noise=noise[s])
        for method, mean in (("dpo", 0.0), ("ipo", 1.0))
        for s in noise
    ]
    values = final_values(by_cell(seeds))
    assert [c.difference for c in against_reference(values)] == pytest.approx([1.0, 2.0])
    [tested] = between_methods(values)
    assert tested.difference == pytest.approx(-1)
    assert "| 0.5 | dpo | +1.000 [" in report(tmp_path, seeds)


def test_methods_with_different_seeds_are_not_compared(tmp_path):
    """A pair is of one seed, and none is left out in silence."""
    outcomes = [outcome(tmp_path, m, seed=s) for m, s in (("dpo", 0), ("dpo", 1), ("ipo", 0))]
    with pytest.raises(ValueError, match="shorter"):
        between_methods(final_values(by_cell(outcomes)))


def test_differences_are_tested_over_seeds_and_not_over_prompts(tmp_path):
    """dpo is above ipo by 0.1 and -0.05 in two seeds, at each of 60 prompts. Over prompts this
    would be far from chance. Over seeds t = 0.025 / 0.075 with one degree of freedom, so that
    p = 1 - 2 atan(t) / pi (Cauchy)."""
    seeds = [
        outcome(tmp_path, method, seed=s, points=((1.0, mean),))
        for s, difference in ((0, 0.1), (1, -0.05))
        for method, mean in (("dpo", difference), ("ipo", 0.0))
    ]
    [tested] = between_methods(final_values(by_cell(seeds)))
    assert tested.p == pytest.approx(1 - 2 * np.arctan(1 / 3) / np.pi)


def test_significant_is_below_one_in_a_hundred():
    assert SIGNIFICANT == 0.01
    assert Comparison(0.5, "dpo", "ipo", 1.0, 0.0099).significant
    assert not Comparison(0.5, "dpo", "ipo", 1.0, 0.0101).significant


def test_one_prompt_and_methods_that_differ_between_rhos(tmp_path):
    cells = (("dpo", 0.2), ("hull", 0.8), ("ipo", 0.8))
    text = report(tmp_path, [outcome(tmp_path, m, rho, noise=np.zeros(1)) for m, rho in cells])
    assert "of 1 prompt at fixed places" in text
    assert "no difference is significant, of 1." in text


def test_figures_of_logged_runs(tmp_path):
    outcomes = [
        log(outcome(tmp_path, m, rho), num_reward_models=3 * (m in ("e-dpo", "hull")))
        for m in ("dpo", "dp-dpo", "e-dpo", "hull")
        for rho in (0.3, 0.8)
    ]
    text = report(tmp_path, outcomes, length_biases=(0.2, 0.5, 0.8))
    assert "Figure B.1 at rho = 0.3" in text
    assert "| rho | method | for each | b = 0.2 | b = 0.5 | b = 0.8 |" in text
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (pair|batch) \|", text, re.M)
    units = (("e-dpo", "pair"), ("e-dpo", "batch"), ("hull", "batch"))
    assert rows == [(rho, *choice) for choice in units for rho in ("0.3", "0.8")]
    assert re.search(r"at \d of 2 rhos other than 0\.5", text)
    for name in ("figure2", "collapse", "ensemble"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(("nearest", "count"), [([0.0, 0.2, 0.8], 1), ([0.8, 0.2, 0.0], 0)])
def test_the_lean_of_the_pairs_by_hand(tmp_path, nearest, count):
    """At rho 0.3 a mean b above 0.5 is on the other side."""
    run = outcome(tmp_path, "e-dpo", 0.3)
    run.policy.path.mkdir()
    record = {"step": 1, "ensemble/nearest": nearest}
    (run.policy.path / "metrics.jsonl").write_text(json.dumps(record))
    text = report(tmp_path, [run], length_biases=(0.2, 0.5, 0.8))
    assert f"at {count} of 1 rhos other than 0.5" in text
    assert f"| 0.3 | e-dpo | pair | {' | '.join(f'{w:.2f}' for w in nearest)} |" in text


def test_collapse_needs_no_log(tmp_path):
    assert "collapse.png)" in report(tmp_path, [outcome(tmp_path, "p-dpo")])


def test_stages_and_samples(tmp_path):
    stages = {"oracle": [{"held-out accuracy": [0.71239, 0.5]}], "labels": [{"pairs": 7}]}
    human = {"prompt 15": "what a *person* wrote"}
    text = report(tmp_path, [outcome(tmp_path, "dpo")], stages, human)
    assert "| oracle | held-out accuracy | 0.7124, 0.5 |" in text
    assert "| labels | pairs | 7 |" in text
    assert "| human | what a \\*person\\* wrote |\n" in text
    assert "| pi\\_ref | ref 15 |" in text or "| pi_ref | ref 15 |" in text
    assert "| dpo | a \\| b\\_15 |\n" in text
    assert re.findall(r"^> (.*)", text, re.M) == [f"prompt {i}" for i in (0, 15, 30, 45)]
    assert "## What the summaries say" not in text and "logit of the oracle" in text


def test_the_run_has_the_findings_of_each_seed(tmp_path):
    stages = {"labels": [{"pairs": 7, "share": 0.25}, {"pairs": 8, "share": 0.5}]}
    text = report(tmp_path, [outcome(tmp_path, "dpo", seed=s) for s in range(2)], stages)
    assert "| stage | finding | of each seed |" in text
    assert "| labels | pairs | 7; 8 |\n| labels | share | 0.25; 0.5 |" in text


# ---- a village, whose summaries can be assessed

PAGE = (
    "It rained all day. Nora lost a key in Oslo. Dan broke Pia's lamp. She took the bus to Lima. "
    "In Paris she met Tom."
)  # Nora's three facts
WHOLE, PART = "Nora lost a key, went to Lima and met Tom.", "Nora met Tom."
WRONG, PADDED = "Nora broke a lamp and met Tom.", "Nora met Tom and met Tom after lunch."


def test_contents_by_hand():
    """WHOLE: three facts, 10 words, reward 3. WRONG: a fact and Dan's deed, 7 words, 0. PADDED: a
    fact, again, and padding, 8 words, 1 - 0.5 - 0.5 = 0. And what is no summary, 2 words: -2 for
    its form and its name."""
    texts = [(PAGE, text) for text in (WHOLE, WRONG, PADDED, "Nobody spoke")]
    assert contents(texts) == pytest.approx(
        {
            "facts": 5 / 4,
            "false": 1 / 4,
            "repeated": 1 / 4,
            "padded": 1 / 4,
            "false_share": 1 / 4,
            "grammatical": 3 / 4,
            "words": 27 / 4,
            "true_reward": 1 / 4,
        }
    )


def villagers(folder, method, samples, rho=0.5, seed=0):
    """One test page with samples of a policy; pi_ref's are PART and PADDED."""
    one = outcome(folder, method, rho, seed, noise=np.zeros(1))
    texts = {"prompt": PAGE, "samples": samples, "reference_samples": [PART, PADDED]}
    return one._replace(rows=[[one.rows[0][0] | texts]])


def test_what_the_summaries_say_by_hand(tmp_path):
    """The means are of all samples, of all seeds: those of dpo state 3, 1, 1 and 1 facts."""
    outcomes = [
        villagers(tmp_path, "dpo", [WHOLE, WRONG]),
        villagers(tmp_path, "dpo", [PART, PART], seed=1),
        villagers(tmp_path, "ipo", [PADDED, PADDED]),
        villagers(tmp_path, "ipo", [PADDED, WHOLE], seed=1),
    ]
    text = report(tmp_path, outcomes, completions={PAGE: WHOLE}, has_truth=True)
    _, section = text.split("## What the summaries say")
    section = section.split("\n## ")[0]
    assert re.findall(r"^\| .*", section, re.M)[2:] == [
        "|  | human | 3.00 | 0.00 | 0.00 | 0 | 0 | 100 | 10.0 | 3.00 |",
        "|  | pi_ref | 1.00 | 0.00 | 0.50 | 0 | 50 | 100 | 5.5 | 0.50 |",
        "| 0.5 | dpo | 1.50 | 0.25 | 0.00 | 25 | 0 | 100 | 5.8 | 1.25 |",
        "| 0.5 | ipo | 1.50 | 0.00 | 0.75 | 0 | 75 | 100 | 8.5 | 0.75 |",
    ]
    assert "The reward is the true one" in text and "oracle" not in text


def test_samples_are_assessed_by_hand(tmp_path):
    """The first sample of the first seed, in the order human, pi_ref, methods."""
    outcomes = [
        villagers(tmp_path, "dpo", [WRONG, WHOLE]),
        villagers(tmp_path, "ipo", [PADDED, WHOLE]),
    ]
    text = report(tmp_path, outcomes, completions={PAGE: WHOLE}, has_truth=True)
    assert (
        "|  | summary | true | false | reward |\n"
        "| --- | --- | --- | --- | --- |\n"
        f"| human | {WHOLE} | 3 of 3 |  | +3.0 |\n"
        f"| pi_ref | {PART} | 1 of 3 |  | +1.0 |\n"
        f"| dpo | {WRONG} | 1 of 3 | broke a lamp | +0.0 |\n"
        f"| ipo | {PADDED} | 1 of 3 |  | +0.0 |\n"
    ) in text


def test_the_figure_has_the_studys_intervals_behind_its_own(tmp_path, monkeypatch):
    """Only at cells that both have, only in a village; a broad pale bar from low to high."""
    study = {(0.5, "dpo"): (1.0, 0.4, 1.6), (0.8, "dpo"): (1.0, 0.9, 1.1)}
    study |= {(0.5, "mean"): (1.0, 0.9, 1.1)}
    monkeypatch.setattr(report_module, "study", lambda: study)
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.name: figure}))

    def broad(has_truth):
        outcomes = [villagers(tmp_path, method, [PART]) for method in ("dpo", "ipo")]
        report(tmp_path, outcomes, {}, {PAGE: PART}, (), has_truth)
        lines = drawn["figure2.png"].axes[0].lines
        return [list(line.get_ydata()) for line in lines if line.get_linewidth() > 5]

    assert broad(True) == [[0.4, 1.6]] and broad(False) == []


# ---- claims


def noisy(mean, noise=(0.0, 0.1, -0.1, 0.05, -0.05)):
    """Five seeds of two prompts. Their means have variance (2 x 0.1^2 + 2 x 0.05^2) / 4 = 1 / 160.

    So the mean's standard error is sqrt(1 / 800), and t = mean x sqrt(800).
    """
    return [np.array([mean + e - 3, mean + e + 3]) for e in noise]


def p_of(mean):
    return 2 * student.sf(abs(mean) * np.sqrt(800), 4)


HALF = student.ppf(0.975, 4) / np.sqrt(800)
ZERO = [np.array([-3.0, 3.0])] * 5
HULL_IS_BEST = Claim("hull is best", ("hull",), ("dpo", "ipo"))


@pytest.mark.parametrize(
    ("dpo", "ipo", "word"),
    [
        (-1.0, -2.0, "confirmed"),
        (-1.0, -0.01, "undecided"),
        (0.01, 0.02, "undecided"),
        (1.0, -1.0, "refuted"),
        (1.0, 0.01, "refuted"),
    ],
)
def test_a_planted_claim_is_confirmed_refuted_or_undecided(dpo, ipo, word):
    """hull is at 0. t is 28 at a difference of 1, and at most 0.57 at one of 0.02."""
    values = {(0.5, "hull"): ZERO, (0.5, "dpo"): noisy(dpo), (0.5, "ipo"): noisy(ipo)}
    [verdict] = verdicts(values, [HULL_IS_BEST])
    assert verdict.word == word and verdict.claim == "hull is best"
    adjusted = sorted((p_of(dpo), p_of(ipo)))
    adjusted = [2 * adjusted[0], max(2 * adjusted[0], adjusted[1])]  # Holm's, of two
    assert [contrast.what for contrast in verdict.contrasts] == ["hull - dpo", "hull - ipo"]
    numbers = [c for contrast in verdict.contrasts for c in contrast[1:4]]
    expected = [m + shift for m in (-dpo, -ipo) for shift in (0, -HALF, HALF)]
    assert numbers == pytest.approx(expected)
    assert sorted(c.p for c in verdict.contrasts) == pytest.approx(np.minimum(adjusted, 1))


def test_p_is_adjusted_over_the_contrasts_of_all_claims():
    """Three contrasts with the same p: Holm multiplies it by three."""
    values = {(0.5, "hull"): ZERO, (0.5, "dpo"): noisy(0.2), (0.5, "ipo"): noisy(0.2)}
    tested = verdicts(values, [HULL_IS_BEST, Claim("dpo improves", ("dpo",), (REFERENCE,))])
    found = [contrast.p for verdict in tested for contrast in verdict.contrasts]
    assert found == pytest.approx([3 * p_of(0.2)] * 3)
    assert [verdict.word for verdict in tested] == ["undecided", "undecided"]  # p is 0.0144
    assert [verdict.word for verdict in verdicts(values, [HULL_IS_BEST])] == ["refuted"]


def test_a_claim_whose_methods_or_rhos_did_not_run_is_not_tested():
    values = {(0.5, "hull"): ZERO, (0.5, "mean"): ZERO}
    elsewhere = Claim("at 0.2", ("hull",), ("mean",), lambda rho: rho < 0.5)
    for claim in (HULL_IS_BEST, elsewhere):
        assert verdicts(values, [claim]) == [Verdict(claim.text, [])]
    assert Verdict("claim", []).word == "not tested"


@pytest.mark.parametrize(("p", "word"), [(0.0099, "confirmed"), (0.0101, "undecided")])
def test_a_verdict_has_the_reports_level(p, word):
    assert Verdict("claim", [Contrast("hull - dpo", 1.0, 0.9, 1.1, p)]).word == word


@pytest.mark.parametrize(
    ("mean", "word"), [(0.0, "confirmed"), (-0.5, "undecided"), (-0.9, "refuted")]
)
def test_a_claim_that_a_difference_is_small(mean, word):
    """hull - dpo is above -0.5: t is 14 at a mean of 0, 0 at -0.5 and -11 at -0.9."""
    values = {(0.5, "hull"): noisy(mean), (0.5, "dpo"): ZERO}
    [verdict] = verdicts(values, [Claim("not far behind", ("hull",), ("dpo",), at_least=-0.5)])
    assert verdict.word == word
    [contrast] = verdict.contrasts
    assert contrast.mean == pytest.approx(mean) and contrast.p == pytest.approx(p_of(mean + 0.5))


def test_methods_without_any_difference_are_undecided():
    values = {(0.5, name): ZERO for name in ("hull", "dpo", "ipo")}
    [verdict] = verdicts(values, [HULL_IS_BEST])
    assert verdict.word == "undecided" and [c.p for c in verdict.contrasts] == [1.0, 1.0]


def test_a_contrast_is_the_mean_over_the_claims_rhos_at_which_both_ran():
    """hull - dpo is 1 at rho 0.2 and 4 at 0.4, so 2.5; 0.8 is not the claim's; dpo did not run at
    0.3. Against pi_ref hull is 1, 2 and 4 at its three rhos."""
    ran = {0.2: 1.0, 0.3: 2.0, 0.4: 4.0, 0.8: 100.0}
    values = {(rho, "hull"): noisy(mean) for rho, mean in ran.items()}
    values |= {(rho, "dpo"): ZERO for rho in ran if rho != 0.3}
    [verdict] = verdicts(values, [Claim("c", ("hull",), ("dpo", REFERENCE), lambda rho: rho < 0.5)])
    assert [c.mean for c in verdict.contrasts] == pytest.approx([2.5, 7 / 3])


def ordered(*methods):
    """Planted values at rhos 0.2, 0.5 and 0.8: each method is better than the next by 1."""
    cells = [(rho, i, name) for rho in (0.2, 0.5, 0.8) for i, name in enumerate(methods)]
    return {(rho, name): noisy(len(methods) - i) for rho, i, name in cells}


def test_the_claims_of_planted_orders():
    """In an order that all claims but (c) and (d) would have, and then in its reverse."""
    order = ("hull", "e-dpo", "mean", "d-dpo", "dp-dpo", "p-dpo", "dpo", "ipo")
    confirmed = [verdict.word for verdict in verdicts(spread(ordered(*order)))]
    assert confirmed == ["confirmed"] * 3 + ["refuted"] * 2 + ["confirmed"] * 3
    reverse = [verdict.word for verdict in verdicts(spread(ordered(*order[::-1])))]
    # each is still above pi_ref, and dpo above p-dpo
    assert reverse == ["confirmed", *["refuted"] * 3, "confirmed", *["refuted"] * 3]


def spread(values):
    """The same with a noise of its own in each cell: differences that are no constants."""
    rng = np.random.default_rng(0)
    return {key: [v + 0.01 * rng.normal() for v in seeds] for key, seeds in values.items()}


ALL_PAIRS = {(a, b) for a in PAPERS for b in PAPERS if a != b}
DISTILLED = {(a, b) for a in ("d-dpo", "dp-dpo", "e-dpo") for b in ("dpo", "ipo")}


@pytest.mark.parametrize(
    ("index", "rhos", "pairs"),
    [
        (0, (0.2, 0.5, 0.6, 0.7, 0.8), {(name, REFERENCE) for name in PAPERS}),
        (1, (0.2, 0.5), DISTILLED),
        (2, (0.2,), {pair for pair in ALL_PAIRS if pair[0] == "e-dpo"}),
        (3, (0.7, 0.8), {pair for pair in ALL_PAIRS if pair[0] == "d-dpo"}),
        (4, (0.2, 0.5, 0.6, 0.7, 0.8), {("dpo", "p-dpo")}),
        (5, (0.2, 0.5, 0.6, 0.7, 0.8), {("hull", "e-dpo")}),
        (6, (0.2, 0.5, 0.6, 0.7, 0.8), {("e-dpo", "mean")}),
        (7, (0.2, 0.5, 0.6, 0.7, 0.8), {("hull", "mean")}),
    ],
)
def test_claims_are_about_their_methods_and_rhos(index, rhos, pairs):
    """Among all eight methods; a method is never compared with itself.

    Values are the powers of 10, one for each rho, times a method's number. The digits of a contrast
    tell which rhos it is the mean of.
    """
    assert PAPERS == ("dpo", "ipo", "d-dpo", "p-dpo", "dp-dpo", "e-dpo")
    numbers = {name: i for i, name in enumerate((REFERENCE, *METHODS))}
    powers = {0.2: 1.0, 0.5: 10.0, 0.6: 100.0, 0.7: 1000.0, 0.8: 10_000.0}
    values = {
        (rho, name): [np.full(2, power * numbers[name])] * 2
        for rho, power in powers.items()
        for name in METHODS
    }
    contrasts = verdicts(values)[index].contrasts
    found = {tuple(c.what.split(" - ")): c.mean for c in contrasts}
    assert found.keys() == pairs and len(contrasts) == len(pairs)
    digits = sum(powers[rho] for rho in rhos) / len(rhos)
    for (method, baseline), mean in found.items():
        assert mean == pytest.approx(digits * (numbers[method] - numbers[baseline]))


def test_the_report_has_the_claims_with_their_contrasts(tmp_path):
    """e-dpo's seeds are above pi_ref by 1.5 and 1.7: 1.6 +- 12.7062 x 0.1."""
    seeds = [
        outcome(tmp_path, method, seed=s, points=((1.0, mean + 0.2 * s),), noise=np.zeros(2))
        for method, mean in (("e-dpo", 1.5), ("mean", 1.5))
        for s in range(2)
    ]
    lines = report(tmp_path, seeds).split("## The paper's claims")[1].splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert rows[0] == f"| {CLAIMS[0].text} | e-dpo - pi_ref +1.600 [+0.329, +2.871] | undecided |"
    assert f"| {CLAIMS[6].text} | e-dpo - mean +0.000 [+0.000, +0.000] | undecided |" in rows
    assert f"| {CLAIMS[5].text} |  | not tested |" in rows
    assert len([row for row in rows if row.startswith(tuple(f"| {c.text}" for c in CLAIMS))]) == 8


def test_the_terminal_table(tmp_path):
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(summaries(planted(tmp_path))))
    assert re.search(r"e-dpo +│ +\+1\.\d{3} ± 0\.\d{3}", console.file.getvalue())


def test_the_terminal_table_by_hand():
    """Half of the interval from -0.5 to 2 is 1.25; a cell that did not run is empty."""
    cells = ((0.2, "dpo", 1.0, -0.5, 2.0, 3), (0.8, "ipo", -1.0, -2.0, 0.0, 3))
    rows = [dict(zip(SUMMARY, cell, strict=True)) for cell in cells]
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(rows))
    printed = console.file.getvalue()
    assert re.search(r"method +┃ +rho 0\.2 ┃ +rho 0\.8", printed)
    assert re.search(r"│ dpo +│ \+1\.000 ± 1\.250 │ +│", printed)
    assert re.search(r"│ ipo +│ +│ -1\.000 ± 1\.000 │", printed)


def test_text_stays_one_line_of_plain_markdown():
    assert escape("a\n b|c `d` <e>") == r"a b\|c \`d\` \<e\>"
    assert (
        prompt_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        == "a\nb"
    )


def test_dodge_keeps_to_its_rho():
    shifts = dodge([0.2, 0.5, 0.6], 8)
    assert sum(shifts) == pytest.approx(0)
    assert 2 * max(shifts) < 0.1
    assert dodge([0.5], 1).tolist() == [0]


def test_reward_models_are_named_by_their_bias_where_known():
    assert reward_model_names((0.2, 0.8), 2) == ["b = 0.2", "b = 0.8"]
    assert reward_model_names((), 2) == ["reward model 1", "reward model 2"]


def test_looks_are_different():
    looks = [look(name) for name in METHODS]
    assert looks[0] == ("DPO", "#E69F00", "o") and looks[5] == ("e-DPO", "#D55E00", "P")
    assert len({one.color for one in looks}) == len({one.marker for one in looks}) == len(METHODS)


def test_a_ninth_method_needs_no_edit(tmp_path, monkeypatch):
    """Its row of `METHODS` puts it into the figures, the report and the table of the terminal."""
    assert choices() == [("e-dpo", "pair"), ("e-dpo", "batch"), ("hull", "batch")]
    monkeypatch.setitem(METHODS, "ninth", METHODS["hull"]._replace(label="Ninth"))
    assert look("ninth").label == "Ninth"
    assert len({look(name)[1:] for name in METHODS}) == 9  # colour and marker
    assert choices()[-1] == ("ninth", "batch")
    drawn = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.update({path.name: figure}))
    outcomes = [log(outcome(tmp_path, name), num_reward_models=2) for name in METHODS]
    text = report(tmp_path, outcomes)
    assert legend_of(drawn["figure2.png"])[-1] == "Ninth"
    assert "Ninth, for each batch" in drawn["ensemble.png"].axes[-1].get_title()
    assert "| 0.5 | ninth | +0." in text and "| 0.5 | ninth | batch |" in text
    assert re.search(r"^\| ninth \| a ", text, re.M)  # its sample
    assert "over all 36 pairs" in text
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(summaries(outcomes)))
    assert re.search(r"mean +│.*\n│ ninth +│", console.file.getvalue())


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_method_in_no_claim_does_no_harm(monkeypatch):
    """All verdicts are as without it, p included."""
    monkeypatch.setitem(METHODS, "ninth", METHODS["hull"])
    values = spread(ordered("e-dpo", "d-dpo", "dpo"))
    others = {(rho, "ninth"): noisy(1.0) for rho in (0.2, 0.5, 0.8)}
    assert verdicts(values | others) == verdicts(values)
    assert all(verdict.word == "not tested" for verdict in verdicts(others))


def test_a_ninth_method_is_a_choice_of_the_command_line():
    """The choices are made at import, so in a process of its own."""
    code = (
        "from minipref.methods import METHODS\n"
        "METHODS['ninth'] = METHODS['hull']\n"
        "from scale.paper.repetition import Repetition\n"
        "from scale.run import parse\n"
        "paper = parse(['--methods', 'dpo', 'ninth'])\n"
        "[policy] = Repetition(paper, 0).policies(0.5, 'ninth')\n"
        "print(paper.methods, parse([]).methods[-1], policy.beta)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"('dpo', 'ninth') ninth {METHODS['hull'].beta}"
