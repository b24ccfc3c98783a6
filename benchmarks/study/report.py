"""`results/study.md`: what the seeds say, from the rows of `results/study.csv` alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import describe
from minipref.methods import METHODS
from scale.files import atomic, write_csv
from scale.paper import claims, figures
from scale.paper.comparisons import SIGNIFICANT, SUMMARY, Seeds, Values, minus, summary
from scale.paper.pipeline import PRESETS
from scale.paper.report import STUDY, points_of
from scale.paper.templates import load_template
from scale.statistics import interval, p_value, seed_means

FIGURE = "study.png"
TEMPLATE = Path(__file__).parent / "study.md.jinja"
CONTENTS = ("facts", "false", "repeated", "padded", "words", "true_reward")
HELD_OUT = ("chosen_logps", "rejected_logps", "forward_kl", "implicit_accuracy")

Row = dict[str, Any]


class Effect(NamedTuple):
    """The mean of a difference over seeds, its 95% interval, and the p that it is 0."""

    what: str
    mean: float
    low: float
    high: float
    p: float


def write_report(out: Path, rows: Sequence[Row]) -> None:
    """Write `study.md`, its figure, and the summary that the package carries.

    Args:
        out: The folder.
        rows: Those of `study.csv`.
    """
    values = column(rows, "advantage")
    rows_of_summary = [summary(*cell) for cell in values.items()]
    write_csv(STUDY, SUMMARY, rows_of_summary)
    points = points_of(rows_of_summary)
    figures.figure2(out / FIGURE, points, behind={})
    context = {
        "machine": describe(),
        "num_seeds": len({row["seed"] for row in rows}),
        "significant": SIGNIFICANT,
        "rhos": sorted({rho for rho, _ in values}),
        "methods": figures.in_order([method for _, method in values]),
        "points": points,
        "verdicts": claims.verdicts(values),
        "collapse": collapse(rows),
        "nearest": nearest(rows),
        "contents": {name: means(rows, name) for name in CONTENTS},
        "held_out": {name: means(rows, name) for name in (*HELD_OUT, "kl")},
        "accuracies": means(rows, "reward_accuracy"),
    }
    text = load_template(TEMPLATE).render(context)
    with atomic(out / "study.md") as temporary:
        temporary.write_text(text.strip() + "\n", encoding="utf-8")


def column(rows: Sequence[Row], name: str) -> Values:
    """A column of each (rho, method): one value for each seed, in the order of `METHODS`."""
    order = list(METHODS)
    cells: Values = {}
    for row in sorted(rows, key=lambda row: (float(row["rho"]), order.index(row["method"]))):
        numbers = np.array(row[name].split(), float) if row[name] else np.array([])
        if numbers.size:
            cells.setdefault((float(row["rho"]), row["method"]), []).append(numbers)
    return cells


def means(rows: Sequence[Row], name: str) -> dict[tuple[float, str], float]:
    """The mean over seeds; of a column of several numbers, over those too."""
    return {key: float(seed_means(seeds).mean()) for key, seeds in column(rows, name).items()}


def effect(what: str, differences: Seeds) -> Effect:
    mean = float(seed_means(differences).mean())
    return Effect(what, mean, *interval(differences), p_value(differences))


def collapse(rows: Sequence[Row]) -> list[Effect]:
    """What the KL term changes on held-out pairs, the mean over all rhos (Figure B.1)."""
    effects = []
    for name in ("chosen_logps", "rejected_logps", "forward_kl"):
        values = column(rows, name)
        rhos = sorted({rho for rho, _ in values})
        for without, with_kl in figures.COLLAPSE:
            both = (claims.over_rhos(values, rhos, method) for method in (with_kl, without))
            effects.append(effect(f"{name}: {with_kl} - {without}", minus(*both)))
    return effects


def nearest(rows: Sequence[Row]) -> dict[float, tuple[np.ndarray, Effect]]:
    """For each rho the shares of e-dpo's pairs nearest to each model, and their mean bias - .5."""
    biases = np.array(PRESETS["miniature"].length_biases)
    shares_and_lean = {}
    for (rho, method), seeds in column(rows, "nearest").items():
        if method == "e-dpo":
            leans = [np.array([shares @ biases - 0.5]) for shares in seeds]
            shares_and_lean[rho] = np.mean(seeds, axis=0), effect("mean bias", leans)
    return shares_and_lean
