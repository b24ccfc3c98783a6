"""What one device does in a compiled program, read from the text of its optimised HLO (`compiled.as_text()`).

XLA's own `cost_analysis` counts a loop's body once. Here a body counts as often as it runs: by the compiler's
`known_trip_count` (CPU), else by the counter, limit and step in the loop's condition and body (TPU). A loop of which
neither can be told counts once and is named in `Counts.uncounted`. Conditionals count by their largest branch.

FLOPs are those of matrix products, two a multiply-add, as model FLOPs are: `dot`, and `convolution`, which the TPU
compiler makes of every dot (a batch dimension becomes a dilated window in which one position is valid, so padding
and dilation must be, and are, left out of the count). A custom call counts by its cost estimate where the text
has one; Pallas kernels mostly have none and are named in `uncounted`.

Collectives are found in every form: synchronous, `-start`/`-done`, wrapped by `async-start`, inside fusions. The TPU
compiler's asynchronous collective fusions repeat one collective in a starting, a computing and a finishing fusion;
it counts where it starts. Its `all-reduce-scatter` fusions hold an all-reduce and a slice and cost a reduce-scatter.
Between slices it sends through the host (`xla_megascale_runtime`); those sends count for the mesh's slowest axes.
Bytes a device sends, by the ring algorithms: all-gather (g-1) x its shard; reduce-scatter and all-to-all (g-1)/g of
their operand; all-reduce twice that; permute its operand.

Devices are numbered as the mesh's flattened device array, whatever the hardware's own ids: XLA's partition ids.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from scale.errors import InputError


@dataclass
class Counts:
    """Totals of one execution, for one device."""

    flops: float = 0.0
    """Of matrix products (and of custom calls that state theirs)."""
    hbm_bytes: float = 0.0
    """Estimate, rather too high: what unfused instructions read and write in main memory. Slices of a larger array
    count by their own size; arrays that the TPU compiler keeps on the chip (`S(1)` and so on) do not count."""
    collective_bytes: dict[str, float] = field(default_factory=dict)
    """Bytes sent, by the mesh axes over which the group extends, in the mesh's order: `fsdp`, `data+fsdp`."""
    uncounted: dict[str, int] = field(default_factory=dict)
    """Executions of what has unknown FLOPs: `tpu_custom_call NAME`, `while NAME: unknown trip count`."""

    def add(self, other: "Counts", times: int) -> None:
        self.flops += other.flops * times
        self.hbm_bytes += other.hbm_bytes * times
        for axes, sent in other.collective_bytes.items():
            self.collective_bytes[axes] = self.collective_bytes.get(axes, 0.0) + sent * times
        for name, executions in other.uncounted.items():
            self.uncounted[name] = self.uncounted.get(name, 0) + executions * times


def count(text: str, mesh_shape: dict[str, int]) -> Counts:
    """Count one execution of a compiled module on one device of a mesh (axis sizes in the mesh's order).

    InputError where the text is no HLO module or a collective's groups are not of this mesh.
    """
    module = _Module(_computations(text), tuple(mesh_shape.items()))
    if _ENTRY not in module.computations:
        raise InputError("HLO text: no ENTRY computation; expected the text of a compiled module")
    return module.cost(_ENTRY, {})


# ---- text to instructions
_ENTRY = "ENTRY"


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


_END = re.compile(r"^\}(, execution_thread=.*)?$")


_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)


_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")


_ARGUMENTS_END = re.compile(r"\)(?=,|\s|$)")


_NAME = re.compile(r"%([\w.\-]+)")


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


class _Array(NamedTuple):
    dims: tuple[int, ...]
    size: float
    """Bytes."""
    main_memory: bool


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """The computations that the first attribute of `keys` to be there names."""
        for key in keys:
            if match := re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                return [name.strip(" %") for name in match[1].strip("{}").split(",")]
        return []


