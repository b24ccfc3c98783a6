import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from scale.paper.figures import dodge, member_names
from scale.paper.report import (
    Claim,
    Comparison,
    at_equal_kl,
    by_cell,
    claim_row,
    compare,
    escape,
    final,
    pairwise,
    prompt_text,
    terminal_table,
    verdict,
    write_report,
)
from scale.paper.results import Outcome, Policy

N = 60
PNG = b"\x89PNG"
NOISE = np.random.default_rng(0).normal(size=N)


def outcome(folder, method, rho=0.5, seed=0, *, points=((1.0, 0.5),), noise=NOISE, beta=0.3):
    """A policy whose advantage at each point (KL, mean) is mean + noise."""
    policy = Policy(folder / f"{method}-{rho}-{seed}", rho, method, beta, 0.003, seed)
    rows = [[row(i, mean + noise[i]) for i in range(len(noise))] for _, mean in points]
    shares = {"win": 0.5, "tie": 0.2, "loss": 0.3}
    findings = [
        {"advantage": mean, "low": mean, "high": mean, **shares, "kl": kl, "tokens": 9.0}
        for kl, mean in points
    ]
    return Outcome(policy, [10 * (i + 1) for i in range(len(points))], rows, findings)


def row(i, advantage):
    return {
        "prompt": f"prompt {i}",
        "sample": f"a | b_{i}",
        "reward": float(2 + advantage),
        "reference_reward": 2.0,
    }


def log(outcome, steps=40, num_reward_models=0):
    """A training log: held-out values every 20 steps, and one-hot weights of a random model."""
    rng = np.random.default_rng(0)
    path = outcome.policy.path / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    held_out = {"logps/chosen": -20.0, "logps/rejected": -22.0, "kl": 0.1}
    validation = {f"validation/{name}": value for name, value in held_out.items()}
    records = [{"step": s} | (validation if s % 20 == 0 else {}) for s in range(steps + 1)]
    n = num_reward_models
    for record in records[1:] if n else []:
        record["ensemble/weights"] = np.eye(n)[rng.integers(n)].tolist()
        record["ensemble/nearest"] = rng.dirichlet(np.ones(n)).tolist()
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return outcome


def report(out, outcomes, facts=None, human=None):
    write_report(out, outcomes, facts or {}, human or {})
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
    comparisons = {(c.a, c.b): c for c in compare(final(by_cell(planted(tmp_path))))}
    significant = {pair for pair, c in comparisons.items() if c.significant}
    assert significant == {("dpo", "e-dpo"), ("ipo", "e-dpo")}
    assert comparisons["dpo", "e-dpo"].difference == pytest.approx(-1, abs=0.05)


def test_the_report_lists_the_planted_difference_alone(tmp_path):
    text = report(tmp_path, planted(tmp_path))
    assert "2 of 3 differences are significant, 1 not" in text
    won = (
        r"^\| 0\.5 \| ([\w-]+) \| dpo \+(?:0\.9|1\.0)\d+ \(< 0\.001\), "
        r"ipo \+\S+ \(< 0\.001\) \|$"
    )
    assert re.findall(won, text, re.M) == ["e-dpo", "e-dpo"]  # at the end, and at equal KL
    assert not re.search(r"\| ipo \| dpo|\| dpo \| ipo", text)
    assert "**e-dpo**" in text and "**dpo**" not in text


def test_no_significant_difference_is_said(tmp_path):
    same = [outcome(tmp_path, "dpo"), outcome(tmp_path, "ipo")]
    assert "no difference is significant, of 1." in report(tmp_path, same)


def test_methods_are_compared_within_a_rho_and_adjusted_over_all(tmp_path):
    outcomes = [outcome(tmp_path, m, rho) for m in ("dpo", "ipo", "mean") for rho in (0.2, 0.8)]
    comparisons = compare(final(by_cell(outcomes)))
    pairs = ("dpo", "ipo"), ("dpo", "mean"), ("ipo", "mean")
    expected = [(rho, *pair) for rho in (0.2, 0.8) for pair in pairs]
    assert [(c.rho, c.a, c.b) for c in comparisons] == expected
    assert "over all 6 pairs" in pairwise(comparisons)


def test_equal_kl_by_hand(tmp_path):
    """ipo ends at KL 1, advantage 0.2; dpo reaches it halfway from (0.5, 0.3) to (1.5, 0.9); e-dpo
    starts beyond."""
    outcomes = [
        outcome(tmp_path, "dpo", points=((0.5, 0.3), (1.5, 0.9)), noise=np.array([1.0, -1.0])),
        outcome(tmp_path, "ipo", points=((0.5, 0.3), (1.0, 0.2)), noise=np.array([0.0, 0.0])),
        outcome(tmp_path, "e-dpo", points=((1.6, 5.0), (2.0, 9.0)), noise=np.array([0.0, 0.0])),
    ]
    [comparison] = at_equal_kl(by_cell(outcomes))
    assert (comparison.a, comparison.b) == ("dpo", "ipo")
    assert comparison.difference == pytest.approx(0.6 - 0.2)
    assert "1 of 3 pairs remain" in report(tmp_path, outcomes)


def test_equal_kl_is_one_that_every_seed_reaches(tmp_path):
    """dpo's seeds end at KL 1 and 4.5 and pass (0.5, 0.2); ipo's path is known to KL 9 and worth
    nothing."""
    seeds = [
        outcome(tmp_path, "dpo", seed=s, points=((0.5, 0.2), (kl, 0.4)), noise=np.zeros(2))
        for s, kl in ((0, 1.0), (1, 4.5))
    ]
    other = outcome(tmp_path, "ipo", points=((0.1, 0.0), (9.0, 0.0)), noise=np.zeros(2))
    [comparison] = at_equal_kl(by_cell([*seeds, other]))
    assert comparison.difference == pytest.approx((0.4 + 0.2 + 0.2 / 8) / 2)


