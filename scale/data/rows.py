"""TODO scale.data.rows."""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.formats import SCORES, Row, _Fault, _format, _kind, _row, _width
from scale.errors import InputError
from scale.files import atomic


def read(path: Path, need: tuple[str, ...] = ("prompt", "chosen", "rejected")) -> list[Row]:
    """The rows of a JSONL (`.jsonl`, `.json`) or Parquet file, normalised and checked, in the file's order.

    Every row has the fields of `need`; a needed `completion` is `chosen` where the file has preferences.
    Raises InputError for whatever is malformed, missing, blank or inconsistent. A `rejected` of white space is
    accepted (HH holds some: to say nothing is a reply, and a bad one); a `chosen` or a prompt of it is not.
    """
    records = list(_records(path))
    if not records:
        raise InputError(f"{path}: the file has no rows")
    rows = [_located(where, _row, raw, need) for where, raw in records]
    wheres = [where for where, _ in records]
    _check_alike(wheres, "mixed formats", [_format(raw) for _, raw in records])
    _check_alike(wheres, f"field {SCORES[0]!r}", [_width(row.get(SCORES[0])) for row in rows])
    return rows


def write(path: Path, rows: list[Row], provenance: dict[str, str]) -> None:
    """Write rows as Parquet, atomically; equal rows and provenance give equal bytes (under one pyarrow).

    Raises InputError naming a column whose values have no common type.
    """
    names = sorted({name for row in rows for name in row})
    columns = {name: _column(path, name, rows) for name in names}
    metadata = {"provenance": json.dumps(provenance, sort_keys=True)}
    with atomic(path) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), temporary)


def provenance(path: Path) -> dict[str, str]:
    """What `write` was told of the file's origin; {} for JSONL and for other programs' Parquet."""
    if path.suffix != ".parquet":
        return {}
    metadata = _parquet(path, pq.read_schema).metadata or {}
    return json.loads(metadata.get(b"provenance", b"{}"))


def require(path: Path, **hashes: str) -> None:
    """Refuse a file whose provenance names another model, tokenizer or data.

    Raises InputError saying which of `hashes` differ; those that the file says nothing of are not checked.
    """
    origin = provenance(path)
    faults = [
        f"columns were computed for another {key}: file has {origin[key]}, this is {value}"
        for key, value in hashes.items()
        if origin.get(key, value) != value
    ]
    if faults:
        raise InputError(f"{path}: " + "; ".join(faults))


def split(rows: list[Row], shares: dict[str, float], seed: int) -> dict[str, list[Row]]:
    """Parts of `rows` of about the given shares, by a hash of (seed, prompt) and not by order.

    All rows of one prompt, up to case and white space, are in one part. Shares not summing to 1: ValueError.
    """
    total = sum(shares.values())
    if abs(total - 1) > 1e-9 or min(shares.values()) < 0:
        raise ValueError(f"shares must be at least 0 and sum to 1: {shares}")
    bounds = [bound / total for bound in accumulate(shares.values())]
    parts: dict[str, list[Row]] = {name: [] for name in shares}
    for row in rows:
        point = _uniform(seed, row["prompt"])
        parts[next(name for name, bound in zip(shares, bounds, strict=True) if point < bound)].append(row)
    return parts


def _uniform(seed: int, prompt: str | list[Row]) -> float:
    """A number in [0, 1) from the seed and the prompt's normalised text."""
    texts = [prompt] if isinstance(prompt, str) else [t[key] for t in prompt for key in ("role", "content")]
    key = json.dumps([seed, *(" ".join(text.casefold().split()) for text in texts)])
    return (int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 11) / 2**53


def _column(path: Path, name: str, rows: list[Row]) -> pa.Array:
    try:
        return pa.array([row.get(name) for row in rows])
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: field {name!r}: no Parquet type holds all its values: {error}") from error


def _records(path: Path) -> Iterator[tuple[str, Row]]:
    """Each raw row and where it stands."""
    if path.suffix in (".jsonl", ".json"):
        return _json_records(path)
    if path.suffix == ".parquet":
        rows = _parquet(path, lambda file: pq.ParquetFile(file).read().to_pylist())
        return ((f"{path}: row {i}", row) for i, row in enumerate(rows, 1))
    raise InputError(f"{path}: suffix {path.suffix!r}; accepted are .jsonl, .json (lines) and .parquet")


def _json_records(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        data = path.read_bytes().rstrip()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from error
    for i, line in enumerate(data.split(b"\n") if data else [], 1):
        yield f"{path}:{i}", _json_object(f"{path}:{i}", line)


def _json_object(where: str, line: bytes) -> Row:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: invalid UTF-8 at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object but {_kind(value)}")
    return value


def _parquet(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot read the file: No such file or directory") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: invalid UTF-8: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: malformed Parquet: {error}") from error


def _located(where: str, function: Callable[..., Row], *args: Any) -> Row:
    try:
        return function(*args)
    except _Fault as fault:
        raise InputError(f"{where}: {fault}") from fault


def _check_alike(wheres: list[str], what: str, values: list[str]) -> None:
    for where, value in zip(wheres, values, strict=True):
        if value != values[0]:
            raise InputError(f"{where}: {what}: {value}, but {wheres[0]} has {values[0]}")
