"""Several processes in one run: they join, load their parts of a batch, and gather results."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from scale.console import quiet
from scale.errors import InputError
from scale.parallel.mesh import BATCH, Runtime, RuntimeConfig

T = TypeVar("T")
HEARTBEAT = 20  # seconds without a sign of life until the others stop
SHUTDOWN = 60  # seconds that a process which is done, or has failed, waits for the others


def join(config: RuntimeConfig) -> None:
    """Connect to the other processes of the run. Call this before anything uses a device.

    Raises:
        InputError: The others do not come within five minutes, or `processes` is 0 and nothing says
            who they are.
    """
    connect: Callable[..., None] = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    try:
        if config.processes > 1:
            connect(config.coordinator, config.processes, config.process)
        elif config.processes == 0:
            connect()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--runtime.processes {config.processes}: {error}") from error
    if config.processes != 1 and not is_main():
        quiet()


def is_main() -> bool:
    """Whether this process prints and writes reports."""
    return jax.process_index() == 0


def main_first(work: Callable[[], T]) -> T:
    """Let process 0 do some work that leaves files while the others wait, then let them do it too.

    They find the files of process 0; where they have a file system of their own, they make theirs.

    Raises:
        InputError: Process 0 raised it, or an OSError, such as that of a full disk.
    """
    if jax.process_count() == 1:
        return work()
    result, fault = None, ""
    if is_main():
        try:
            result = work()
        except (InputError, OSError) as error:
            fault = str(error)
    if fault := broadcast_text(fault):
        raise InputError(fault)
    return result if is_main() else work()  # type: ignore[return-value]  # process 0 has a result


def broadcast_text(text: str) -> str:
    """The text of process 0, in every process."""
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(text.encode()))))
    if not size:
        return ""
    data = np.frombuffer(text.encode().ljust(size)[:size], np.uint8)
    theirs = multihost_utils.broadcast_one_to_all(data)
    return np.asarray(theirs, np.uint8).tobytes().decode()


def shard_batch(batch: Any, runtime: Runtime, axis: int = 0) -> Any:
    """A batch that every process has, with `axis` split over the devices.

    Each process loads the part of its own devices and talks to no other process, so this may be
    called in any thread.

    Raises:
        InputError: The rows do not divide among the devices.
    """
    if runtime.mesh is None:
        return jax.device_put(batch)
    rows = jax.tree.leaves(batch)[0].shape[axis]
    if rows % runtime.batch_shards:
        raise InputError(
            f"--training.batch-size {rows}: does not divide among {runtime.batch_shards} devices"
        )
    sharding = runtime.sharding(*[None] * axis, BATCH)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, lambda part: a[part]), batch
    )


def to_host(tree: Any) -> Any:
    """Arrays of the whole run as NumPy arrays, in every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)
