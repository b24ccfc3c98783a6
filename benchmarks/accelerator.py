"""`python -m benchmarks.accelerator`: a step of Llama's shapes on a GPU or TPU, in bfloat16.

Llama 3.2 1B is trained as a whole, Llama 3 8B by adapters of rank 16 over frozen weights. Rows have
the lengths of Anthropic's HH: a prompt of 192 tokens and three (dpo: two) responses of 64 tokens,
without padding. MFU is the FLOPs of the model (`scale.model.flops`: nothing is counted twice, and
the unembedding counts at the labels alone) over the peak of the data sheet. The next column has the
share of the best rate that a matrix product reached on this device. Each case has a process of its
own. Its memory is the peak of the allocator.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from benchmarks.machine import describe, timed
from benchmarks.work import (
    BETA,
    OPTIMIZER,
    SCHEDULE,
    TRAINING,
    Work,
    batch_for,
    hyperparameters,
    in_new_process,
    num_responses,
    repeated,
)
from scale.model.adapters import AdapterConfig, adapted, partition, stored
from scale.model.config import ModelConfig
from scale.model.flops import model_flops
from scale.model.presets import LLAMA_3_8B
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.chips import peak_flops
from scale.parallel.mesh import Remat, Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import initialise
from scale.train.steps import policy_step, start_state

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
WORKS = {
    "1B": Work(LLAMA_1B, batch=96, prompt=192, response=64),
    "8B": Work(LLAMA_3_8B, batch=32, prompt=192, response=64),
}
RANKS = {"1B": 0, "8B": 16}  # of adapters
CASES: list[tuple[str, str, Remat]] = [
    ("1B", "dpo", "dots"),
    ("1B", "e-dpo", "dots"),
    ("1B", "e-dpo", "full"),
    ("8B", "dpo", "full"),
    ("8B", "e-dpo", "full"),
]
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


def measure(method: str, remat: Remat, work: Work, rank: int) -> Measurement:
    """One case, in this process; rank 0 has no adapters."""
    runtime = make_runtime(RuntimeConfig(dtype="bfloat16", remat=remat))
    trained, frozen = random_parts(work, runtime, rank)
    state = start_state(
        trained, OPTIMIZER, SCHEDULE, TRAINING.learning_rate, hyperparameters(BETA)
    )
    batch = jax.device_put(batch_for(method, work))
    labels = num_responses(method) * work.response
    length = work.row_length(num_responses(method))
    whole = parameter_count(trained if frozen is None else frozen)
    adapters = parameter_count(trained) if rank else None
    per_token = model_flops(work.model, whole, length, labels, adapters)
    function = partial(policy_step, method, OPTIMIZER, SCHEDULE, frozen=frozen)
    step = repeated(function, state, batch)
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


def random_parts(work: Work, runtime: Runtime, rank: int) -> tuple[Any, Any]:
    """What is trained of a random model, and what is not."""

    def make() -> Any:
        model = Transformer(work.model, jax.random.key(0), runtime)
        if not rank:
            return model
        trunk = stored(model, runtime.dtype)
        return adapted(trunk, AdapterConfig(rank), jax.random.key(1))

    return partition(initialise(make))


def product_flops(size: int = 8192, repeats: int = 20) -> float:
    """The rate of bfloat16 matrix products of random numbers (FLOP/s)."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    return 2 * size**3 * repeats / timed(lambda: [product(a) for _ in range(repeats)])


def table_row(name: str, method: str, remat: str, case: Measurement) -> str:
    rate, work = case.flops / case.seconds, WORKS[name]
    mfu = f"{rate / case.peak_flops:.1%}" if case.peak_flops else "unknown"
    tokens = work.batch * work.row_length(num_responses(method))
    case_name = f"| {name} | {RANKS[name]} | {work.batch} | {method}"
    return (
        f"{case_name} | {remat} | {case.seconds * 1e3:.1f} | {tokens / case.seconds:,.0f} | "
        f"{mfu} | {rate / case.product_flops:.1%} | {case.memory_gib:.1f} | "
        f"{case.compile_seconds:.0f} |"
    )


def main() -> None:
    """Print the table."""
    cases = {
        case: in_new_process(measure, *case[1:], WORKS[case[0]], RANKS[case[0]]) for case in CASES
    }
    machine = next(iter(cases.values())).machine
    peak = max(case.product_flops for case in cases.values())
    print(f"{machine}; products reach {peak / 1e12:.0f} TFLOP/s\n")
    print(
        "| shape | rank of adapters | pairs | method | remat | ms | tokens/s | MFU | "
        "of products' rate | peak memory GiB | first call, s |\n|" + "---|" * 11
    )
    for case, measured in cases.items():
        print(table_row(*case, measured))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
