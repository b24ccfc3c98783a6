"""What a person, or a file that the output goes to, sees while something runs."""

import io

import pytest
from rich.console import Console

import scale.console
from scale.console import track


def shown(monkeypatch, seconds, **options):
    """The lines of a run of three items, after each of which `seconds` have passed."""
    written, now = io.StringIO(), [0.0]
    console = Console(file=written, width=20, soft_wrap=True, **options)
    monkeypatch.setattr(scale.console, "console", console)
    monkeypatch.setattr(scale.console.time, "monotonic", lambda: now[0])
    for _ in track(range(3), "a long name of a run", 4, lambda: "loss 0.5, 1,000 tokens/s"):
        now[0] += seconds
    return written.getvalue().splitlines()


def test_a_file_has_a_whole_line_every_half_a_minute_and_at_the_end(monkeypatch):
    """By hand: after 40 s of 120 s; never wrapped, however narrow the console is."""
    assert shown(monkeypatch, 40.0) == [
        f"a long name of a run {done}/7, {times}  loss 0.5, 1,000 tokens/s"
        for done, times in (
            (5, "0:00:40, eta 0:01:20"),
            (6, "0:01:20, eta 0:00:40"),
            (7, "0:02:00, eta 0:00:00"),
        )
    ]
    assert [line.split(",")[0] for line in shown(monkeypatch, 10.0)] == ["a long name of a run 7/7"]
    assert [line.split(",")[0] for line in shown(monkeypatch, 16.0)] == [
        "a long name of a run 6/7", "a long name of a run 7/7"
    ]  # fmt: skip
    assert shown(monkeypatch, 1.0) == []


@pytest.mark.parametrize("items", [0, 3])
def test_a_terminal_has_a_bar(monkeypatch, items):
    written = io.StringIO()
    console = Console(file=written, width=120, force_terminal=True)
    monkeypatch.setattr(scale.console, "console", console)
    monkeypatch.setattr(scale.console, "IN_A_TERMINAL", 0.0)
    assert list(track(range(items), "run", 1, lambda: "loss 0.5")) == list(range(items))
    assert (f"{items + 1}/{items + 1}" in written.getvalue()) == bool(items)
    assert ("loss 0.5" in written.getvalue()) == bool(items)
