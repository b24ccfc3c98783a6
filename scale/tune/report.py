"""`report.md` and `curves.png` of `tune`: what happened, and whether to believe it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minipref.methods import METHODS
from scale.console import console
from scale.data.rows import read
from scale.files import write_text
from scale.health import WARNINGS, as_findings
from scale.paper.figures import bare, save
from scale.stages.command_line import command_line
from scale.templates import cut, escape, load_template, write_rendered
from scale.train.metrics import logged
from scale.tune.options import Options
from scale.tune.plan import rows_text
from scale.tune.survey import Survey

TEMPLATE = Path(__file__).parent / "report.md.jinja"
NUM_SAMPLES = 6
# the first step at which margins are not all 0: batches are measured before their update
FIRST = {"rewards/accuracies": 2, "validation/rewards/accuracies": 1}
REHEARSAL = "rehearsal (--quick): nothing here says how good a model is"
TRAINING, HELD_OUT, REJECTED = "#0072B2", "#D55E00", "#8C8C8C"
CURVES = {  # title: the metrics that are drawn, with their colour and name
    "loss": {"loss": (TRAINING, "training"), "validation/loss": (HELD_OUT, "held out")},
    "margin of implicit rewards (nats)": {
        "rewards/margins": (TRAINING, "training"),
        "validation/rewards/margins": (HELD_OUT, "held out"),
    },
    "accuracy of implicit rewards": {
        "rewards/accuracies": (TRAINING, "training"),
        "validation/rewards/accuracies": (HELD_OUT, "held out"),
    },
    "held-out log-probability (nats)": {
        "validation/logps/chosen": (HELD_OUT, "chosen"),
        "validation/logps/rejected": (REJECTED, "rejected"),
    },
    "forward KL to the model before (nats)": {
        "kl": (TRAINING, "training"),
        "validation/kl": (HELD_OUT, "held out"),
    },
}


def write_report(
    options: Options,
    stages: dict[str, Any],
    findings: dict[str, dict[str, Any]],
    surveyed: Survey,
    refused: Sequence[str],
) -> dict[str, Any]:
    """Write the report, its figure and the model's card.

    Args:
        options: Those of `tune`.
        stages: The stages, by name.
        findings: What each of them recorded.
        surveyed: The survey of the rows.
        refused: The errors of rows that cannot be read.

    Returns:
        The findings of the whole.
    """
    judge, policy = findings["judge"], findings["policy"]
    [result] = findings["evaluation"]["policies"]
    warnings = [
        f"{name}: {text}" for name, part in findings.items() for text in part.get(WARNINGS, [])
    ]
    verdict = verdict_of(result, judge)
    context = {
        "options": options,
        "label": METHODS[options.method].label,
        "rehearsal": REHEARSAL if options.quick else "",
        "warnings": warnings,
        "rows": rows_text(surveyed, refused),
        "align": stages["policy"],
        "policy": policy,
        "reward": findings.get("rewards"),
        "reward_stage": stages.get("rewards"),
        "judge": judge,
        "judge_interval": accuracy_interval(judge),
        "result": result,
        "test": means(options.out / "evaluation/rows.parquet"),
        "verdict": verdict,
        "samples": samples(options.out / "evaluation/rows.parquet"),
        "commands": [command_line(stage) for stage in stages.values()],
    }
    draw_curves(options)
    write_rendered(options.out / "report.md", load_template(TEMPLATE), context)
    write_text(options.hf / "README.md", card(options, verdict))
    console.print(f"{options.out / 'report.md'}; the model: {options.hf}", markup=False)
    return {"verdict": verdict} | as_findings(warnings)


def verdict_of(result: dict[str, Any], judge: dict[str, Any]) -> str:
    """What the judge sees in the samples, and whether it can see at all."""
    low, _ = accuracy_interval(judge)
    if low <= 0.5:
        return "unknown: the judge is no better than a coin on held-out pairs"
    longer = judge["accuracy of picking the longer"]
    if judge["held-out accuracy"][0] <= max(longer, 1 - longer):
        return "unknown: the judge is no better than one that looks at length alone"
    if result["low"] > 0:
        return "the judge prefers the samples after training"
    if result["high"] < 0:
        return "the judge prefers the samples before training"
    return "the judge finds no difference"


def accuracy_interval(judge: dict[str, Any]) -> tuple[float, float]:
    """Wilson's 95% interval of the judge's accuracy."""
    from scipy.stats import binomtest  # it takes 0.7 s to import

    pairs = judge["held-out pairs"]
    right = round(judge["held-out accuracy"][0] * pairs)
    low, high = binomtest(right, pairs).proportion_ci(method="wilson")
    return float(low), float(high)


def means(path: Path) -> dict[str, Any]:
    """How many test prompts there are, and the means over them that the report shows."""
    rows = read(path, need=("prompt",))
    names = ("tokens", "reference_tokens", "cut", "reference_cut")
    prompts = {json.dumps(row["prompt"]) for row in rows}
    return {"prompts": len(prompts)} | {n: float(np.mean([row[n] for row in rows])) for n in names}


def samples(path: Path) -> list[dict[str, Any]]:
    """Prompts at fixed places, with a sample before and after training and the judge's rewards."""
    rows = read(path, need=("prompt",))
    places = sorted({len(rows) * i // NUM_SAMPLES for i in range(NUM_SAMPLES)})
    return [
        {
            "prompt": end_of(rows[i]["prompt"]),
            "before": shown(rows[i]["reference_samples"][0], rows[i]["reference_cut"]),
            "after": shown(rows[i]["samples"][0], rows[i]["cut"]),
            "gain": rows[i]["reward"] - rows[i]["reference_reward"],
        }
        for i in places
    ]


def shown(sample: str, is_cut: float) -> str:
    """A sample as a cell of the table, which marks one that reached the limit of tokens."""
    return escape(cut(sample)) + " [limit]" * bool(is_cut)


def end_of(prompt: str | list[dict[str, Any]], length: int = 200) -> str:
    """The end of a prompt's last turn."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    end = text[-length:]
    return text if len(text) <= length else f"... {end.partition(' ')[2] or end}"


def draw_curves(options: Options) -> None:
    """Draw the metrics of the policy's training over its steps."""
    records = logged(options.out / "policy/metrics.jsonl")
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for ax, (title, metrics) in zip(axes, CURVES.items(), strict=False):
        draw(ax, title, metrics, records)
    axes[-1].axis("off")
    title = f"{METHODS[options.method].label}, {options.model.name or options.model}"
    figure.suptitle(f"{title}: {REHEARSAL}" if options.quick else title)
    save(figure, options.out / "curves.png")


def draw(
    ax: Axes, title: str, metrics: dict[str, tuple[str, str]], records: list[dict[str, Any]]
) -> None:
    bare(ax)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step", fontsize=9)
    for metric, (color, name) in metrics.items():
        first = FIRST.get(metric, 0)
        points = [
            (r["step"], np.mean(r[metric])) for r in records if metric in r and r["step"] >= first
        ]
        if points:
            is_line = len(points) > 2 and not metric.startswith("validation/")
            style = "-" if is_line else "o-"
            ax.plot(*zip(*points, strict=True), style, markersize=4, color=color, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.legend(frameon=False, fontsize=9)


def card(options: Options, verdict: str) -> str:
    """The model card of the exported folder."""
    lines = [
        f"# {options.model.name or options.model}, aligned by {METHODS[options.method].label}",
        "",
        *([f"**A {REHEARSAL}.**", ""] if options.quick else []),
        f"Preferences: `{options.data.name}`. Verdict on held-out prompts: {verdict}.",
        "Made with minipref: `python -m scale.run tune`.",
    ]
    return "\n".join(lines) + "\n"
