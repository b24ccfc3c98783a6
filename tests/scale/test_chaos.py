"""`benchmarks.chaos` in small: `tune --quick`, killed and on one core, has the same bits."""

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


def test_killed_on_one_core_and_started_again_it_ends_with_the_bits_of_all_cores(
    home: Path, whole: Undisturbed
) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        tally, run = Tally(), new_run(home, "tune", "killed")
        campaign(run, whole, random.Random(0), 2, tally)
    finally:
        os.sched_setaffinity(0, cores)
    assert (tally.kills, tally.resumed_equal, tally.lost) == (2, 2, 0), tally.notes
    assert contents(run.out) == whole.files and len(whole.files) > 20


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
