"""The paper's Figures 2, B.1 and B.3, drawn from a run."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minipref.methods import METHODS
from scale.files import atomic
from scale.paper.results import Outcome

WINDOWS = 10


class Look(NamedTuple):
    label: str
    color: str
    marker: str


LOOKS = {  # the colours of Okabe and Ito, told apart by the colour-blind
    "dpo": Look("DPO", "#E69F00", "o"),
    "ipo": Look("IPO", "#56B4E9", "s"),
    "d-dpo": Look("d-DPO", "#009E73", "^"),
    "p-dpo": Look("p-DPO", "#8C8C8C", "v"),
    "dp-dpo": Look("dp-DPO", "#0072B2", "D"),
    "e-dpo": Look("e-DPO", "#D55E00", "P"),
    "hull": Look("hull (ours)", "#CC79A7", "*"),
    "mean": Look("mean (baseline)", "#000000", "X"),
}


COLLAPSE = (("dpo", "p-dpo"), ("d-dpo", "dp-dpo"))


CHOICES = {  # what an ensemble's reward models can be chosen for: a method and its metric
    "e-dpo, of each pair": ("e-dpo", "ensemble/nearest"),
    "e-dpo, of each batch": ("e-dpo", "ensemble/weights"),
    "hull, of each batch": ("hull", "ensemble/weights"),
}


MONITORED = {
    "validation/logps/chosen": "log-prob of chosen (nats)",
    "validation/logps/rejected": "log-prob of rejected (nats)",
    "validation/kl": "forward KL to $\\pi_{ref}$ (nats)",
}


COLLAPSE_RHO = 0.4  # Figure B.1's


Point = tuple[float, float, float]


def save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")


def bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)


def in_order(outcomes: Sequence[Outcome], names: Sequence[str] = tuple(METHODS)) -> list[str]:
    """The methods of `names` that were run."""
    run = {o.policy.method for o in outcomes}
    return [name for name in names if name in run]


def figure2(path: Path, points: dict[tuple[float, str], Point]) -> None:
    """Advantage over length bias, one line a method; `points` are each (rho, method)'s mean, low and high."""
    rhos = sorted({rho for rho, _ in points})
    methods = [name for name in METHODS if any(name == method for _, method in points)]
    figure = Figure(figsize=(7.5, 4.5))
    ax = figure.subplots()
    bare(ax)
    ax.axhline(0, color="0.4", linestyle="--", linewidth=1, label="$\\pi_{ref}$")
    for name, offset in zip(methods, dodge(rhos, len(methods)), strict=True):
        draw_line(ax, name, offset, {rho: points[rho, name] for rho in rhos if (rho, name) in points})
    ax.set(xticks=rhos, xlim=(rhos[0] - gap(rhos) / 3, rhos[-1] + gap(rhos) / 3))
    ax.set(xlabel="length bias ρ of the training pairs", ylabel="oracle reward over $\\pi_{ref}$")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path)


def dodge(rhos: Sequence[float], n: int) -> np.ndarray:
    """Shifts along x that keep n error bars at one rho apart."""
    return (np.arange(n) - (n - 1) / 2) * 0.25 * gap(rhos) / max(n, 1)


def gap(rhos: Sequence[float]) -> float:
    return float(np.diff(rhos).min()) if len(rhos) > 1 else 0.1


def draw_line(ax: Axes, method: str, offset: float, points: dict[float, Point]) -> None:
    look = LOOKS[method]
    mean, low, high = np.array(list(points.values())).T
    ax.errorbar(np.array(list(points)) + offset, mean, np.maximum([mean - low, high - mean], 0), label=look.label,
                color=look.color, marker=look.marker, markersize=6, capsize=2.5, linewidth=1.3, elinewidth=1.1)


def collapse(path: Path, outcomes: Sequence[Outcome]) -> float | None:
    """Figure B.1, pessimistic beside not, at the rho nearest 0.4; returns that rho, None where no such method ran."""
    rows = [names for pair in COLLAPSE if (names := in_order(outcomes, pair))]
    shown = [o for o in outcomes if any(o.policy.method in names for names in rows)]
    if not shown:
        return None
    rho = min(sorted({o.policy.rho for o in shown}), key=lambda r: abs(r - COLLAPSE_RHO))
    figure = Figure(figsize=(13, 2.9 * len(rows)), layout="constrained")
    for axes, names in zip(figure.subplots(len(rows), 4, squeeze=False), rows, strict=True):
        for name in names:
            draw_collapse(axes, name, [o for o in shown if (o.policy.rho, o.policy.method) == (rho, name)])
        axes[0].legend(frameon=False)
    figure.suptitle(f"ρ = {rho:g}")
    save(figure, path)
    return rho