class _Computation:
    def __init__(self, instructions: dict[str, _Instruction], root: str):
        self.instructions = instructions
        self.root = instructions[root]

    @cached_property
    def parameters(self) -> dict[int, str]:
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.arguments): i.name for i in found}

    @cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        users: dict[str, list[_Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operand(self, instruction: _Instruction, index: int) -> _Instruction:
        return self.instructions[instruction.operands[index]]

    def uses(self, name: str) -> Iterator[tuple[_Instruction, int]]:
        """The instructions that use a value, and as which operand; through what only renames it."""
        for user in self.users[name]:
            if user.opcode in ("bitcast", "get-tuple-element"):
                yield from self.uses(user.name)
            else:
                yield user, user.operands.index(name)


def _computations(text: str) -> dict[str, _Computation]:
    """Every computation by name; the entry's name is ENTRY."""
    found: dict[str, _Computation] = {}
    for name, lines in _bodies(text):
        parsed = [_parsed(line) for line in lines]
        root = next((i.name for is_root, i in parsed if is_root), parsed[-1][1].name)
        found[name] = _Computation({i.name: i for _, i in parsed}, root)
    return found


def _bodies(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's name and instructions; one whose attributes hold line ends is put together again."""
    name, lines = None, list[str]()
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = _ENTRY if header[1] else header[2], []
        elif _END.match(line):
            yield name, lines
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line


def _parsed(line: str) -> tuple[bool, _Instruction]:
    match = _INSTRUCTION.match(line)
    opcode = _OPCODE.search(match[3]) if match else None
    end = _ARGUMENTS_END.search(match[3], opcode.end()) if match and opcode else None
    if not match or not opcode or not end:
        raise InputError(f"HLO text: cannot read the instruction {line.strip()[:80]!r}")
    arguments = match[3][opcode.end() : end.start()]
    operands = tuple(_NAME.findall(arguments))
    shape, attributes = match[3][: opcode.start()], match[3][end.end() :]
    return bool(match[1]), _Instruction(match[2], shape, opcode[1], arguments, operands, attributes)


@cache
def _arrays(shape: str) -> tuple[_Array, ...]:
    """The arrays of a shape, those of a tuple in order."""
    return tuple(_array(*match) for match in _ARRAY.findall(shape))


def _array(kind: str, dims: str, layout: str) -> _Array:
    sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
    digits = re.search(r"\d+", kind)
    bits = _BITS.get(kind, int(digits[0]) if digits else 0)
    space = re.search(r"S\((\d+)\)", layout)
    return _Array(sizes, math.prod(sizes) * bits / 8, space is None or space[1] == "0")


def _dims(instruction: _Instruction) -> tuple[int, ...]:
    return _arrays(instruction.shape)[0].dims


def _size(instruction: _Instruction) -> float:
    return math.fsum(a.size for a in _arrays(instruction.shape))


# ---- matrix products
def _dot_flops(computation: _Computation, dot: _Instruction) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    left = _dims(computation.operand(dot, 0))
    depth = math.prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
    return 2.0 * math.prod(_dims(dot)) * depth


def _convolution_flops(computation: _Computation, convolution: _Instruction) -> float:
    """Twice the multiply-adds; kernel positions that fall on padding or between dilated inputs are none."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        raise InputError(f"HLO text: convolution {convolution.name} without dim_labels")
    shapes = _dims(computation.operand(convolution, 0)), _dims(computation.operand(convolution, 1)), _dims(convolution)
    left, kernel, out = (dict(zip(*pair, strict=True)) for pair in zip(labels.groups(), shapes, strict=True))
    window = _window(convolution.attributes)
    positions = [
        _valid(left[d], out[d], kernel[d], **{key: values[i] for key, values in window.items()})
        for i, d in enumerate(sorted(d for d in out if d.isdigit()))
    ]
    groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    batch = left["b"] / (int(groups[1]) if groups else 1)
    return 2.0 * batch * out["f"] * kernel["i"] * math.prod(positions)


def _window(attributes: str) -> dict[str, list[str]]:
    """`{size=8x1 pad=0_0x2_2}` as {"size": ["8", "1"], "pad": ["0_0", "2_2"]}."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    pairs = (item.split("=") for item in match[1].split()) if match else ()
    return {key: value.split("x") for key, value in pairs if key != "rhs_reversal"}


@cache
def _valid(inputs: int, outputs: int, kernel: int, *, size="", stride="1", pad="0_0", lhs_dilate="1", rhs_dilate="1"):
    """Pairs of an output and a kernel position that meet an input, along one dimension."""
    low = int(pad.split("_")[0])
    at = np.arange(outputs)[:, None] * int(stride) + np.arange(kernel) * int(rhs_dilate) - low
    inside = (at >= 0) & (at <= (inputs - 1) * int(lhs_dilate)) & (at % int(lhs_dilate) == 0)
    return int(inside.sum())


# ---- collectives
_Axes: TypeAlias = tuple[tuple[str, int], ...]


_SHARES = {  # of the operand, in a group of g: what one device sends
    "all-gather": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "ragged-all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1,
    "collective-broadcast": lambda g: 1,
}


_GROUPS = re.compile(
    r"(?:replica_groups|source_target_pairs)="
    r"(mesh\[.*?\](?:, device_ids=\(.*?\)\))? \{.*?\}|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?|\{\}|\{\{[\d,{} ]*\}\})"
)


def _collective(computation: _Computation, it: _Instruction, kind: str, axes: _Axes) -> dict[str, float]:
    """Bytes that one device sends, by mesh axes; {} where every group is one device."""
    names, group = _extent(_groups_text(it), axes)
    operands = it.operands[:1] if kind == "collective-permute" else it.operands
    size = math.fsum(_size(computation.instructions[name]) for name in operands)
    return {names: _SHARES[kind](group) * size} if names else {}


def _groups_text(it: _Instruction) -> str:
    match = _GROUPS.search(it.attributes)
    if match is None:
        raise InputError(f"HLO text: {it.opcode} {it.name}: no replica groups that can be read")
    return match[1]


@cache
def _extent(groups: str, axes: _Axes) -> tuple[str, int]:
    """The axes along which the groups extend, joined by `+`, and the size of a group."""
    names, sizes = zip(*axes, strict=True)
    devices = _groups(groups, math.prod(sizes))
    if devices.max() >= math.prod(sizes):
        raise InputError(f"HLO text: device {devices.max()} in groups {groups[:60]}, but the mesh is {dict(axes)}")
    places = np.stack(np.unravel_index(devices, sizes))
    varies = (places != places[:, :, :1]).any((1, 2))
    return "+".join(name for name, along in zip(names, varies, strict=True) if along), devices.shape[1]


_AXIS_PART = r"'?([A-Za-z_]\w*)'?(?::\((\d+)\)(\d+))?"


def _groups(text: str, devices: int) -> np.ndarray:
    """Device numbers [groups, members] of the three notations, and of `{}`, all devices."""
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if "<=" in text:
        shape, source, order = map(_integers, re.split(r"<=|T", text + ("" if "T" in text else "T")))
        return np.arange(math.prod(source)).reshape(source).transpose(order or None).reshape(shape)
    return np.array([_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)] or [list(range(devices))])


def _mesh_groups(text: str) -> np.ndarray:
    """`mesh['x'=4,'y'=2] {'x'}`; a part of an axis is `'x':(1)2`: the 2 that follow a factor of 1.

    The mesh's devices are numbered in order, or as `device_ids=([2,4]T(1,0))` says: 0 to 7 as [2, 4], transposed.
    """
    shape, _, chosen = text.partition("]")
    ids, _, chosen = chosen.rpartition(" {")
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", shape)}
    parts = {m[1]: (int(m[2] or 1), int(m[3] or sizes[m[1]])) for m in re.finditer(_AXIS_PART, chosen)}
    factors = list[int]()  # of each axis: those before the part, the part, those after
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        factors += before, part, size // before // part
    inner = range(1, len(factors), 3)
    grid = np.moveaxis(_device_ids(ids, math.prod(factors)).reshape(factors), inner, range(-len(inner), 0))
    return grid.reshape(-1, math.prod(factors[1::3]))


def _device_ids(text: str, devices: int) -> np.ndarray:
    match = re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", text)
    if match is None:
        return np.arange(devices)
    return np.arange(devices).reshape(_integers(match[1])).transpose(_integers(match[2]))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


_MEGASCALE = re.compile(r'_xla_megascale_target="?\{+([\d,:]*)\}.*_xla_megascale_transfer_type="(\w+)"')


def _between_slices(computation: _Computation, send: _Instruction, axes: _Axes) -> dict[str, float] | None:
    """A send of the TPU runtime's network between slices; None for another."""
    match = _MEGASCALE.search(send.attributes)
    kind = match[2].lower().replace("_", "-") if match else ""
    if match is None or kind not in _SHARES:
        return None
    slices = sum(_members(part) for part in match[1].split(","))
    slowest = next(name for name, size in axes if size > 1)
    return {slowest: _SHARES[kind](slices) * _size(computation.operand(send, 0))}


def _members(part: str) -> int:
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def _is_sliced(computation: _Computation, all_reduce: _Instruction) -> bool:
    users = [user.opcode for user, _ in computation.uses(all_reduce.name)]
    return set(users) == {"dynamic-slice"}


def _is_continued(computation: _Computation, it: _Instruction) -> bool:
    """A collective's later appearance: in the fusions that compute while it runs, and that wait for it."""
    users = computation.users[it.name]
    return "async_collective_fusion_config" in it.attributes and not any(
        _target(user) == "AsyncCollectiveStart" for user in users
    )


# ---- main memory
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "send", "recv", "send-done", "recv-done"),
    *("async-start", "async-update", "async-done"),
}


