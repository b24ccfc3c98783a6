"""Files of rows, read piece by piece: lines of JSON, or batches of Arrow.

A piece is small, and another process can parse it. So no process needs memory for a whole file.

Arrow reads Parquet here. Its reader of JSON is not used: it gives a file one schema, whose errors
name neither the line nor the field, and it takes the last of two equal names. Grain would read what
lies on the disk as token ids at random, which NumPy's memory maps do.
"""

import codecs
import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, count, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.formats import LINES, FieldError, Row, parse_row, type_name
from scale.data.hub_rows import row_files
from scale.errors import InputError

PIECE = 2**11  # rows of a piece
LONGEST = 2**26  # bytes of a line
EXPANSION, LEAST = 200, 2**30  # an archive may be so many times its size, or so many bytes


@dataclass(frozen=True)
class Piece:
    """Some rows of a file, in its order."""

    source: str
    """The name of the file."""
    numbers: Sequence[int]
    """Which rows of the file they are, from 1."""
    records: Sequence[bytes] | pa.RecordBatch
    """Lines of JSON, or the values of rows."""

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, mask: np.ndarray) -> "Piece":
        """The rows whose value in `mask` is true."""
        numbers = list(compress(self.numbers, mask))
        if isinstance(self.records, pa.RecordBatch):
            return Piece(self.source, numbers, self.records.filter(pa.array(mask)))
        return Piece(self.source, numbers, list(compress(self.records, mask)))

    def places(self) -> list[str]:
        """The name of each row in messages."""
        return [place(self.source, number) for number in self.numbers]

    def rows(self, need: tuple[str, ...]) -> Iterator[Row]:
        """The rows, one after another, in the one form that `scale.data.formats` describes.

        Raises:
            InputError: A row is malformed or lacks a field.
        """
        with readable(Path(self.source)):
            records = self.values()
        for where, record in zip(self.places(), records, strict=True):
            yield parsed(where, record_of(where, record), need)

    def values(self) -> Sequence[bytes | Row]:
        """Lines of JSON, or rows as Parquet has them."""
        if isinstance(self.records, pa.RecordBatch):
            return self.records.to_pylist()
        return self.records


def pieces(path: Path) -> Iterator[Piece]:
    """The rows of the files that a path means, in order.

    Args:
        path: A JSONL or Parquet file, a pattern of such files, or the id of a data set of the hub.

    Raises:
        InputError: A file cannot be read.
    """
    for file in row_files(path) or [path]:
        if not (file.name.endswith(LINES) or file.suffix == ".parquet"):
            raise InputError(
                f"{file}: suffix {file.suffix!r}; accepted are .jsonl, .json (lines), these with "
                ".gz, and .parquet"
            )
        numbers = count(1)
        with readable(file):
            for records in batches(file) if file.suffix == ".parquet" else lines(file):
                yield Piece(str(file), list(islice(numbers, len(records))), records)


def place(source: str, number: int) -> str:
    """The n-th row of a file: `FILE:LINE`, or `FILE: row N` where rows are no lines of one file."""
    is_file = source.endswith(LINES) and not glob.has_magic(source)
    return f"{source}:{number}" if is_file else f"{source}: row {number}"


def lines(path: Path) -> Iterator[list[bytes]]:
    """Some lines of a file at a time, without the blank ones at its end."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        own = without_blank_end(line.removesuffix(b"\n") for line in bounded(path, file))
        while some := list(islice(own, PIECE)):
            yield some


def bounded(path: Path, file: Any) -> Iterator[bytes]:
    """The lines of an open file, which are not in memory before it is known how long they are."""
    total, most = 0, max(LEAST, EXPANSION * path.stat().st_size)
    for number in count(1):
        line = file.readline(LONGEST + 1)
        total += len(line)
        if len(line) > LONGEST:
            raise InputError(f"{place(str(path), number)}: the line has more than {LONGEST} bytes")
        if total > most:
            raise InputError(f"{path}: expands to more than {EXPANSION} times its size")
        if not line:
            return
        yield line


def without_blank_end(own: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without the mark of UTF-8 before the first, and without white space after the last."""
    last, blank = next(own, b"").removeprefix(codecs.BOM_UTF8), 0
    for line in own:
        if line.strip():
            yield last
            yield from repeat(b"", blank)
            last, blank = line, 0
        else:
            blank += 1
    if last.strip():
        yield last.rstrip()


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Some rows of a Parquet file at a time; the file is mapped into memory."""
    with pq.ParquetFile(path, memory_map=True) as file:
        names = file.schema_arrow.names
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{path}: field {name!r}: is there twice")
        total, most = 0, max(LEAST, EXPANSION * path.stat().st_size)
        for batch in file.iter_batches(PIECE):
            total += batch.nbytes
            if total > most:
                raise InputError(f"{path}: expands to more than {EXPANSION} times its size")
            yield batch


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say which file cannot be read, and why.

    Raises:
        InputError: It cannot.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot read the file: No such file or directory") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8: {error}") from error
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        if path.suffix == ".parquet":
            raise InputError(f"{path}: malformed Parquet: {error}") from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot read the file: {reason}") from error


def record_of(where: str, record: bytes | Row) -> Row:
    """The fields of a row, as the file has them.

    Raises:
        InputError: It is a line that holds no JSON object.
    """
    if not isinstance(record, bytes):
        return record
    try:
        value = DECODER.decode(record.decode())
    except FieldError as error:
        raise InputError(f"{where}: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: invalid UTF-8 at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object but {type_name(value)}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object, of which `json` would keep the last of two equal names in silence."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise FieldError(next(name for name in names if names.count(name) > 1), "is there twice")
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates)


def parsed(where: str, record: Row, need: tuple[str, ...]) -> Row:
    """`parse_row`, whose error names the row."""
    try:
        return parse_row(record, need)
    except FieldError as error:
        raise InputError(f"{where}: {error}") from error
