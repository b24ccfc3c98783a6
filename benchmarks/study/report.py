"""`results/study.md`: what the seeds say, from the rows of `results/study.csv` alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.machine import describe
from minipref.methods import METHODS
from scale.files import atomic, write_csv
from scale.paper import claims, figures
from scale.paper.comparisons import SIGNIFICANT, Seeds, Values
from scale.paper.results import SUMMARY
from scale.statistics import interval, p_value, seed_means

FIGURE = "study.png"
PACKAGED = Path(__file__).parents[2] / "scale/paper/study.csv"
"""What the figure of the default run shows behind its points."""
CONTENTS = ("facts", "false", "repeated", "padded", "words", "true_reward")
HELD_OUT = ("chosen_logps", "rejected_logps", "forward_kl", "implicit_accuracy")
COLLAPSE = (("p-dpo", "dpo"), ("dp-dpo", "d-dpo"))  # Figure B.1: with and without the KL term
BIASES = np.array([0.2, 0.4, 0.5, 0.6, 0.8])

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
    summary = [summary_row(key, seeds) for key, seeds in values.items()]
    write_csv(PACKAGED, SUMMARY, summary)
    points = {(row["rho"], row["method"]): tuple(row[n] for n in SUMMARY[2:5]) for row in summary}
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
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    with atomic(out / "study.md") as temporary:
        text = environment.get_template("study.md.jinja").render(context)
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


def summary_row(key: tuple[float, str], seeds: Seeds) -> Row:
    """A row of `summary.csv`."""
    values = (float(seed_means(seeds).mean()), *interval(seeds))
    row = (*key, *(round(value, 4) for value in values), len(seeds))
    return dict(zip(SUMMARY, row, strict=True))


def effect(what: str, differences: Seeds) -> Effect:
    mean = float(seed_means(differences).mean())
    return Effect(what, mean, *interval(differences), p_value(differences))


def collapse(rows: Sequence[Row]) -> list[Effect]:
    """What the KL term changes on held-out pairs, the mean over all rhos (Figure B.1)."""
    return [
        effect(f"{name}: {with_kl} - {without}", over_rhos(column(rows, name), with_kl, without))
        for name in ("chosen_logps", "rejected_logps", "forward_kl")
        for with_kl, without in COLLAPSE
    ]


def over_rhos(values: Values, method: str, baseline: str) -> Seeds:
    """For each seed the difference of two methods, the mean over all rhos."""
    rhos = sorted({rho for rho, _ in values})
    cells = [(values[rho, method], values[rho, baseline]) for rho in rhos]
    return [
        np.mean([ours[s] - theirs[s] for ours, theirs in cells], axis=0)
        for s in range(len(cells[0][0]))
    ]


def nearest(rows: Sequence[Row]) -> dict[float, tuple[np.ndarray, Effect]]:
    """For each rho the shares of e-dpo's pairs nearest to each model, and their mean bias - .5."""
    cells = column(rows, "nearest")
    found = {}
    for (rho, method), seeds in cells.items():
        if method == "e-dpo":
            leans = [np.array([shares @ BIASES - 0.5]) for shares in seeds]
            found[rho] = np.mean(seeds, axis=0), effect("mean bias", leans)
    return found