_SLICES = ("dynamic-slice", "slice", "gather")


_FREE_CALLS = {
    *("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone", "AssumeGatherIndicesInBound"),
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "LayoutConstraint", "TopK", "SliceId"),
    *("MoveToHost", "MoveToDevice", "annotate_device_placement"),
}


_TARGET = re.compile(r'custom_call_target="([^"]*)"')


def _in_memory(instruction: _Instruction) -> float:
    return math.fsum(a.size for a in _arrays(instruction.shape) if a.main_memory)


def _target(instruction: _Instruction) -> str:
    match = _TARGET.search(instruction.attributes) if instruction.opcode == "custom-call" else None
    return match[1] if match else ""


def _traffic(computation: _Computation, it: _Instruction, fused: _Computation | None) -> float:
    """Bytes that one instruction reads from and writes to main memory; `fused` is a fusion's computation."""
    if it.opcode in _NO_TRAFFIC or _target(it) in _FREE_CALLS:
        return 0.0
    if fused:
        return _fusion_traffic(computation, it, fused)
    if it.opcode == "dynamic-update-slice":
        return 2 * min(_in_memory(computation.operand(it, 1)), _in_memory(it))
    written = 0.0 if it.opcode.endswith("-start") else _in_memory(it)
    if it.opcode.endswith("-done"):
        return written
    operands = (computation.instructions[name] for name in it.operands)
    if it.opcode.removesuffix("-start") in _SLICES:
        whole = _in_memory(next(operands))
        result = _arrays(it.shape)[-2 if it.opcode.endswith("-start") else 0].size
        return written + min(whole, result)
    return written + math.fsum(map(_in_memory, operands))


