"""The report and its figures: planted differences, hand-made paths, and a ninth method."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from minipref.methods import METHODS
from scale.paper import figures
from scale.paper.comparisons import (
    CLAIMS,
    PAPERS,
    REFERENCE,
    Claim,
    Comparison,
    Evidence,
    at_equal_kl,
    between_methods,
    by_cell,
    evidence,
    final_values,
)
from scale.paper.figures import choices, dodge, look, reward_model_names
from scale.paper.report import escape, prompt_text, terminal_table, write_report
from scale.paper.results import Outcome, Policy

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
    sample = f"a | b_{i}"
    rewards = {"reward": float(2 + advantage), "reference_reward": 2.0}
    return {"prompt": f"prompt {i}", "sample": sample} | rewards


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


def report(out, outcomes, stages=None, completions=None, length_biases=()):
    write_report(out, outcomes, stages or {}, completions or {}, length_biases)
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
    assert "| 0.2 | **dpo** | **+2.000 [" in text and "| 50 / 20 / 30 | 1.00 | 9.0 |" in text


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


def test_equal_kl_is_one_that_every_seed_reaches(tmp_path):
    """dpo's seeds end at KL 1 and 4.5 and pass (0.5, 0.2); ipo's path goes to KL 9, worth 0."""
    seeds = [
        outcome(tmp_path, "dpo", seed=s, points=((0.5, 0.2), (kl, 0.4)), noise=np.zeros(2))
        for s, kl in ((0, 1.0), (1, 4.5))
    ]
    other = outcome(tmp_path, "ipo", points=((0.1, 0.0), (9.0, 0.0)), noise=np.zeros(2))
    [tested] = at_equal_kl(by_cell([*seeds, other]))
    assert tested.difference == pytest.approx((0.4 + 0.2 + 0.2 / 8) / 2)


def test_one_method_at_one_rho(tmp_path):
    text = report(tmp_path, [outcome(tmp_path, "mean")])
    assert "No two methods can be compared at one rho" in text
    assert "One seed." in text
    assert "collapse.png)" not in text and "ensemble.png" not in text and "## The run" not in text
    assert (tmp_path / "figure2.png").read_bytes().startswith(PNG)


def test_two_seeds(tmp_path):
    """Means 1 and 2: Student's interval is 1.5 +- 12.706 x 0.5."""
    seeds = [
        outcome(tmp_path, "dpo", seed=s, points=((1.0, 1.0 + s),), noise=np.zeros(4), beta=0.1 + s)
        for s in range(2)
    ]
    text = report(tmp_path, seeds)
    assert "2 seeds, averaged for each prompt" in text
    assert "| 0.5 | dpo | 2 | +1.500 [-4.853, +7.853] | +1.000, +2.000 |" in text
    assert "| 0.1, 1.1 |" in text


def test_uneven_seeds(tmp_path):
    outcomes = [
        outcome(tmp_path, "dpo"),
        outcome(tmp_path, "dpo", seed=1),
        outcome(tmp_path, "ipo"),
    ]
    assert "| dpo | 2 |" in report(tmp_path, outcomes)


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
    stages = {"oracle": {"held-out accuracy": [0.71239, 0.5]}, "labels": {"pairs": 7}}
    human = {"prompt 15": "what a *person* wrote"}
    text = report(tmp_path, [outcome(tmp_path, "dpo")], stages, human)
    assert "| oracle | held-out accuracy | 0.7124, 0.5 |" in text
    assert "| labels | pairs | 7 |" in text
    assert "| human | what a \\*person\\* wrote |  |" in text
    assert f"| dpo | a \\| b\\_15 | {0.5 + NOISE[15]:+.2f} |" in text
    assert re.findall(r"^> (.*)", text, re.M) == [f"prompt {i}" for i in (0, 15, 30, 45)]


def test_claims_by_hand():
    tested = [
        Comparison(0.2, "dpo", "e-dpo", -1.0, 0.01),
        Comparison(0.5, "e-dpo", "dpo", 0.1, 0.6),
        Comparison(0.8, "dpo", "e-dpo", 1.0, 0.01),
        Comparison(0.2, "dpo", "ipo", 1.0, 0.01),
    ]
    low = Claim("low", ("e-dpo",), ("dpo",), lambda rho: rho <= 0.5)
    assert evidence(low, tested) == ("low", 2, 2, 1, 0)
    assert evidence(Claim("all", ("e-dpo",), ("dpo",)), tested) == ("all", 3, 2, 1, 1)
    assert evidence(Claim("none", ("hull",), ("mean",)), tested) == ("none", 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((0, 0, 0, 0), "not tested"),
        ((2, 2, 2, 0), "yes"),
        ((2, 2, 1, 0), "in part"),
        ((2, 1, 1, 1), "mixed"),
        ((2, 1, 0, 0), "undecided"),
        ((2, 1, 0, 1), "no"),
    ],
)
def test_verdicts(counts, verdict):
    assert Evidence("claim", *counts).verdict == verdict


@pytest.mark.parametrize(
    ("index", "rho", "num_tested"),
    [
        (0, 0.2, 6), (1, 0.5, 6), (1, 0.6, 0), (2, 0.5, 2), (3, 0.2, 5), (3, 0.5, 0), (4, 0.7, 5),
        (4, 0.6, 0), (5, 0.8, 2), (6, 0.2, 3), (7, 0.2, 1), (8, 0.2, 1), (9, 0.2, 1),
    ],
)  # fmt: skip
def test_claims_are_about_their_methods_and_rhos(index, rho, num_tested):
    """Among all eight methods; a method is never compared with itself."""
    methods = [*METHODS, REFERENCE]
    pairs = [(a, b) for i, a in enumerate(methods) for b in methods[i + 1 :]]
    tested = [Comparison(rho, a, b, 0.0, 1.0) for a, b in pairs]
    assert evidence(CLAIMS[index], tested).tested == num_tested


def test_the_terminal_table(tmp_path):
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(planted(tmp_path)))
    assert re.search(r"e-dpo +│ +\+1\.\d{3} ± 0\.\d{3}", console.file.getvalue())


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
    console.print(terminal_table(outcomes))
    assert re.search(r"mean +│.*\n│ ninth +│", console.file.getvalue())


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_method_in_no_claim_does_no_harm(monkeypatch):
    monkeypatch.setitem(METHODS, "ninth", METHODS["hull"])
    tested = [Comparison(0.2, "ninth", name, 1.0, 0.001) for name in PAPERS]
    assert all(evidence(claim, tested).verdict == "not tested" for claim in CLAIMS)


def test_a_ninth_method_is_a_choice_of_the_command_line():
    """The choices are made at import, so in a process of its own."""
    code = (
        "from minipref.methods import METHODS\n"
        "METHODS['ninth'] = METHODS['hull']\n"
        "from scale.run import parse\n"
        "paper = parse(['--methods', 'dpo', 'ninth'])\n"
        "print(paper.methods, parse([]).methods[-1], paper.policies(0.5, 'ninth', 0)[0].beta)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"('dpo', 'ninth') ninth {METHODS['hull'].beta}"
