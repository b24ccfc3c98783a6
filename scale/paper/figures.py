"""The paper's Figures 2, B.1 and B.3, drawn from a run.

A method's label is that of its row in `METHODS`; its colour and marker follow from its place there.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minipref.methods import METHODS, mean_weights
from scale.files import atomic
from scale.paper.results import Outcome
from scale.train.metrics import records

# Okabe and Ito's palette, which colour-blind readers tell apart, with grey for their yellow
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#8C8C8C", "#0072B2", "#D55E00", "#CC79A7", "#000000")
MARKERS = "os^vDP*X"
COLLAPSE = (("dpo", "p-dpo"), ("d-dpo", "dp-dpo"))  # Figure B.1: without and with the KL term
COLLAPSE_RHO = 0.4  # Figure B.1's
MONITORED = {
    "validation/logps/chosen": "log-prob. of chosen (nats)",
    "validation/logps/rejected": "log-prob. of rejected (nats)",
    "validation/kl": "forward KL to $\\pi_{ref}$ (nats)",
}
METRICS = {"pair": "ensemble/nearest", "batch": "ensemble/weights"}
WINDOWS = 10

Point = tuple[float, float, float]  # mean, low and high
Choice = tuple[str, str]  # a method, and whether it weights reward models for a pair or a batch
Curve = tuple[np.ndarray, np.ndarray]  # steps [T] and values [T, ...]
Weights = dict[tuple[float, Choice], np.ndarray]


class Look(NamedTuple):
    """How figures show a method."""

    label: str
    color: str
    marker: str


def look(method: str) -> Look:
    """The look of a row of `METHODS`: the first eight differ in colour and in marker."""
    i = list(METHODS).index(method)
    marker = MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]
    return Look(METHODS[method].label, PALETTE[i % len(PALETTE)], marker)


def in_order(names: Sequence[str]) -> list[str]:
    """Methods without repetition, in the order of `METHODS`."""
    return [name for name in METHODS if name in names]


def save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight")


def bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25, linewidth=0.6)


def figure2(
    path: Path, points: dict[tuple[float, str], Point], behind: dict[tuple[float, str], Point]
) -> None:
    """Draw Figure 2: the advantage over the length bias, one line a method.

    The intervals `behind` are those of another run with more seeds: broad pale bars.
    """
    rhos = sorted({rho for rho, _ in points})
    methods = in_order([method for _, method in points])
    figure = Figure(figsize=(8, 4.8))
    ax = figure.subplots()
    bare(ax)
    ax.axhline(0, color="0.4", linestyle="--", linewidth=1, label="$\\pi_{ref}$")
    for method, offset in zip(methods, dodge(rhos, len(methods)), strict=True):
        line = {rho: points[rho, method] for rho in rhos if (rho, method) in points}
        draw_line(ax, method, offset, line)
        for rho in line.keys() & {rho for rho, name in behind if name == method}:
            _, low, high = behind[rho, method]
            color = look(method).color
            ax.plot([rho + offset] * 2, [low, high], color=color, alpha=0.25, linewidth=7)
    ax.set(xticks=rhos, xlim=(rhos[0] - gap(rhos) / 3, rhos[-1] + gap(rhos) / 3))
    ax.set(xlabel="length bias ρ of the training pairs", ylabel="reward over $\\pi_{ref}$")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path)


def dodge(rhos: Sequence[float], n: int) -> np.ndarray:
    """Shifts along x that keep n error bars at one rho apart."""
    return (np.arange(n) - (n - 1) / 2) * 0.36 * gap(rhos) / max(n, 1)


def gap(rhos: Sequence[float]) -> float:
    return float(np.diff(rhos).min()) if len(rhos) > 1 else 0.1


def draw_line(ax: Axes, method: str, offset: float, points: dict[float, Point]) -> None:
    label, color, marker = look(method)
    mean, low, high = np.array(list(points.values())).T
    errors = np.maximum([mean - low, high - mean], 0)
    x = np.array(list(points)) + offset
    ax.errorbar(
        x, mean, errors, fmt=f"{marker}-", color=color, label=label, markersize=6, capsize=2.5,
        linewidth=1.3, elinewidth=1.1,
    )  # fmt: skip


def collapse(path: Path, outcomes: Sequence[Outcome]) -> float | None:
    """Draw Figure B.1, methods with and without the KL term, at the rho nearest 0.4.

    Returns:
        That rho; None where none of the methods ran.
    """
    rhos = {o.policy.rho for o in outcomes if any(o.policy.method in row for row in COLLAPSE)}
    if not rhos:
        return None
    rho = min(sorted(rhos), key=lambda other: abs(other - COLLAPSE_RHO))
    seeds = {method: seeds_of(outcomes, rho, method) for row in COLLAPSE for method in row}
    rows = [row for row in COLLAPSE if any(seeds[method] for method in row)]
    figure = Figure(figsize=(14, 2.9 * len(rows)), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), 4, squeeze=False), rows, strict=True):
        for method in row:
            draw_collapse(axes, method, seeds[method])
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.suptitle(f"ρ = {rho:g}")
    save(figure, path)
    return rho


def seeds_of(outcomes: Sequence[Outcome], rho: float, method: str) -> list[Outcome]:
    return [o for o in outcomes if (o.policy.rho, o.policy.method) == (rho, method)]


def draw_collapse(axes: np.ndarray, method: str, seeds: Sequence[Outcome]) -> None:
    if not seeds:
        return
    label, color, marker = look(method)
    curves = {title: logged(seeds, metric) for metric, title in MONITORED.items()}
    advantages = np.mean([[f["advantage"] for f in o.findings] for o in seeds], axis=0)
    steps = np.array([0, *seeds[0].steps])
    curves["advantage on test prompts"] = (steps, np.array([0.0, *advantages]))
    for ax, (title, (steps, values)) in zip(axes, curves.items(), strict=True):
        every = max(1, len(steps) // 12)
        ax.plot(steps, values, f"{marker}-", color=color, markevery=every, ms=5, label=label)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step")
        bare(ax)


def logged(seeds: Sequence[Outcome], metric: str) -> Curve:
    """A metric, the mean over the seeds; empty where it was not logged."""
    logs = [records(outcome.policy.path / "metrics.jsonl", metric) for outcome in seeds]
    if not logs:
        return np.array([]), np.array([])
    return np.array(list(logs[0])), np.mean([list(log.values()) for log in logs], axis=0)


def ensemble(path: Path, outcomes: Sequence[Outcome], length_biases: Sequence[float]) -> Weights:
    """Draw Figure B.3, the weight of each reward model over training, where weights were logged.

    Returns:
        The mean weights [K] of each rho and choice.
    """
    curves = weight_curves(outcomes)
    if not curves:
        return {}
    rhos = sorted({rho for rho, _ in curves})
    chosen = list(dict.fromkeys(choice for _, choice in curves))
    size = (3 * len(rhos) + 1.4, 2.5 * len(chosen))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(chosen), len(rhos), squeeze=False, sharex=True, sharey=True)
    for ax, (choice, rho) in zip(grid.flat, product(chosen, rhos), strict=True):
        method, unit = choice
        ax.set_title(f"{METHODS[method].label}, for each {unit}, ρ = {rho:g}", fontsize=10)
        if (rho, choice) in curves:
            draw_weights(ax, *curves[rho, choice])
    figure.supxlabel("step")
    figure.supylabel("weight, mean over a window of steps")
    entries = legend(length_biases, max(values.shape[1] for _, values in curves.values()))
    figure.legend(handles=entries, loc="outside right center", frameon=False)
    save(figure, path)
    return {key: values.mean(0) for key, (_, values) in curves.items()}


def choices() -> list[Choice]:
    """The paper's choice, then that of each ensemble method whose weights are not fixed."""
    ensembles = [name for name, row in METHODS.items() if row.rewards == "ensemble"]
    chosen = [(name, "batch") for name in ensembles if METHODS[name].weights is not mean_weights]
    return [("e-dpo", "pair"), *chosen]


