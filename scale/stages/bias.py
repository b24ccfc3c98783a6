from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from scale import folders
from scale.rows import DataError, provenance, read, write
from scale.stages.base import Stage
from scale.tokenizer import Codec


@dataclass(frozen=True, kw_only=True)
class Bias(Stage):
    """D_rho of section 6.1: a subsample in which the longer response is preferred in a share rho of the pairs."""

    data: Path
    """Preference rows."""
    tokenizer: Path
    """Folder of the model whose tokens measure length."""
    rho: float = 0.5
    """Share of pairs whose longer response is preferred."""
    size: int = 6000
    """Pairs at most; fewer where the data has fewer at this rho."""
    seed: int = 0
    """Seed of the subsample."""

    def inputs(self) -> list[Path]:
        return [self.data, self.tokenizer]

    def run(self) -> dict[str, Any]:
        rows = read(self.data)
        sides = longer_side(folders.codec_of(self.tokenizer), rows)
        size = min(self.size, largest(sides, self.rho))
        chosen = subsample(sides, self.rho, size, np.random.default_rng(self.seed))
        write(self.out / "rows.parquet", [rows[i] for i in chosen], provenance(self.data))
        return {"pairs": size, "share of pairs whose longer side wins": float((sides[chosen] > 0).mean())}


def longer_side(codec: Codec, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """+1 where the chosen response is longer (>= 10% more tokens), -1 where the rejected one is, else 0."""
    lengths = np.array([[len(codec.response_ids(row[f])) for f in ("chosen", "rejected")] for row in rows])
    chosen, rejected = lengths.T
    return (10 * chosen >= 11 * rejected).astype(int) - (10 * rejected >= 11 * chosen)  # section 6.1


def longer_wins(sides: np.ndarray) -> float:
    """Share of the pairs with a longer side in which it wins."""
    return float((sides > 0).sum() / max((sides != 0).sum(), 1))


def largest(sides: np.ndarray, rho: float) -> int:
    """The most pairs that can be drawn, all with a longer side, a share rho of them won by it."""
    wins, losses = int((sides > 0).sum()), int((sides < 0).sum())
    share = Fraction(str(rho))
    size = int(min(count / part for count, part in ((wins, share), (losses, 1 - share)) if part))
    if size < 1:
        raise DataError(f"no pairs can be drawn at length bias {rho}: the longer side wins {wins}, loses {losses}")
    return size


def subsample(sides: np.ndarray, rho: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `size` pairs, in random order, of which round(rho x size) are won by their longer side."""
    wins = min(round(rho * size), int((sides > 0).sum()))
    drawn = [rng.choice(np.flatnonzero(sides == s), n, replace=False) for s, n in ((1, wins), (-1, size - wins))]
    return rng.permutation(np.concatenate(drawn))
