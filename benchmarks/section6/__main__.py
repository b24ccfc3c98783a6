"""`python -m benchmarks.section6 [DIR]`: section 6 in a bandit, with exact values.

Writes `section6.md`, `section6.csv` and `section6.png` (Figure 2 in the bandit) to DIR. Every world
of `reference/worlds.py` is trained by `minipref/section6.py`: 1,000 worlds in the main study, and
200 in each variation. The first half of the worlds chooses each method's beta; all that is reported
comes from the other half.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from benchmarks.machine import describe
from benchmarks.section6.variations import BETAS, CONSTANT, VARIATIONS, Cell, Study, Variation, run
from benchmarks.section6.verdicts import CLAIMS, difference, verdicts
from minipref.methods import METHODS
from reference.worlds import BIASES
from scale.files import atomic, write_csv
from scale.paper.claims import Verdict
from scale.paper.comparisons import SIGNIFICANT
from scale.paper.figures import figure2
from scale.statistics import student_interval
from scale.templates import load_template

PAIRS = (
    ("d-dpo", "dpo"), ("e-dpo", "d-dpo"), ("p-dpo", "dpo"), ("dp-dpo", "d-dpo"), ("hull", "e-dpo"),
    ("e-dpo", "mean"), ("hull", "mean"), ("e-dpo", CONSTANT),
)  # fmt: skip
EVERYWHERE = {  # the claims of each variation, by the column of the table
    "(a)": CLAIMS[0], "(b)": CLAIMS[1], "(c)": CLAIMS[2], "hull > e-dpo": CLAIMS[10],
    "e-dpo > mean": CLAIMS[11],
}  # fmt: skip
FIELDS = ("advantage", "forward_kl", "reverse_kl", "chosen_logp", "rejected_logp")

Studies = dict[str, tuple[Variation, Study]]  # by the name of the variation


class Interval(NamedTuple):
    """A mean over worlds, with Student's 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:.3f}"

    def __format__(self, digits: str) -> str:
        return f"{self.mean:+{digits}} ±{(self.high - self.low) / 2:{digits}}"


def interval(values: np.ndarray) -> Interval:
    return Interval(float(values.mean()), *student_interval(values))


def rows(studies: Studies) -> Iterator[dict[str, Any]]:
    """One row of the CSV for each study, rho and method."""
    for variation, study in studies.values():
        for (rho, method), cell in study.cells.items():
            means = {field: round(float(cell.values(field).mean()), 4) for field in FIELDS}
            low, high = (round(x, 4) for x in student_interval(cell.values("advantage")))
            head = {"study": variation.name, "rho": rho, "method": method, "beta": cell.beta}
            worlds = len(cell.values("advantage"))
            yield head | means | {"low": low, "high": high, "worlds": worlds}


def selection(cell: Cell, smallest: Any) -> dict[str, np.ndarray | float]:
    """Which reward models e-DPO follows, and how often that is the one of smallest margins."""
    selected = cell.values("selected")
    matches = np.argmax(selected, axis=1) == smallest[-len(selected) :]
    nearest = cell.values("nearest").mean(0)
    return {"selected": selected.mean(0), "nearest": nearest, "smallest": float(matches.mean())}


def report(studies: Studies, judged: Sequence[Verdict], minutes: tuple[float, float]) -> str:
    """The text of `section6.md`; `section6.md.jinja` has the words.

    Args:
        studies: The results.
        judged: The verdicts on the claims in the main study.
        minutes: How long they took, by the clock and in CPU time.
    """
    variation, main = studies[VARIATIONS[0].name]
    rhos, cells = variation.rhos, main.cells
    means = {key: interval(cell.values("advantage")) for key, cell in cells.items()}
    context = {
        "machine": describe(),
        "minutes": minutes,
        "num_worlds": variation.worlds,
        "betas": BETAS,
        "biases": BIASES,
        "significant": SIGNIFICANT,
        "rhos": rhos,
        "methods": list(METHODS),
        "advantages": means,
        "differences": {
            (a, b): [interval(difference(cells, rho, a, b)) for rho in rhos] for a, b in PAIRS
        },
        "verdicts": judged,
        "selection": {
            rho: selection(cells[rho, "e-dpo"], main.margins[rho].smallest) for rho in rhos
        },
        **varied(studies),
    }
    return load_template(Path(__file__).parent / "section6.md.jinja").render(context)