def test_one_method_at_one_rho(tmp_path):
    text = report(tmp_path, [outcome(tmp_path, "mean")])
    assert "No two methods can be compared at one rho" in text
    assert "One seed." in text
    for absent in ("collapse.png)", "ensemble.png", "## The run"):
        assert absent not in text
    assert (tmp_path / "figure2.png").read_bytes().startswith(PNG)


def test_two_seeds(tmp_path):
    seeds = [
        outcome(tmp_path, "dpo", seed=s, points=((1.0, 1.0 + s),), noise=np.zeros(4), beta=0.1 + s)
        for s in range(2)
    ]
    text = report(tmp_path, seeds)
    assert "2 seeds, averaged for each prompt" in text
    assert "| 0.5 | dpo | 2 | +1.500 [-4.853, +7.853] | +1.000, +2.000 |" in text
    assert "| 0.1, 1.1 |" in text


def test_uneven_seeds(tmp_path):
    outcomes = [outcome(tmp_path, "dpo", seed=seed) for seed in (0, 1)]
    outcomes.append(outcome(tmp_path, "ipo"))
    assert "| dpo | 2 |" in report(tmp_path, outcomes)


def test_one_prompt_and_methods_that_differ_between_rhos(tmp_path):
    cells = ("dpo", 0.2), ("hull", 0.8), ("ipo", 0.8)
    outcomes = [outcome(tmp_path, method, rho, noise=np.zeros(1)) for method, rho in cells]
    text = report(tmp_path, outcomes)
    assert "of 1 prompt at fixed places" in text
    assert "no difference is significant, of 1." in text


def test_figures_of_logged_runs(tmp_path):
    outcomes = [
        log(outcome(tmp_path, method, rho), num_reward_models=num_reward_models)
        for method, num_reward_models in (("dpo", 0), ("dp-dpo", 0), ("e-dpo", 3), ("hull", 3))
        for rho in (0.3, 0.8)
    ]
    text = report(tmp_path, outcomes, {"biases": (0.2, 0.5, 0.8)})
    assert "Figure B.1 at rho = 0.3" in text
    assert "| rho | choice | b = 0.2 | b = 0.5 | b = 0.8 |" in text
    assert re.search(r"at \d of 2 rhos other than 0\.5", text)
    for name in ("figure2", "collapse", "ensemble"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)


def test_collapse_needs_no_log(tmp_path):
    assert "collapse.png)" in report(tmp_path, [outcome(tmp_path, "p-dpo")])


def test_facts_and_samples(tmp_path):
    oracle = {"held-out accuracy": [0.71239, 0.5]}
    facts = {"oracle": oracle, "labels": {"pairs": 7}, "biases": (0.2,)}
    human = {"prompt 15": "what a *person* wrote"}
    text = report(tmp_path, [outcome(tmp_path, "dpo")], facts, human)
    assert "| oracle | held-out accuracy | 0.7124, 0.5 |" in text
    assert "| labels | pairs | 7 |" in text
    assert "| human | what a \\*person\\* wrote |  |" in text
    assert f"| dpo | a \\| b\\_15 | {0.5 + NOISE[15]:+.2f} |" in text
    assert re.findall(r"^> (.*)", text, re.M) == [f"prompt {i}" for i in (0, 15, 30, 45)]


def test_claims_by_hand():
    comparisons = [
        Comparison(0.2, "dpo", "e-dpo", -1.0, 0.01),
        Comparison(0.5, "e-dpo", "dpo", 0.1, 0.6),
        Comparison(0.8, "dpo", "e-dpo", 1.0, 0.01),
        Comparison(0.2, "dpo", "ipo", 1.0, 0.01),
    ]
    low = Claim("low", ("e-dpo",), ("dpo",), lambda rho: rho <= 0.5)
    whole, untested = Claim("all", ("e-dpo",), ("dpo",)), Claim("none", ("hull",), ("mean",))
    assert claim_row(low, comparisons) == ["low", "2", "2", "1", "0", "in part"]
    assert claim_row(whole, comparisons) == ["all", "3", "2", "1", "1", "mixed"]
    assert claim_row(untested, comparisons) == ["none", "0", "0", "0", "0", "not tested"]


@pytest.mark.parametrize(
    ("counts", "expected"), [((2, 2, 0), "yes"), ((2, 0, 0), "undecided"), ((2, 0, 1), "no")]
)
def test_verdicts(counts, expected):
    assert verdict(*counts) == expected


def test_the_terminal_table(tmp_path):
    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(planted(tmp_path)))
    assert re.search(r"e-dpo +│ +\+1\.\d{3} ± 0\.\d{3}", console.file.getvalue())


def test_text_stays_one_line_of_plain_markdown():
    assert escape("a\n b|c `d` <e>") == r"a b\|c \`d\` \<e\>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_text(turns) == "a\nb"


def test_dodge_keeps_to_its_rho():
    shifts = dodge([0.2, 0.5, 0.6], 8)
    assert sum(shifts) == pytest.approx(0)
    assert 2 * max(shifts) < 0.1
    assert dodge([0.5], 1).tolist() == [0]


def test_members_are_named_by_their_bias_where_known():
    assert member_names((0.2, 0.8), 2) == ["b = 0.2", "b = 0.8"]
    assert member_names((), 2) == ["member 1", "member 2"]
