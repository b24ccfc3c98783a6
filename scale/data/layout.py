"""TODO scale.data.layout."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipref.batch import Batch
from scale.errors import InputError

LANES = 128


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
    labels, n = batch.response_ids.shape[1], batch.last.shape[1]
    return Layout(batch.tokens.shape[1] - labels, labels // max(n, 1), n)


def round_up(length: int, multiple: int = 8) -> int:
    """Few distinct shapes, so few compilations."""
    return -(-length // multiple) * multiple


def least_shape(lengths: np.ndarray, lines: int) -> Shape:
    """The smallest that holds rows with pieces of `lengths` [N, 1 + n], N / lines of them in each line."""
    per_row, per_label = lengths.sum(1), lengths[:, 1:].sum(1)
    width, labels = (round_up(int(a.reshape(lines, -1).sum(1).max())) for a in (per_row, per_label))
    return Shape(lines, width, labels, round_up(int(per_row.max())))


def check_regions(lengths: np.ndarray, layout: Layout) -> None:
    """Errors: InputError where a row has another number of responses than the layout, or a piece over its region."""
    n = lengths.shape[1] - 1
    if n != layout.responses:
        raise InputError(f"{layout}: has {layout.responses} responses, the rows have {n}")
    prompt, response = int(lengths[:, 0].max()), int(lengths[:, 1:].max(initial=0))
    for name, longest, region in (("prompt", prompt, layout.start), ("response", response, layout.response)):
        if longest > region:
            raise InputError(f"{layout}: a {name} of {longest} tokens does not fit its region of {region}")