def varied(studies: Studies) -> dict[str, Any]:
    """What the report says of the variations."""
    table = [cells_at(variation.name, study, rho) for variation, study in studies.values()
             for rho in VARIATIONS[1].rhos]  # fmt: skip
    cells = [cell for _, study in studies.values() for cell in study.cells.values()]
    gains = [row["means"]["d-dpo"] - row["means"]["dpo"] for row in table]
    knowledge = [row["right"][1] - row["right"][0] for row in table]
    wins = [row["means"]["mean"] > row["means"]["e-dpo"] for row in table]
    claims = tuple(EVERYWHERE.values())
    return {
        "studies": {name: study for name, (_, study) in studies.items()},
        "num_varied": VARIATIONS[1].worlds,
        "varied": table,
        "columns": list(EVERYWHERE),
        "by_study": {
            name: [verdict.word for verdict in verdicts(study.cells, VARIATIONS[1].rhos, claims)]
            for name, (_, study) in studies.items()
        },
        "right": {(row["name"], row["rho"]): row["right"] for row in table},
        "lead_of": lambda study, rho, a, b: difference(study.cells, rho, a, b).mean(),
        "mean_of": lambda name, rho, method: next(
            row["means"][method] for row in table if (row["name"], row["rho"]) == (name, rho)
        ),
        "correlation": np.corrcoef(gains, knowledge)[0, 1],
        "mean_wins": (sum(wins), len(wins)),
        "edges": sum(cell.best in (0, len(BETAS) - 1) for cell in cells),
        "num_cells": len(cells),
    }


def cells_at(name: str, study: Study, rho: float) -> dict[str, Any]:
    """One row of the table of variations."""
    intervals = {m: interval(study.cells[rho, m].values("advantage")) for m in METHODS}
    return {
        "name": name,
        "rho": rho,
        "means": {method: value.mean for method, value in intervals.items()},
        "advantages": {method: f"{value:.2f}" for method, value in intervals.items()},
        "right": [float(np.mean(share)) for share in study.margins[rho][:3]],
    }


def main(
    out: Annotated[Path, tyro.conf.Positional] = Path("benchmarks/results"),
) -> None:
    """Run every study, and write the report.

    Args:
        out: The folder to write to.
    """
    start = time.perf_counter()
    studies: Studies = {}
    for variation in VARIATIONS:
        studies[variation.name] = variation, run(variation)
        print(f"{time.perf_counter() - start:6.1f} s  {variation.name}", flush=True)
    means = {
        key: interval(cell.values("advantage"))
        for key, cell in studies[VARIATIONS[0].name][1].cells.items()
    }
    points = {
        (rho, method): (mean.mean, mean.low, mean.high)
        for (rho, method), mean in means.items()
        if method in METHODS
    }
    figure2(out / "section6.png", points, behind={})
    minutes = (time.perf_counter() - start) / 60, time.process_time() / 60
    lines = list(rows(studies))
    write_csv(out / "section6.csv", list(lines[0]), lines)
    judged = verdicts(studies[VARIATIONS[0].name][1].cells, VARIATIONS[0].rhos)
    words = [{"claim": verdict.claim, "verdict": verdict.word} for verdict in judged]
    write_csv(out / "section6_verdicts.csv", ("claim", "verdict"), words)
    with atomic(out / "section6.md") as temporary:
        temporary.write_text(report(studies, judged, minutes), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
