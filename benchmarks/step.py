"""`python -m benchmarks.step`: what a method adds to the forward and backward pass of its model.

The baseline is supervised fine-tuning on exactly the tokens of the method's rows: two responses, or
three where the method has a KL term. All steps are compiled, and they are the steps that `align`
and `sft` run. They take turns. The overhead of a method is its time over the time of its baseline
in the same round; the table shows the median over the rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import tyro

from benchmarks.machine import describe, matmul_flops, median, peak_memory_gib, timed
from benchmarks.work import (
    OPTIMIZER,
    SCHEDULE,
    Work,
    batch_for,
    first_state,
    in_new_process,
    matmul_work,
    num_responses,
    random_batch,
    repeated,
)
from minipref.methods import METHODS
from scale.train.steps import policy_step, sft_step


@dataclass(frozen=True)
class Shape(Work):
    """The work of one step, and how often it is measured."""

    rounds: int = 15
    """Rounds of measurement."""


BASELINES = {"language model (2)": 2, "language model (3)": 3}
"""Name of a baseline -> the responses of its rows."""


def step_of(work: Work, name: str) -> Callable:
    """A function that takes the next step of a method, or of a baseline."""
    if name in BASELINES:
        batch = random_batch(work, BASELINES[name], 0)
        return repeated(partial(sft_step, OPTIMIZER, SCHEDULE), first_state(work), batch)
    step = partial(policy_step, name, OPTIMIZER, SCHEDULE)
    return repeated(step, first_state(work), batch_for(name, work))


def peak_of(work: Work, name: str) -> float:
    """The peak memory of this process after a step, GiB."""
    jax.block_until_ready(step_of(work, name)())
    return peak_memory_gib()


def measure(shape: Shape) -> None:
    """Print the table."""
    steps = {name: step_of(shape, name) for name in (*BASELINES, *METHODS)}
    for step in steps.values():
        jax.block_until_ready(step())
    rounds = [{name: timed(step) for name, step in steps.items()} for _ in range(shape.rounds)]
    peak = matmul_flops()
    print(f"{describe()}\nmatrix-product peak {peak / 1e9:.0f} GFLOP/s; {shape}\n")
    print("| step | ms | over the language model | tokens/s | share of peak | peak memory GiB |")
    print("|---|---|---|---|---|---|")
    for name in steps:
        print(table_row(shape, name, rounds, peak))


def table_row(shape: Shape, name: str, rounds: list[dict[str, float]], peak: float) -> str:
    """One row of the table, from the seconds of each step in each round."""
    responses = BASELINES.get(name) or num_responses(name)
    over = median([r[name] / r[f"language model ({responses})"] for r in rounds])
    seconds = median([r[name] for r in rounds])
    tokens = shape.batch * shape.row_length(responses)
    share = matmul_work(shape, responses) / seconds / peak
    memory = in_new_process(peak_of, shape, name)
    return (
        f"| {name} | {seconds * 1e3:.1f} | {over - 1:+.1%} | {tokens / seconds:,.0f} | "
        f"{share:.0%} | {memory:.2f} |"
    )


if __name__ == "__main__":
    measure(tyro.cli(Shape, description=__doc__))
