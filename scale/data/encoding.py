"""Rows to token ids: in chunks, and on all cores where there are many."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

from scale.console import Rate, console, track
from scale.data.rows import place
from scale.data.tokenizer import RefusedRow, Tokenizer
from scale.errors import InputError
from scale.parallel.workers import usable_cores, workers

CHUNK = 2**14  # rows that are encoded at a time
MANY = 6 * CHUNK  # rows that are worth the start of other processes, some seconds

Column = list[list[int]]


def encoded(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], fields: Sequence[str], source: str
) -> Iterator[tuple[list[int], ...]]:
    """The tokens of the prompt and of each response of the rows.

    Args:
        tokenizer: The tokenizer.
        rows: Rows with `prompt` and the fields.
        fields: The columns that hold responses.
        source: The name of the user's file, for messages.

    Raises:
        InputError: A row has no tokens; the message names it.
    """
    rate, starts = Rate(), range(0, len(rows), CHUNK)
    with ExitStack() as stack:
        chunks = in_order(tokenizer, fields, [rows[i : i + CHUNK] for i in starts], stack)
        for start in track(starts, "tokenize", status=rate):
            try:
                columns = next(chunks)
            except RefusedRow as error:
                raise InputError(f"{place(source, start + error.index + 1)}: {error}") from error
            rate.rows += len(columns[0])
            yield from zip(*columns, strict=True)


def in_order(
    tokenizer: Tokenizer,
    fields: Sequence[str],
    chunks: Sequence[Sequence[dict[str, Any]]],
    stack: ExitStack,
) -> Iterator[list[Column]]:
    """The columns of each chunk: by this process, or by workers that end with `stack`."""
    encode = partial(columns_of, tokenizer, fields)
    is_worker = multiprocessing.parent_process() is not None
    if is_worker or sum(map(len, chunks)) < MANY:
        return map(encode, chunks)
    pool = stack.enter_context(ended_at_once(workers(len(usable_cores()))))
    results = pool.map(encode, chunks)
    return stack.enter_context(closing(results))  # type: ignore[type-var]  # it is a generator


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


def columns_of(
    tokenizer: Tokenizer, fields: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[Column]:
    """The tokens of the prompts, and of the responses of each field."""
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


def warn_of_names(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], fields: Sequence[str], source: str
) -> None:
    """Say how many rows spell special tokens, as texts do that a template has been applied to."""
    if not source:
        return
    spelled = [
        i
        for i, row in enumerate(rows)
        if any(
            isinstance(row[name], str) and tokenizer.special_names.search(row[name])
            for name in ("prompt", *fields)
        )
    ]
    if spelled:
        first = place(source, spelled[0] + 1)
        console.print(
            f"  {source}: {len(spelled)} of {len(rows)} rows spell special tokens, the first at "
            f"{first}: they are read as text; a conversation is given as turns",
            markup=False,
        )
