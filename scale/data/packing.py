"""Token ids to the arrays of shared-prefix rows: end to end in lines, or each row in fixed regions.

`minipref.batch` has the picture of both a row and a line.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from scale.data.layout import Layout, Shape, check_regions
from scale.data.tokenizer import PAD

Pieces: TypeAlias = Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]
"""Of each row, its prompt and its responses."""


class Tokens(NamedTuple):
    """Token ids of N rows of 1 + n pieces, a prompt and n responses, all end to end; and where each piece ends."""

    ids: np.ndarray
    ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[N, 1 + n] tokens of each piece."""
        return np.diff(self.ends.ravel(), prepend=0).reshape(self.ends.shape)

    def take(self, rows: np.ndarray) -> "Tokens":
        stops = self.ends[rows, -1]
        starts = np.where(rows > 0, self.ends[rows - 1, -1], 0)
        ids = [self.ids[start:stop] for start, stop in zip(starts, stops, strict=True)]
        inside = self.ends[rows] - starts[:, None]
        return Tokens(np.concatenate(ids), inside + (np.cumsum(inside[:, -1]) - inside[:, -1])[:, None])


def tokens_of(pieces: Pieces) -> Tokens:
    flat = [np.asarray(piece, np.int32) for prompt, responses in pieces for piece in (prompt, *responses)]
    ends = np.cumsum([len(piece) for piece in flat])
    return Tokens(np.concatenate(flat), ends.reshape(len(pieces), -1))


def lay(tokens: Tokens, shape: Shape, layout: Layout | None = None, pad: int = PAD) -> tuple[np.ndarray, ...]:
    """`Batch`'s tokens, positions, segments, labels, logit_positions, response_ids and last.

    Errors: InputError where a piece does not fit its region of `layout`.
    """
    lengths = tokens.lengths
    rows, n = len(lengths), lengths.shape[1] - 1
    if layout:
        check_regions(lengths, layout)
    begins, firsts = in_regions(rows, layout) if layout else end_to_end(lengths, shape.lines)
    piece = np.repeat(np.arange(lengths.size), lengths.ravel())
    offset = np.arange(len(piece)) - np.repeat(np.cumsum(lengths) - lengths.ravel(), lengths.ravel())
    row, part = np.divmod(piece, n + 1)
    rows_a_line = rows // shape.lines
    line, slot, prompt = row // rows_a_line, begins[row, part] + offset, lengths[row, 0]
    lines, labels = (shape.lines, shape.width), (shape.lines, shape.labels)
    of = part > 0  # the responses' tokens
    at = line[of], firsts[row[of], part[of] - 1] + offset[of]
    before = np.where(offset == 0, begins[row, 0] + prompt - 1, slot - 1)
    return (
        filled(lines, pad, (line, slot), tokens.ids),
        filled(lines, 0, (line, slot), np.where(part == 0, offset, prompt + offset)),
        filled((rows, shape.slots), -1, (row, slot - begins[row, 0]), part),
        filled(labels, pad, at, tokens.ids[of]),
        filled(labels, 0, at, before[of]),
        filled(labels, rows_a_line * n, at, (row % rows_a_line * n + part - 1)[of]),
        (np.where(lengths[:, 1:], begins[:, 1:] + lengths[:, 1:], begins[:, :1] + lengths[:, :1]) - 1).astype(np.int32),
    )


def end_to_end(lengths: np.ndarray, lines: int) -> tuple[np.ndarray, np.ndarray]:
    """In its line: the first slot of each piece [N, 1 + n], and the first label of each response [N, n]."""

    def firsts(counts: np.ndarray) -> np.ndarray:
        by_line = counts.reshape(lines, -1)
        return (np.cumsum(by_line, 1) - by_line).reshape(counts.shape)

    return firsts(lengths), firsts(lengths[:, 1:])


def in_regions(rows: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    firsts = layout.response * np.arange(layout.responses)
    return tuple(np.tile(each, (rows, 1)) for each in ([0, *(layout.start + firsts)], firsts))  # type: ignore[return-value]


def filled(shape: tuple[int, int], fill: int, at: Any, values: np.ndarray) -> np.ndarray:
    array = np.full(shape, fill, np.int32)
    array[at] = values
    return array
