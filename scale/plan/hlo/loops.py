"""How often a loop runs: by `known_trip_count` (CPU), else by its counter, limit and step (TPU).

The state of a loop is a tuple. A scalar that depends on it is known here as a `Linear`: `number`,
or `number + state[element]`.
"""

import re
from dataclasses import dataclass
from typing import TypeAlias

from scale.plan.hlo.parse import Computation, Instruction

State: TypeAlias = dict[int, int]
"""The elements of a loop's state that are known numbers."""
Linear: TypeAlias = tuple[int, int | None]
"""(number, element) stands for number + state[element]; (number, None) for the number alone."""
_SIGNS = {"add": 1, "subtract": -1}
_INTEGER = re.compile(r"[su]\d+\[\]")


@dataclass(frozen=True)
class Loops:
    """The loops of a module.

    Attributes:
        computations: All computations of the module.
    """

    computations: dict[str, Computation]

    def trips(
        self, computation: Computation, loop: Instruction, state: State
    ) -> tuple[int | None, State]:
        """How often the body of a loop runs.

        Args:
            computation: Where the loop stands.
            loop: A `while`.
            state: What is known of the surrounding loop's state.

        Returns:
            The number, None where it cannot be told; and the elements of the loop's own state that
            are known and never change.
        """
        body, condition = loop.called("body")[0], loop.called("condition")[0]
        start = self._start(computation, loop, state)
        unchanged = {i for i, value in self._step(body, {}).items() if value == (0, i)}
        constants = {i: value for i, value in start.items() if i in unchanged}
        if stated := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(stated), constants
        step = self._step(body, constants)
        comparison = self._comparison(self.computations[condition], constants)
        return _trips(comparison, start, step) if comparison else None, constants

    def _start(self, computation: Computation, loop: Instruction, state: State) -> State:
        """The known elements of the first state."""
        values = self._elements(computation, computation.operands(loop)[0], state)
        return {i: number for i, (number, element) in values.items() if element is None}

    def _step(self, body: str, constants: State) -> dict[int, Linear]:
        """The elements of the next state, as they depend on this one."""
        computation = self.computations[body]
        return self._elements(computation, computation.root, constants)

    def _elements(
        self, computation: Computation, state: Instruction, constants: State
    ) -> dict[int, Linear]:
        """The elements of a tuple that are `Linear`."""
        if state.opcode != "tuple":
            return {}
        values = [self._linear(computation, name, constants) for name in state.operands]
        return {i: value for i, value in enumerate(values) if value}

    def _comparison(
        self, computation: Computation, constants: State
    ) -> tuple[str, Linear, Linear] | None:
        """Direction and sides of the comparison that a condition makes, itself or in a fusion."""
        root, arguments = computation.root, None
        if root.opcode in ("fusion", "call"):
            arguments = [self._linear(computation, name, constants) for name in root.operands]
            computation = self.computations[root.called("calls", "to_apply")[0]]
            root = computation.root
        if root.opcode != "compare":
            return None
        left, right = (
            self._linear(computation, name, constants, arguments) for name in root.operands
        )
        return (root.attribute(r"direction=(\w+)"), left, right) if left and right else None

    def _linear(
        self,
        computation: Computation,
        name: str,
        constants: State,
        arguments: list[Linear | None] | None = None,
    ) -> Linear | None:
        """A scalar as number + state[element], None where it is something else.

        Args:
            computation: Where the scalar stands.
            name: The name of its instruction.
            constants: Elements of the state that keep one known number; they become numbers.
            arguments: What a fusion is called with, where the scalar stands in one.

        Returns:
            The number and the element.
        """
        scalar = computation.instructions[name]
        if not _INTEGER.match(scalar.shape):
            return None
        if scalar.opcode == "constant":
            return int(scalar.arguments), None
        if scalar.opcode == "parameter":
            return arguments[int(scalar.arguments)] if arguments else None
        if scalar.opcode == "get-tuple-element":
            return _element(computation, scalar, constants)
        operands = [self._linear(computation, i, constants, arguments) for i in scalar.operands]
        if scalar.opcode in ("copy", "bitcast", "convert"):
            return operands[0]
        if scalar.opcode == "fusion":
            fused = self.computations[scalar.called("calls")[0]]
            return self._linear(fused, fused.root.name, {}, operands)
        return _sum(_SIGNS[scalar.opcode], *operands) if scalar.opcode in _SIGNS else None


def _element(computation: Computation, element: Instruction, constants: State) -> Linear | None:
    """An element of the state, or the number that it always is."""
    index = element.attribute(r"index=(\d+)")
    if not index or computation.operands(element)[0].opcode != "parameter":
        return None
    return (constants[int(index)], None) if int(index) in constants else (0, int(index))


def _sum(sign: int, left: Linear | None, right: Linear | None) -> Linear | None:
    """left + sign * right, None where it is not number + state[element]."""
    if left is None or right is None:
        return None
    if right[1] is not None and (left[1] is not None or sign < 0):
        return None
    return left[0] + sign * right[0], right[1] if left[1] is None else left[1]


def _trips(
    comparison: tuple[str, Linear, Linear], start: State, step: dict[int, Linear]
) -> int | None:
    """How often `counter + offset < limit`, or another comparison, holds."""
    direction, (offset, counter), (limit, other) = comparison
    if other is not None or counter is None or counter not in start or counter not in step:
        return None
    stride, element = step[counter]
    if element != counter or not stride:
        return None
    return _steps(direction, limit - offset - start[counter], stride)


def _steps(direction: str, distance: int, stride: int) -> int | None:
    """How often a comparison holds: a counter `distance` below its limit grows by `stride`."""
    if direction == "NE":
        return distance // stride if distance % stride == 0 and distance * stride >= 0 else None
    if direction in ("GT", "GE"):
        distance, stride = -distance, -stride
    if stride < 0 or direction == "EQ":
        return None
    return max(0, -(-(distance + (direction in ("LE", "GE"))) // stride))
