"""`python -m benchmarks.study`: section 6 in the village, over ten seeds and seven length biases.

Each seed redraws everything: pages, pi_ref, samples, pairs, reward models, policies, test pages.
Hyperparameters are those of `benchmarks.search`, which used other seeds. The first seeds also have
what `variations` and `protocol` describe. Every finished seed is written to `results/study.csv` and
`results/variations.csv` at once, so that a killed study goes on; the report and its figures are
made of these files alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.study import protocol, variations
from benchmarks.study.report import write_report
from scale.files import read_csv, write_csv
from scale.paper.pipeline import PRESETS, Paper, findings_of
from scale.paper.repetition import Repetition
from scale.paper.results import COLUMNS
from scale.stages.stage import execute

RESULTS = Path(__file__).parents[1] / "results"
RHOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STUDY_COLUMNS = (
    *(name for name in COLUMNS if "validation_" not in name and name != "selected"),
    *("reward_accuracy", "snapshot_advantage", "snapshot_kl"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """The seeds."""

    out: Path = Path("runs/study")
    """Folder of the runs; that of a finished seed is not read again."""
    seeds: int = 10
    """How many."""
    seed: int = 0
    """The first one."""
    varied: int = 5
    """How many of them have the variations."""


def main(study: Study) -> None:
    """Run the seeds that are not in `results/`, and write the report."""
    papers = [
        replace(
            PRESETS["miniature"], out=study.out / f"{seed}", seed=seed, seeds=1, rhos=RHOS,
            snapshots=1, test_samples=2,
        )
        for seed in range(study.seed, study.seed + study.seeds)
    ]  # fmt: skip
    rows, varied = finished("study.csv"), finished("variations.csv")
    for paper in papers:
        if not has(rows, paper.seed):
            execute(paper)
            rows += seed_rows(paper)
            write_csv(RESULTS / "study.csv", STUDY_COLUMNS, rows)
    for paper in papers[: study.varied]:
        if not has(varied, paper.seed):
            execute(paper)
            varied += [*variations.run(paper), *protocol.run(paper)]
            write_csv(RESULTS / "variations.csv", variations.COLUMNS, varied)
    write_report(RESULTS, finished("study.csv"), finished("variations.csv"))


def finished(name: str) -> list[Row]:
    """The rows of earlier runs."""
    path = RESULTS / name
    return read_csv(path) if path.exists() else []


def has(rows: Sequence[Row], seed: int) -> bool:
    return any(int(row["seed"]) == seed for row in rows)


def seed_rows(paper: Paper) -> list[Row]:
    """The rows of one seed: its `results.csv`, the accuracy of the reward models, the snapshots."""
    repetition = Repetition(paper, paper.seed)
    rows = read_csv(paper.out / "results.csv")
    for row in rows:
        rho, method = float(row["rho"]), row["method"]
        row["reward_accuracy"] = variations.accuracies(repetition, rho, method)
        points = findings_of(repetition.evaluation("test", rho, ()))["policies"]
        snapshot = points[2 * paper.methods.index(method)]  # the end of training follows it
        row["snapshot_advantage"], row["snapshot_kl"] = snapshot["advantage"], snapshot["kl"]
    return [{name: row[name] for name in STUDY_COLUMNS} for row in rows]


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
