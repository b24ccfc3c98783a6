"""Preference pairs with a chosen length bias rho: the longer response wins a share rho of them."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from scale.data.formats import SIDES
from scale.data.pieces import PIECE
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError


def longer_side(tokenizer: Tokenizer, rows: Iterable[dict[str, Any]]) -> np.ndarray:
    """Which response of each pair is longer: it has at least 10% more tokens than the other.

    Returns:
        +1 where it is the chosen one, -1 where it is the rejected one, 0 where neither is [N].

    Source: section 6.1.
    """
    lengths, rows = [], iter(rows)
    while some := list(islice(rows, PIECE)):
        columns = [[row[field] for row in some] for field in SIDES]
        ids = [tokenizer.responses_ids(column, [True] * len(some)) for column in columns]
        lengths.append([list(map(len, column)) for column in ids])
    chosen, rejected = np.concatenate(lengths, axis=1)
    return (10 * chosen >= 11 * rejected).astype(int) - (10 * rejected >= 11 * chosen)


def longer_wins(sides: np.ndarray) -> float:
    """The length bias: of the pairs with a longer side, the share that it wins."""
    return float((sides > 0).sum() / max((sides != 0).sum(), 1))


def picking_longer(sides: np.ndarray) -> float:
    """How often one is right who picks the longer response, and a random one where neither is."""
    return float((sides > 0).mean() + (sides == 0).mean() / 2)


def largest(sides: np.ndarray, rho: float) -> int:
    """How many pairs with a longer side can be drawn at length bias rho.

    Raises:
        InputError: Not even one.
    """
    wins, losses = int((sides > 0).sum()), int((sides < 0).sum())
    share = Fraction(str(rho))
    limits = [count / part for count, part in ((wins, share), (losses, 1 - share)) if part]
    size = int(min(limits))
    if size < 1:
        raise InputError(
            f"no pairs can be drawn at length bias {rho}: the longer side wins {wins}, "
            f"loses {losses}"
        )
    return size


def subsample(sides: np.ndarray, rho: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `size` pairs in random order; the longer side wins round(rho x size) of them."""
    wins = min(round(rho * size), int((sides > 0).sum()))
    drawn = [
        rng.choice(np.flatnonzero(sides == side), count, replace=False)
        for side, count in ((1, wins), (-1, size - wins))
    ]
    return rng.permutation(np.concatenate(drawn))
