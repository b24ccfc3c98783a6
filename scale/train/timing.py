"""Where a run's wall time went, and how often its step was compiled.

JAX begins a step and goes on before it is done, on a CPU too, and nothing here waits for a step that the loop does not
wait for. So what the host does counts by what the devices had to do meanwhile:

- in the step: beginning one, waiting for its results, and waiting for a batch where the step before it still ran when
  the batch came;
- waiting for batches: where it had ended by then. It may have ended in the middle of the wait, so this is at most what
  the devices stood still for want of a batch;
- compiling: the calls of the step that compiled, tracing included;
- log and checkpoints: all else, with what the probes compute and compile.
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

STEP, BATCHES, COMPILING, REST = "in the step", "waiting for batches", "compiling", "log and checkpoints"


compiled = Counter[str]()  # events of this process


def heard(event: str, duration_secs: float, **_: str | int) -> None:
    compiled[event] += 1


def programs() -> int:
    """How many programs this process has compiled."""
    return compiled["/jax/core/compile/backend_compile_duration"]


jax.monitoring.register_event_duration_secs_listener(heard)


@dataclass
class Timing:
    """The stopwatch of one run of the loop, which begins when it is made."""

    clock: Callable[[], float] = time.monotonic
    seconds: dict[str, float] = field(default_factory=partial(defaultdict, float))
    programs: int = 0

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def add(self, part: str, since: float) -> None:
        self.seconds[part] += self.clock() - since

    def next(self, batches: Iterator[Any], running: Any) -> Any:
        """The next batch; `running` is what the step before it gives."""
        since = self.clock()
        batch = next(batches)
        self.add(BATCHES if ready(running) else STEP, since)
        return batch

    def step(self, step: Callable[[Any, Any], Any], state: Any, batch: Any) -> Any:
        since, before = self.clock(), programs()
        found = step(state, batch)
        self.programs += programs() - before
        self.add(COMPILING if programs() > before else STEP, since)
        return found

    def wait(self, metrics: Any) -> None:
        since = self.clock()
        jax.block_until_ready(metrics)
        self.add(STEP, since)

    def finish(self, steps: int, folder: Path) -> None:
        """Print where the time went, and write it to `timing.json`, which no hash of the folder includes."""
        total = self.clock() - self.begun
        parts = {part: self.seconds[part] for part in (STEP, BATCHES, COMPILING)}
        parts[REST] = total - sum(parts.values())
        shares = {part: f"{seconds / total:.0%} {part}" for part, seconds in parts.items()}
        shares[COMPILING] += f" ({self.programs} program{'s' * (self.programs != 1)})"
        console.print(f"  {steps} steps in {total:.1f} s: {', '.join(shares.values())}", markup=False)
        write_json(folder / "timing.json", {"steps": steps, "seconds": total, **parts, "programs": self.programs})


def ready(tree: Any) -> bool:
    """Whether all arrays have been computed."""
    return all(leaf.is_ready() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_ready"))
