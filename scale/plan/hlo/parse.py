"""Reads the text of an HLO module into computations of instructions."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from typing import NamedTuple

from scale.errors import InputError

ENTRY = "ENTRY"
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)", re.DOTALL)
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_ARGUMENTS_END = re.compile(r"\)(?=,|\s|$)")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


class HloArray(NamedTuple):
    """One array of a shape.

    Attributes:
        dims: Its size along each dimension.
        size: Bytes.
        in_hbm: Whether it lies in main memory. The TPU compiler marks an array that it keeps on
            the chip by a memory space, such as `S(1)`.
    """

    dims: tuple[int, ...]
    size: float
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of a computation: `name = shape opcode(arguments), attributes`.

    Attributes:
        operands: The names of the instructions among the arguments.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> tuple[HloArray, ...]:
        """The arrays of the shape, those of a tuple in order."""
        return _arrays(self.shape)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the first array."""
        return self.arrays[0].dims

    @property
    def size(self) -> float:
        """Bytes of all arrays."""
        return math.fsum(array.size for array in self.arrays)

    @property
    def hbm_size(self) -> float:
        """Bytes of the arrays that lie in main memory."""
        return math.fsum(array.size for array in self.arrays if array.in_hbm)

    @property
    def target(self) -> str:
        """What a custom call calls, "" for another instruction."""
        is_custom = self.opcode == "custom-call"
        return self.attribute(r'custom_call_target="([^"]*)"') if is_custom else ""

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression in the attributes, "" without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """The names of computations that the first attribute among `keys` holds."""
        texts = (self.attribute(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)") for key in keys)
        names = next(filter(None, texts), "").strip("{}")
        return [name.strip(" %") for name in names.split(",") if name]


class Computation:
    """A function of the module: its instructions by name, and the root, which is its result."""

    def __init__(self, instructions: dict[str, Instruction], root: str):
        self.instructions = instructions
        self.root = instructions[root]

    @cached_property
    def parameters(self) -> dict[int, str]:
        """The names of the parameters by their numbers."""
        values = self.instructions.values()
        return {int(i.arguments): i.name for i in values if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have a name among their operands."""
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that compute the operands of one."""
        return [self.instructions[name] for name in instruction.operands]

    def uses(self, name: str) -> Iterator[tuple[Instruction, int]]:
        """The instructions that use a value, also under another name, and as which operand."""
        for user in self.users[name]:
            if user.opcode in ("bitcast", "get-tuple-element"):
                yield from self.uses(user.name)
            else:
                yield user, user.operands.index(name)


def parse(text: str) -> dict[str, Computation]:
    """Reads all computations of a module.

    Args:
        text: `compiled.as_text()`.

    Returns:
        The computations by name; the name of the entry computation is ENTRY.

    Raises:
        InputError: An instruction cannot be read, or there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    for name, lines in _bodies(text):
        parsed = [_instruction(line) for line in lines]
        root = next((i.name for is_root, i in parsed if is_root), parsed[-1][1].name)
        computations[name] = Computation({i.name: i for _, i in parsed}, root)
    if ENTRY not in computations:
        raise InputError("HLO text: no ENTRY computation; expected the text of a compiled module")
    return computations


def _bodies(text: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the instructions of each computation; a line end in an attribute is no end."""
    name, lines = None, list[str]()
    for line in text.splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = ENTRY if header[1] else header[2], []
        elif _END.match(line):
            yield name, lines
            name = None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += "\n" + line


def _instruction(line: str) -> tuple[bool, Instruction]:
    """Whether it is the root, and the instruction."""
    match = _INSTRUCTION.match(line)
    opcode = _OPCODE.search(match[3]) if match else None
    end = _ARGUMENTS_END.search(match[3], opcode.end()) if match and opcode else None
    if not match or not opcode or not end:
        raise InputError(f"HLO text: cannot read the instruction {line.strip()[:80]!r}")
    arguments = match[3][opcode.end() : end.start()]
    operands = tuple(_NAME.findall(arguments))
    shape, attributes = match[3][: opcode.start()], match[3][end.end() :]
    instruction = Instruction(match[2], shape, opcode[1], arguments, operands, attributes)
    return bool(match[1]), instruction


@cache
def _arrays(shape: str) -> tuple[HloArray, ...]:
    return tuple(_array(*match) for match in _ARRAY.findall(shape))


def _array(dtype: str, dims: str, layout: str) -> HloArray:
    sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
    digits = re.search(r"\d+", dtype)
    bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
    space = re.search(r"S\((\d+)\)", layout)
    return HloArray(sizes, math.prod(sizes) * bits / 8, space is None or space[1] == "0")
