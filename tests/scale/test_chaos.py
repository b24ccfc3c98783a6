"""`benchmarks.chaos` in small: `tune --quick`, killed and on other cores, has the same bits."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos.kills import Tally, Undisturbed, campaign, new_run
from benchmarks.chaos.runs import contents, differences, prepare
from scale.console import console

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    console.quiet = True
    home = tmp_path_factory.mktemp("chaos")
    prepare(home)
    yield home
    console.quiet = False


@pytest.fixture(scope="module")
def whole(home: Path) -> Undisturbed:
    return Undisturbed.of(home, "tune")


def test_bits_are_those_of_one_core(home: Path, whole: Undisturbed) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        run = new_run(home, "tune", "one-core")
        code, output = run.finish()
    finally:
        os.sched_setaffinity(0, cores)
    assert code == 0, output
    assert contents(run.out) == whole.files and len(whole.files) > 20


def test_killed_and_started_again_it_ends_with_the_same_bits(
    home: Path, whole: Undisturbed
) -> None:
    tally, run = Tally(), new_run(home, "tune", "killed")
    campaign(run, whole, random.Random(0), 2, tally)
    assert (tally.kills, tally.resumed_equal, tally.lost) == (2, 2, 0), tally.notes


def test_what_differs_or_is_left_is_found(home: Path, whole: Undisturbed) -> None:
    out = new_run(home, "tune", "differs").out
    out.mkdir()
    for name, data in whole.files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    assert differences(out, whole.files) == []
    (out / "report.md").write_bytes(b"x")
    (out / "policy/.half").touch()
    (out / "policy/checkpoints").mkdir()
    assert sorted(differences(out, whole.files)) == [
        "policy/.half: differs", "policy/.half: is left", "policy/checkpoints: is left",
        "report.md: differs",
    ]  # fmt: skip
