"""The static sizes of a batch, and where the parts of an example lie in a packed sequence."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minipref.batch import Inputs

LANES = 128  # of a TPU's vector unit


class BatchShape(NamedTuple):
    """The sizes for which a step is compiled: packed sequences of `length` tokens and `num_labels`
    labels each, and the `row_length` of an example in attention."""

    num_sequences: int
    length: int
    num_labels: int
    row_length: int


@dataclass(frozen=True)
class Layout:
    """An example in fixed regions, `[prompt | response 1 | ... | response n]`, each padded at its
    end: the static mask of TPU attention. A kernel skips whole blocks of keys where regions end at
    multiples of a block (128 to 512 tokens)."""

    prompt: int
    """Tokens of the prompt's region, at least."""
    response: int
    """Tokens of the region of each response."""
    num_responses: int
    """n."""

    @property
    def num_labels(self) -> int:
        return self.num_responses * self.response

    @property
    def length(self) -> int:
        """Tokens of an example, a multiple of `LANES`; the prompt's region takes the difference."""
        return round_up(self.prompt + self.num_labels, LANES)

    @property
    def start(self) -> int:
        """Where the first response's region starts."""
        return self.length - self.num_labels

    def region(self, indices: np.ndarray) -> np.ndarray:
        """0 in the prompt's region, i in the region of response i."""
        return np.where(
            indices < self.start, 0, 1 + (indices - self.start) // max(self.response, 1)
        )

    def shape(self, rows: int) -> BatchShape:
        return BatchShape(rows, self.length, self.num_labels, self.length)


def layout_of(inputs: Inputs) -> Layout:
    """The layout of inputs that were packed with one: their labels fill the responses' regions."""
    num_labels, n = inputs.response_ids.shape[1], inputs.reward_positions.shape[1]
    return Layout(inputs.tokens.shape[1] - num_labels, num_labels // max(n, 1), n)


def smallest_shape(lengths: np.ndarray, num_sequences: int) -> BatchShape:
    """The smallest shape for N examples whose parts have `lengths` [N, 1 + n]."""
    per_row, per_label = lengths.sum(1), lengths[:, 1:].sum(1)
    length, num_labels = (
        round_up(int(counts.reshape(num_sequences, -1).sum(1).max()))
        for counts in (per_row, per_label)
    )
    return BatchShape(num_sequences, length, num_labels, round_up(int(per_row.max())))


def round_up(length: int, multiple: int = 8) -> int:
    """Few distinct sizes mean few compilations."""
    return -(-length // multiple) * multiple
