"""Several processes as one: who they are, what each loads, who writes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental import multihost_utils

from scale.console import quiet
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
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)
