"""Bytes that one device sends in one instruction, by the ring algorithms.

Collectives come in many forms: synchronous, `-start` and `-done`, wrapped by `async-start`, inside
fusions. An asynchronous collective fusion of the TPU compiler repeats one collective in a starting,
a computing and a finishing fusion. Its `all-reduce-scatter` fusion holds an all-reduce and a slice
and costs a reduce-scatter. Between slices it sends through the host (`xla_megascale_runtime`).
"""

import math
import re

from scale.errors import InputError
from scale.plan.hlo.parse import Computation, Instruction
from scale.plan.hlo.replica_groups import GROUPS, Axes, group_axes

SENT = {  # in a group of g devices: what one device sends, as a share of its operand
    "all-gather": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "ragged-all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
    "collective-broadcast": lambda g: 1,
}
_MEGASCALE = r'_xla_megascale_target="?\{+([\d,:]*)\}.*_xla_megascale_transfer_type="(\w+)"'


def sent_bytes(
    computation: Computation, instruction: Instruction, axes: Axes, fused: bool
) -> dict[str, float]:
    """Bytes that one device sends in an instruction.

    Args:
        computation: Where the instruction stands.
        instruction: Any instruction. One that continues an earlier collective sends nothing.
        axes: Those of the mesh.
        fused: Whether the computation is that of a fusion.

    Returns:
        Bytes by the axes over which a group extends, such as `data+fsdp`; {} for nothing.

    Raises:
        InputError: The groups cannot be read, or are not of this mesh.
    """
    if instruction.opcode == "send":
        return _sent_between_slices(computation, instruction, axes)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in SENT or is_continued(computation, instruction):
        return {}
    if fused and kind == "all-reduce" and _is_sliced(computation, instruction):
        kind = "reduce-scatter"
    names, group_size = group_axes(_groups(instruction), axes)
    operands = computation.operands(instruction)[: 1 if kind == "collective-permute" else None]
    size = math.fsum(operand.size for operand in operands)
    return {names: SENT[kind](group_size) * size} if names else {}


def is_continued(computation: Computation, instruction: Instruction) -> bool:
    """Whether a collective was started by an earlier fusion, which counts it.

    Args:
        computation: Where the instruction stands.
        instruction: Any instruction.
    """
    targets = (user.target for user in computation.users[instruction.name])
    is_async = "async_collective_fusion_config" in instruction.attributes
    return is_async and "AsyncCollectiveStart" not in targets


def _groups(collective: Instruction) -> str:
    groups = collective.attribute(GROUPS)
    if not groups:
        name = f"{collective.opcode} {collective.name}"
        raise InputError(f"HLO text: {name}: no replica groups that can be read")
    return groups


def _is_sliced(computation: Computation, all_reduce: Instruction) -> bool:
    return {user.opcode for user, _ in computation.uses(all_reduce.name)} == {"dynamic-slice"}


def _sent_between_slices(
    computation: Computation, send: Instruction, axes: Axes
) -> dict[str, float]:
    """It counts for the slowest axis of the mesh. {} for a send of another kind."""
    match = re.search(_MEGASCALE, send.attributes)
    kind = match[2].lower().replace("_", "-") if match else ""
    if match is None or kind not in SENT:
        return {}
    slices = sum(_members(part) for part in match[1].split(","))
    slowest = next(name for name, size in axes if size > 1)
    return {slowest: SENT[kind](slices) * computation.operands(send)[0].size}


def _members(part: str) -> int:
    """1 for `7`, 4 for `0:3`."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1
