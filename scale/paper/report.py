"""`report.md`: what a run found. This module computes values; `report.md.jinja` has the words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from scale.console import shown
from scale.data.village import assess, read_page
from scale.files import read_csv
from scale.paper import claims, comparisons, figures
from scale.paper.comparisons import REFERENCE, SIGNIFICANT, Cells, Comparison, Key, summaries
from scale.paper.contents import contents, sampled_texts
from scale.paper.figures import Point
from scale.paper.results import Outcome
from scale.templates import load_template, write_rendered

NUM_PROMPTS = 4
STUDY = Path(__file__).parent / "study.csv"
TEMPLATE = Path(__file__).parent / "report.md.jinja"


def write_report(
    out: Path,
    outcomes: Sequence[Outcome],
    stages: dict[str, list[dict[str, Any]]],
    completions: dict[str, str],
    length_biases: Sequence[float] = (),
    has_truth: bool = False,
) -> None:
    """Write `report.md` and its figures.

    Args:
        out: The folder to write to.
        outcomes: The outcomes of the selected policies.
        stages: For each stage before them, by name, the findings of each seed.
        completions: The human's completion of each prompt of the first seed.
        length_biases: Those of the ensemble's reward models.
        has_truth: Whether prompts are pages of a village, so that samples can be assessed.
    """
    cells = comparisons.by_cell(outcomes)
    rows = summaries(outcomes)
    points = points_of(rows)
    figures.figure2(out / "figure2.png", points, study() if has_truth else {})
    weights = figures.ensemble(out / "ensemble.png", outcomes, length_biases)
    context = {
        "stages": stages,
        "has_truth": has_truth,
        "cells": [result_row(key, seeds, points, has_truth) for key, seeds in cells.items()],
        "reference_contents": reference_contents(cells, completions) if has_truth else {},
        "num_seeds": max(map(len, cells.values())),
        "num_points": len(outcomes[0].steps) + 1,
        "collapse_rho": figures.collapse(out / "collapse.png", outcomes),
        **tests(cells),
        **ensemble(weights, length_biases),
        **samples(cells, completions, has_truth),
    }
    template = load_template(TEMPLATE, g="{:g}".format, shown=shown, wins=wins)
    write_rendered(out / "report.md", template, context)


def study() -> dict[Key, Point]:
    """The points of the study (`python -m benchmarks.study`), which this package carries."""
    return points_of(read_csv(STUDY))


def points_of(rows: Sequence[dict[str, Any]]) -> dict[Key, Point]:
    """The advantage of each cell, with its interval, from the rows of a `summary.csv`."""
    return {
        (float(row["rho"]), row["method"]): (
            float(row["advantage"]), float(row["low"]), float(row["high"])
        )
        for row in rows
    }  # fmt: skip


def best_of(points: dict[Key, Point]) -> set[Key]:
    """The best cell of each rho."""
    rhos = {rho for rho, _ in points}
    return {max((k for k in points if k[0] == rho), key=lambda k: points[k][0]) for rho in rhos}


def result_row(
    key: Key, seeds: Sequence[Outcome], points: dict[Key, Point], has_truth: bool
) -> dict[str, Any]:
    """One method at one rho: its row of the results."""
    names = ("win", "tie", "loss", "kl", "tokens")
    findings = {name: np.mean([o.findings[-1][name] for o in seeds]) for name in names}
    return findings | {
        "rho": key[0],
        "method": key[1],
        "advantage": points[key],
        "is_best": key in best_of(points),
        "betas": dict.fromkeys(outcome.policy.beta for outcome in seeds),
        "learning_rates": dict.fromkeys(outcome.policy.learning_rate for outcome in seeds),
        "seeds": [outcome.advantages().mean() for outcome in seeds],
        "contents": contents(sampled_texts(last_rows(seeds))) if has_truth else {},
    }


def last_rows(seeds: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The rows of all seeds at the end of training."""
    return [row for outcome in seeds for row in outcome.rows[-1]]


