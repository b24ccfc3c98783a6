"""Implementations in other languages, as programs that read and write one JSON object a line.

    -> {"id": 1, "method": "supports", "objective": "dpo", "dialect": "plain"}
    <- {"id": 1, "result": true}
    -> {"id": 2, "method": "evaluate", "objective": "dpo", "dialect": "plain",
        "params": {...}, "inputs": {...}}                         (all on one line)
    <- {"id": 2, "result": {"loss": 0.31, "grads": {...}}}      or, where the input is refused,
    <- {"id": 2, "error": "why"}

Floats are JSON numbers that keep all 17 digits. Those that JSON lacks are the strings "NaN",
"Infinity" and "-Infinity".
"""

import json
import shlex
from typing import Any

from reference.conformance.answers import from_json, readable, to_json
from reference.conformance.program import TIMEOUT, Program


class Rejected(ValueError):
    """The program refused the input."""


class Client:
    """A program that is asked by lines of JSON.

    Args:
        words: the program and its arguments.
        name: what errors call it.
        timeout: how long to wait for an answer, in seconds.
    """

    def __init__(self, words: list[str], name: str, timeout: float):
        self.program, self.last = Program(words, name, timeout), 0

    def ask(self, question: dict[str, Any]) -> Any:
        """Put a question.

        Args:
            question: without its id.

        Returns:
            The result.

        Raises:
            ConnectionError: the program ended, was silent, took more than the bounds of `program`
                allow, or answered out of turn. It is then gone; it is started again, twice.
            Exception: what `failure` makes of an error.
        """
        self.last += 1
        line = self.program.exchange(json.dumps({"id": self.last} | question, allow_nan=False))
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or answer.get("id") != self.last:
            said = f"{self.last} out of turn, or not in JSON: {line[:200]!r}"
            self.program.lose(f"answered {said}")
        if answer.get("error") is not None:
            raise self.failure(answer)
        return answer.get("result")

    def supports(self, objective: str, dialect: str) -> bool:
        """Ask the program whether it claims this dialect of this objective."""
        return self.ask({"method": "supports", "objective": objective, "dialect": dialect}) is True

    def failure(self, answer: dict[str, Any]) -> Exception:
        """What to raise for an answer that is an error."""
        return Rejected(readable(str(answer["error"])))

    def close(self) -> None:
        """End the program and the processes that it started."""
        self.program.close()


class CommandAdapter(Client):
    """A program as an adapter. The program may write what it likes on standard error.

    Args:
        command: the program and its arguments, as a shell would split them.
        dtype: how exact the program is.
        timeout: how long to wait for an answer, in seconds.

    Raises:
        ValueError: the command is empty.
    """

    def __init__(self, command: str, dtype: str = "float64", timeout: float = TIMEOUT):
        self.dtype, words = dtype, shlex.split(command)
        if not words:
            raise ValueError("the command is empty")
        super().__init__(words, "the program", timeout)

    def evaluate(
        self, objective: str, dialect: str, params: dict[str, Any], inputs: dict[str, Any]
    ) -> Any:
        """Put one case to the program; raises `Rejected` where it refuses the input."""
        question = {"method": "evaluate", "objective": objective, "dialect": dialect}
        return from_json(
            self.ask(question | {"params": to_json(params), "inputs": to_json(inputs)})
        )
