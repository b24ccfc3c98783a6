"""`python -m benchmarks.study`: section 6 in the village, over ten seeds and seven length biases.

Each seed redraws everything: pages, pi_ref, samples, pairs, reward models, policies, test pages.
Hyperparameters are those of `benchmarks.search`, which used other seeds. Every finished seed is
written to `results/study.csv` at once, so that a killed study goes on; the report and its figures
are made of that file alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.study.report import write_report
from minipref.methods import METHODS
from scale.files import read_csv, write_csv
from scale.paper.pipeline import PRESETS, Paper, findings_of
from scale.paper.repetition import Repetition
from scale.paper.results import COLUMNS
from scale.stages.stage import execute

RESULTS = Path(__file__).parents[1] / "results"
RHOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STUDY_COLUMNS = (*(name for name in COLUMNS if "validation_" not in name), "reward_accuracy")
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


def main(study: Study) -> None:
    """Run the seeds that are not in `results/study.csv`, and write the report."""
    rows = finished()
    for seed in range(study.seed, study.seed + study.seeds):
        if str(seed) not in {row["seed"] for row in rows}:
            paper = replace(
                PRESETS["miniature"], out=study.out / f"{seed}", seed=seed, seeds=1, rhos=RHOS,
                snapshots=1,
            )  # fmt: skip
            execute(paper)
            rows += seed_rows(paper)
            write_csv(RESULTS / "study.csv", STUDY_COLUMNS, rows)
    write_report(RESULTS, rows)


def finished() -> list[Row]:
    """The rows of earlier runs."""
    path = RESULTS / "study.csv"
    return read_csv(path) if path.exists() else []


def seed_rows(paper: Paper) -> list[Row]:
    """The rows of one seed: its `results.csv`, and the accuracy of the reward models."""
    rows = read_csv(paper.out / "results.csv")
    repetition = Repetition(paper, paper.seed)
    for row in rows:
        name = "ensemble" if METHODS[row["method"]].rewards == "ensemble" else "single"
        [_, reward, _] = repetition.reward_stages(float(row["rho"]), name)
        accuracies = findings_of(reward)["held-out accuracy"]
        row["reward_accuracy"] = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
    return [{name: row[name] for name in STUDY_COLUMNS} for row in rows]


if __name__ == "__main__":
    main(tyro.cli(Study, description=__doc__))
