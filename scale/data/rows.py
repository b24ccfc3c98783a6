"""Rows of text, in and out: JSONL or Parquet to checked rows, rows to Parquet, rows to parts.

The way of a row: a file -> `pieces.py` -> `read` (here; `formats.py` checks it), or `table.scan`
for a file of any size -> `dataset.make_dataset` (token ids) -> `packing.pack` (a batch).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.formats import LOGPS, SCORES, Prompt, Row, format_name, score_width
from scale.data.hub_rows import row_files
from scale.data.pieces import Piece, parsed, pieces, readable, record_of
from scale.errors import InputError
from scale.files import atomic

COMMON = ("ref_sample", *LOGPS)  # columns that all rows have, or none
GROUP = 2**15  # rows that are written at once


def read(
    path: Path,
    need: tuple[str, ...] = ("prompt", "chosen", "rejected"),
    refused: list[str] | None = None,
) -> list[Row]:
    """The rows of a file in its order, each in the one form that `scale.data.formats` describes.

    Args:
        path: A JSONL (`.jsonl`, `.json`) or Parquet file, a pattern of such files, or the id of a
            data set of the hub.
        need: Fields that every row must have. A `completion` that the file lacks is its `chosen`.
        refused: Where the errors of rows go, which are then left out. Default: the first is raised.

    Returns:
        The rows. A `rejected` may be empty: HH has such rows, and to say nothing is a bad reply.

    Raises:
        InputError: A row is malformed, lacks a field, has a blank prompt, `chosen` or `completion`,
            or differs from the first row in its format, in its number of scores or in which columns
            of pi_ref it has.
    """
    return list(checked(path, need, refused))


def checked(
    path: Path, need: tuple[str, ...], refused: list[str] | None = None
) -> Iterator[Row]:
    """The rows of `read`, one after another: a file is not in memory as a whole.

    The file is checked when the last one has been taken.
    """
    first: tuple[str, dict[str, str]] | None = None
    is_empty = is_refused = True
    for where, record in (item for piece in pieces(path) for item in _items(piece)):
        is_empty = False
        try:
            record = record_of(where, record)
            row = parsed(where, record, need)
            traits = _traits(record, row)
            first = first or (where, traits)
            _check_alike(where, traits, *first)
        except InputError as error:
            if refused is None:
                raise
            refused.append(str(error))
        else:
            is_refused = False
            yield row
    if is_empty:
        raise InputError(f"{path}: the file has no rows")
    if is_refused:
        raise InputError(f"{path}: no row can be used; {(refused or [''])[0]}")


def _items(piece: Piece) -> Iterator[tuple[str, Row | bytes]]:
    """Each row as its file has it, after its place."""
    with readable(Path(piece.source)):
        values = piece.values()
    return zip(piece.places(), values, strict=True)


def _traits(record: Row, row: Row) -> dict[str, str]:
    """What all rows of a file must have in common."""
    columns = {f"field {n!r}": "a value" if n in row else "no value" for n in COMMON}
    width = {f"field {SCORES[0]!r}": score_width(row.get(SCORES[0]))}
    return {"mixed formats": format_name(record)} | width | columns


def _check_alike(
    where: str, traits: dict[str, str], first: str, expected: dict[str, str]
) -> None:
    for name, value in traits.items():
        if value != expected[name]:
            raise InputError(f"{where}: {name}: {value}, but {first} has {expected[name]}")


def write(
    path: Path, rows: Iterable[Row], provenance: dict[str, str], types: pa.Schema | None = None
) -> int:
    """Write rows as Parquet, whole or not at all; `GROUP` of them are in memory at a time.

    Equal rows and provenance give equal bytes with one version of pyarrow.

    Args:
        path: The file.
        rows: Rows; a column that some rows lack is null there.
        provenance: Which model, tokenizer, data and limits the columns come from, for `require`.
        types: What `column_types` says of the columns; others are in the first `GROUP` rows.
            Default: the rows are in memory, and it is asked.

    Returns:
        How many rows there are.

    Raises:
        InputError: The values of a column have no common type.
    """
    metadata = {"provenance": json.dumps(provenance, sort_keys=True)}
    if types is None:
        types = column_types(path, rows)
    groups = _groups(rows)
    first = next(groups, [])
    types = _common_types(path, types, column_types(path, first)).with_metadata(metadata)
    total = 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, types) as writer:
        for group in chain([first], groups):
            columns = [_column(path, field.name, group, field.type) for field in types]
            writer.write_table(pa.Table.from_arrays(columns, schema=types))
            total += len(group)
    return total


def column_types(path: Path, rows: Iterable[Row]) -> pa.Schema:
    """The types of the columns that some of the rows have, in the order of their names.

    Args:
        path: Their file, for messages.
        rows: Rows.

    Raises:
        InputError: The values of a column have no common type, and could not be written.
    """
    types = pa.schema([])
    for group in _groups(rows):
        names = sorted({name for row in group for name in row})
        own = pa.schema([(name, _column(path, name, group).type) for name in names])
        types = _common_types(path, types, own)
    return types


def _common_types(path: Path, first: pa.Schema, second: pa.Schema) -> pa.Schema:
    try:
        types = pa.unify_schemas([first, second], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{path}: no Parquet type holds all values of a field: {error}") from error
    return pa.schema(sorted(types, key=lambda field: field.name))


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while group := list(islice(rows, GROUP)):
        yield group


def provenance(path: Path) -> dict[str, str]:
    """The provenance that `write` stored; empty for JSONL and for the Parquet of other programs.

    Of several files it is what all record alike.
    """
    records = [_provenance(file) for file in row_files(path)]
    alike = [set(record.items()) for record in records]
    return dict(set.intersection(*alike)) if alike else {}


def _provenance(path: Path) -> dict[str, str]:
    if path.suffix != ".parquet":
        return {}
    with readable(path):
        metadata = pq.read_schema(path).metadata or {}
    try:
        record = json.loads(metadata.get(b"provenance", b"{}"))
    except ValueError:
        return {}
    is_ours = isinstance(record, dict) and all(isinstance(x, str) for x in record.values())
    return record if is_ours else {}


def require(path: Path, expected: dict[str, str]) -> None:
    """Refuse a file whose columns were computed with another model or tokenizer, or other limits.

    Args:
        path: A file of rows.
        expected: The provenance of this run. A key that the file does not record is not checked.

    Raises:
        InputError: Some values differ; the message names them.
    """
    for file in row_files(path):
        recorded = _provenance(file)
        faults = [
            f"columns were computed with {key} {recorded[key]}; this run has {value}"
            for key, value in expected.items()
            if recorded.get(key, value) != value
        ]
        if faults:
            raise InputError(f"{file}: " + "; ".join(faults))


def split(rows: list[Row], shares: dict[str, float], seed: int) -> dict[str, list[Row]]:
    """Split rows by a hash of (seed, prompt), so that neither their order nor their number matters.

    All rows of one prompt, up to case and white space, are in one part.

    Args:
        rows: Rows with a `prompt`.
        shares: The name of each part and about what share of the prompts it gets.
        seed: Another seed gives another split.

    Returns:
        The rows of each part.

    Raises:
        ValueError: A share is negative, or the shares do not sum to 1.
    """
    names = list(shares)
    parts: dict[str, list[Row]] = {name: [] for name in names}
    for row, part in zip(rows, part_of_each(rows, shares, seed), strict=True):
        parts[names[part]].append(row)
    return parts


def part_of_each(rows: Iterable[Row], shares: dict[str, float], seed: int) -> np.ndarray:
    """The index of each row's part in `split`, which has the arguments and errors [N]."""
    total = sum(shares.values())
    if abs(total - 1) > 1e-9 or min(shares.values()) < 0:
        raise ValueError(f"shares must be at least 0 and sum to 1: {shares}")
    bounds = [bound / total for bound in accumulate(shares.values())]
    points = (_uniform(seed, row["prompt"]) for row in rows)
    parts = (next(i for i, bound in enumerate(bounds) if point < bound) for point in points)
    return np.fromiter(parts, np.int8)


def _uniform(seed: int, prompt: Prompt) -> float:
    """A number in [0, 1) from the seed and the prompt's normalised text."""
    if isinstance(prompt, str):
        texts = [prompt]
    else:
        texts = [turn[key] for turn in prompt for key in ("role", "content")]
    key = json.dumps([seed, *(" ".join(text.casefold().split()) for text in texts)])
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 11) / 2**53


def _column(path: Path, name: str, rows: list[Row], of: pa.DataType | None = None) -> pa.Array:
    try:
        return pa.array([row.get(name) for row in rows], of)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(
            f"{path}: field {name!r}: no Parquet type holds all its values: {error}"
        ) from error
