"""`python -m benchmarks.search`: the model selection behind the hyperparameters of the miniature.

Every method gets the same search: each beta (ipo: its tau) with each learning rate, at each rho. A
candidate is trained as the default run trains, and it is judged on validation prompts alone, within
the KL budget of `Paper.most_kl`: a policy that is far enough from pi_ref fools the oracle. The
command prints the table for `scale/paper/pipeline.py`, and copies the validation advantage of every
candidate to `benchmarks/results/search.csv`. It marks a best value at the edge of its grid.
"""

import csv
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from scale.paper.pipeline import PRESETS
from scale.stages.stage import execute

RESULTS = Path(__file__).parent / "results" / "search.csv"


@dataclass(frozen=True)
class Search:
    """The candidates."""

    out: Path = Path("runs/search")
    """Folder of the run."""
    betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Candidates for beta (ipo: for its tau)."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Candidates for the learning rate."""


def main(search: Search) -> None:
    """Run the search, keep its results and print the table."""
    rates = search.learning_rates
    miniature = replace(PRESETS["miniature"], out=search.out, snapshots=0)
    execute(replace(miniature, betas=search.betas, learning_rates=rates))
    RESULTS.parent.mkdir(exist_ok=True)
    shutil.copy(search.out / "results.csv", RESULTS)
    with RESULTS.open() as file:
        selected = [row for row in csv.DictReader(file) if row["selected"] == "1"]
    print(
        "| method | rho | beta | learning rate | validation advantage | its KL | "
        "at an edge of the grid |\n|---|---|---|---|---|---|---|"
    )
    for row in selected:
        print(table_row(row, {"beta": search.betas, "learning_rate": rates}))


def table_row(row: dict[str, str], grids: dict[str, tuple[float, ...]]) -> str:
    """One selected candidate, and which of its values are the smallest or largest of their grid."""
    edges = [name for name, grid in grids.items() if float(row[name]) in (min(grid), max(grid))]
    names = ("method", "rho", "beta", "learning_rate", "validation_advantage", "validation_kl")
    return f"| {' | '.join(row[name] for name in names)} | {', '.join(edges)} |"


if __name__ == "__main__":
    main(tyro.cli(Search, description=__doc__))