def reference_contents(cells: Cells, completions: dict[str, str]) -> dict[str, dict[str, float]]:
    """What the humans of the first seed and pi_ref write of the test pages."""
    rows = last_rows(next(iter(cells.values())))
    prompts = [row["prompt"] for row in rows if row["prompt"] in completions]
    human = [(prompt, completions[prompt]) for prompt in prompts]
    return {
        "human": contents(human),
        REFERENCE: contents(sampled_texts(rows, "reference_samples")),
    }


def tests(cells: Cells) -> dict[str, Any]:
    """All comparisons, and what they say of the claims."""
    values = comparisons.final_values(cells)
    return {
        "significant": SIGNIFICANT,
        "reference": comparisons.against_reference(values),
        "final": comparisons.between_methods(values),
        "equal_kl": comparisons.at_equal_kl(cells),
        "verdicts": claims.verdicts(values),
    }


def wins(tested: Sequence[Comparison]) -> dict[Key, list[Comparison]]:
    """What each method is significantly better than, rho by rho."""
    real = [c.oriented() for c in tested if c.significant]
    winners: dict[Key, list[Comparison]] = {}
    for comparison in sorted(real, key=lambda c: c.rho):
        winners.setdefault((comparison.rho, comparison.method), []).append(comparison)
    return winners


def ensemble(weights: figures.Weights, length_biases: Sequence[float]) -> dict[str, Any]:
    """The mean weights of the reward models, and at which rhos the pairs' lean against rho."""
    num_reward_models = max(map(len, weights.values()), default=0)
    biases = np.array(length_biases)
    opposite = [
        (rho - 0.5) * (values @ biases - biases.mean()) < 0
        for (rho, choice), values in weights.items()
        if choice == figures.choices()[0] and rho != 0.5 and len(values) == len(biases)
    ]
    names = figures.reward_model_names(length_biases, num_reward_models)
    return {"weights": weights, "reward_models": names, "opposite": opposite}


def samples(cells: Cells, completions: dict[str, str], has_truth: bool) -> dict[str, Any]:
    """First samples of each method at the middle rho, for prompts at fixed places."""
    rhos = sorted({rho for rho, _ in cells})
    middle = rhos[len(rhos) // 2]
    rows = {method: seeds[0].rows[-1] for (rho, method), seeds in cells.items() if rho == middle}
    some = next(iter(rows.values()))
    places = sorted({len(some) * i // NUM_PROMPTS for i in range(NUM_PROMPTS)})
    shown_samples = []
    for i in places:
        prompt = prompt_text(some[i]["prompt"])
        texts = {"human": completions.get(prompt, ""), REFERENCE: some[i]["reference_samples"][0]}
        texts |= {method: rows[method][i]["samples"][0] for method in rows}
        assessed = {n: assess(read_page(prompt), t) for n, t in texts.items() if has_truth}
        facts = len(read_page(prompt).facts) if has_truth else 0
        shown_samples.append(
            {"prompt": prompt, "texts": texts, "assessed": assessed, "num_facts": facts}
        )
    return {"samples_rho": middle, "samples": shown_samples}


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as one text: the key of `completions`."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def terminal_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Methods by rhos, from the rows of `summary.csv`: the advantage and half its 95% interval."""
    points = points_of(rows)
    rhos = sorted({rho for rho, _ in points})
    title = "reward over pi_ref (± half the 95% interval over seeds and prompts)"
    table = Table("method", title=title, title_justify="left")
    for rho in rhos:
        table.add_column(f"rho {rho:g}", justify="right")
    texts = {
        key: f"{mean:+.3f} ± {(high - low) / 2:.3f}" for key, (mean, low, high) in points.items()
    }
    texts |= {key: f"[bold]{texts[key]}[/]" for key in best_of(points)}
    for method in figures.in_order([method for _, method in points]):
        table.add_row(method, *(texts.get((rho, method), "") for rho in rhos))
    return table
