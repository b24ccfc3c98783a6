"""An adapter from a table: (objective, dialect) -> a function of a case's params and inputs."""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.peers.inputs import Values


class Table(NamedTuple):
    """An adapter of the kit."""

    functions: dict[tuple[str, str], Callable[[Values, Values], Values]]
    dtype: str = "float32"

    def supports(self, objective: str, dialect: str) -> bool:
        return (objective, dialect) in self.functions

    def evaluate(self, objective: str, dialect: str, params: Values, inputs: Values) -> Values:
        return self.functions[objective, dialect](params, inputs)
