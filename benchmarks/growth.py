"""`python -m benchmarks.growth [DIR]`: how the time and memory of a step of e-DPO grow.

Writes `growth.md` and `growth.png`. One variable changes at a time, from one base. Each case has a
process of its own; the picture shows its largest resident size. The floor is the time of the matrix
products of the step at the best rate that a product reached between its steps.

The memory of the step may grow with the vocabulary by two things and no more, by the compiler's own
count: four copies of the parameters (with their gradient and the two moments of Adam; the step
takes over the buffers of its state), and one chunk of logits with its gradient.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

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
    repeated,
)
from scale.console import track
from scale.files import atomic
from scale.memory import keep_freed_memory
from scale.model.config import ModelConfig
from scale.model.response_logps import LOGITS
from scale.model.transformer import Transformer, parameter_count
from scale.paper.figures import bare, look, save
from scale.train.steps import policy_step

METHOD = "e-dpo"
STEPS = 9  # measured, after the first
SLACK = 1  # MiB
LLAMA = ModelConfig(
    vocab_size=8192,
    num_layers=6,
    d_model=384,
    num_heads=6,
    head_dim=64,
    d_ff=1024,
    num_kv_heads=2,
    block="sequential",
    norm="rms",
    scaled_logits=False,
)
BASE = Work(LLAMA, batch=4, prompt=128, response=64, num_reward_models=4)
SHAPE_49M = Work(
    replace(LLAMA, vocab_size=49_152, d_model=576, num_heads=9, num_kv_heads=3, d_ff=1536),
    batch=4,
    prompt=128,
    response=96,
)


def with_vocabulary(vocab_size: int) -> Work:
    return replace(BASE, model=replace(LLAMA, vocab_size=vocab_size))


SWEEPS = {
    "response length": {n: replace(BASE, response=n) for n in (16, 32, 64, 128, 256)},
    "prompt length": {n: replace(BASE, prompt=n) for n in (32, 128, 256, 512, 1024)},
    "vocabulary": {2**n: with_vocabulary(2**n) for n in (10, 12, 13, 14, 16, 18)},
    "rewards K": {n: replace(BASE, num_reward_models=n) for n in (1, 2, 4, 8, 16)},
    "batch": {n: replace(BASE, batch=n) for n in (1, 2, 4, 8, 16)},
}


class Cost(NamedTuple):
    """What one case takes.

    Attributes:
        seconds: Seconds of a step.
        peak_gib: The largest resident size of the process.
        step_gib: Arguments, results and buffers of the step, by the compiler's count.
        matmul_flops: The best rate of a matrix product between the steps (FLOP/s).
    """

    seconds: float
    peak_gib: float
    step_gib: float
    matmul_flops: float


def measure(method: str, work: Work) -> Cost:
    """One case, in this process."""
    batch = batch_for(method, work)
    state = jax.eval_shape(partial(first_state, work))
    compiled = policy_step.lower(method, OPTIMIZER, SCHEDULE, state, batch).compile()
    step = repeated(compiled, first_state(work), batch)
    jax.block_until_ready(step())
    measured = [(timed(step), matmul_flops(repeats=2)) for _ in range(STEPS)]
    seconds, rates = zip(*measured, strict=True)
    memory = step_gib(compiled.memory_analysis())
    return Cost(median(seconds), peak_memory_gib(), memory, max(rates))


def step_gib(memory: Any) -> float:
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / 2**30


def allowance(work: Work) -> float:
    """The memory that a step may take, GiB, in float32.

    It is that of the parameters, their gradient, the two moments of Adam, and one chunk of logits
    with its gradient.
    """
    start = partial(Transformer, work.model)
    params = parameter_count(jax.eval_shape(start, jax.random.key(0)))
    vocab_size, labels = work.model.vocab_size, num_responses(METHOD) * work.response
    chunk = min(work.batch * labels, LOGITS["cpu"] // vocab_size)
    return 4 * (4 * params + 2 * vocab_size * chunk) / 2**30


def floor(method: str, work: Work, cost: Cost) -> float:
    """The seconds of the step's matrix products at the best measured rate."""
    return matmul_work(work, num_responses(method)) / cost.matmul_flops


Costs = dict[Work, Cost]


