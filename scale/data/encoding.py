"""Rows to token ids: some at a time, and on all cores where there are many."""

import gc
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scale.console import Rate, track
from scale.data.formats import Row
from scale.data.pieces import PIECE, Piece
from scale.data.table import Table
from scale.data.token_cache import GrowingArray
from scale.data.tokenizer import RefusedRow, Tokenizer
from scale.parallel.workers import usable_cores, workers

MANY = 48 * PIECE  # rows that are worth the start of other processes, some seconds

Column = list[list[int]]


class Arrays(NamedTuple):
    """The tokens and targets of the rows that are kept, as `scale.data.dataset.Dataset` has them.

    Attributes:
        kept: Which of all rows they are [N].
        ids: All token ids, end to end.
        ends: Where each part ends in `ids` [N, 1 + n].
        ref_logps: log pi_ref of the responses [N, n or 0].
        rewards: Of both sides by each reward model [N, 2, K].
    """

    kept: np.ndarray
    ids: np.ndarray
    ends: np.ndarray
    ref_logps: np.ndarray
    rewards: np.ndarray


class Counts(NamedTuple):
    """What became of rows."""

    total: int = 0
    kept: int = 0
    cut: int = 0
    """Prompts that were cut."""
    identical: int = 0
    """Pairs of equal tokens, which are dropped."""
    spelled: int = 0
    """Rows that spell special tokens."""
    first_spelled: int = -1
    """The first of them."""

    def plus(self, other: "Counts") -> "Counts":
        sums = (a + b for a, b in zip(self[:-1], other[:-1], strict=True))
        first = self.first_spelled if self.spelled else other.first_spelled
        return Counts(*sums)._replace(first_spelled=first)


@dataclass(frozen=True)
class Chunk:
    """Some of the rows to encode, in memory or as the file has them."""

    start: int
    """The index of the first one among all rows."""
    rows: Sequence[Row] | Piece
    need: tuple[str, ...] = ()

    def read(self) -> Sequence[Row]:
        return [*self.rows.rows(self.need)] if isinstance(self.rows, Piece) else self.rows


Encoded = tuple[Arrays, Counts]
Encode = Callable[[Chunk], Encoded]


def chunks_of(rows: Sequence[Row]) -> Iterator[Chunk]:
    """All rows, some at a time."""
    if not isinstance(rows, Table):
        yield from (Chunk(i, rows[i : i + PIECE]) for i in range(0, len(rows), PIECE))
        return
    start = 0
    for piece in filter(len, rows.pieces()):
        yield Chunk(start, piece, rows.need)
        start += len(piece)


def encoded(encode: Encode, rows: Sequence[Row]) -> Iterator[Encoded]:
    """The tokens and targets of all rows, some at a time, each with ends of its own.

    Raises:
        InputError: A row has no tokens; the message names it.
    """
    rate, total = Rate(), len(rows)
    done = track(range(total), "tokenize", status=rate)
    with ExitStack() as stack:
        for arrays, counts in in_order(encode, chunks_of(rows), total >= MANY, stack):
            rate.rows += counts.total
            deque(islice(done, counts.total), maxlen=0)
            yield arrays, counts
        deque(done, maxlen=0)


def in_order(
    encode: Encode, chunks: Iterable[Chunk], many: bool, stack: ExitStack
) -> Iterator[Encoded]:
    """What `encode` makes of each chunk: in this process, or in workers that end with `stack`."""
    cores = len(usable_cores())
    if not many or cores == 1 or multiprocessing.parent_process() is not None:
        return map(partial(uncollected, encode), chunks)
    pool = stack.enter_context(ended_at_once(workers(cores, partial(install, encode))))
    return stack.enter_context(closing(window(pool, chunks, 3 * cores)))


def window(
    pool: ProcessPoolExecutor, chunks: Iterable[Chunk], size: int
) -> Generator[Encoded, None, None]:
    """The results in order, while so many chunks are at work or wait: more would need memory."""
    waiting: deque = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode_installed, chunk))
        if len(waiting) >= size:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


installed: list[Encode] = []  # in a worker: how it encodes; a tokenizer is too large for each call


def install(encode: Encode) -> None:
    installed[:] = [encode]


def encode_installed(chunk: Chunk) -> Encoded:
    return uncollected(installed[0], chunk)


def uncollected(encode: Encode, chunk: Chunk) -> Encoded:
    """Encode without Python's garbage collector, which takes a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return encode(chunk)
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def ended_at_once(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """The pool, whose processes an interrupt or an error kills: they write nothing."""
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_to_end(chunks: Iterable[Encoded]) -> Iterator[Encoded]:
    """The chunks, with ends among the ids of all of them."""
    tokens = 0
    for arrays, counts in chunks:
        yield arrays._replace(ends=arrays.ends + tokens), counts
        tokens += len(arrays.ids)


def joined(chunks: Iterable[Encoded]) -> Encoded:
    """The chunks as one, in memory."""
    parts, counts = zip(*end_to_end(chunks), strict=True)
    arrays = Arrays(*map(np.concatenate, zip(*parts, strict=True)))
    return arrays, total(counts)


def stored(chunks: Iterable[Encoded], folder: Path) -> Counts:
    """Write the chunks as one into files of a folder, which `load` reads."""
    sums = Counts()
    files: list[GrowingArray] = []
    with ExitStack() as stack:
        for arrays, counts in end_to_end(chunks):
            if not files:
                paths = (folder / f"{name}.npy" for name in Arrays._fields)
                new = map(GrowingArray, paths, arrays)
                files = [stack.enter_context(closing(file)) for file in new]
            for file, array in zip(files, arrays, strict=True):
                file.add(array)
            sums = sums.plus(counts)
    return sums


def total(counts: Iterable[Counts]) -> Counts:
    sums = Counts()
    for part in counts:
        sums = sums.plus(part)
    return sums


def load(folder: Path) -> Arrays:
    """The arrays that `stored` wrote, mapped into memory."""
    return Arrays(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Arrays._fields))


def columns_of(
    tokenizer: Tokenizer, fields: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[Column]:
    """The tokens of the prompts, and of the responses of each field.

    Raises:
        RefusedRow: A row has no tokens.
    """
    prompts = tokenizer.prompts_ids([row["prompt"] for row in rows])
    return [prompts, *(response_ids(tokenizer, rows, field) for field in fields)]


def response_ids(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], field: str
) -> list[list[int]]:
    """The tokens of a column of responses: those that were sampled, where the rows have them."""
    if field == "ref_sample" and all("ref_sample_ids" in row for row in rows):
        size = tokenizer.vocab_size
        return [within(size, i, row["ref_sample_ids"]) for i, row in enumerate(rows)]
    complete = [row.get(f"{field}_complete", True) for row in rows]
    return tokenizer.responses_ids([row[field] for row in rows], complete)


def within(vocab_size: int, index: int, ids: list[int]) -> list[int]:
    """The tokens of row `index`, which are some of the vocabulary."""
    if max(ids, default=0) >= vocab_size:
        fault = f"field 'ref_sample_ids': {max(ids)} is not one of {vocab_size} tokens"
        raise RefusedRow(index, fault)
    return ids


def names_in(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], fields: Sequence[str]
) -> list[int]:
    """The rows that spell special tokens, as texts do that a template has been applied to."""
    return [
        i
        for i, row in enumerate(rows)
        if any(
            isinstance(row[name], str) and tokenizer.special_names.search(row[name])
            for name in ("prompt", *fields)
        )
    ]
