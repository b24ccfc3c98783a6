"""The search for the fastest step that fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, get_args

from scale.errors import InputError
from scale.parallel.mesh import RematPolicy
from scale.plan.report import report
from scale.plan.step import StepConfig
from scale.plan.topology import meshes


def best(config: StepConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """The figures of the candidate with the highest bound of its MFU.

    Args:
        config: The step around which the candidates lie.
        log: Gets one line about each candidate.

    Returns:
        What `report` says of it.

    Raises:
        InputError: No candidate fits.
    """
    reports = []
    for candidate in candidates(config):
        try:
            reports.append(report(candidate))
            outcome = f"MFU at most {reports[-1]['mfu_bound']:.1%}"
        except InputError as error:
            outcome = str(error)
        shape = f"batch {candidate.batch}, mesh {candidate.mesh}, remat {candidate.remat}"
        log(f"{shape}: {outcome}")
    if not reports:
        pod = f"{config.topology} x {config.slices}"
        raise InputError(f"--search: no batch, mesh and remat policy fits {pod}")
    return max(reports, key=lambda figures: figures["mfu_bound"])


def candidates(config: StepConfig) -> Iterator[StepConfig]:
    """Half, once and twice the batch, with all meshes and remat policies.

    Args:
        config: The step around which they lie.

    Yields:
        Steps.
    """
    for batch in (config.batch // 2, config.batch, config.batch * 2):
        shapes = meshes(config.topology, config.slices, batch)
        for mesh, remat in product(shapes, get_args(RematPolicy)):
            yield replace(config, batch=batch, mesh=mesh, remat=remat)
