"""Token ids to the arrays of shared-prefix rows: end to end in lines, or each row in fixed regions.

`minipref.sequences` has the picture of both a row and a line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from minipref.sequences import Batch
from scale.rows import DataError
from scale.tokenizer import PAD

LANES = 128
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


class Shape(NamedTuple):
    """The static sizes of a batch: lines, of so many slots and labels each; and slots of a row in attention."""

    lines: int
    width: int
    labels: int
    slots: int


@dataclass(frozen=True)
class Layout:
    """A row in fixed regions, `[prompt | response_1 | ... | response_n]`, each padded at its end: the static mask of
    TPU attention. Whole blocks of keys are skipped where regions end at multiples of a block, 128 to 512 slots."""

    prompt: int
    """Slots of the prompt's region at least."""
    response: int
    """Slots of each response's region."""
    responses: int
    """How many responses, n."""

    @property
    def labels(self) -> int:
        return self.responses * self.response

    @property
    def width(self) -> int:
        """Slots of a row, a multiple of the TPU's 128 lanes: the prompt's region takes what that adds."""
        return round_up(self.prompt + self.labels, LANES)

    @property
    def start(self) -> int:
        """Where the prompt's region ends and the first response's starts."""
        return self.width - self.labels

    def region(self, slots: np.ndarray) -> np.ndarray:
        """0 in the prompt's region, i in that of response i."""
        return np.where(slots < self.start, 0, 1 + (slots - self.start) // max(self.response, 1))

    def shape(self, rows: int) -> Shape:
        return Shape(rows, self.width, self.labels, self.width)


def layout_of(batch: Batch) -> Layout:
    """The layout of a batch that was packed with one: its labels fill the responses' regions."""
    labels, n = batch.owners.shape[1], batch.last.shape[1]
    return Layout(batch.tokens.shape[1] - labels, labels // max(n, 1), n)


def round_up(length: int, multiple: int = 8) -> int:
    """Few distinct shapes, so few compilations."""
    return -(-length // multiple) * multiple


def least_shape(lengths: np.ndarray, lines: int) -> Shape:
    """The smallest that holds rows with pieces of `lengths` [N, 1 + n], N / lines of them in each line."""
    per_row, per_label = lengths.sum(1), lengths[:, 1:].sum(1)
    width, labels = (round_up(int(a.reshape(lines, -1).sum(1).max())) for a in (per_row, per_label))
    return Shape(lines, width, labels, round_up(int(per_row.max())))


def lay(tokens: Tokens, shape: Shape, layout: Layout | None = None, pad: int = PAD) -> tuple[np.ndarray, ...]:
    """`Batch`'s tokens, positions, segments, labels, predictors, owners and last.

    Errors: DataError where a piece does not fit its region of `layout`.
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


def check_regions(lengths: np.ndarray, layout: Layout) -> None:
    """Errors: DataError where a row has another number of responses than the layout, or a piece over its region."""
    n = lengths.shape[1] - 1
    if n != layout.responses:
        raise DataError(f"{layout}: has {layout.responses} responses, the rows have {n}")
    prompt, response = int(lengths[:, 0].max()), int(lengths[:, 1:].max(initial=0))
    for name, longest, region in (("prompt", prompt, layout.start), ("response", response, layout.response)):
        if longest > region:
            raise DataError(f"{layout}: a {name} of {longest} tokens does not fit its region of {region}")
