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
import math
import os
import shlex
import signal
import subprocess
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np


class Rejected(ValueError):
    """The program refused the input."""


class CommandAdapter:
    """A program as an adapter. The program may write what it likes on standard error.

    Args:
        command: the program and its arguments, as a shell would split them.
        dtype: how exact the program is.
        timeout: how long to wait for an answer, in seconds.

    Raises:
        ConnectionError: the program ended, was silent for `timeout` seconds, or answered out of
            turn. It is then gone.
        ValueError: the command is empty.
    """

    def __init__(self, command: str, dtype: str = "float64", timeout: float = 60.0):
        self.dtype, self.timeout, self.last = dtype, timeout, 0
        words = shlex.split(command)
        if not words:
            raise ValueError("the command is empty")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        text: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
        self.process = subprocess.Popen(words, start_new_session=True, **pipes, **text)

    def supports(self, objective: str, dialect: str) -> bool:
        """Ask the program whether it claims this dialect of this objective."""
        return self._ask({"method": "supports", "objective": objective, "dialect": dialect}) is True

    def evaluate(
        self, objective: str, dialect: str, params: dict[str, Any], inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """Put one case to the program; raises `Rejected` where it refuses the input."""
        question = {"method": "evaluate", "objective": objective, "dialect": dialect}
        return from_json(
            self._ask(question | {"params": to_json(params), "inputs": to_json(inputs)})
        )

    def close(self) -> None:
        """End the program and the processes that it started."""
        self._kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what it did not read is lost
                pipe.close()  # type: ignore[union-attr]

    def _kill(self) -> None:
        """Kill the whole group, since a shell's child would go on and hold the pipes open."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _ask(self, question: dict[str, Any]) -> Any:
        self.last += 1
        line = self._exchange(json.dumps({"id": self.last} | question, allow_nan=False))
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or answer.get("id") != self.last:
            self.close()
            raise ConnectionError(
                f"the program answered {self.last} out of turn, or not in JSON: {line[:200]!r}"
            )
        if answer.get("error") is not None:
            raise Rejected(answer["error"])
        return answer.get("result")

    def _exchange(self, line: str) -> str:
        """Write one line and read one line; a program that does neither is killed in time."""
        assert self.process.stdin and self.process.stdout
        if self.process.stdin.closed:
            raise ConnectionError("the program is gone")
        answer, start, timer = "", time.monotonic(), threading.Timer(self.timeout, self._kill)
        timer.daemon = True  # an interrupted run does not wait for it
        timer.start()
        with suppress(OSError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        timer.cancel()
        if not answer:
            late = time.monotonic() - start >= self.timeout
            self.close()
            ended = f"ended with status {self.process.returncode}"
            raise ConnectionError(
                f"the program {f'was silent for {self.timeout:g} s' if late else ended}"
            )
        return answer


def to_json(value: Any) -> Any:
    """A value as strict JSON; `from_json` is its inverse.

    Args:
        value: numbers, arrays, text, and lists and dictionaries of them.

    Returns:
        Arrays as nested lists, "NaN", "Infinity" and "-Infinity" as text, all else as it is.
    """
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else json.dumps(value)


def from_json(value: Any) -> Any:
    """The inverse of `to_json`, but lists stay lists.

    Args:
        value: decoded JSON.

    Returns:
        The value; the judge makes arrays of its lists where numbers are due.
    """
    if isinstance(value, dict):
        return {name: from_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
