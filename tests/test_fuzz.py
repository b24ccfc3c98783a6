"""`benchmarks.fuzz`: what it makes of files of rows, and that it notices what must not be."""

import random
import time

import pytest

from benchmarks.fuzz import workers
from benchmarks.fuzz.independent import answer
from benchmarks.fuzz.mutations import damaged, mutated
from benchmarks.fuzz.rows import compared, fault_of, formats, rows_case
from benchmarks.fuzz.workers import outcome_of
from scale.data.formats import parse_row
from scale.errors import InputError


def test_faulty_rows_are_read_as_by_others_or_refused(tmp_path):
    outcomes = [rows_case(random.Random(seed), tmp_path) for seed in range(150)]
    assert set(outcomes) == {"accepted", "refused"}


def test_the_independent_reader_by_hand():
    parts = [{"type": "text", "text": text} for text in "ab"]
    say = {"role": "user", "content": parts}
    reply = {"from": "gpt", "value": "c"}
    row = {"prompt": [say], "chosen": reply, "rejected": "d", "system": "s"}
    assert answer(row) == ([("system", "s"), ("user", "ab")], "c", "d")
    hh = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert answer(hh) == ("\n\nHuman: a\n\nAssistant:", " b", " c")
    for row in formats(3):
        assert parse_row(row, ("prompt", "chosen", "rejected"))["chosen"] == answer(row)[1]


def test_what_is_read_otherwise_or_refused_without_need_is_wrong(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert compared(path, None) == compared(path, [("p", "a", "b")]) == "accepted"
    assert compared(path, [("p", "a", "c")]).startswith("wrong: ")
    path.write_text('{"prompt": "p"}\n')
    assert compared(path, None) == "refused"
    assert compared(path, [("p", "a", "b")]).startswith("wrong: harmless, but refused")
    assert fault_of(InputError("somewhere"), path).startswith("wrong: the file is not named")


def test_a_case_that_fails_or_takes_too_much_is_told(tmp_path, monkeypatch):
    def fails(rng, folder):
        raise KeyError("x")

    def grows(rng, folder):
        return f"accepted{len(bytearray(2**28))}"

    def runs(rng, folder):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return "accepted"

    monkeypatch.setattr(workers, "MEMORY", 2**27)
    monkeypatch.setattr(workers, "SLOW", 0.2)
    outcomes = [outcome_of(case, 0, tmp_path) for case in (fails, grows, runs)]
    starts = ("traceback: KeyError in test_fuzz.py", "slow: more than 128 MiB", "slow: ")
    for outcome, start in zip(outcomes, starts, strict=True):
        assert outcome.startswith(start)


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_is_one_input(seed):
    made = [
        (repr(mutated(random.Random(seed), formats(1)[3])), damaged(random.Random(seed), b"x" * 99))
        for _ in range(2)
    ]
    assert made[0] == made[1]
