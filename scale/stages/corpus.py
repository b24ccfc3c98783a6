"""`corpus`: rows split by prompt into train, validation and test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scale.data.docstrings import docstrings
from scale.data.rows import Row, read, split, write
from scale.data.village import NUM_ROWS, village
from scale.errors import InputError
from scale.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Corpus(Stage):
    """Split rows by prompt into train, validation and test."""

    data: Path | None = None
    """Rows with `prompt` and `completion`, or preference rows. Default: those of --source."""
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
        rows = self.rows()
        train = 1 - self.validation - self.test
        shares = {"train": train, "validation": self.validation, "test": self.test}
        parts = split(rows, shares, self.seed)
        for name, part in parts.items():
            if shares[name] and not part:
                share = f"a {name} part of {shares[name]:g}"
                raise InputError(f"--data {self.data}: {len(rows)} rows are too few for {share}")
        for name, part in parts.items():
            write(self.out / f"{name}.parquet", part, {})
        return {name: len(part) for name, part in parts.items()}

    def rows(self) -> list[Row]:
        if self.data:
            return read(self.data, need=("prompt", "completion"))
        return village(self.pages, self.seed) if self.source == "village" else docstrings()