def weight_curves(outcomes: Sequence[Outcome]) -> dict[tuple[float, Choice], Curve]:
    """Weights [T, K] of each rho and choice that was logged, choice by choice."""
    rhos = sorted({outcome.policy.rho for outcome in outcomes})
    curves = {
        (rho, (method, unit)): logged(seeds_of(outcomes, rho, method), METRICS[unit])
        for (method, unit), rho in product(choices(), rhos)
    }
    return {key: (steps, values) for key, (steps, values) in curves.items() if steps.size}


def draw_weights(ax: Axes, steps: np.ndarray, weights: np.ndarray) -> None:
    """Stacked means over windows of steps."""
    windows = np.array_split(np.arange(len(steps)), min(WINDOWS, len(steps)))
    means = np.array([weights[window].mean(0) for window in windows]).T
    ax.stackplot([steps[window].mean() for window in windows], means, colors=shades(len(means)))
    ax.set(ylim=(0, 1))
    ax.margins(x=0)


def shades(n: int) -> list:
    return list(colormaps["viridis"](np.linspace(0, 1, n)))


def legend(length_biases: Sequence[float], num_reward_models: int) -> list[Patch]:
    """One entry for each reward model, stacked as the areas are."""
    names = reward_model_names(length_biases, num_reward_models)
    colors = shades(num_reward_models)
    return [Patch(color=c, label=n) for n, c in zip(names, colors, strict=True)][::-1]


def reward_model_names(length_biases: Sequence[float], num_reward_models: int) -> list[str]:
    """The length bias of each reward model, or its number where the biases are not known."""
    if len(length_biases) == num_reward_models:
        return [f"b = {bias:g}" for bias in length_biases]
    return [f"reward model {i + 1}" for i in range(num_reward_models)]