def _fusion_traffic(computation: _Computation, fusion: _Instruction, fused: _Computation) -> float:
    operands = (_in_memory(computation.instructions[name]) for name in fusion.operands)
    read = math.fsum(min(whole, _read(fused, fused.parameters[i])) for i, whole in enumerate(operands))
    results = fused.root.operands if fused.root.opcode == "tuple" else (fused.root.name,)
    outputs = zip(results, _arrays(fusion.shape), strict=False)
    return read + math.fsum(min(a.size, _written(fused, name)) for name, a in outputs if a.main_memory)


def _read(fused: _Computation, name: str) -> float:
    """Bytes of a value that a fusion reads: all, but of what is only sliced, updated in place or passed on less."""
    return math.fsum(_read_by(fused, user, place) for user, place in fused.uses(name))


def _read_by(fused: _Computation, user: _Instruction, place: int) -> float:
    if place == 0 and user.opcode in _SLICES:
        return _size(user)
    in_place = place == 0 and user.opcode == "dynamic-update-slice"
    passed = user.opcode == "tuple" or _target(user) in _FREE_CALLS or _is_continued(fused, user)
    return 0.0 if in_place or passed else math.inf


def _written(fused: _Computation, name: str) -> float:
    """Bytes that a fusion writes of a result: an update's own, none of what it passes on."""
    result = fused.instructions[name]
    while result.opcode == "bitcast":
        result = fused.operand(result, 0)
    if result.opcode == "dynamic-update-slice":
        return _size(fused.operand(result, 1))
    passed = result.opcode == "parameter" or _is_continued(fused, result) or "CollectiveStart" in _target(result)
    return 0.0 if passed else math.inf