def table(costs: Costs) -> Iterable[str]:
    """The lines of the table of all sweeps."""
    yield "| variable | value | ms | floor, ms | share | process, GiB | step, GiB |"
    yield "|---|---|---|---|---|---|---|"
    for name, cases in SWEEPS.items():
        for value, work in cases.items():
            yield table_row(f"{name} | {value:,}", METHOD, work, costs[work])


def table_row(name: str, method: str, work: Work, cost: Cost) -> str:
    least = floor(method, work, cost)
    return (
        f"| {name} | {cost.seconds * 1e3:.0f} | {least * 1e3:.0f} | {least / cost.seconds:.0%} | "
        f"{cost.peak_gib:.2f} | {cost.step_gib:.2f} |"
    )


def memory_check(costs: Costs) -> Iterable[str]:
    """The lines that compare the growth from the smallest vocabulary on with the allowance."""
    (_, smallest), *larger = SWEEPS["vocabulary"].items()
    yield "| vocabulary | the step's memory grew by, MiB | allowed | beyond that |"
    yield "|---|---|---|---|"
    excess = 0.0
    for vocab_size, work in larger:
        grown = 1024 * (costs[work].step_gib - costs[smallest].step_gib)
        allowed = 1024 * (allowance(work) - allowance(smallest))
        excess = max(excess, grown - allowed)
        yield f"| {vocab_size:,} | {grown:,.0f} | {allowed:,.0f} | {grown - allowed:+,.0f} |"
    verdict = "pass" if excess <= SLACK else "FAIL"
    yield f"\n{verdict}: {excess:.0f} MiB beyond the allowance at most, of {SLACK}"


def draw(costs: Costs, path: Path) -> None:
    """The picture: time above, memory below, one column for each variable."""
    figure = Figure(figsize=(17, 7), layout="constrained")
    grid = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
    for (name, cases), (above, below) in zip(SWEEPS.items(), grid.T, strict=True):
        measured = [costs[work] for work in cases.values()]
        floors = [floor(METHOD, work, costs[work]) for work in cases.values()]
        allowances = [allowance(work) for work in cases.values()]
        panel(above, cases, [cost.seconds for cost in measured], floors, "--")
        panel(below, cases, [cost.peak_gib for cost in measured], allowances, ":")
        below.set_xlabel(name)
    grid[0, 0].set_ylabel("a step, s")
    grid[1, 0].set_ylabel("peak memory, GiB")
    memory = "four copies of the parameters, and a chunk of logits with its gradient"
    key = {
        f"step of {look(METHOD).label}": grid[0, 0].lines[0],
        "floor: matrix products at the measured peak": grid[0, 0].lines[1],
        memory: grid[1, 0].lines[1],
    }
    handles, labels = list(key.values()), list(key)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def panel(
    ax: Axes, values: Iterable[int], measured: list[float], bounds: list[float], style: str
) -> None:
    """One panel: what was measured, and its bound."""
    (_, color, marker), x = look(METHOD), list(values)
    ax.plot(x, measured, f"{marker}-", color=color)
    ax.plot(x, bounds, style, color="0.3")
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(x, [f"{n // 1024}k" if n >= 1024 else f"{n}" for n in x])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    bare(ax)


def main(folder: tyro.conf.Positional[Path] = Path("benchmarks/results")) -> None:
    """Measure all cases and write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    cases = list(dict.fromkeys(chain(*(c.values() for c in SWEEPS.values()))))
    costs = {work: in_new_process(measure, METHOD, work) for work in track(cases, "cases")}
    large = {name: in_new_process(measure, name, SHAPE_49M) for name in ("dpo", METHOD)}
    shares = [table_row(f"49M shape | {m}", m, SHAPE_49M, cost) for m, cost in large.items()]
    rates = [cost.matmul_flops / 1e9 for cost in (*costs.values(), *large.values())]
    peaks = f"products reach {min(rates):.0f} to {max(rates):.0f} GFLOP/s, each case's own peak"
    heading = f"`python -m benchmarks.growth`\n\n{describe()}\n{peaks}; {BASE}\n"
    with atomic(folder / "growth.md") as temporary:
        lines = [heading, *table(costs), *shares, "", *memory_check(costs), ""]
        temporary.write_text("\n".join(lines))
    draw(costs, folder / "growth.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
