"""An estimate of the bytes of main memory that one instruction reads and writes, rather too high.

A slice of a larger array counts by its own size. Arrays on the chip do not count.
"""

import math

from scale.plan.hlo.collectives import is_continued
from scale.plan.hlo.parse import Computation, Instruction

FREE_CALLS = {
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone"),
    *("AssumeGatherIndicesInBound", "LayoutConstraint", "TopK", "SliceId"),
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"),
    *("MoveToHost", "MoveToDevice", "annotate_device_placement"),
}
"""Targets of custom calls that neither compute nor move anything."""
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "opt-barrier"),
    *("send", "recv", "send-done", "recv-done", "async-start", "async-update", "async-done"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_traffic(
    computation: Computation, instruction: Instruction, fused: Computation | None
) -> float:
    """Bytes that one instruction reads from main memory and writes to it.

    Args:
        computation: Where the instruction stands; not a fusion's.
        instruction: Any instruction.
        fused: The computation of a fusion, else None.

    Returns:
        Bytes.
    """
    opcode, operands = instruction.opcode, computation.operands(instruction)
    if opcode in _NO_TRAFFIC or instruction.target in FREE_CALLS:
        return 0.0
    if fused:
        return _fusion_traffic(operands, instruction, fused)
    if opcode == "dynamic-update-slice":
        return 2 * min(operands[1].hbm_size, instruction.hbm_size)
    is_start = opcode.endswith("-start")
    written = 0.0 if is_start else instruction.hbm_size
    if opcode.endswith("-done"):
        return written
    if opcode.removesuffix("-start") in _SLICES:
        return written + min(operands[0].hbm_size, instruction.arrays[-2 if is_start else 0].size)
    return written + math.fsum(operand.hbm_size for operand in operands)


def _fusion_traffic(
    operands: list[Instruction], fusion: Instruction, fused: Computation
) -> float:
    read = [
        min(operand.hbm_size, _read(fused, fused.parameters[i]))
        for i, operand in enumerate(operands)
    ]
    results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    outputs = zip(results, fusion.arrays, strict=False)
    written = [min(array.size, _written(fused, name)) for name, array in outputs if array.in_hbm]
    return math.fsum(read) + math.fsum(written)


def _read(fused: Computation, name: str) -> float:
    """Bytes that a fusion reads of a value: infinity for all of them."""
    return math.fsum(_read_by(fused, user, place) for user, place in fused.uses(name))


def _read_by(fused: Computation, user: Instruction, place: int) -> float:
    """A slice reads its own size. An update in place, and what passes a value on, read nothing."""
    if place == 0 and user.opcode in _SLICES:
        return user.size
    in_place = place == 0 and user.opcode == "dynamic-update-slice"
    passed = user.opcode == "tuple" or user.target in FREE_CALLS or is_continued(fused, user)
    return 0.0 if in_place or passed else math.inf


def _written(fused: Computation, name: str) -> float:
    """Bytes that a fusion writes of a result: infinity for all of them.

    An update writes its own size. What the fusion passes on is not written again.
    """
    result = fused.instructions[name]
    while result.opcode == "bitcast":
        result = fused.operands(result)[0]
    if result.opcode == "dynamic-update-slice":
        return fused.operands(result)[1].size
    is_passed = result.opcode == "parameter" or is_continued(fused, result)
    return 0.0 if is_passed or "CollectiveStart" in result.target else math.inf
