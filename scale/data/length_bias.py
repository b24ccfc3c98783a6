"""TODO scale.data.length_bias."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from scale.data.tokenizer import Tokenizer
from scale.errors import InputError


def longer_side(tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """+1 where the chosen response is longer (>= 10% more tokens), -1 where the rejected one is, else 0."""
    lengths = np.array([[len(tokenizer.response_ids(row[f])) for f in ("chosen", "rejected")] for row in rows])
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
        raise InputError(f"no pairs can be drawn at length bias {rho}: the longer side wins {wins}, loses {losses}")
    return size


def subsample(sides: np.ndarray, rho: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `size` pairs, in random order, of which round(rho x size) are won by their longer side."""
    wins = min(round(rho * size), int((sides > 0).sum()))
    drawn = [rng.choice(np.flatnonzero(sides == s), n, replace=False) for s, n in ((1, wins), (-1, size - wins))]
    return rng.permutation(np.concatenate(drawn))
