"""The work of `python -m benchmarks.peers`, and how the program of a library takes its turns.

The work is a folder: `model/` has the initial weights as a Hugging Face folder, and `work.npz` the
token ids of the rows, in order. This module does not import JAX: the memory of a program is that of
its own library.
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
"""The same for all libraries: the beta of DPO, Adam's constant learning rate and its decays, and
the largest norm of the gradient."""


class Work(NamedTuple):
    """N pairs, `batch` of them in a step, in this order.

    Attributes:
        ids: Token ids of all rows, end to end.
        ends: Where the prompt, the chosen and the rejected response of each row end [N, 3].
        ref_logps: log pi_ref of chosen and rejected [N, 2], nats.
        batch: Pairs of a step.
        dtype: The type of activations and products.
    """

    ids: np.ndarray
    ends: np.ndarray
    ref_logps: np.ndarray
    batch: int
    dtype: str

    @property
    def steps(self) -> int:
        return len(self.ends) // self.batch

    @property
    def parts(self) -> list[list[np.ndarray]]:
        """The token ids of all prompts, of all chosen and of all rejected responses."""
        parts = np.split(self.ids, self.ends.ravel()[:-1])
        return [parts[i::3] for i in range(3)]


def load(folder: Path) -> Work:
    """The work of a folder."""
    with np.load(folder / "work.npz") as file:
        ids, ends, ref_logps = (file[name] for name in ("ids", "ends", "ref_logps"))
        return Work(ids, ends, ref_logps, int(file["batch"]), str(file["dtype"]))


class Turns:
    """The side of one program.

    A line of input asks for a pass over the work. A line of JSON answers what the pass took.
    """

    def __init__(self, device: str):
        self.device = device
        self.answers, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def wait(self) -> bool:
        """Wait for a turn; False where there is no other."""
        line = sys.stdin.readline()
        self.start = time.perf_counter()
        return bool(line)

    def report(self, losses: Sequence[SupportsFloat], accelerator_bytes: int = 0) -> None:
        """Answer with the losses, seconds and memory of the pass.

        Args:
            losses: The loss of each step.
            accelerator_bytes: The peak memory of the accelerator. Where it is 0, the peak of the
                process counts.
        """
        seconds = time.perf_counter() - self.start
        answer = {
            "seconds": seconds,
            "losses": list(map(float, losses)),
            "memory": accelerator_bytes / 2**30 or peak_memory_gib(),
            "device": self.device,
        }
        print(json.dumps(answer), file=self.answers, flush=True)
