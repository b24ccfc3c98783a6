"""What a person sees while a stage runs."""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False, soft_wrap=True)

IN_A_TERMINAL, IN_A_FILE = 2.0, 30.0  # seconds between two looks at how a run goes


class Rate:
    """How many rows a second, as the status of a bar: add what is done."""

    def __init__(self) -> None:
        self.rows, self.began = 0, time.monotonic()

    def __call__(self) -> str:
        rate = self.rows / (time.monotonic() - self.began)
        return f"{rate:,.{0 if rate >= 10 else 1}f} rows/s"


def nothing() -> str:
    return ""


def track(
    items: Sequence[Any], label: str, start: int = 0, status: Callable[[], str] = nothing
) -> Iterator[Any]:
    """Yield the items under a progress bar with the remaining time, unless they are done at once.

    The bar appears after `IN_A_TERMINAL` seconds. Where the output is not a terminal, a line is
    printed every `IN_A_FILE` seconds, and at the end if there was one before.

    Args:
        items: What is left to do.
        label: The name in front of the bar.
        start: How many items were done before, by a run that this one resumes.
        status: How the run goes, in a few words; it is asked for now and then.
    """
    show = bar if console.is_terminal else lines
    yield from show(items, label, start, status)


def bar(items: Sequence[Any], label: str, start: int, status: Callable[[], str]) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    progress = Progress(*columns, console=console)
    task = progress.add_task(label, total=start + len(items), completed=start, status="")
    looked = time.monotonic()
    try:
        for item in items:
            yield item
            progress.advance(task)
            if time.monotonic() - looked >= IN_A_TERMINAL:
                progress.update(task, status=status())
                progress.start()
                looked = time.monotonic()
    finally:
        progress.stop()


def lines(items: Sequence[Any], label: str, start: int, status: Callable[[], str]) -> Iterator[Any]:
    began = printed = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now, left = time.monotonic(), len(items) - done
        if now - printed >= IN_A_FILE or (printed > began and not left):
            spent = now - began
            times = f"{clock(spent)}, eta {clock(spent / done * left)}"
            line = f"{label} {start + done}/{start + len(items)}, {times}  {status()}"
            console.print(line.rstrip(), markup=False)
            printed = now


def clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def quiet() -> None:
    """Print nothing from this process: a worker's parent shows the progress."""
    console.quiet = True


def shown(value: Any) -> str:
    """A finding as text on one line: numbers to four digits, lists and tables without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(item)}" for name, item in value.items())
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
