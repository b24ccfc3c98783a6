"""An adapter of Python in a process of its own: it may hang, exit or take all memory."""

import ctypes
import json
import os
import signal
import sys
from typing import Any

import numpy as np

from reference.conformance.answers import from_json, plain, readable, to_json
from reference.conformance.cases import from_hex, to_hex
from reference.conformance.judge import Told, dtype_of, kind_of, words
from reference.conformance.lines import Client
from reference.conformance.loading import load_adapter
from reference.conformance.program import TIMEOUT

DEATH_SIGNAL = 1
"""prctl's PR_SET_PDEATHSIG: the signal that a process gets when its parent ends."""
SERVE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from reference.conformance.isolated import serve; serve(sys.argv[2])"
)


class IsolatedAdapter(Client):
    """An adapter that another process imports.

    Args:
        path: `module:attribute`.
        timeout: how long to wait for an answer, in seconds.

    Raises:
        ValueError: there is no such module or attribute, or it is no adapter.
        ConnectionError: its process ended, or was silent for so long.
    """

    def __init__(self, path: str, timeout: float = TIMEOUT):
        python = [sys.executable, *(f"-W{option}" for option in sys.warnoptions)]
        serve = [*python, "-c", SERVE, json.dumps(sys.path), path]
        super().__init__(serve, f"the process of {path}", timeout)
        try:
            self.dtype = self.ask({"method": "open"})
            dtype_of(self)
        except (Told, ValueError) as error:
            self.close()
            raise ValueError(str(error)) from error

    def evaluate(
        self, objective: str, dialect: str, params: dict[str, Any], inputs: dict[str, Any]
    ) -> Any:
        """The adapter's answer to one case; raises `Told` where it raises."""
        is_hex = any(isinstance(value, np.ndarray) for value in inputs.values())
        encode = to_hex if is_hex else to_json
        question = {"method": "evaluate", "objective": objective, "dialect": dialect}
        values = {"hex": is_hex, "params": encode(params), "inputs": encode(inputs)}
        return from_json(self.ask(question | values))

    def failure(self, answer: dict[str, Any]) -> Exception:
        """What the adapter raised, in its words."""
        return Told(readable(str(answer["error"])), answer.get("kind", "broken"))


def serve(path: str) -> None:
    """Answer questions about an adapter until there are no more.

    Standard input and output are the kit's: the adapter reads nothing, and what it prints goes to
    standard error.

    Args:
        path: `module:attribute`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)  # a kit that is killed leaves nothing
    questions, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        adapter, failure = load_adapter(path), {}
    except BaseException as error:
        adapter, failure = None, {"error": str(error), "kind": "gone"}
    with open(questions, encoding="utf-8") as lines, open(answers, "w", encoding="utf-8") as out:
        for line in lines:
            question = json.loads(line)
            answer = failure or _answer(adapter, question)
            out.write(json.dumps({"id": question["id"]} | answer) + "\n")
            out.flush()


def _answer(adapter: Any, question: dict[str, Any]) -> dict[str, Any]:
    """The result of a question, or what the adapter raised; here Ctrl-C is the adapter's too."""
    name = (question.get("objective"), question.get("dialect"))
    try:
        if question["method"] == "open":
            return {"result": str(getattr(adapter, "dtype", "float32"))}
        if question["method"] == "supports":
            return {"result": bool(adapter.supports(*name))}
        decode = from_hex if question["hex"] else from_json
        made = adapter.evaluate(*name, decode(question["params"]), decode(question["inputs"]))
        return {"result": to_json(plain(made))}
    except BaseException as error:
        return {"error": words(error), "kind": kind_of(error)}
