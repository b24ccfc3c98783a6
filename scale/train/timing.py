"""Where the wall time of a run goes, and how often its step is compiled.

JAX starts a step and returns before it is complete, on a CPU too. Nothing here waits for a step
that the loop does not wait for, so the time of the host counts by what the devices do meanwhile:

- in the step: the loop starts a step, waits for its results, or waits for a batch and the previous
  step still runs when the batch arrives;
- waiting for batches: the previous step is complete when the batch arrives. It may have ended
  during the wait, so this is the most that the devices can have been idle for want of a batch;
- compiling: calls of the step that compile, tracing included;
- log and checkpoints: all the rest, evaluations and their compilation included.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from scale.console import console
from scale.files import write_json

STEP, BATCHES, COMPILING = "in the step", "waiting for batches", "compiling"
REST = "log and checkpoints"

event_counts = Counter[str]()  # JAX's events in this process


def count_event(event: str, duration_secs: float, **_: str | int) -> None:
    """JAX calls this at each event that has a duration."""
    event_counts[event] += 1


jax.monitoring.register_event_duration_secs_listener(count_event)


def programs() -> int:
    """How many programs this process has compiled."""
    return event_counts["/jax/core/compile/backend_compile_duration"]


@dataclass
class Timing:
    """The stopwatch of one run of the loop. It starts when it is made.

    Attributes:
        clock: Returns the time in seconds.
        seconds: The seconds of each part.
        programs: How many programs the step has compiled.
    """

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=partial(defaultdict, float))
    programs: int = 0

    def __post_init__(self) -> None:
        self.start = self.clock()

    def add(self, part: str, since: float) -> None:
        """Count the time since `since` to a part."""
        self.seconds[part] += self.clock() - since

    def next(self, batches: Iterator[Any], running: Any) -> Any:
        """The next batch.

        Args:
            batches: The batches.
            running: The results of the previous step.
        """
        since = self.clock()
        batch = next(batches)
        self.add(BATCHES if ready(running) else STEP, since)
        return batch

    def step(self, step: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        """The result of `step(state, batch)`."""
        since, before = self.clock(), programs()
        result = step(state, batch)
        self.programs += programs() - before
        self.add(COMPILING if programs() > before else STEP, since)
        return result

    def wait(self, metrics: Any) -> None:
        """Wait for the results of a step."""
        since = self.clock()
        jax.block_until_ready(metrics)
        self.add(STEP, since)

    def finish(self, steps: int, folder: Path) -> None:
        """Print where the time went, and write it to `timing.json`.

        No hash of the folder includes that file.
        """
        total = self.clock() - self.start
        parts = {part: self.seconds[part] for part in (STEP, BATCHES, COMPILING)}
        parts[REST] = total - sum(parts.values())
        shares = {part: f"{seconds / total:.0%} {part}" for part, seconds in parts.items()}
        shares[COMPILING] += f" ({self.programs} program{'s' * (self.programs != 1)})"
        console.print(
            f"  {steps} steps in {total:.1f} s: {', '.join(shares.values())}", markup=False
        )
        report = {"steps": steps, "seconds": total, **parts, "programs": self.programs}
        write_json(folder / "timing.json", report)


def ready(tree: Any) -> bool:
    """Whether all arrays of a tree are computed."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_ready"))
