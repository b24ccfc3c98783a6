"""`bias`: preference rows in which the longer response wins a given share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.length_bias import largest, longer_side, longer_wins, subsample
from scale.data.rows import provenance, read, write
from scale.io import model_folder
from scale.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Bias(Stage):
    """Draw D_rho of section 6.1: pairs of which a share rho prefer the longer response."""

    data: Path
    """Preference rows."""
    tokenizer: Path
    """The model whose tokens measure length: a folder of ours, a Hugging Face folder, an id of its
    hub, a .gguf file, or smollm2."""
    rho: float = 0.5
    """Share of pairs whose longer response is preferred."""
    size: int = 6000
    """Pairs at most; fewer where the data has fewer at this rho."""
    seed: int = 0
    """Seed of the subsample."""

    def run(self) -> dict[str, Any]:
        rows = read(self.data)
        sides = longer_side(model_folder.tokenizer_of(self.tokenizer), rows)
        size = min(self.size, largest(sides, self.rho))
        chosen = subsample(sides, self.rho, size, np.random.default_rng(self.seed))
        write(self.out / "rows.parquet", [rows[i] for i in chosen], provenance(self.data))
        return {
            "pairs": size,
            "share of pairs whose longer side wins": float((sides[chosen] > 0).mean()),
            "that share of --data": longer_wins(sides),
        }
