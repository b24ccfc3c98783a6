"""Where a run's metrics go: `metrics.jsonl`, and on request TensorBoard and Weights & Biases; and how fast it trains.

A record is `{"step": s}` and metrics under the names of `minipref.training`, numbers or arrays of them. A list in
`metrics.jsonl` is `NAME/0`, `NAME/1`, ... elsewhere. Equal runs write equal records but for `WALL_CLOCK`.
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

from scale.errors import InputError
from scale.files import atomic, read_json, write_json

LoggerName = Literal["tensorboard", "wandb"]


Record = dict[str, Any]


Write = Callable[[list[Record]], None]


WALL_CLOCK = ("tokens_per_second", "mfu")


@dataclass(frozen=True)
class Log:
    """The open log of a run; of a process other than the first it has no writers."""

    writers: Sequence[Write]

    def write(self, records: list[Record]) -> None:
        for write in self.writers:
            write(records)


@contextmanager
def open_log(folder: Path, step: int, loggers: Sequence[LoggerName] = ()) -> Iterator[Log]:
    """The log in `folder` of a run that begins after `step`: what was logged after it is dropped (of step 0, all).

    TensorBoard's files are in `tensorboard/`, those of W&B in `wandb/`, its run's id in `wandb.json`. Only process 0
    writes. Raises InputError where a sink's package is missing (in every process), or where W&B refuses to begin.
    """
    for logger in loggers:
        if find_spec(logger) is None:
            raise InputError(f"--log {logger}: needs pip install 'minipref[logging]'")
    openers = [OPENERS[name] for name in OPENERS if name in ("jsonl", *loggers) and jax.process_index() == 0]
    with ExitStack() as stack:
        yield Log([stack.enter_context(opener(folder, step)) for opener in openers])


@contextmanager
def open_jsonl(folder: Path, step: int) -> Iterator[Write]:
    path = folder / "metrics.jsonl"
    cut_back(path, step)
    yield partial(append, path)


def cut_back(path: Path, step: int) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # a kill may have torn the last line
    kept = [line for line in lines if json.loads(line)["step"] <= step] if step else []
    with atomic(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def append(path: Path, records: list[Record]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, default=plain) + "\n" for record in records)


def plain(value: Any) -> Any:
    return np.asarray(value).tolist()


@contextmanager
def open_tensorboard(folder: Path, step: int) -> Iterator[Write]:
    """A new file of events, whose first tells TensorBoard to forget the steps that will be run again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder / "tensorboard"))
    start = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=step + 1 if step else 0, session_log=start))
    try:
        yield partial(to_tensorboard, writer)
    finally:
        writer.close()


def to_tensorboard(writer: Any, records: list[Record]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    for record in records:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(record).items()]
        writer.add_event(Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values)))
    writer.flush()


@contextmanager
def open_wandb(folder: Path, step: int) -> Iterator[Write]:
    """The W&B run of the folder, continued where `step` is not 0; marked as failed where the training raises.

    Its project is `WANDB_PROJECT`, else "minipref"; `WANDB_MODE=offline` needs neither a network nor an account.
    """
    import wandb

    path = folder / "wandb.json"
    known = read_json(path)["id"] if step and path.exists() else None
    project = os.environ.get("WANDB_PROJECT", "minipref")
    try:
        run = wandb.init(project=project, name=folder.name, dir=folder, id=known, resume="allow")
    except wandb.Error as error:
        raise InputError(f"--log wandb: {error}; WANDB_MODE=offline needs no account") from error
    write_json(path, {"id": run.id})
    failed = 1
    try:
        yield partial(to_wandb, run, run.step)
        failed = 0
    finally:
        run.finish(failed)


def to_wandb(run: Any, first: int, records: list[Record]) -> None:
    """The records from step `first` on: W&B has those before it, and cannot take them back."""
    for record in records:
        if record["step"] >= first:
            run.log(scalars(record), step=record["step"], commit=True)


OPENERS = {"wandb": open_wandb, "tensorboard": open_tensorboard, "jsonl": open_jsonl}  # first what may refuse


def scalars(record: Record) -> dict[str, float]:
    """A record's numbers under one name each, `NAME/i` (of a matrix, `NAME/i/j`) for an array's."""
    return {"/".join([name, *map(str, index)]): float(value)
            for name, values in record.items() if name != "step"
            for index, value in np.ndenumerate(values)}
