"""`python -m benchmarks.accelerator`: a step of Llama 3.2 1B's shape on a GPU or TPU, in bfloat16.

Rows have the lengths of Anthropic's HH: a prompt of 192 tokens and three (dpo: two) responses of 64
tokens, without padding. MFU is the FLOPs of the model (`scale.model.flops`: nothing is counted
twice, and the unembedding counts at the labels alone) over the peak of the data sheet. The next
column has the share of the best rate that a matrix product reached on this device. Each case has a
process of its own. Its memory is the peak of the allocator.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tyro

from benchmarks.machine import describe, timed
from benchmarks.work import (
    OPTIMIZER,
    SCHEDULE,
    Work,
    batch_for,
    first_state,
    in_new_process,
    num_responses,
    repeated,
)
from scale.model.config import ModelConfig
from scale.model.flops import model_flops
from scale.model.transformer import parameter_count
from scale.parallel.chips import peak_flops
from scale.parallel.mesh import Remat, RuntimeConfig, make_runtime
from scale.train.steps import policy_step

LLAMA_1B = ModelConfig(
    vocab_size=128_256,
    num_layers=16,
    d_model=2048,
    num_heads=32,
    head_dim=64,
    d_ff=8192,
    rope_base=500_000.0,
    num_kv_heads=8,
    block="sequential",
    norm="rms",
    norm_eps=1e-5,
    scaled_logits=False,
)
WORK = Work(LLAMA_1B, batch=96, prompt=192, response=64)
CASES: list[tuple[str, Remat]] = [("dpo", "dots"), ("e-dpo", "dots"), ("e-dpo", "full")]
STEPS = 10


class Measurement(NamedTuple):
    """One case.

    Attributes:
        machine: What it ran on.
        compile_seconds: Seconds of the first step.
        seconds: Seconds of a step.
        flops: FLOPs of a step that the model needs.
        peak_flops: FLOP/s of the data sheet, where the device is known.
        product_flops: FLOP/s that a matrix product reaches.
        memory_gib: Peak of the allocator.
    """

    machine: str
    compile_seconds: float
    seconds: float
    flops: float
    peak_flops: float | None
    product_flops: float
    memory_gib: float


def measure(method: str, remat: Remat, work: Work) -> Measurement:
    """One case, in this process."""
    state = first_state(work, make_runtime(RuntimeConfig(dtype="bfloat16", remat=remat)))
    batch = jax.device_put(batch_for(method, work))
    labels = num_responses(method) * work.response
    length = work.row_length(num_responses(method))
    per_token = model_flops(work.model, parameter_count(state.model), length, labels)
    step = repeated(partial(policy_step, method, OPTIMIZER, SCHEDULE), state, batch)
    compile_seconds, _ = timed(step), timed(step)
    seconds = timed(lambda: [step() for _ in range(STEPS)]) / STEPS
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return Measurement(
        describe(),
        compile_seconds,
        seconds,
        work.batch * length * per_token,
        peak_flops(device.device_kind),
        product_flops(),
        memory,
    )


def product_flops(size: int = 8192, repeats: int = 20) -> float:
    """The rate of bfloat16 matrix products of random numbers (FLOP/s)."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return 2 * size**3 * repeats / timed(lambda: [product(a) for _ in range(repeats)])


def table_row(method: str, remat: str, case: Measurement) -> str:
    rate = case.flops / case.seconds
    mfu = f"{rate / case.peak_flops:.1%}" if case.peak_flops else "unknown"
    tokens = WORK.batch * WORK.row_length(num_responses(method))
    return (
        f"| {method} | {remat} | {case.seconds * 1e3:.1f} | {tokens / case.seconds:,.0f} | {mfu} | "
        f"{rate / case.product_flops:.1%} | {case.memory_gib:.1f} | {case.compile_seconds:.0f} |"
    )


def main() -> None:
    """Print the table."""
    cases = {case: in_new_process(measure, *case, WORK) for case in CASES}
    machine = next(iter(cases.values())).machine
    peak = max(case.product_flops for case in cases.values())
    print(f"{machine}; products reach {peak / 1e12:.0f} TFLOP/s\n{WORK}\n")
    print(
        "| method | remat | ms | tokens/s | MFU | of products' rate | peak memory GiB | "
        "first call, s |\n|---|---|---|---|---|---|---|---|"
    )
    for (method, remat), case in cases.items():
        print(table_row(method, remat, case))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
