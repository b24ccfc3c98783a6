"""Several processes as one: who they are, what each loads, who writes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from minipref.batch import Batch
from scale.console import quiet
from scale.data.dataset import take
from scale.errors import InputError
from scale.parallel.mesh import BATCH, Runtime, RuntimeConfig


def join(compute: RuntimeConfig) -> None:
    """Meet the other processes of the run. To be called before anything touches a device.

    Errors: InputError where they do not come within five minutes, or cannot be found out.
    """
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    meet: Callable[..., None] = partial(jax.distributed.initialize, **limits)
    try:
        if compute.processes > 1:
            meet(compute.coordinator, compute.processes, compute.process)
        elif compute.processes == 0:
            meet()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--runtime.processes {compute.processes}: {error}") from error
    if compute.processes != 1 and not is_main():
        quiet()


HEARTBEAT = 20  # seconds without a sign of life until the others stop


def is_main() -> bool:
    """Whether this process prints and writes reports."""
    return jax.process_index() == 0


def shard_batch(data: Batch, indices: np.ndarray, runtime: Runtime) -> Batch:
    """The rows `indices` [..., B] of `data`, a line each, as one batch of the whole run."""
    return on_devices(take(data, indices), runtime, indices.ndim - 1)


def on_devices(batch: Batch, runtime: Runtime, axis: int = 0) -> Batch:
    """A batch that every process has, its rows and lines (`axis`) split; each process loads those of its devices. It
    talks to no other process, so it may be called in any thread.

    Errors: InputError where the rows do not divide among the devices that share them out.
    """
    if runtime.mesh is None:
        return jax.device_put(batch)
    rows = batch.segments.shape[axis]
    if rows % runtime.batch_shards:
        raise InputError(f"--training.batch {rows}: does not divide among {runtime.batch_shards} devices")
    sharding = runtime.sharding(*[None] * axis, BATCH)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda part: a[part]), batch)


def to_host(tree: Any) -> Any:
    """Arrays of the whole run as NumPy arrays, in every process."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)
