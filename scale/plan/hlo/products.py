"""FLOPs of one instruction that multiplies matrices: two for each multiply-add."""

import math
from functools import cache

import numpy as np

from scale.errors import InputError
from scale.plan.hlo.parse import Computation, Instruction


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot`, of a `convolution` or of a custom call that states its own.

    The TPU compiler makes a convolution of every dot.

    Args:
        computation: Where the instruction stands.
        instruction: Any instruction.

    Returns:
        FLOPs, 0 for an instruction of another kind. Most Pallas kernels state none.

    Raises:
        InputError: A convolution without `dim_labels`.
    """
    match instruction.opcode:
        case "dot":
            return _dot(computation, instruction)
        case "convolution":
            return _convolution(computation, instruction)
        case "custom-call":
            return float(instruction.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)') or 0)
    return 0.0


def _dot(computation: Computation, dot: Instruction) -> float:
    left = computation.operands(dot)[0].dims
    contracted = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    depth = math.prod(left[int(dim)] for dim in contracted.split(",") if dim)
    return 2.0 * math.prod(dot.dims) * depth


def _convolution(computation: Computation, convolution: Instruction) -> float:
    """Products of a kernel position with padding, or with what dilation adds, are not counted.

    They must not be: a batch dimension of a dot becomes a dilated window with one valid position.
    """
    labels = convolution.attribute(r"dim_labels=(\w+_\w+->\w+)").replace("->", "_").split("_")
    if len(labels) != 3:
        raise InputError(f"HLO text: convolution {convolution.name} without dim_labels")
    shapes = [i.dims for i in (*computation.operands(convolution), convolution)]
    left, kernel, out = (dict(zip(*pair, strict=True)) for pair in zip(labels, shapes, strict=True))
    spatial = sorted(dim for dim in out if dim.isdigit())
    windows = _windows(convolution.attribute(r"window=\{([^}]*)\}"), len(spatial))
    positions = [
        _valid_positions(left[dim], out[dim], kernel[dim], **window)
        for dim, window in zip(spatial, windows, strict=True)
    ]
    batch = left["b"] / int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * batch * out["f"] * kernel["i"] * math.prod(positions)


def _windows(text: str, dims: int) -> list[dict[str, str]]:
    """`size=8x1 pad=0_0x2_2` as [{"size": "8", "pad": "0_0"}, {"size": "1", "pad": "2_2"}]."""
    pairs = [pair.split("=") for pair in text.split() if not pair.startswith("rhs_reversal")]
    return [{key: values.split("x")[i] for key, values in pairs} for i in range(dims)]


@cache
def _valid_positions(
    inputs: int, outputs: int, kernel: int,
    *, size="", stride="1", pad="0_0", lhs_dilate="1", rhs_dilate="1",
) -> int:
    """Pairs of an output and a kernel position that meet an input, along one dimension."""
    before, spacing = int(pad.split("_")[0]), int(lhs_dilate)
    starts = np.arange(outputs)[:, None] * int(stride) - before
    positions = starts + np.arange(kernel) * int(rhs_dilate)
    inside = (positions >= 0) & (positions <= (inputs - 1) * spacing) & (positions % spacing == 0)
    return int(inside.sum())
