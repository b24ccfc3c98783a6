"""`python -m benchmarks.growth [DIR]`: how the time and the memory of a step of e-DPO grow: `growth.md`, `growth.png`.

One variable at a time, from one base. Each case has a process of its own; drawn is its largest resident size. The floor
is the time of the step's matrix products at the best rate that a product reached between its steps.

The vocabulary may cost memory for four copies of the parameters (with their gradient and Adam's two moments; the step
takes over its state's buffers) and one chunk of logits with its gradient, and no more, by the compiler's own count.
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
from benchmarks.work import RECIPE, Work, alone, first_state, matmul_work, repeated, responses_of, rows_of
from scale.console import track
from scale.files import atomic
from scale.memory import keep_freed_memory
from scale.model.config import ModelConfig
from scale.model.response_logps import LOGITS
from scale.model.transformer import Transformer, parameter_count
from scale.paper.figures import LOOKS, bare, save
from scale.stages.align import align_step

METHOD = "e-dpo"
STEPS = 9  # measured, after the first
SLACK = 1  # MiB
LLAMA = ModelConfig(8192, 6, 384, 6, 64, 1024, num_kv_heads=2, block="sequential", norm="rms", scaled_logits=False)
BASE = Work(LLAMA, batch=4, prompt=128, response=64, num_reward_models=4)
SHAPE_49M = Work(replace(LLAMA, vocab_size=49_152, d_model=576, num_heads=9, num_kv_heads=3, d_ff=1536), 4, 128, 96)
SWEEPS = {
    "response length": {n: replace(BASE, response=n) for n in (16, 32, 64, 128, 256)},
    "prompt length": {n: replace(BASE, prompt=n) for n in (32, 128, 256, 512, 1024)},
    "vocabulary": {2**n: replace(BASE, model=replace(LLAMA, vocab_size=2**n)) for n in (10, 12, 13, 14, 16, 18)},
    "rewards K": {n: replace(BASE, num_reward_models=n) for n in (1, 2, 4, 8, 16)},
    "batch": {n: replace(BASE, batch=n) for n in (1, 2, 4, 8, 16)},
}


class Cost(NamedTuple):
    seconds: float
    peak_gib: float
    """Of the process."""
    step_gib: float
    """Of the step: its arguments, results and buffers, by the compiler's count."""
    matmul_flops: float


def measure(method: str, work: Work) -> Cost:
    batch = rows_of(method, work)
    compiled = align_step.lower(method, RECIPE, jax.eval_shape(partial(first_state, work)), batch).compile()
    step = repeated(compiled, first_state(work), batch)
    jax.block_until_ready(step())
    seconds, rates = zip(*((timed(step), matmul_flops(repeats=2)) for _ in range(STEPS)), strict=True)
    return Cost(median(seconds), peak_memory_gib(), step_gib(compiled.memory_analysis()), max(rates))


def step_gib(memory: Any) -> float:
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + results + memory.temp_size_in_bytes) / 2**30


def allowance(work: Work) -> float:
    """GiB of parameters, gradient, Adam's two moments, and one chunk of logits with its gradient, in float32."""
    params = parameter_count(jax.eval_shape(partial(Transformer, work.model), jax.random.key(0)))
    labels = work.batch * responses_of(METHOD) * work.response
    return 4 * (4 * params + 2 * work.model.vocab_size * min(labels, LOGITS["cpu"] // work.model.vocab_size)) / 2**30


def floor(method: str, work: Work, cost: Cost) -> float:
    return matmul_work(work, responses_of(method)) / cost.matmul_flops


Costs = dict[Work, Cost]


def table(costs: Costs) -> Iterable[str]:
    yield "| variable | value | ms | floor, ms | share | process, GiB | step, GiB |\n|---|---|---|---|---|---|---|"
    for name, cases in SWEEPS.items():
        for value, work in cases.items():
            yield row(f"{name} | {value:,}", METHOD, work, costs[work])


def row(name: str, method: str, work: Work, cost: Cost) -> str:
    least = floor(method, work, cost)
    return (f"| {name} | {cost.seconds * 1e3:.0f} | {least * 1e3:.0f} | {least / cost.seconds:.0%} | "
            f"{cost.peak_gib:.2f} | {cost.step_gib:.2f} |")


def memory_check(costs: Costs) -> Iterable[str]:
    """Growth from the smallest vocabulary on."""
    (_, smallest), *larger = SWEEPS["vocabulary"].items()
    yield "| vocabulary | the step's memory grew by, MiB | allowed | beyond that |\n|---|---|---|---|"
    most = 0.0
    for vocab_size, work in larger:
        grown = 1024 * (costs[work].step_gib - costs[smallest].step_gib)
        allowed = 1024 * (allowance(work) - allowance(smallest))
        most = max(most, grown - allowed)
        yield f"| {vocab_size:,} | {grown:,.0f} | {allowed:,.0f} | {grown - allowed:+,.0f} |"
    yield f"\n{'pass' if most <= SLACK else 'FAIL'}: {most:.0f} MiB beyond the allowance at most, of {SLACK}"


def draw(costs: Costs, path: Path) -> None:
    figure = Figure(figsize=(17, 7), layout="constrained")
    grid = figure.subplots(2, len(SWEEPS), sharex="col", sharey="row")
    for (name, cases), (above, below) in zip(SWEEPS.items(), grid.T, strict=True):
        found = [costs[work] for work in cases.values()]
        least = [floor(METHOD, work, costs[work]) for work in cases.values()]
        panel(above, cases, [c.seconds for c in found], least, "--")
        panel(below, cases, [c.peak_gib for c in found], [allowance(work) for work in cases.values()], ":")
        below.set_xlabel(name)
    grid[0, 0].set_ylabel("a step, s")
    grid[1, 0].set_ylabel("peak memory, GiB")
    key = {f"step of {LOOKS[METHOD].label}": grid[0, 0].lines[0],
           "floor: matrix products at the measured peak": grid[0, 0].lines[1],
           "four copies of the parameters, and a chunk of logits with its gradient": grid[1, 0].lines[1]}
    figure.legend(list(key.values()), list(key), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def panel(ax: Axes, values: Iterable[int], found: list[float], least: list[float], style: str) -> None:
    look, x = LOOKS[METHOD], list(values)
    ax.plot(x, found, f"{look.marker}-", color=look.color)
    ax.plot(x, least, style, color="0.3")
    ax.set(xscale="log", yscale="log")
    ax.set_xticks(x, [f"{n // 1024}k" if n >= 1024 else f"{n}" for n in x])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    bare(ax)


def main(folder: tyro.conf.Positional[Path] = Path("benchmarks/results")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    cases = list(dict.fromkeys(chain(*(c.values() for c in SWEEPS.values()))))
    costs = {work: alone(measure, METHOD, work) for work in track(cases, "cases")}
    large = {method: alone(measure, method, SHAPE_49M) for method in ("dpo", METHOD)}
    shares = (row(f"49M shape | {method}", method, SHAPE_49M, cost) for method, cost in large.items())
    rates = [cost.matmul_flops / 1e9 for cost in (*costs.values(), *large.values())]
    peaks = f"products reach {min(rates):.0f} to {max(rates):.0f} GFLOP/s, each case's own peak"
    heading = f"`python -m benchmarks.growth`\n\n{describe()}\n{peaks}; {BASE}\n"
    with atomic(folder / "growth.md") as temporary:
        temporary.write_text("\n".join([heading, *table(costs), *shares, "", *memory_check(costs), ""]))
    draw(costs, folder / "growth.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
