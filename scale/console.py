"""What a person sees while a stage runs."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)


def track(items: Sequence[Any], label: str, start: int = 0) -> Iterator[Any]:
    """Yield the items under a progress bar with the remaining time.

    Where the output is not a terminal, one line is printed at the end instead.

    Args:
        items: What is left to do.
        label: The name in front of the bar.
        start: How many items were done before, by a run that this one resumes.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=start + len(items), completed=start)
        for item in items:
            yield item
            progress.advance(task)


def quiet() -> None:
    """Print nothing from this process: a worker's parent shows the progress."""
    console.quiet = True
