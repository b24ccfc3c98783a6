"""`python -m benchmarks.step`: what each method adds to a language model's own forward and backward pass.

The baseline is next-token training on exactly the tokens of the method's rows: two responses, or three where the
method samples its KL. All steps are the compiled steps that `align` runs, timed in turn; a method's overhead is the
median, over rounds, of its time over its baseline's in the same round.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
import tyro

from benchmarks.machine import describe, matmul_flops, median, peak_memory_gib, timed
from minipref.methods import METHODS
from minipref.sequences import Batch
from scale.batches import pack
from scale.model import ModelConfig, Transformer
from scale.recipe import Recipe, start_state
from scale.stages.align import align_step
from scale.stages.sft import sft_step
from scale.train import Training, hyper

FIELDS = ["chosen", "rejected", "ref_sample"]


@dataclass(frozen=True)
class Shape:
    """The work of one step."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(8192, 6, 384, 6, 64, 1536))
    """Shape of the decoder."""
    batch: int = 8
    """Rows of a step."""
    prompt: int = 96
    """Tokens of each prompt."""
    response: int = 48
    """Tokens of each response."""
    members: int = 5
    """Rewards that e-dpo, hull and mean are given as columns."""
    rounds: int = 15
    """Rounds of measurement."""
    memory_of: str = ""
    """Run this method (or `language model (2)`) alone, and print this process's peak memory."""


def rows(shape: Shape, responses: int, members: int) -> Batch:
    """Made-up rows without padding: random tokens, reference log-probs and scores."""
    rng = np.random.default_rng(0)
    pieces = [(tokens(rng, shape, shape.prompt), [tokens(rng, shape, shape.response) for _ in range(responses)])
              for _ in range(shape.batch)]
    columns = [{"ref_chosen_logps": -300.0, "ref_rejected_logps": -300.0, "ref_sample_logps": -300.0,
                "score_chosen": rng.normal(size=members).tolist(), "score_rejected": rng.normal(size=members).tolist()}
               for _ in range(shape.batch)]
    return pack(pieces, columns, FIELDS[:responses])


def tokens(rng: np.random.Generator, shape: Shape, n: int) -> list[int]:
    return rng.integers(5, shape.model.vocab, n).tolist()


RECIPE = Recipe()
LANGUAGE_MODEL = {"language model (2)": 2, "language model (3)": 3}


def call(shape: Shape, name: str) -> Callable:
    """Steps of a method, or of the language model on two or on three responses; each goes on from the one before."""
    state = start_state(Transformer(shape.model, jax.random.key(0)), RECIPE, hyper(Training(), 0.1, (1e-4, 1e-2)))
    if name in LANGUAGE_MODEL:
        step, batch = partial(sft_step, RECIPE), rows(shape, LANGUAGE_MODEL[name], 0)
    else:
        members = {"none": 0, "single": 1, "ensemble": shape.members}[METHODS[name].rewards]
        step, batch = partial(align_step, name, RECIPE), rows(shape, responses_of(name), members)
    latest = [state]

    def run() -> Any:
        latest[0], metrics = step(latest[0], batch)
        return metrics

    return run


def responses_of(name: str) -> int:
    return LANGUAGE_MODEL.get(name) or (3 if max(METHODS[name].gamma) else 2)


def matmul_work(shape: Shape, responses: int) -> float:
    """FLOPs of one step's matrix products: forward, and twice that backward; attention over the slots that exist."""
    m, slots, labels = shape.model, shape.prompt + responses * shape.response, responses * shape.response
    layer = m.d_model * (m.heads * m.head_size * 2 + 2 * m.head_size + 3 * m.d_ff)
    attention = 2 * m.heads * m.head_size * slots
    per_row = m.layers * slots * (layer + attention) + labels * m.d_model * m.vocab
    return 6.0 * shape.batch * per_row


def measure(shape: Shape) -> None:
    steps = {name: call(shape, name) for name in (*LANGUAGE_MODEL, *METHODS)}
    for step in steps.values():
        jax.block_until_ready(step())
    rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(shape.rounds)]
    peak = matmul_flops()
    print(f"{describe()}\nmatrix-product peak {peak / 1e9:.0f} GFLOP/s; {shape}\n")
    print("| step | ms | over the language model | tokens/s | share of peak | peak memory GiB |")
    print("|---|---|---|---|---|---|")
    for name in steps:
        responses = responses_of(name)
        over = median([r[name] / r[f"language model ({responses})"] for r in rounds])
        seconds = median([r[name] for r in rounds])
        tokens = shape.batch * (shape.prompt + responses * shape.response)
        print(f"| {name} | {seconds * 1e3:.1f} | {over - 1:+.1%} | {tokens / seconds:,.0f} | "
              f"{matmul_work(shape, responses) / seconds / peak:.0%} | {memory(name, sys.argv[1:]):.2f} |")


def memory(name: str, options: list[str]) -> float:
    """Peak of a process that runs this step alone."""
    command = [sys.executable, "-m", "benchmarks.step", *options, "--memory-of", name]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main(shape: Shape) -> None:
    if not shape.memory_of:
        return measure(shape)
    jax.block_until_ready(call(shape, shape.memory_of)())
    print(peak_memory_gib())


if __name__ == "__main__":
    main(tyro.cli(Shape, description=__doc__))
