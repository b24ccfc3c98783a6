"""Token ids to packed sequences: end to end, or each example in fixed regions.

`minipref.batch` has the picture of both an example and a packed sequence.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from minipref.batch import Inputs
from scale.data.layout import BatchShape, Layout
from scale.errors import InputError


class TokenizedRows(NamedTuple):
    """Token ids of N rows of 1 + n parts, a prompt and n responses.

    Attributes:
        ids: All token ids, end to end.
        ends: Where each part ends in `ids` [N, 1 + n].
    """

    ids: np.ndarray
    ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each part [N, 1 + n]."""
        lengths = np.array(self.ends).ravel()
        lengths[1:] -= self.ends.ravel()[:-1]
        return lengths.reshape(self.ends.shape)

    def take(self, rows: np.ndarray) -> "TokenizedRows":
        stops = self.ends[rows, -1]
        starts = np.where(rows > 0, self.ends[rows - 1, -1], 0)
        ids = [self.ids[start:stop] for start, stop in zip(starts, stops, strict=True)]
        ends = self.ends[rows] - starts[:, None]
        offsets = np.cumsum(ends[:, -1]) - ends[:, -1]
        return TokenizedRows(np.concatenate(ids), ends + offsets[:, None])


def tokenized_rows(rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> TokenizedRows:
    """Rows of `(prompt ids, [response ids, ...])`, all with as many responses."""
    parts = [ids for prompt, responses in rows for ids in (prompt, *responses)]
    ends = np.cumsum([len(ids) for ids in parts], dtype=int)
    ids = np.fromiter(chain.from_iterable(parts), np.int32)
    return TokenizedRows(ids, ends.reshape(len(rows), -1) if rows else ends)


def shared_out(rows: np.ndarray, tokens: np.ndarray, num_groups: int) -> np.ndarray:
    """Rows in groups that have about equal totals of tokens.

    The longest rows are dealt first, one to each group, and then on in turns there and back.

    Args:
        rows: Indices [G * n], which may be there several times.
        tokens: How many tokens each row has.
        num_groups: G.

    Returns:
        The indices of the rows of each group [G, n].
    """
    longest_first = rows[np.argsort(-tokens[rows], kind="stable")]
    dealt = longest_first.reshape(-1, num_groups)
    dealt[1::2] = dealt[1::2, ::-1]
    return dealt.T


def pack(
    rows: TokenizedRows, shape: BatchShape, layout: Layout | None = None, pad: int = 0
) -> Inputs:
    """Pack rows into sequences, as NumPy arrays.

    Args:
        rows: B rows of n responses.
        shape: The sizes of the arrays; B is a multiple of its `num_sequences`.
        layout: Where given, each row stands in a sequence of its own, in these regions.
        pad: The token that fills up sequences.

    Returns:
        The inputs of a model.

    Raises:
        InputError: A part does not fit its region of `layout`.
        IndexError: A row does not fit `shape`.
    """
    lengths = rows.lengths
    num_rows, n = len(lengths), lengths.shape[1] - 1
    rows_per_sequence = num_rows // shape.num_sequences
    starts, label_starts = part_starts(lengths, shape.num_sequences, layout)

    row, part, offset = token_places(lengths)
    sequence, index, prompt = row // rows_per_sequence, starts[row, part] + offset, lengths[row, 0]
    previous = np.where(offset == 0, starts[row, 0] + prompt - 1, index - 1)
    response_id = row % rows_per_sequence * n + part - 1
    is_label = part > 0
    label = label_starts[row[is_label], part[is_label] - 1] + offset[is_label]

    token_shape = shape.num_sequences, shape.length
    label_shape = shape.num_sequences, shape.num_labels
    token_at, label_at = (sequence, index), (sequence[is_label], label)
    positions = np.where(part == 0, offset, prompt + offset)
    row_at = row, index - starts[row, 0]
    arrays = {
        "tokens": scatter(token_shape, pad, token_at, rows.ids),
        "positions": scatter(token_shape, 0, token_at, positions),
        "segment_ids": scatter((num_rows, shape.row_length), -1, row_at, part),
        "labels": scatter(label_shape, pad, label_at, rows.ids[is_label]),
        "logit_positions": scatter(label_shape, 0, label_at, previous[is_label]),
        "response_ids": scatter(
            label_shape, rows_per_sequence * n, label_at, response_id[is_label]
        ),
        "reward_positions": last_indices(lengths, starts),
    }
    return Inputs(**arrays)  # type: ignore[arg-type]  # NumPy arrays


def token_places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row of each token, its part (0: the prompt, i: response i) and its index in the part."""
    flat = lengths.ravel()
    part = np.repeat(np.arange(flat.size), flat)
    offset = np.arange(len(part)) - np.repeat(np.cumsum(flat) - flat, flat)
    return *np.divmod(part, lengths.shape[1]), offset


def part_starts(
    lengths: np.ndarray, num_sequences: int, layout: Layout | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first index of each part within its sequence, and the first label of each response."""
    if layout is None:
        return end_to_end_starts(lengths, num_sequences)
    check_regions(lengths, layout)
    return region_starts(len(lengths), layout)


def last_indices(lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The last index of each response [B, n]; that of the prompt where a response is empty."""
    ends = np.where(lengths[:, 1:], starts[:, 1:] + lengths[:, 1:], starts[:, :1] + lengths[:, :1])
    return (ends - 1).astype(np.int32)


def end_to_end_starts(lengths: np.ndarray, num_sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """The starts of rows that stand end to end."""

    def starts(counts: np.ndarray) -> np.ndarray:
        by_sequence = counts.reshape(num_sequences, -1)
        return (np.cumsum(by_sequence, 1) - by_sequence).reshape(counts.shape)

    return starts(lengths), starts(lengths[:, 1:])


def region_starts(rows: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The starts of rows in regions."""
    labels = layout.response * np.arange(layout.num_responses)
    parts = np.concatenate([[0], layout.start + labels])
    return np.tile(parts, (rows, 1)), np.tile(labels, (rows, 1))


def scatter(
    shape: tuple[int, int], fill: int, indices: tuple[np.ndarray, np.ndarray], values: np.ndarray
) -> np.ndarray:
    array = np.full(shape, fill, np.int32)
    array[indices] = values
    return array


def check_regions(lengths: np.ndarray, layout: Layout) -> None:
    n = lengths.shape[1] - 1
    if n != layout.num_responses:
        raise InputError(f"{layout}: has {layout.num_responses} responses, the rows have {n}")
    longest = {"prompt": lengths[:, 0].max(), "response": lengths[:, 1:].max(initial=0)}
    regions = {"prompt": layout.start, "response": layout.response}
    for name, length in longest.items():
        if length > regions[name]:
            raise InputError(
                f"{layout}: a {name} of {length} tokens does not fit its region of {regions[name]}"
            )
