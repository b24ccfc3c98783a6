"""What each library is given by `python -m benchmarks.peers`, and how its program takes turns with the others.

A folder holds it: `model/`, the initial weights as Hugging Face's, and `work.npz`, the rows' token ids in order. No JAX
here: a program's memory is that of its own library.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, SupportsFloat

import numpy as np

from benchmarks.machine import peak_memory_gib

BETA, LEARNING_RATE, BETAS, CLIP = 0.1, 1e-5, (0.9, 0.99), 1.0
"""Of all libraries: DPO's beta; Adam's constant learning rate and decays; the gradient's largest norm."""


class Work(NamedTuple):
    """N pairs, `batch` of them a step, in this order."""

    ids: np.ndarray
    """Tokens of all rows end to end."""
    ends: np.ndarray
    """[N, 3] where each row's prompt, chosen and rejected response end."""
    ref_logps: np.ndarray
    """[N, 2] of chosen and rejected, in nats."""
    batch: int
    dtype: str

    @property
    def steps(self) -> int:
        return len(self.ends) // self.batch

    @property
    def pieces(self) -> list[list[np.ndarray]]:
        """All prompts, all chosen and all rejected responses."""
        pieces = np.split(self.ids, self.ends.ravel()[:-1])
        return [pieces[i::3] for i in range(3)]


def load(folder: Path) -> Work:
    with np.load(folder / "work.npz") as file:
        return Work(file["ids"], file["ends"], file["ref_logps"], int(file["batch"]), str(file["dtype"]))


class Turns:
    """A program's side: a line in asks for a pass over the work, a line of JSON out says what it took."""

    def __init__(self, device: str):
        self.device = device
        self.answers, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def asked(self) -> bool:
        """Waits until there is a pass to do, or no more."""
        line = sys.stdin.readline()
        self.start = time.perf_counter()
        return bool(line)

    def done(self, losses: Sequence[SupportsFloat], accelerator_bytes: int = 0) -> None:
        """`accelerator_bytes` is the peak there, where there is one; else the process's own counts."""
        seconds = time.perf_counter() - self.start
        memory = accelerator_bytes / 2**30 or peak_memory_gib()
        answer = {"seconds": seconds, "losses": list(map(float, losses)), "memory": memory, "device": self.device}
        print(json.dumps(answer), file=self.answers, flush=True)
