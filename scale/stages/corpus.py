"""`corpus`: rows split by prompt into train, validation and test."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scale.console import console
from scale.data.docstrings import docstrings
from scale.data.formats import SIDES
from scale.data.rows import Row, read, split, write
from scale.data.village import NUM_ROWS, village
from scale.errors import InputError
from scale.files import write_text
from scale.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Corpus(Stage):
    """Split rows by prompt into train, validation and test."""

    data: Path | None = None
    """Rows with `prompt` and `completion`, or preference rows: a file, a pattern such as
    'shards/*.parquet', or an id of the Hugging Face hub. Default: those of --source."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used: the command stops, or the row is left out and
    listed in `bad_rows.txt`."""
    rows: int | None = None
    """Only the first so many rows of --data. Default: all."""
    preferences: bool = False
    """Whether every row must be a preference pair."""
    source: Literal["village", "docstrings"] = "village"
    """Rows that need no file: a generated village, whose summaries have a true reward, or the
    docstrings of the installed packages."""
    validation: float = 0.05
    """Share of the prompts for model selection."""
    test: float = 0.05
    """Share of the prompts for the final evaluation."""
    pages: int = NUM_ROWS
    """Rows of the village."""
    seed: int = 0
    """Seed of the split, and of the village."""

    def run(self) -> dict[str, Any]:
        if self.validation + self.test >= 1:
            raise InputError("--validation and --test: they must leave some prompts to train on")
        rows = self.read()
        train = 1 - self.validation - self.test
        shares = {"train": train, "validation": self.validation, "test": self.test}
        parts = split(rows, shares, self.seed)
        for name, part in parts.items():
            if shares[name] and not part:
                share = f"a {name} part of {shares[name]:g}"
                raise InputError(f"--data {self.data}: {len(rows)} rows are too few for {share}")
        for name, part in parts.items():
            write(self.out / f"{name}.parquet", part, {})
        findings = {name: len(part) for name, part in parts.items()}
        return findings | duplicates(rows)

    def read(self) -> list[Row]:
        if not self.data:
            return village(self.pages, self.seed) if self.source == "village" else docstrings()
        refused: list[str] | None = [] if self.bad_rows == "skip" else None
        need = ("prompt", *SIDES) if self.preferences else ("prompt", "completion")
        rows = read(self.data, need, refused)
        if refused:
            write_text(self.out / "bad_rows.txt", "".join(f"{line}\n" for line in refused))
            console.print(f"  {len(refused)} bad rows: {self.out / 'bad_rows.txt'}", markup=False)
        return rows[: self.rows]


def duplicates(rows: list[Row]) -> dict[str, int]:
    """How many pairs stand there again, and how many with their labels exchanged."""
    pairs = [row for row in rows if "rejected" in row]
    keys = [[json.dumps([row["prompt"], row[side]]) for side in SIDES] for row in pairs]
    seen = {(chosen, rejected) for chosen, rejected in keys}
    counts = {
        "duplicate pairs": len(keys) - len(seen),
        "pairs labelled both ways": sum((b, a) in seen for a, b in seen) // 2,
    }
    return {name: count for name, count in counts.items() if count}
