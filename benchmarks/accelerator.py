"""`python -m benchmarks.accelerator`: a step of Llama 3.2 1B's shape on one GPU or TPU, in bfloat16.

Rows of the lengths of Anthropic's HH, prompt 192 and three (dpo: two) responses of 64 tokens, without padding. MFU is
the model's own FLOPs (`scale.plan.roofline`: nothing that is computed again, the vocabulary at labels alone) over the data
sheet's peak; beside it the share of the best rate that a product reached here. Each case is a process of its own; its
memory is the allocator's peak.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro

from benchmarks.machine import describe, timed
from benchmarks.work import RECIPE, Work, alone, first_state, repeated, responses_of, rows_of
from scale.model.config import ModelConfig
from scale.model.flops import model_flops
from scale.model.transformer import parameter_count
from scale.parallel.chips import peak_flops
from scale.parallel.mesh import Remat, RuntimeConfig, make_runtime
from scale.stages.align import align_step

LLAMA_1B = ModelConfig(128_256, 16, 2048, 32, 64, 8192, 500_000.0, 8, "sequential", "rms", 1e-5, scaled_logits=False)
WORK = Work(LLAMA_1B, batch=96, prompt=192, response=64)
CASES: list[tuple[str, Remat]] = [("dpo", "dots"), ("e-dpo", "dots"), ("e-dpo", "full")]
STEPS = 10


class Found(NamedTuple):
    machine: str
    compilation: float
    seconds: float
    flops: float
    peak_flops: float | None
    product_flops: float
    memory_gib: float


def measure(method: str, remat: Remat, work: Work) -> Found:
    state = first_state(work, make_runtime(RuntimeConfig(dtype="bfloat16", remat=remat)))
    batch = jax.device_put(rows_of(method, work))
    labels = responses_of(method) * work.response
    row = work.prompt + labels
    flops = work.batch * row * model_flops(work.model, parameter_count(state.model), row, labels)
    step = repeated(partial(align_step, method, RECIPE), state, batch)
    compilation, _, seconds = timed(step), timed(step), timed(lambda: [step() for _ in range(STEPS)]) / STEPS
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return Found(describe(), compilation, seconds, flops, peak_flops(device.device_kind), product_flops(), memory)


def product_flops(size: int = 8192, repeats: int = 20) -> float:
    """The rate of bfloat16 products of random numbers (FLOP/s)."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return 2 * size**3 * repeats / timed(lambda: [product(a) for _ in range(repeats)])


def row(method: str, remat: str, found: Found) -> str:
    rate = found.flops / found.seconds
    mfu = f"{rate / found.peak_flops:.1%}" if found.peak_flops else "unknown"
    tokens = WORK.batch * (WORK.prompt + responses_of(method) * WORK.response)
    return (f"| {method} | {remat} | {found.seconds * 1e3:.1f} | {tokens / found.seconds:,.0f} | {mfu} | "
            f"{rate / found.product_flops:.1%} | {found.memory_gib:.1f} | {found.compilation:.0f} |")


def main() -> None:
    found = {case: alone(measure, *case, WORK) for case in CASES}
    machine, peak = next(iter(found.values())).machine, max(each.product_flops for each in found.values())
    print(f"{machine}; products reach {peak / 1e12:.0f} TFLOP/s\n{WORK}\n")
    print("| method | remat | ms | tokens/s | MFU | of products' rate | peak memory GiB | first call, s |")
    print("|---|---|---|---|---|---|---|---|")
    for (method, remat), each in found.items():
        print(row(method, remat, each))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