# ---- how often: loops and what they call
_State: TypeAlias = dict[int, int]  # elements of a loop's state that are known and do not change


_Linear: TypeAlias = tuple[int, int | None]  # a number, plus an element of the loop's state


_STEPS = {"add": 1, "subtract": -1}


_INTEGER = re.compile(r"[su]\d+\[\]")


class _Module:
    def __init__(self, computations: dict[str, _Computation], axes: _Axes):
        self.computations = computations
        self.axes = axes
        self.known: dict[tuple[str, frozenset[tuple[int, int]], bool], Counts] = {}

    def cost(self, name: str, state: _State, fused: bool = False) -> Counts:
        """One execution of a computation, a loop's body with the constants in its state."""
        key = name, frozenset(state.items()), fused
        if key not in self.known:
            self.known[key] = total = Counts()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                total.add(self._own(computation, instruction, fused), 1)
                for part, times in self._parts(computation, instruction, state, fused):
                    total.add(part, times)
        return self.known[key]

    def _own(self, computation: _Computation, it: _Instruction, fused: bool) -> Counts:
        """What an instruction itself does, without the computations that it calls."""
        own = Counts()
        if it.opcode == "dot":
            own.flops = _dot_flops(computation, it)
        elif it.opcode == "convolution":
            own.flops = _convolution_flops(computation, it)
        elif it.opcode == "custom-call" and _target(it) not in _FREE_CALLS:
            own = _custom(it)
        elif it.opcode == "send":
            sent = _between_slices(computation, it, self.axes)
            own = Counts(uncounted={f"send {it.name}": 1}) if sent is None else Counts(collective_bytes=sent)
        elif (kind := it.opcode.removesuffix("-start")) in _SHARES and not _is_continued(computation, it):
            kind = "reduce-scatter" if fused and kind == "all-reduce" and _is_sliced(computation, it) else kind
            own.collective_bytes = _collective(computation, it, kind, self.axes)
        if not fused:
            inner = self.computations[it.called("calls")[0]] if it.opcode == "fusion" else None
            own.hbm_bytes = _traffic(computation, it, inner)
        return own

    def _parts(
        self, computation: _Computation, it: _Instruction, state: _State, fused: bool
    ) -> Iterable[tuple[Counts, int]]:
        """What an instruction calls, and how often."""
        if it.opcode == "fusion":
            return [(self.cost(it.called("calls")[0], {}, True), 1)]
        if it.opcode in ("call", "async-start"):
            return [(self.cost(name, {}, fused), 1) for name in it.called("to_apply", "calls")]
        if it.opcode == "conditional":
            names = it.called("branch_computations") or it.called("true_computation") + it.called("false_computation")
            return [(max((self.cost(name, {}, fused) for name in names), key=lambda c: (c.flops, c.hbm_bytes)), 1)]
        return self._loop(computation, it, state) if it.opcode == "while" else []

    def _loop(self, computation: _Computation, loop: _Instruction, state: _State) -> list[tuple[Counts, int]]:
        condition, body = loop.called("condition")[0], loop.called("body")[0]
        start = self._start(computation, loop, state)
        unchanged = {i for i, value in self._step(body, {}).items() if value == (0, i)}
        constants = {i: value for i, value in start.items() if i in unchanged}
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        trips = int(stated[1]) if stated else self._trips(condition, start, self._step(body, constants), constants)
        cost = self.cost(body, constants)
        if trips is not None:
            return [(cost, trips)]
        return [(cost, 1), (Counts(uncounted={f"while {loop.name}: unknown trip count": 1}), 1)]

    def _start(self, computation: _Computation, loop: _Instruction, state: _State) -> _State:
        """The elements of a loop's first state that are known."""
        first = computation.operand(loop, 0)
        if first.opcode != "tuple":
            return {}
        values = [self._linear(computation, name, state) for name in first.operands]
        return {i: value[0] for i, value in enumerate(values) if value and value[1] is None}

    def _step(self, body: str, constants: _State) -> dict[int, _Linear]:
        """Each element of the next state that is a number, or an element of this one plus a number."""
        computation = self.computations[body]
        if computation.root.opcode != "tuple":
            return {}
        values = [self._linear(computation, name, constants) for name in computation.root.operands]
        return {i: value for i, value in enumerate(values) if value}

    def _trips(self, condition: str, start: _State, step: dict[int, _Linear], constants: _State) -> int | None:
        """How often `counter + offset < limit` (or another comparison) holds; None where it cannot be told."""
        comparison = self._comparison(self.computations[condition], constants)
        if comparison is None:
            return None
        direction, (offset, counter), (limit, other) = comparison
        stride, same = step.get(counter, (0, None)) if counter is not None else (0, None)
        if other is not None or counter not in start or same != counter or not stride:
            return None
        return _length(direction, limit - offset - start[counter], stride)

    def _comparison(self, computation: _Computation, constants: _State) -> tuple[str, _Linear, _Linear] | None:
        """Direction and sides of the comparison that a condition returns, itself or through a fusion."""
        root, arguments = computation.root, None
        if root.opcode in ("fusion", "call"):
            arguments = [self._linear(computation, name, constants) for name in root.operands]
            computation = self.computations[root.called("calls", "to_apply")[0]]
            root = computation.root
        if root.opcode != "compare":
            return None
        left, right = (self._linear(computation, name, constants, arguments) for name in root.operands)
        direction = re.search(r"direction=(\w+)", root.attributes)
        return (direction[1], left, right) if direction and left and right else None

    def _linear(
        self, computation: _Computation, name: str, constants: _State, arguments: list[_Linear | None] | None = None
    ) -> _Linear | None:
        """A scalar as a number plus an element of the loop's state; None where it is no such thing."""
        it = computation.instructions[name]
        if not _INTEGER.match(it.shape):
            return None
        if it.opcode == "constant":
            return int(it.arguments), None
        if it.opcode == "parameter":
            return arguments[int(it.arguments)] if arguments else None
        if it.opcode == "get-tuple-element":
            return _element(computation, it, constants)
        operands = [self._linear(computation, operand, constants, arguments) for operand in it.operands]
        if it.opcode in ("copy", "bitcast", "convert"):
            return operands[0]
        if it.opcode == "fusion":
            inner = self.computations[it.called("calls")[0]]
            return self._linear(inner, inner.root.name, {}, operands)
        return _combined(it.opcode, *operands) if it.opcode in _STEPS else None


