"""Files of preference rows with a fault, in each format, read here and independently."""

import copy
import gzip
import random
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzz import independent
from benchmarks.fuzz.mutations import as_text, damaged, mutated
from scale.data.rows import read
from scale.errors import InputError

NAMES = (
    "prompt", "chosen", "rejected", "completion", "system", "conversations", "messages", "role",
    "content", "from", "value", "type", "text", "info", "summaries", "choice", "tools", "post",
    "score_chosen", "score_rejected", "ref_chosen_logps", "ref_sample", "ref_sample_ids",
)  # fmt: skip
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")
Row = dict[str, Any]


def turn(role: str, text: Any) -> Row:
    return {"role": role, "content": text}


def user(text: Any) -> Row:
    return turn("user", text)


def bot(text: Any) -> Row:
    return turn("assistant", text)


def part(text: str) -> Row:
    return {"type": "text", "text": text}


def formats(i: int) -> list[Row]:
    """A row in each format; rows of different i have different texts."""
    ask, good, bad = f"Question {i}, é?", f"Good {i}.", f"Bad \U0001f3f3 {i}."
    hh = f"\n\nHuman: {ask}\n\nAssistant:"
    talk = [turn("system", "Be kind."), user("Hi."), bot("Hello."), user(ask)]
    sides = {"chosen": good, "rejected": bad}
    return [
        {"prompt": ask, **sides},
        {"prompt": ask, **sides, "score_chosen": i + 0.5, "score_rejected": -1.0, "n": i},
        {"prompt": ask, **sides, "system": "Be kind.", "source": "web"},
        {"prompt": talk, **sides},
        {"prompt": talk, "chosen": [bot(good)], "rejected": [bot(bad)]},
        {"prompt": ask, "chosen": [user(ask), bot(good)], "rejected": [user(ask), bot(bad)]},
        {"chosen": [*talk, bot(good)], "rejected": [*talk, bot(bad)]},
        {"prompt": [user([part(ask), part("!")])], "chosen": [bot([part(good)])],
         "rejected": bot([part(bad)])},
        {"chosen": f"{hh} {good}", "rejected": f"{hh} {bad}"},
        {"conversations": [{"from": "human", "value": ask}],
         "chosen": {"from": "gpt", "value": good}, "rejected": {"from": "gpt", "value": bad}},
        {"info": {"post": ask, "title": "T", "subreddit": "s"}, "choice": 0,
         "summaries": [{"text": good}, {"text": bad}]},
    ]  # fmt: skip


def rows_case(rng: random.Random, folder: Path) -> str:
    """One file; its outcome: `accepted`, `refused`, or `wrong: ...`."""
    kind = rng.randrange(len(formats(0)))
    rows = [formats(i)[kind] for i in range(rng.choice((1, 1, 2, 3)))]
    expected = [independent.answer(row) for row in copy.deepcopy(rows)]
    path = folder / f"rows{rng.choice(SUFFIXES)}"
    if rng.random() < 0.15:
        write_harmlessly(rng, path, rows)
        return compared(path, expected)
    write_faulty(rng, path, rows)
    return compared(path, None)


def compared(path: Path, expected: list[independent.Answer] | None) -> str:
    """What `read` makes of a file beside the independent reader, or beside what it must give."""
    try:
        ours = [as_answer(row) for row in read(path)]
    except InputError as error:
        fault = fault_of(error, path)
        return f"wrong: harmless, but refused: {error}" if expected else fault
    try:
        theirs = expected or independent.answers(path)
    except Exception as error:
        return f"wrong: read, but not independently: {error!r}"
    return "accepted" if ours == theirs else f"wrong: {ours} for {theirs}"


def fault_of(error: InputError, path: Path) -> str:
    """`refused`, where the error is one line of bearable length that names the file."""
    text = str(error)
    if path.name not in text:
        return f"wrong: the file is not named: {text}"
    if len(text.splitlines()) != 1 or len(text) > 2000:
        return f"wrong: {len(text)} characters in {len(text.splitlines())} lines: {text[:300]}"
    return "refused"


def as_answer(row: Row) -> independent.Answer:
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = [(turn["role"], turn["content"]) for turn in prompt]
    return prompt, row["chosen"], row["rejected"]


def write_harmlessly(rng: random.Random, path: Path, rows: list[Row]) -> None:
    """Write rows in another way that means the same."""
    more = {"extra": rng.choice(([1, 2], ["a"])), "nothing": None, "note": "x", "tree": {"a": 1}}
    for row in rows:
        row |= more
    rows = [dict(rng.sample(sorted(row.items()), len(row))) for row in rows]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, compression=rng.choice(CODECS))
        return
    ending = rng.choice((b"\n", b"\r\n", b" \n"))
    data = rng.choice((b"", b"\xef\xbb\xbf")) + b"".join(as_text(rng, r) + ending for r in rows)
    write_bytes(path, data + rng.choice((b"", b"\n", b"\r\n\r\n", b"  \n")))


def write_faulty(rng: random.Random, path: Path, rows: list[Row]) -> None:
    """Write rows of which one is changed, or a file whose bytes are."""
    place = rng.randrange(len(rows))
    changed: Any = rows[place]
    if harms_values := rng.random() < 0.75:
        for _ in range(rng.choice((1, 1, 2, 3))):
            changed = mutated(rng, changed, NAMES) if isinstance(changed, dict) else changed
    lines = [as_text(rng, changed if i == place else row) for i, row in enumerate(rows)]
    rows[place] = changed
    if rng.random() < 0.005:
        lines[place] = b'{"prompt": ' + rng.choice((b"[", b'{"a":')) * 100_000
    data = parquet(rng, path, rows) if path.suffix == ".parquet" else b"\n".join(lines) + b"\n"
    if not harms_values or rng.random() < 0.05:
        data = damaged(rng, data)
    if path.suffix == ".gz":
        data = gzip.compress(data, 1)
        data = damaged(rng, data) if rng.random() < 0.1 else data
    path.write_bytes(data)


def write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


CODECS: tuple[Literal["snappy", "gzip", "zstd", "none"], ...] = ("snappy", "gzip", "zstd", "none")
TYPES = (
    pa.large_string(), pa.binary(), pa.int8(), pa.float16(), pa.float32(), pa.date32(), pa.bool_(),
    pa.dictionary(pa.int32(), pa.string()), pa.decimal128(38, 3), pa.list_(pa.string()),
    pa.string_view(), pa.timestamp("ns"), pa.duration("us"), pa.time64("ns"),
)  # fmt: skip


def parquet(rng: random.Random, path: Path, rows: list[Row]) -> bytes:
    """A file of these rows, or of a plain one where they have no types that it could hold."""
    for some in (rows, formats(0)[:1]):
        try:
            table = retyped(rng, pa.Table.from_pylist(some))
            pq.write_table(table, path, compression=rng.choice(CODECS))
            break
        except Exception:  # values without a common type, empty objects, very deep ones
            continue
    return path.read_bytes()


def retyped(rng: random.Random, table: pa.Table) -> pa.Table:
    """A table, a column of which may have another type."""
    if not table.num_columns or rng.random() < 0.5:
        return table
    place, kind = rng.randrange(table.num_columns), rng.choice(TYPES)
    column: Any
    try:
        column = table.column(place).cast(kind, safe=False)
    except Exception:
        values: Any = rng.choice(([None], [b"\xff"], [2**62], [1.5], [True]))
        column = pa.array(values * len(table))
    return table.set_column(place, table.column_names[place], column)
