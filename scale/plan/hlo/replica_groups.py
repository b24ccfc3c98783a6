"""Which devices a collective joins, and which axes of the mesh lie between them.

Devices have the numbers of the mesh's flattened device array, which are XLA's partition ids, and
not the hardware's own.
"""

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np

from scale.errors import InputError

Axes: TypeAlias = tuple[tuple[str, int], ...]
"""Names and sizes of the mesh's axes, in its order."""
GROUPS = (
    r"(?:replica_groups|source_target_pairs)="
    r"(mesh\[.*?\](?:, device_ids=\(.*?\)\))? \{.*?\}"
    r"|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?|\{\}|\{\{[\d,{} ]*\}\})"
)
"""A regular expression for groups in every notation."""
_AXIS_PART = r"'?([A-Za-z_]\w*)'?(?::\((\d+)\)(\d+))?"


@cache
def group_axes(groups: str, axes: Axes) -> tuple[str, int]:
    """The axes of the mesh along which groups extend.

    Args:
        groups: The text that `GROUPS` matches.
        axes: Those of the mesh.

    Returns:
        The names of the axes, joined by `+`, and how many devices a group has.

    Raises:
        InputError: A group names a device that the mesh does not have.
    """
    names, sizes = zip(*axes, strict=True)
    devices = _devices(groups, math.prod(sizes))
    if (last := devices.max()) >= math.prod(sizes):
        mesh = dict(axes)
        raise InputError(f"HLO text: device {last} in groups {groups[:60]}, but the mesh is {mesh}")
    coordinates = np.stack(np.unravel_index(devices, sizes))
    varies = (coordinates != coordinates[:, :, :1]).any((1, 2))
    extent = "+".join(name for name, along in zip(names, varies, strict=True) if along)
    return extent, devices.shape[1]


def _devices(text: str, count: int) -> np.ndarray:
    """Device numbers [groups, members] in the three notations; `{}` is one group of all devices."""
    if text.startswith("mesh"):
        return _mesh_notation(text)
    if "<=" in text:
        shape, source, *order = map(_integers, re.split(r"<=|T", text))
        return _iota(source, *order).reshape(shape)
    groups = [_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]
    return np.array(groups or [list(range(count))])


def _mesh_notation(text: str) -> np.ndarray:
    """`mesh['x'=4,'y'=2] {'x'}`: groups along x of a mesh of devices.

    A part of an axis is `'x':(1)2`: the 2 that follow a factor of 1. The devices of the mesh are in
    order, or as `device_ids=([2,4]T(1,0))` says: 0 to 7 as [2, 4], transposed.
    """
    shape, _, rest = text.partition("]")
    ids, _, chosen = rest.rpartition(" {")
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", shape)}
    matches = re.finditer(_AXIS_PART, chosen)
    parts = {m[1]: (int(m[2] or 1), int(m[3] or sizes[m[1]])) for m in matches}
    factors = list[int]()  # of each axis: those before the part, the part, those after
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        factors += before, part, size // before // part
    source, _, order = ids.partition("T")
    grid = _iota(_integers(source) or factors, _integers(order)).reshape(factors)
    inner = range(1, len(factors), 3)
    grouped = np.moveaxis(grid, inner, range(-len(inner), 0))
    return grouped.reshape(-1, math.prod(factors[1::3]))


def _iota(shape: list[int], order: Sequence[int] = ()) -> np.ndarray:
    """0, 1, ... as an array of a shape, with its axes in another order, if one is given."""
    return np.arange(math.prod(shape)).reshape(shape).transpose(order or range(len(shape)))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
