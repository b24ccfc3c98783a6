"""Where a run's metrics go: `metrics.jsonl`, and on request TensorBoard and Weights & Biases.

A record is `{"step": s}` with metrics under the names of `minipref.losses`: numbers, or arrays of
them. An array is a list in `metrics.jsonl`, and `NAME/0`, `NAME/1`, ... elsewhere. Equal runs write
equal records, except for `WALL_CLOCK`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from scale.errors import InputError, as_input_error
from scale.files import read_json, write_json, write_text

WALL_CLOCK = ("tokens_per_second", "mfu")

LoggerName = Literal["tensorboard", "wandb"]
Record = dict[str, Any]
Writer = Callable[[list[Record]], None]


@dataclass(frozen=True)
class Log:
    """The open log of a run. In a process other than the first it has no writers."""

    writers: Sequence[Writer]

    def write(self, records: list[Record]) -> None:
        """Write records to every logger."""
        for write in self.writers:
            write(records)


@contextmanager
def open_log(folder: Path, step: int, loggers: Sequence[LoggerName] = ()) -> Iterator[Log]:
    """Open the log of a run. Only process 0 writes.

    TensorBoard's files go to `tensorboard/`, those of W&B to `wandb/` and its run id to
    `wandb.json`.

    Args:
        folder: The folder of the run.
        step: The step after which the run continues: later records are dropped. 0 drops all.
        loggers: Where metrics go besides `metrics.jsonl`.

    Yields:
        The log.

    Raises:
        InputError: A logger's package is missing (in every process), or W&B refuses to start.
    """
    for logger in loggers:
        if find_spec(logger) is None:
            raise InputError(f"--log {logger}: needs pip install -e '.[logging]'")
    names = [name for name in OPENERS if name in ("jsonl", *loggers)]
    with ExitStack() as stack:
        openers = [OPENERS[name] for name in names] if jax.process_index() == 0 else []
        yield Log([stack.enter_context(opener(folder, step)) for opener in openers])


@contextmanager
def open_jsonl(folder: Path, step: int) -> Iterator[Writer]:
    """A writer that appends lines to `metrics.jsonl`."""
    path = folder / "metrics.jsonl"
    drop_after(path, step)
    yield partial(append, path)


def drop_after(path: Path, step: int) -> None:
    """Drop the records of later steps, and a line that a kill left incomplete. Step 0 drops all."""
    kept: list[str] = []
    if step and path.exists():
        with as_input_error(path):
            text = path.read_text(encoding="utf-8")
            lines = text[: text.rfind("\n") + 1].splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def append(path: Path, records: list[Record]) -> None:
    """Append a line of JSON for each record."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, default=as_list) + "\n" for record in records)


def as_list(value: Any) -> Any:
    """An array as nested lists, or a number."""
    return np.asarray(value).tolist()


@contextmanager
def open_tensorboard(folder: Path, step: int) -> Iterator[Writer]:
    """A writer to a new file of events.

    The first event tells TensorBoard to forget the steps that run again.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / "tensorboard"))
    start, first = SessionLog(status=SessionLog.START), step + 1 if step else 0
    writer.add_event(Event(wall_time=time.time(), step=first, session_log=start))
    try:
        yield partial(to_tensorboard, writer)
    finally:
        writer.close()


def to_tensorboard(writer: Any, records: list[Record]) -> None:
    """Write an event for each record."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    for record in records:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in scalars(record).items()]
        summary = Summary(value=values)
        writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=summary))
    writer.flush()


@contextmanager
def open_wandb(folder: Path, step: int) -> Iterator[Writer]:
    """A writer to the folder's W&B run, which continues unless `step` is 0.

    Its project is `WANDB_PROJECT`, by default "minipref"; `WANDB_MODE=offline` needs neither a
    network nor an account. An exception marks the run as failed.
    """
    import wandb

    path = folder / "wandb.json"
    run_id = read_json(path)["id"] if step and path.exists() else None
    project = os.environ.get("WANDB_PROJECT", "minipref")
    try:
        run = wandb.init(project=project, name=folder.name, dir=folder, id=run_id, resume="allow")
    except wandb.Error as error:
        raise InputError(f"--log wandb: {error}; WANDB_MODE=offline needs no account") from error
    write_json(path, {"id": run.id})
    exit_code = 1
    try:
        yield partial(to_wandb, run, run.step)
        exit_code = 0
    finally:
        run.finish(exit_code)


def to_wandb(run: Any, first: int, records: list[Record]) -> None:
    """Log the records from step `first` on: W&B has the earlier ones and cannot drop them."""
    for record in records:
        if record["step"] >= first:
            run.log(scalars(record), step=record["step"], commit=True)


OPENERS = {"wandb": open_wandb, "tensorboard": open_tensorboard, "jsonl": open_jsonl}
"""The writers in the order in which they open: one that may refuse comes before those that drop
records."""


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers, each under its own name: `NAME/i` or `NAME/i/j` in an array."""
    return {
        "/".join([name, *map(str, index)]): float(value)
        for name, values in record.items()
        if name != "step"
        for index, value in np.ndenumerate(values)
    }


def logged(path: Path) -> list[Record]:
    """The records of a `metrics.jsonl`; none where there is no file."""
    if not path.exists():
        return []
    with as_input_error(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def records(path: Path, metric: str) -> dict[int, Any]:
    """A metric's values by step; none where there is no file."""
    return {line["step"]: line[metric] for line in logged(path) if metric in line}
