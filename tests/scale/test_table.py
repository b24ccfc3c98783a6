"""Files of rows read piece by piece, and their tokens in the user's cache."""

import gzip
import json
import os
import time
from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scale.console import console
from scale.data import dataset as dataset_module
from scale.data import pieces as pieces_module
from scale.data import table as table_module
from scale.data.dataset import Limits, make_dataset
from scale.data.pieces import pieces
from scale.data.rows import read, split
from scale.data.table import Table, scan
from scale.data.token_cache import GrowingArray, entry
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.parallel import processes
from scale.stages.reward import held_out

SIDES = ("chosen", "rejected")
TOKENIZER = train_tokenizer(["the cat sat on the mat"], 270)
ROWS = [
    {
        "prompt": f"the cat {i}",
        "chosen": f"sat {i}" * (1 + i % 4),
        "rejected": "on" * (i % 3),
        "ref_chosen_logps": -i - 0.5,
        "ref_rejected_logps": -1.0,
        "score_chosen": [i / 2, 1.0],
        "score_rejected": [0.0, -float(i)],
    }
    for i in range(10)
]
LIMITS = Limits(16, 24)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and pieces of three rows; returns the folder of tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (pieces_module, dataset_module.encoded.__globals__):
        target = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(target, "PIECE", 3)
    return tmp_path / "cache/minipref/tokens"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return path


def zipped(path, rows):
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


FILES = [(jsonl, "rows.jsonl"), (zipped, "rows.jsonl.gz"), (parquet, "rows.parquet")]


@pytest.fixture(params=FILES, ids=[name for _, name in FILES])
def file(request, tmp_path):
    write, name = request.param
    return write(tmp_path / name, ROWS)


def arrays(dataset):
    tokens, targets = dataset.tokens, dataset.targets
    parts = (dataset.kept, tokens.ids, tokens.ends, targets.ref_logps, targets.rewards)
    return [(array.dtype, array.shape, array.tolist()) for array in parts]


def dataset_of(rows, limits=LIMITS, tokenizer=TOKENIZER, source="rows"):
    with console.capture() as printed:
        dataset = make_dataset(tokenizer, rows, SIDES, limits, source)
    return dataset, " ".join(printed.get().split())


# ---- rows


def test_a_table_has_the_rows_of_read(file):
    table, rows = scan(file), read(file)
    assert len(table) == 10 and list(table) == rows == [table[i] for i in range(10)]
    assert table[-1] == rows[-1] and table[2:9:3] == rows[2:9:3] and table[:1] == rows[:1]
    with pytest.raises(IndexError):
        table[10]
    sizes = [len(piece) for piece in pieces(file)]
    assert max(sizes) <= 3 and sum(sizes) == 10
    assert [number for piece in pieces(file) for number in piece.numbers] == [*range(1, 11)]


def test_some_rows_of_a_table_and_some_of_these(file):
    mask = np.arange(10) % 2 == 0
    some = scan(file).where(mask)
    assert len(some) == 5 and list(some) == read(file)[::2] and some[0] == ROWS[0]
    fewer = some.where(np.array([False, True, False, False, True]))
    assert [row["prompt"] for row in fewer] == ["the cat 2", "the cat 8"]
    assert fewer[0]["prompt"] == "the cat 2"


def test_the_rows_held_out_are_those_of_split(file):
    table = scan(file)
    shares = {"train": 0.9, "held out": 0.1}
    for seed in range(3):
        mask, parts = held_out(table, seed), split(read(file), shares, seed)
        assert list(table.where(mask)) == parts["held out"]
        assert list(table.where(~mask)) == parts["train"]


def test_the_tables_of_several_files_and_their_errors(tmp_path):
    jsonl(tmp_path / "a.jsonl", ROWS[:4])
    jsonl(tmp_path / "b.jsonl", [*ROWS[4:], {"prompt": "p", "chosen": "c"}])
    with pytest.raises(InputError, match=r"b\.jsonl:7: field 'rejected': missing"):
        scan(tmp_path / "*.jsonl")
    jsonl(tmp_path / "b.jsonl", ROWS[4:])
    assert list(scan(tmp_path / "*.jsonl")) == read(tmp_path / "*.jsonl") == read_all(ROWS)


def read_all(rows):
    return [row | {"score_chosen": list(row["score_chosen"])} for row in rows]


@pytest.mark.parametrize("end", ["", "\n", "\n\n \n", "\f \n"])
def test_white_space_after_the_last_row_is_no_row(tmp_path, end):
    text = "\n".join(map(json.dumps, ROWS[:3]))
    (tmp_path / "a.jsonl").write_text("\ufeff" + text + end, encoding="utf-8")
    assert len(scan(tmp_path / "a.jsonl")) == 3
    (tmp_path / "b.jsonl").write_text("\n" + text + end)
    with pytest.raises(InputError, match=r"b\.jsonl:1: malformed JSON"):
        scan(tmp_path / "b.jsonl")


# ---- tokens


def test_the_tokens_of_a_table_are_those_of_its_rows_in_memory(file):
    """Rows that the limits drop, in every piece; the same report."""
    limits = Limits(16, 12)
    table, printed = dataset_of(scan(file), limits)
    rows, expected = dataset_of(read(file), limits)
    assert arrays(table) == arrays(rows) and printed == expected and "dropped" in printed
    assert 0 < len(table) < 10
    batch, same = (d.batch(np.arange(3), d.shape(3)) for d in (table, rows))
    for ours, theirs in zip((*batch.inputs, *batch.targets), (*same.inputs, *same.targets),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)
    assert list(table.select(read(file))) == list(scan(file).where(table.mask(10)))