def draw_collapse(axes: np.ndarray, method: str, seeds: Sequence[Outcome]) -> None:
    curves = {label: logged(seeds, key) for key, label in MONITORED.items()}
    curves["advantage on test prompts"] = advantage_curve(seeds)
    look = LOOKS[method]
    for ax, (label, (steps, values)) in zip(axes, curves.items(), strict=True):
        ax.plot(steps, values, color=look.color, marker=look.marker, markersize=5, label=look.label)
        ax.set_title(label, fontsize=10)
        ax.set_xlabel("step")
        bare(ax)


def advantage_curve(seeds: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    means = [[0.0, *(point["advantage"] for point in o.findings)] for o in seeds]
    return np.array([0, *seeds[0].steps] if seeds else []), mean_over_seeds(means)


def logged(seeds: Sequence[Outcome], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, the mean over the seeds; empty where it was not logged."""
    found = [records(o.policy.path / "metrics.jsonl", key) for o in seeds]
    return np.array(list(found[0]) if found else []), mean_over_seeds([list(each.values()) for each in found])


def records(path: Path, key: str) -> dict[int, float | list[float]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["step"]: record[key] for record in map(json.loads, lines) if key in record}


def mean_over_seeds(values: list) -> np.ndarray:
    return np.mean(values, axis=0) if values else np.array([])


def ensemble(path: Path, outcomes: Sequence[Outcome], biases: Sequence[float]) -> bool:
    """Figure B.3: each reward model's share of each choice over training; False where none was logged."""
    weights = ensemble_weights(outcomes)
    if not weights:
        return False
    rhos, choices = sorted({rho for rho, _ in weights}), list(dict.fromkeys(choice for _, choice in weights))
    figure = Figure(figsize=(3 * len(rhos) + 1.4, 2.5 * len(choices)), layout="constrained")
    grid = figure.subplots(len(choices), len(rhos), squeeze=False, sharex=True, sharey=True)
    for ax, (choice, rho) in zip(grid.flat, product(choices, rhos), strict=True):
        ax.set_title(f"{choice}, ρ = {rho:g}", fontsize=10)
        if (rho, choice) in weights:
            draw_weights(ax, *weights[rho, choice])
    figure.supxlabel("step")
    figure.supylabel("weight, mean over a window of steps")
    figure.legend(handles=member_key(biases, max(w.shape[1] for _, w in weights.values())), loc="outside right center",
                  frameon=False)
    save(figure, path)
    return True


def ensemble_weights(outcomes: Sequence[Outcome]) -> dict[tuple[float, str], tuple[np.ndarray, np.ndarray]]:
    """Steps [T] and weights [T, K] of each (rho, choice) that was logged, choice by choice."""
    found = {}
    for (choice, (method, metric)), rho in product(CHOICES.items(), sorted({o.policy.rho for o in outcomes})):
        found[rho, choice] = logged([o for o in outcomes if (o.policy.rho, o.policy.method) == (rho, method)], metric)
    return {key: each for key, each in found.items() if each[0].size}


def draw_weights(ax: Axes, steps: np.ndarray, weights: np.ndarray) -> None:
    """Stacked means over windows of steps."""
    windows = np.array_split(np.arange(len(steps)), min(WINDOWS, len(steps)))
    shares = np.array([weights[w].mean(0) for w in windows]).T
    ax.stackplot([steps[w].mean() for w in windows], shares, colors=shades(len(shares)))
    ax.set(ylim=(0, 1))
    ax.margins(x=0)


def shades(members: int) -> list:
    return list(colormaps["viridis"](np.linspace(0, 1, members)))


def member_key(biases: Sequence[float], members: int) -> list[Patch]:
    """The legend, stacked as the areas are."""
    named = zip(member_names(biases, members), shades(members), strict=True)
    return [Patch(color=shade, label=name) for name, shade in named][::-1]


def member_names(biases: Sequence[float], members: int) -> list[str]:
    """The length biases that the members were trained at; numbers where there are not as many."""
    known = len(biases) == members
    return [f"b = {b:g}" for b in biases] if known else [f"member {i + 1}" for i in range(members)]
