"""Adds up what the instructions of a module do, as often as they run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from scale.plan.hlo.collectives import sent_bytes
from scale.plan.hlo.loops import Loops, State
from scale.plan.hlo.memory import FREE_CALLS, hbm_traffic
from scale.plan.hlo.parse import ENTRY, Computation, Instruction, parse
from scale.plan.hlo.products import product_flops
from scale.plan.hlo.replica_groups import Axes


@dataclass
class Counts:
    """Totals of one execution, for one device.

    Attributes:
        flops: FLOPs of matrix products, and of custom calls that state theirs.
        hbm_bytes: Bytes read and written in main memory; an estimate, rather too high.
        collective_bytes: Bytes sent, by the mesh axes over which a group extends, in the mesh's
            order: `fsdp`, `data+fsdp`.
        uncounted: Executions of what cannot be counted: `tpu_custom_call NAME`, whose FLOPs are
            unknown, or `while NAME: unknown trip count`, whose body counts as often as is assumed.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collective_bytes: dict[str, float] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Counts", times: int) -> None:
        """Adds another execution.

        Args:
            other: What it does.
            times: How often it runs.
        """
        self.flops += other.flops * times
        self.hbm_bytes += other.hbm_bytes * times
        for axes, sent in other.collective_bytes.items():
            self.collective_bytes[axes] = self.collective_bytes.get(axes, 0.0) + sent * times
        for name, executions in other.uncounted.items():
            self.uncounted[name] = self.uncounted.get(name, 0) + executions * times


def count(text: str, mesh_shape: dict[str, int], loop_trips: int = 1) -> Counts:
    """Counts one execution of a compiled module on one device.

    Args:
        text: Its optimized HLO, `compiled.as_text()`.
        mesh_shape: The sizes of the mesh's axes, in the mesh's order.
        loop_trips: How often a loop runs whose condition depends on data.

    Returns:
        The totals. A conditional counts by its largest branch.

    Raises:
        InputError: The text is no HLO module, or the groups of a collective are not of this mesh.
    """
    return _Counter(parse(text), tuple(mesh_shape.items()), loop_trips).total(ENTRY, {})


class _Counter:
    def __init__(self, computations: dict[str, Computation], axes: Axes, loop_trips: int):
        self.computations = computations
        self.axes = axes
        self.loop_trips = loop_trips
        self.loops = Loops(computations)
        self.totals: dict[tuple[str, frozenset[tuple[int, int]], bool], Counts] = {}

    def total(self, name: str, state: State, fused: bool = False) -> Counts:
        """One execution of a computation, with what is known of the state of its loop."""
        key = name, frozenset(state.items()), fused
        if key not in self.totals:
            self.totals[key] = total = Counts()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                total.add(self.alone(computation, instruction, fused), 1)
                for callee, times in self.callees(computation, instruction, state, fused):
                    total.add(callee, times)
        return self.totals[key]

    def alone(self, computation: Computation, instruction: Instruction, fused: bool) -> Counts:
        """What an instruction does, without the computations that it calls."""
        flops = product_flops(computation, instruction)
        sent = sent_bytes(computation, instruction, self.axes, fused)
        traffic = 0.0
        if not fused:
            names = instruction.called("calls") if instruction.opcode == "fusion" else []
            inner = self.computations[names[0]] if names else None
            traffic = hbm_traffic(computation, instruction, inner)
        unknown = _unknown(instruction) if not flops and not sent else ""
        return Counts(flops, traffic, sent, {unknown: 1} if unknown else {})

    def callees(
        self, computation: Computation, instruction: Instruction, state: State, fused: bool
    ) -> Iterable[tuple[Counts, int]]:
        """What the computations that an instruction calls do, and how often they run."""
        match instruction.opcode:
            case "fusion":
                return [(self.total(instruction.called("calls")[0], {}, True), 1)]
            case "call" | "async-start":
                names = instruction.called("to_apply", "calls")
                return [(self.total(name, {}, fused), 1) for name in names]
            case "conditional":
                branches = [self.total(name, {}, fused) for name in _branches(instruction)]
                return [(max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes)), 1)]
            case "while":
                trips, constants = self.loops.trips(computation, instruction, state)
                body = self.total(instruction.called("body")[0], constants)
                if trips is not None:
                    return [(body, trips)]
                unknown = Counts(uncounted={f"while {instruction.name}: unknown trip count": 1})
                return [(body, self.loop_trips), (unknown, 1)]
        return []


def _branches(conditional: Instruction) -> list[str]:
    pair = conditional.called("true_computation") + conditional.called("false_computation")
    return conditional.called("branch_computations") or pair


def _unknown(instruction: Instruction) -> str:
    """The name under which an instruction without counts is reported, "" if it has none to miss."""
    if instruction.opcode == "send":
        return f"send {instruction.name}"
    if instruction.opcode != "custom-call" or instruction.target in FREE_CALLS:
        return ""
    name = re.sub(r"([.]clone|[.]\d+)+$", "", instruction.name)
    return f"{instruction.target} {name}"
