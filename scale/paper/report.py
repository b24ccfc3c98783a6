"""`report.md`: what a run found. This module computes values; `report.md.jinja` has the words."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from scale.files import atomic
from scale.paper import comparisons, figures
from scale.paper.comparisons import CLAIMS, SIGNIFICANT, Cells, Comparison, Key
from scale.paper.figures import Point
from scale.paper.results import Outcome
from scale.statistics import bootstrap_interval, seed_interval

NUM_PROMPTS = 4


def write_report(
    out: Path,
    outcomes: Sequence[Outcome],
    stages: dict[str, dict[str, Any]],
    completions: dict[str, str],
    length_biases: Sequence[float] = (),
) -> None:
    """Write `report.md` and its figures.

    Args:
        out: The folder to write to.
        outcomes: The outcomes of the selected policies.
        stages: The findings of the stages before them, by name.
        completions: The human's completion of each prompt.
        length_biases: Those of the ensemble's reward models.
    """
    cells = comparisons.by_cell(outcomes)
    points = points_of(cells)
    figures.figure2(out / "figure2.png", points)
    weights = figures.ensemble(out / "ensemble.png", outcomes, length_biases)
    context = {
        "stages": stages,
        "cells": [summary(key, seeds, points) for key, seeds in cells.items()],
        "num_seeds": max(map(len, cells.values())),
        "num_points": len(outcomes[0].steps) + 1,
        "collapse_rho": figures.collapse(out / "collapse.png", outcomes),
        **tests(cells),
        **ensemble(weights, length_biases),
        **samples(cells, completions),
    }
    text = template("report.md.jinja").render(context)
    with atomic(out / "report.md") as temporary:
        temporary.write_text(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", encoding="utf-8")


def template(name: str) -> Any:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = {"g": "{:g}".format, "shown": shown, "cut": cut, "escape": escape, "wins": wins}
    environment.filters |= filters
    return environment.get_template(name)


def points_of(cells: Cells) -> dict[Key, Point]:
    """The final advantage of each cell, with its interval over prompts."""
    return {
        key: (float(values.mean()), *bootstrap_interval(values))
        for key, values in comparisons.final_values(cells).items()
    }


def best_of(points: dict[Key, Point]) -> set[Key]:
    """The best cell of each rho."""
    rhos = {rho for rho, _ in points}
    return {max((k for k in points if k[0] == rho), key=lambda k: points[k][0]) for rho in rhos}


def summary(key: Key, seeds: Sequence[Outcome], points: dict[Key, Point]) -> dict[str, Any]:
    """One method at one rho: its row of the results, and its seeds."""
    names = ("win", "tie", "loss", "kl", "tokens")
    findings = {name: np.mean([o.findings[-1][name] for o in seeds]) for name in names}
    means = np.array([outcome.advantages().mean() for outcome in seeds])
    return findings | {
        "rho": key[0],
        "method": key[1],
        "advantage": points[key],
        "is_best": key in best_of(points),
        "betas": dict.fromkeys(outcome.policy.beta for outcome in seeds),
        "learning_rates": dict.fromkeys(outcome.policy.learning_rate for outcome in seeds),
        "seeds": means,
        "over_seeds": (means.mean(), *seed_interval(means)) if len(seeds) > 1 else None,
    }


def tests(cells: Cells) -> dict[str, Any]:
    """All comparisons, and what they say of the claims."""
    values = comparisons.final_values(cells)
    reference = comparisons.against_reference(values)
    final, equal_kl = comparisons.between_methods(values), comparisons.at_equal_kl(cells)
    return {
        "significant": SIGNIFICANT,
        "reference": reference,
        "final": final,
        "equal_kl": equal_kl,
        "final_claims": [comparisons.evidence(claim, reference + final) for claim in CLAIMS],
        "equal_kl_claims": [comparisons.evidence(claim, equal_kl) for claim in CLAIMS],
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


def samples(cells: Cells, completions: dict[str, str]) -> dict[str, Any]:
    """First samples of each method at the middle rho, for prompts at fixed places."""
    rhos = sorted({rho for rho, _ in cells})
    middle = rhos[len(rhos) // 2]
    rows = {method: seeds[0].rows[-1] for (rho, method), seeds in cells.items() if rho == middle}
    prompts = [prompt_text(row["prompt"]) for row in next(iter(rows.values()))]
    places = sorted({len(prompts) * i // NUM_PROMPTS for i in range(NUM_PROMPTS)})
    shown_samples = [
        (prompts[i], completions.get(prompts[i], ""), {name: rows[name][i] for name in rows})
        for i in places
    ]
    return {"samples_rho": middle, "samples": shown_samples}


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """A prompt as one text: the key of `completions`."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def shown(value: Any) -> str:
    """A finding as text: numbers to four digits, lists and tables on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(item)}" for name, item in value.items())
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def cut(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def escape(text: str) -> str:
    """One line that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """Methods by rhos: the advantage with half the width of its 95% interval, the best one bold."""
    points = points_of(comparisons.by_cell(outcomes))
    rhos = sorted({rho for rho, _ in points})
    title = "oracle reward over pi_ref (± half the 95% interval)"
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