def test_the_second_time_no_row_is_read_and_the_report_is_the_same(file, monkeypatch):
    limits = Limits(16, 12)
    first, printed = dataset_of(scan(file), limits)

    def fail(*_):
        raise AssertionError("it is done again")

    monkeypatch.setattr(table_module, "checked", fail)
    monkeypatch.setattr(dataset_module, "stored", fail)
    second, again = dataset_of(scan(file), limits)
    assert arrays(second) == arrays(first) and printed == again != ""
    assert isinstance(second.tokens.ids, np.memmap)


def test_other_inputs_have_other_tokens(file, cache):
    def entries():
        return len([path for path in cache.iterdir() if not path.name.startswith(".")])

    table = scan(file)
    assert entries() == 1
    base = dataset_of(table)[0]
    assert entries() == 2
    other = train_tokenizer(["sat on a mat"], 268)
    assert arrays(dataset_of(table, tokenizer=other)[0]) != arrays(base) and entries() == 3
    assert len(dataset_of(table, Limits(16, 12))[0]) < 10 and entries() == 4
    assert len(dataset_of(table.where(np.arange(10) < 5))[0]) == 5 and entries() == 5
    make_dataset(TOKENIZER, table, ["chosen"], LIMITS)
    assert entries() == 6


def test_a_changed_file_is_read_again(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert len(dataset_of(scan(path))[0]) == 10
    stat = path.stat()
    jsonl(path, [*ROWS[:9], ROWS[0]])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert dataset_of(scan(path))[0].tokens.ids.tolist() == arrays_of(path)


def arrays_of(path):
    return dataset_of(read(path))[0].tokens.ids.tolist()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "record"])
def test_a_damaged_entry_is_made_again(tmp_path, cache, damage):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    expected = arrays(dataset_of(scan(path))[0])
    [ids] = cache.glob("*/ids.npy")
    data = bytearray(ids.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        ids.write_bytes(data)
    elif damage == "cut":
        ids.write_bytes(data[:-8])
    elif damage == "remove":
        ids.unlink()
    else:
        (ids.parent / "entry.json").write_text("{")
    assert arrays(dataset_of(scan(path))[0]) == expected


def test_what_fails_halfway_leaves_no_entry(tmp_path, cache):
    long = [*ROWS[:8], ROWS[8] | {"chosen": "sat on the mat " * 9}, ROWS[9]]
    path = jsonl(tmp_path / "rows.jsonl", long)
    table = scan(path)
    before = sorted(cache.iterdir())
    for _ in range(2):
        with pytest.raises(InputError, match=r"rows\.jsonl:9: longer than 16 \+ 24 tokens"):
            dataset_of(table, replace(LIMITS, overlong="error"), source=str(path))
    assert [path for path in cache.iterdir() if path.is_dir()] == [p for p in before if p.is_dir()]


def test_without_a_folder_to_write_there_is_one_for_this_process(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert arrays(dataset_of(scan(path))[0]) == arrays(dataset_of(read(path))[0])


def test_a_folder_that_is_only_read_is_not_used(cache, tmp_path, monkeypatch):
    """Root may write any folder, so `access` is what says it."""
    cache.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != cache)
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    assert arrays(dataset_of(scan(path))[0]) == arrays(dataset_of(read(path))[0])
    assert not [*cache.iterdir()]


def test_entries_of_last_month_are_removed_and_used_ones_stay(cache):
    def make(folder):
        (folder / "a").write_text("a")
        return "value"

    old, used = (entry([name], make)[0] for name in ("old", "used"))
    for folder in (old, used):
        os.utime(folder, (time.time() - 31 * 86400,) * 2)
    assert entry(["used"], make) == (used, "value")
    assert not old.exists() and used.exists()


def test_a_growing_array_is_a_npy_file(tmp_path):
    parts = [np.arange(6).reshape(2, 3), np.zeros((0, 3), int), np.arange(30).reshape(10, 3)]
    growing = GrowingArray(tmp_path / "a.npy", parts[0])
    for part in parts:
        growing.add(part)
    growing.close()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.concatenate(parts))
    empty = GrowingArray(tmp_path / "b.npy", np.zeros((4, 2, 0), np.float32))
    empty.add(np.zeros((4, 2, 0), np.float32))
    empty.close()
    loaded = np.load(tmp_path / "b.npy", mmap_mode="r")
    assert loaded.shape == (4, 2, 0) and loaded.dtype == np.float32


def test_a_table_is_one_of_files(file):
    assert isinstance(scan(file), Table) and scan(file).identity != scan(file, SIDES).identity


@pytest.mark.parametrize("error", [OSError(28, "No space left", "x"), InputError("x: no")])
def test_what_stops_process_0_stops_all_with_its_words(monkeypatch, error):
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "broadcast_text", lambda text: said.append(text) or text)

    def work():
        raise error

    with pytest.raises(InputError) as caught:
        processes.main_first(work)
    assert said == [str(caught.value)] == [str(error)]
