"""`python -m benchmarks.step`: what each method adds to a language model's own forward and backward pass.

The baseline is next-token training on exactly the tokens of the method's rows: two responses, or three where the
method samples its KL. All steps are the compiled steps that `align` runs, timed in turn; a method's overhead is the
median, over rounds, of its time over its baseline's in the same round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import tyro

from benchmarks.machine import describe, matmul_flops, median, peak_memory_gib, timed
from benchmarks.work import RECIPE, Work, alone, first_state, matmul_work, repeated, responses_of, rows, rows_of
from minipref.methods import METHODS
from scale.stages.align import align_step
from scale.stages.sft import sft_step


@dataclass(frozen=True)
class Shape(Work):
    """The work of one step, and how often it is measured."""

    rounds: int = 15
    """Rounds of measurement."""


LANGUAGE_MODEL = {"language model (2)": 2, "language model (3)": 3}


def call(work: Work, name: str) -> Callable:
    """Steps of a method, or of the language model on two or on three responses."""
    if name in LANGUAGE_MODEL:
        return repeated(partial(sft_step, RECIPE), first_state(work), rows(work, LANGUAGE_MODEL[name], 0))
    return repeated(partial(align_step, name, RECIPE), first_state(work), rows_of(name, work))


def peak_of(work: Work, name: str) -> float:
    """GiB of this process after a step."""
    jax.block_until_ready(call(work, name)())
    return peak_memory_gib()


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
        responses = LANGUAGE_MODEL.get(name) or responses_of(name)
        over = median([r[name] / r[f"language model ({responses})"] for r in rounds])
        seconds = median([r[name] for r in rounds])
        tokens = shape.batch * (shape.prompt + responses * shape.response)
        print(f"| {name} | {seconds * 1e3:.1f} | {over - 1:+.1%} | {tokens / seconds:,.0f} | "
              f"{matmul_work(shape, responses) / seconds / peak:.0%} | {alone(peak_of, shape, name):.2f} |")


if __name__ == "__main__":
    measure(tyro.cli(Shape, description=__doc__))
