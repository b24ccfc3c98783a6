"""The loop around the pure step: progress, metrics, checkpoints, exact resume."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from minipref.losses import Metrics
from minipref.training import TrainState
from scale.console import track
from scale.health import OF_BATCH, Signs, spike_signs, warn
from scale.io.arrays import all_finite
from scale.parallel.processes import is_main
from scale.train.checkpoints import Checkpoints
from scale.train.metrics import WALL_CLOCK, LoggerName, Record, logged, open_log
from scale.train.optimizer import Schedule
from scale.train.throughput import Throughput
from scale.train.timing import Timing

WATCHED = {
    "loss": "loss {:.3g}",
    "rewards/accuracies": "accuracy {:.2f}",
    "kl": "KL {:.3g}",
    "validation/kl": "held-out KL {:.3g}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
AHEAD = 2  # batches that are made before the loop asks for them
StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
EvalFn = Callable[[Any, int], dict[str, Any]]
SignsFn = Callable[[Sequence[Record]], Signs]


def no_signs(records: Sequence[Record]) -> Signs:
    return {}


def no_rows(step: int) -> list[int]:
    return []


@dataclass(frozen=True)
class TrainingConfig:
    """One training run."""

    steps: int = 200
    """Updates."""
    batch_size: int = 16
    """Rows of a batch."""
    learning_rate: float = 1e-3
    """Peak learning rate. The default is for the miniature; `tune` has others for large models."""
    warmup: int = 10
    """Steps of linear warm-up."""
    end_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of its peak; the decay is linear."""
    seed: int = 0
    """Seed of the order of rows, and of all random draws of the stage."""
    epochs: float | None = None
    """Passes over the rows, in place of the number of steps."""
    accumulation: int = 1
    """Parts of a batch that pass through the model one after another, so that memory is that of
    one part; the loss and its gradient are the whole batch's, for one more forward pass."""

    def for_rows(self, n: int) -> "TrainingConfig":
        """This run over n rows, with its number of steps."""
        if self.epochs is None:
            return self
        steps = max(1, round(self.epochs * n / self.batch_size))
        return replace(self, steps=steps, epochs=None)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.warmup, self.end_lr_ratio, self.steps)


def train(
    step_fn: StepFn,
    state: TrainState,
    batch_fn: Callable[[int], Any],
    num_steps: int,
    folder: Path,
    label: str,
    *,
    eval_fn: EvalFn | None = None,
    signs_fn: SignsFn = no_signs,
    every: int = 50,
    also: Collection[int] = (),
    record: dict[str, Any] | None = None,
    loggers: Sequence[LoggerName] = (),
    throughput: Throughput | None = None,
    rows_fn: Callable[[int], list[int]] = no_rows,
) -> Any:
    """Train a model, resuming from the checkpoint in the folder if there is one.

    Every `every` steps, and after those of `also`, there are a checkpoint and the metrics of
    `eval_fn`. The last step has no checkpoint: the caller saves the model. With several processes,
    all call this with global arrays, and process 0 writes the log. At the end it prints where the
    time went.

    Args:
        step_fn: `(state, batch) -> (state, metrics)`; it may donate the state.
        state: The state before the first step; it says how a restored one is sharded.
        batch_fn: The batch of a step. It is called in a thread, in order, up to `AHEAD` steps
            before its step; what it raises is raised here.
        num_steps: Updates.
        folder: Where checkpoints and `metrics.jsonl` go.
        label: What the progress bar shows.
        eval_fn: `(model, step) -> metrics`.
        signs_fn: What the records say of a run that goes wrong: each sign is printed once.
        every: Steps between checkpoints and evaluations.
        also: More steps after which there is one.
        record: JSON that identifies the run: another run's checkpoint is refused.
        loggers: Where metrics go besides `metrics.jsonl`.
        throughput: A stopwatch.
        rows_fn: The rows of a step's batch, for the message where its loss is not finite.

    Returns:
        The trained model.

    Raises:
        KeyboardInterrupt: On SIGTERM or Ctrl-C, after the current step and a checkpoint of it.
        FloatingPointError: The loss, the gradient, a weight or a metric is not finite; nothing of
            it is saved, and the last checkpoint stays.
        InputError: The checkpoint is another run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timing, watch = Timing(), throughput or Throughput(0.0)
    with ExitStack() as stack:
        should_stop = stack.enter_context(preemption())
        checkpoints = Checkpoints(folder / "checkpoints", record or {})
        state = placed(stack.enter_context(closing(checkpoints)).restore(state))
        start = int(np.asarray(state.step).flat[0])
        writer = stack.enter_context(open_log(folder, start, loggers))
        if eval_fn and not start:
            writer.write([{"step": 0} | eval_fn(state.model, 0)])
        monitor = Monitor(folder, writer, eval_fn, watch, timing, signs_fn, rows_fn, checkpoints)
        batches = prefetch(batch_pool(stack), batch_fn, range(start, num_steps))
        metrics: Metrics = {}
        for step in track(range(start + 1, num_steps + 1), label, start, monitor.status):
            before = metrics
            state, metrics = timing.step(step_fn, state, timing.next(batches, metrics))
            timing.wait(before)  # JAX would start all steps at once, and a signal wait for them all
            monitor.add(step, metrics, first=step == start + 1)
            due = step % every == 0 or step in also or step == num_steps
            stop = should_stop(step)
            if due or stop:
                monitor.flush(state.model, evaluate=due)
            if stop or (due and step < num_steps):
                checkpoints.save(step, state)
            if stop:
                raise KeyboardInterrupt
            if due:
                monitor.throughput.begin(step)
    timing.finish(num_steps - start, folder)
    return state.model


@dataclass
class Monitor:
    """Collects the metrics of the steps, on the devices, and writes them when asked."""

    folder: Path
    log: Any
    eval_fn: EvalFn | None
    throughput: Throughput
    timing: Timing
    signs_fn: SignsFn = no_signs
    rows_fn: Callable[[int], list[int]] = no_rows
    checkpoints: Checkpoints | None = None

    def __post_init__(self) -> None:
        self.pending: list[Record] = []
        # process 0 may be writing a line, and it alone prints what the records say
        self.records = logged(self.folder / "metrics.jsonl") if is_main() else []
        self.last: Record = {}
        self.signs: Signs = {}

    def add(self, step: int, metrics: Metrics, first: bool) -> None:
        self.pending.append({"step": step} | metrics)
        if first:  # it compiles, so throughput is measured from its end
            self.timing.wait(metrics)
            self.throughput.begin(step)

    def flush(self, model: Any, evaluate: bool) -> None:
        """Write the pending records; the last one has the throughput and the evaluation."""
        self.timing.wait(self.pending[-1])
        records = jax.device_get(self.pending)
        records[-1] |= self.throughput.measure(records)
        with self.kept():
            require_finite(records, model, self.folder, self.rows_fn)
            if evaluate and self.eval_fn:
                records[-1] |= self.eval_fn(model, records[-1]["step"])
                require_finite(records[-1:], {}, self.folder)
        self.log.write(records)
        self.pending, self.last = [], self.last | records[-1]
        self.records += records
        signs = spike_signs(self.records, len(records))
        signs |= self.signs_fn(self.records) if evaluate else {}
        warn(sentence for name, sentence in signs.items() if name not in self.signs)
        self.signs |= signs

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Add to an error what is not lost."""
        try:
            yield
        except FloatingPointError as error:
            step = self.checkpoints and self.checkpoints.latest
            stays = f"the checkpoint of step {step} stays" if step else "there is no checkpoint"
            raise FloatingPointError(f"{error}; {stays}") from None

    def status(self) -> str:
        """The metrics of the last step that people watch; of several models their means."""
        self.timing.wait(self.pending)
        records = jax.device_get(self.pending)
        latest = self.last | (records[-1] | self.throughput.measure(records) if records else {})
        values = {name: float(np.mean(x)) for name, x in latest.items()}
        return ", ".join(text.format(values[n]) for n, text in WATCHED.items() if n in values)


