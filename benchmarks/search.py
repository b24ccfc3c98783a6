"""`python -m benchmarks.search`: the model selection behind the miniature's shipped hyperparameters.

Every method gets the same search: each strength (beta, or tau) with each learning rate, at each rho, trained as the
default run trains and judged on validation prompts alone, within the KL budget of `Paper.most_kl`, since a policy far
enough from pi_ref fools the oracle. Prints the table for `scale/paper.py`, and copies every
candidate's validation advantage to `benchmarks/results/search.csv`. A best value at the edge of its grid is marked.
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
    out: Path = Path("runs/search")
    """Folder of the run."""
    betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Candidates for beta."""
    taus: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Candidates for IPO's tau: as many."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Candidates for the learning rate."""


def main(search: Search) -> None:
    execute(replace(PRESETS["miniature"], out=search.out, betas=search.betas, taus=search.taus,
                    learning_rates=search.learning_rates, snapshots=0))
    RESULTS.parent.mkdir(exist_ok=True)
    shutil.copy(search.out / "results.csv", RESULTS)
    with RESULTS.open() as file:
        chosen = [row for row in csv.DictReader(file) if row["selected"] == "1"]
    print("| method | rho | value | learning rate | validation advantage | its KL | at an edge of the grid |")
    print("|---|---|---|---|---|---|---|")
    for row in chosen:
        strengths = search.betas if row["parameter"] == "beta" else search.taus
        edges = [name for name, grid in (("value", strengths), ("learning_rate", search.learning_rates))
                 if float(row[name]) in (min(grid), max(grid))]
        print(f"| {row['method']} | {row['rho']} | {row['value']} | {row['learning_rate']} | "
              f"{row['validation_advantage']} | {row['validation_kl']} | {', '.join(edges)} |")


if __name__ == "__main__":
    main(tyro.cli(Search, description=__doc__))
