"""The batch of a plan: the one that is asked for, or the largest that fits; and the best mesh."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from scale.errors import InputError
from scale.parallel.mesh import RematPolicy
from scale.plan.options import TRAINED, PlanOptions
from scale.plan.report import report
from scale.plan.step import Placed, place, smallest_batch
from scale.plan.topology import meshes

Log = Callable[[str], None]
FINEST = 16  # the largest batch is found to this part of it
MOST = 2**16  # rows of a step; larger batches are not tried


def planned(options: PlanOptions, log: Log) -> dict[str, Any]:
    """The figures of a step.

    Args:
        options: The stage and the pod.
        log: Gets a line for each batch that is tried.

    Returns:
        What `report` says of it.

    Raises:
        InputError: The mesh does not divide the model or the batch, or no batch fits.
    """
    placed = place(options)
    unit = smallest_batch(options, placed)
    if options.batch is None and options.stage in TRAINED:
        return largest(options, placed, unit, log)
    rows = options.batch or unit
    shards = placed.shards * options.accumulation
    if rows % shards:
        parts = f" in {options.accumulation} parts" * (options.accumulation > 1)
        raise InputError(f"--batch {rows}: does not divide among {placed.shards} devices{parts}")
    return report(options, placed, rows)


def largest(options: PlanOptions, placed: Placed, unit: int, log: Log) -> dict[str, Any]:
    """The figures of the largest batch that fits, by doubling and then by bisection.

    Raises:
        InputError: Not even the smallest one fits.
    """
    found = tried(options, placed, unit, log)
    low, high = 1, 2
    while high * unit <= MOST and (figures := fitting(options, placed, high * unit, log)):
        found, low, high = figures, high, 2 * high
    if high * unit > MOST:
        return found
    while high - low > max(1, low // FINEST):
        middle = (low + high) // 2
        figures = fitting(options, placed, middle * unit, log)
        if figures:
            found, low = figures, middle
        else:
            high = middle
    return found


def fitting(
    options: PlanOptions, placed: Placed, rows: int, log: Log
) -> dict[str, Any] | None:
    """The figures of a batch, if it fits."""
    try:
        return tried(options, placed, rows, log)
    except InputError:
        return None


def tried(options: PlanOptions, placed: Placed, rows: int, log: Log) -> dict[str, Any]:
    """The figures of a batch that fits.

    Raises:
        InputError: It does not.
    """
    try:
        figures = report(options, placed, rows)
        if not figures["fits"]:
            raise InputError(f"{options.model} on {options.topology}: {memory_text(figures)}")
    except InputError as error:
        log(f"batch {rows}: {error}")
        raise
    log(f"batch {rows}: {memory_text(figures)}")
    return figures


def memory_text(figures: dict[str, Any]) -> str:
    """Whether a step fits, and how much memory it needs."""
    used, limit = (figures[f"hbm_{n}"] / 2**30 for n in ("bytes_per_chip", "limit_bytes"))
    sizes = f"a chip needs {used:.2f} of {limit:.1f} GiB HBM"
    return f"fits: {sizes}" if figures["fits"] else f"does not fit: {sizes}; {figures['advice']}"


def best(options: PlanOptions, log: Log) -> dict[str, Any]:
    """The figures of the candidate with the highest bound of its MFU.

    Args:
        options: The stage and the pod.
        log: Gets lines about each candidate.

    Returns:
        What `report` says of it.

    Raises:
        InputError: No candidate fits.
    """
    reports = []
    for candidate in candidates(options):
        runtime = candidate.runtime
        shape = f"mesh {runtime.data} x {runtime.fsdp} x {runtime.tensor}, remat {runtime.remat}"
        try:
            figures = planned(candidate, lambda line: None)
            outcome = f"batch {figures['batch']}, {memory_text(figures)}"
            if figures["fits"]:
                reports.append(figures)
                outcome += f", MFU at most {figures['mfu_bound']:.1%}"
        except InputError as error:
            outcome = str(error)
        log(f"{shape}: {outcome}")
    if not reports:
        raise InputError(f"--search: nothing fits {options.topology} x {options.slices}")
    return max(reports, key=lambda figures: figures["mfu_bound"])


def candidates(options: PlanOptions) -> Iterator[PlanOptions]:
    """All meshes with all remat policies."""
    for mesh, remat in product(meshes(options.topology, options.slices), get_args(RematPolicy)):
        data, fsdp, tensor = mesh
        runtime = replace(options.runtime, data=data, fsdp=fsdp, tensor=tensor, remat=remat)
        yield replace(options, runtime=runtime)