def placed(state: TrainState) -> TrainState:
    """The state on its devices, also where it was not restored."""
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def batch_pool(stack: ExitStack) -> Executor:
    """A thread that ends with `stack`, after its current task."""
    pool = ThreadPoolExecutor(1, "batches")
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool


def prefetch(pool: Executor, batch_fn: Callable[[int], Any], steps: Iterable[int]) -> Iterator[Any]:
    """`batch_fn(i)` of each step i in order, `AHEAD` of them made before they are asked for."""
    pending: deque[Future[Any]] = deque()
    for i in steps:
        pending.append(pool.submit(batch_fn, i))
        if len(pending) > AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, the same for all processes: a SIGTERM or Ctrl-C came.

    Meanwhile neither ends the process, but a second Ctrl-C does: JAX's own callbacks would swallow
    a KeyboardInterrupt in the middle of a step. With several processes, the handler is that of
    `jax.distributed`, and all processes stop at the first step that none of them had started.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    notice = threading.Event()

    def stop(number: Any, _: Any) -> None:
        notice.set()
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, stop)
    try:
        yield lambda _: notice.is_set()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def require_finite(
    records: list[dict[str, Any]],
    model: Any,
    folder: Path,
    rows_fn: Callable[[int], list[int]] = no_rows,
) -> None:
    """Nothing that is not finite is ever saved."""
    advice = "lower the learning rate, or look at the rows' scores"
    last = records[-1]["step"]
    for record in records:
        step = record["step"]
        for name, words in OF_BATCH.items():
            if not np.all(np.isfinite(record.get(name, 0.0))):
                if step == 1:
                    advice = "it is so before the first update: look at beta and the rows' scores"
                rows = ", ".join(map(str, rows_fn(step - 1)[:32]))
                where = f"at step {step}" + f", of rows {rows}" * bool(rows)
                raise FloatingPointError(f"{folder}: {words} is {record[name]} {where}; {advice}")
    if not all_finite(model):
        raise FloatingPointError(f"{folder}: a weight is not finite after step {last}; {advice}")
    for name, value in records[-1].items():
        if name not in WALL_CLOCK and not np.all(np.isfinite(value)):
            raise FloatingPointError(f"{folder}: {name} is {value} at step {last}; {advice}")
