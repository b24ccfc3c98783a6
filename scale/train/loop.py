"""The loop around the pure step: progress, metrics, checkpoints, exact resume."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from minipref.training import Hyper, Metrics, TrainState
from scale.console import track
from scale.io.arrays import all_finite
from scale.train.checkpoints import Checkpoints
from scale.train.metrics import LoggerName, open_log
from scale.train.throughput import Speed
from scale.train.timing import Timing

AHEAD = 2  # batches that are made before the loop asks for them


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


EvalFn = Callable[[Any, int], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One training run."""

    steps: int = 200
    """Updates."""
    batch: int = 16
    """Rows of a batch."""
    learning_rate: float = 1e-3
    """Peak learning rate of Adam."""
    warmup: int = 10
    """Steps of linear warm-up."""
    end_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of its peak; the decay is linear."""
    seed: int = 0
    """Seed of the order of rows, and of what the stage draws."""


def hyper(training: Training, strength: float = 0.0, gamma: tuple[float, float] = (0.0, 0.0)) -> Hyper:
    values = (strength, gamma, training.learning_rate, training.warmup, training.end_lr_ratio, training.steps)
    return Hyper(*(jnp.asarray(v, jnp.float32) for v in values))


def train(
    step: Step,
    state: TrainState,
    batch_at: Callable[[int], Any],
    steps: int,
    folder: Path,
    label: str,
    eval_fn: EvalFn | None = None,
    every: int = 50,
    record: dict[str, Any] | None = None,
    loggers: Sequence[LoggerName] = (),
    speed: Speed | None = None,
) -> Any:
    """The trained model. Every `every` steps: a checkpoint, and `probe`'s findings in the log.

    The last step has no checkpoint: the caller saves the model. `step` may donate its state. `record` (JSON) says
    which run it is, so that no other resumes from its checkpoints; `state` says how what is restored is sharded.
    `batch_at` is called in a thread, in the order of the steps and up to `AHEAD` before its step; what it raises is
    raised here, where the batch is due. Of several processes, all must call this, with global arrays; process 0 writes
    the log. At the end it is printed where the time went (`scale.train.timing`).

    Errors: KeyboardInterrupt on SIGTERM, after the step under way and a checkpoint of it (of several processes, after
    the step that all agree on); InputError on another run's checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    speed, timing, pending = speed or Speed(0.0), Timing(), []
    metrics: Metrics = {}
    with ExitStack() as stack:
        noticed = stack.enter_context(preemption())
        checkpoints = stack.enter_context(closing(Checkpoints(folder / "checkpoints", record or {})))
        state = checkpoints.restore(state)
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))  # committed, as if restored
        start = int(np.asarray(state.step).flat[0])
        log = stack.enter_context(open_log(folder, start, loggers))
        if eval_fn and not start:
            log.write([{"step": 0} | eval_fn(state.model, 0)])
        batches = made_ahead(thread(stack), batch_at, range(start, steps))
        for i in track(range(start, steps), label, start):
            state, metrics = timing.step(step, state, timing.next(batches, metrics))
            pending.append({"step": i + 1} | metrics)
            if i == start:
                timing.wait(metrics)
                speed.begin(i + 1)
            due, stop = (i + 1) % every == 0 or i + 1 == steps, noticed(i + 1)
            if due or stop:
                timing.wait(metrics)
                log.write(checked(pending, state.model, folder, eval_fn if due else None, speed))
                pending = []
            if stop or (due and i + 1 < steps):
                checkpoints.save(i + 1, state)
            if stop:
                raise KeyboardInterrupt("SIGTERM")
            if due:
                speed.begin(i + 1)
    timing.finish(steps - start, folder)
    return state.model


def thread(stack: ExitStack) -> Executor:
    """One that ends with `stack`, after what it is at."""
    pool = ThreadPoolExecutor(1, "batches")
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def made_ahead(pool: Executor, make: Callable[[int], Any], steps: Iterable[int]) -> Iterator[Any]:
    """`make(i)` of each step i in order, `AHEAD` of them made in the pool before they are asked for."""
    pending: deque[Future[Any]] = deque()
    for i in steps:
        pending.append(pool.submit(make, i))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def checked(
    pending: list[dict[str, Any]], model: Any, folder: Path, eval_fn: EvalFn | None, speed: Speed
) -> list[dict[str, Any]]:
    """The steps' records on the host, all finite as the model is; the last with the speed and the probe's findings."""
    records = jax.device_get(pending)
    records[-1] |= speed.measured(records)
    require_finite(records, model, folder)
    if eval_fn:
        records[-1] |= eval_fn(model, records[-1]["step"])
    return records


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, for all processes alike: SIGTERM, a preemption notice, came.

    Meanwhile SIGTERM does not end the process. With several, the handler is the one of `jax.distributed`, and the step
    is the first that no process has begun when one of them is told.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    notice = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: notice.set())
    try:
        yield lambda _: notice.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)


def require_finite(records: list[dict[str, Any]], model: Any, folder: Path) -> None:
    """Nothing that is not finite is ever saved."""
    advice = "lower the learning rate, or look at the rows' scores"
    for record in records:
        if not np.all(np.isfinite(record["loss"])):
            raise FloatingPointError(f"{folder}: loss is {record['loss']} at step {record['step']}; {advice}")
    if not all_finite(model):
        raise FloatingPointError(f"{folder}: a weight is not finite after step {records[-1]['step']}; {advice}")