def _length(direction: str, distance: int, stride: int) -> int | None:
    """How often the comparison of a counter with its limit, `distance` above it, holds while it grows by `stride`."""
    if direction == "NE":
        return distance // stride if distance % stride == 0 and distance * stride >= 0 else None
    if direction in ("GT", "GE"):
        distance, stride = -distance, -stride
    if stride < 0 or direction == "EQ":
        return None
    return max(0, -(-(distance + (direction in ("LE", "GE"))) // stride))


def _element(computation: _Computation, it: _Instruction, constants: _State) -> _Linear | None:
    index = re.search(r"index=(\d+)", it.attributes)
    if index is None or computation.operand(it, 0).opcode != "parameter":
        return None
    i = int(index[1])
    return (constants[i], None) if i in constants else (0, i)


def _combined(opcode: str, left: _Linear | None, right: _Linear | None) -> _Linear | None:
    if left is None or right is None or (right[1] is not None and (left[1] is not None or opcode == "subtract")):
        return None
    return left[0] + _STEPS[opcode] * right[0], right[1] if left[1] is None else left[1]


def _custom(it: _Instruction) -> Counts:
    """A custom call's own cost estimate, or its name."""
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', it.attributes)
    if estimate:
        return Counts(flops=float(estimate[1]))
    name = re.sub(r"([.]clone|[.]\d+)+$", "", it.name)
    return Counts(uncounted={f"{_target(it)} {name}": 1})
