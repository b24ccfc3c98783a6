"""A run of gradient descent with another step in place of the right one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.mistakes.mistake import Function, Values


class Step(NamedTuple):
    """One step of a run.

    Attributes:
        function: that of the dialect: what it makes of one step is right.
        params: of the case.
        inputs: of the case, with the batches of this step alone, and the table before it.
        before: the table one step ago; before the first step it is the reference's.
        number: from 0.
        steps: of the run.
        memory: what the steps of the run keep for later ones.
    """

    function: Function
    params: Values
    inputs: Values
    before: np.ndarray
    number: int
    steps: int
    memory: list[Any]

    @property
    def table(self) -> np.ndarray:
        """The table before the step."""
        table: np.ndarray = self.inputs["table"]
        return table

    @property
    def rate(self) -> float:
        """The learning rate."""
        rate: float = self.params["learning_rate"]
        return rate

    def right(self, **changes: Any) -> tuple[float, np.ndarray]:
        """The loss and the next table, of other inputs if any."""
        made = self.function(self.params, self.inputs | changes)
        return made["losses"][0], made["parameters"]

    def moved(self, direction: np.ndarray) -> np.ndarray:
        """The table after an update of the learning rate times this direction, downwards."""
        return self.table - self.rate * direction

    def gradient(self, **changes: Any) -> tuple[float, np.ndarray]:
        """The loss and its gradient, of other inputs if any."""
        loss, table = self.right(**changes)
        return loss, (self.table - table) / self.rate


Updated = tuple[float, np.ndarray]
"""The loss of a step, and the next table."""


def step_by_step(step: Callable[[Step], Updated]) -> Callable[[Function], Function]:
    """A run with other steps."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            losses, memory, steps = list[float](), list[Any](), len(inputs["batches"])
            table, before = inputs["table"], inputs["ref_table"]
            for number, batch in enumerate(inputs["batches"]):
                one = inputs | {"batches": batch[None], "table": table}
                loss, after = step(Step(function, params, one, before, number, steps, memory))
                table, before = after, table
                losses.append(loss)
            return {"losses": np.array(losses), "parameters": table}

        return mistaken

    return change
