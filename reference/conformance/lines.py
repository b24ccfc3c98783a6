"""Implementations in other languages: one JSON object a line on a program's standard input and output.

    -> {"id": 1, "method": "supports", "objective": "dpo", "dialect": "plain"}
    <- {"id": 1, "result": true}
    -> {"id": 2, "method": "evaluate", "objective": "dpo", "dialect": "plain", "params": {...}, "inputs": {...}}
    <- {"id": 2, "result": {"loss": 0.31, "grads": {...}}}      or, where the input is refused,
    <- {"id": 2, "error": "why"}

Floats are JSON numbers that keep all 17 digits; those that JSON lacks are the strings "NaN", "Infinity", "-Infinity".
"""

import json
import math
import queue
import shlex
import subprocess
import threading
from typing import Any

import numpy as np


class Rejected(ValueError):
    """The program refused the input."""


class CommandAdapter:
    """A program as an adapter. The program may write what it likes on standard error.

    Errors: ConnectionError where it ends, is silent for `timeout` seconds, or answers out of turn.
    """

    def __init__(self, command: str, dtype: str = "float64", timeout: float = 60.0):
        self.dtype, self.timeout, self.last = dtype, timeout, 0
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        self.process = subprocess.Popen(shlex.split(command), **pipes)
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def supports(self, objective: str, dialect: str) -> bool:
        return self._ask({"method": "supports", "objective": objective, "dialect": dialect}) is True

    def evaluate(
        self, objective: str, dialect: str, params: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        question = {"method": "evaluate", "objective": objective, "dialect": dialect}
        return from_json(self._ask(question | {"params": to_json(params), "inputs": to_json(inputs)}))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin
        self.last += 1
        try:
            self.process.stdin.write(json.dumps({"id": self.last} | question, allow_nan=False) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.answers.get(timeout=self.timeout) or "{}")
        except (OSError, queue.Empty, ValueError) as error:
            self.process.kill()
            raise ConnectionError(f"the program gave no answer in JSON: {error or 'time is up'}") from error
        if not isinstance(answer, dict) or answer.get("id") != self.last:
            self.process.kill()
            raise ConnectionError(f"the program ended or answered out of turn: {str(answer)[:200]}")
        if "error" in answer:
            raise Rejected(answer["error"])
        return answer.get("result")


def to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else json.dumps(value)


def from_json(value: Any) -> Any:
    """Lists stay lists; the judge makes arrays of them where numbers are due."""
    if isinstance(value, dict):
        return {name: from_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
