"""`python -m benchmarks.search`: the model selection behind section 6's hyperparameters.

Every method gets the same search: each beta (ipo: its tau) with each learning rate, at each rho. A
candidate is trained as the default run trains, and judged on validation prompts, in seeds that no
result uses. The best mean over these seeds is written to `scale/paper/searched.csv`, which the
default run and the study read; `benchmarks/results/search.csv` has every candidate. The command
prints the table, and marks a best value at the edge of its grid. A killed search goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import tyro

from minipref.methods import METHODS
from scale.files import read_csv, write_csv
from scale.paper.pipeline import PRESETS
from scale.paper.presets import SEARCHED_FILE
from scale.stages.stage import execute

RESULTS = Path(__file__).parent / "results" / "search.csv"
CELL = ("method", "rho")
CANDIDATE = (*CELL, "beta", "learning_rate")
Row = dict[str, str]


@dataclass(frozen=True)
class Search:
    """The candidates."""

    out: Path = Path("runs/search")
    """Folder of the run."""
    betas: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """Candidates for beta (ipo: for its tau)."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Candidates for the learning rate."""
    seed: int = 1000
    """The first seed."""
    seeds: int = 2
    """How many."""


def main(search: Search) -> None:
    """Run the search, keep its results and print the table."""
    miniature = replace(
        PRESETS["miniature"], out=search.out, seed=search.seed, seeds=search.seeds, test_samples=2
    )
    execute(replace(miniature, betas=search.betas, learning_rates=search.learning_rates))
    rows = read_csv(search.out / "results.csv")
    names = (*CANDIDATE, "seed", "validation_advantage", "validation_kl")
    write_csv(RESULTS, names, [{name: row[name] for name in names} for row in rows])
    chosen = [best(candidates) for candidates in grouped(rows, CELL)]
    write_csv(SEARCHED_FILE, CANDIDATE, [{name: row[name] for name in CANDIDATE} for row in chosen])
    grids = {"beta": search.betas, "learning_rate": search.learning_rates}
    print("| method | rho | beta | learning rate | validation advantage | at an edge of its grid |")
    print("|---|---|---|---|---|---|")
    for row in chosen:
        edges = [name for name, grid in grids.items() if float(row[name]) in (grid[0], grid[-1])]
        print(f"| {' | '.join(row.values())} | {', '.join(edges)} |")


def best(candidates: Sequence[Row]) -> Row:
    """The candidate of one method and rho with the best mean over the seeds."""
    means = []
    for rows in grouped(candidates, CANDIDATE):
        mean = float(np.mean([float(row["validation_advantage"]) for row in rows]))
        means.append((mean, rows[0]))
    mean, row = max(means, key=lambda pair: pair[0])
    return {name: row[name] for name in CANDIDATE} | {"validation_advantage": f"{mean:+.3f}"}


def grouped(rows: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    """The rows that agree in some columns, in the order of `METHODS` and of the columns."""
    order = list(METHODS)

    def key(row: Row) -> tuple[float, ...]:
        return tuple(order.index(row[n]) if n == "method" else float(row[n]) for n in names)

    return [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]


if __name__ == "__main__":
    main(tyro.cli(Search, description=__doc__))
