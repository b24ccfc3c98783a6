"""`plan`: what a training step of `align` takes on TPUs that nobody has rented yet."""

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any, get_args

import jax
import jax.numpy as jnp

from minipref.batch import Batch, Inputs, Targets
from minipref.methods import METHODS
from minipref.training import Hyperparameters, TrainState
from scale.console import console
from scale.data.layout import Layout
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.flops import model_flops
from scale.model.presets import published
from scale.model.splash import SharedPrefix, block_sizes
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.chips import chip_of
from scale.parallel.mesh import BATCH, Remat, RematPolicy, Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import abstract_sharded
from scale.plan.hlo import Counts, count
from scale.plan.roofline import bound
from scale.plan.topology import spanned, topology_devices, torus
from scale.stages.align import MethodName
from scale.train.loop import TrainingConfig
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import policy_step, start_state

SCHEDULE = TrainingConfig().schedule
PRODUCTS = {"_fwd_": 2, "_dkv_": 4, "_dq_": 3}  # of queries with keys, in each of splash attention's kernels


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile the step that `align` would run for TPUs that are not there; print its memory, work and speed limit.

    A row has --tokens slots: half are the prompt's, half the responses', of which a method with a KL term has three and
    the others two; only the responses' half meets the vocabulary.
    """

    model: str = "palm-540b"
    """Shape: palm-8b, palm-62b, palm-540b, llama-3-8b, llama-3-70b or smollm2-135m."""
    method: MethodName = "e-dpo"
    """Which row of the table of methods."""
    topology: str = "v4:12x16x16"
    """TPU generation and chips along each dimension of a slice."""
    slices: int = 1
    """Slices, joined by the data-centre network; they lie along the mesh axis `data`."""
    batch: int = 1024
    """Pairs of a step, over all devices."""
    tokens: int = 2048
    """Slots of a row."""
    num_reward_models: int = 5
    """Reward models of an ensemble method."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp and tensor. Default: one copy a slice, the smallest tensor that divides the work."""
    remat: Remat = "full"
    """What the backward pass computes again: nothing, all but matrix products, or each layer but its input."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adafactor", 1e-4))
    """Optimiser and z-loss."""
    search: bool = False
    """Try half and twice the batch, all remat policies and meshes; print each, and the best that fits."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        try:
            found = best(self) if self.search else report(self)
        except InputError as error:
            if self.json:
                print(json.dumps({"fits": False, "error": str(error)}))
                sys.exit(2)
            raise
        print(json.dumps(found)) if self.json else show(self, found)


def best(plan: Plan) -> dict[str, Any]:
    """The candidate whose MFU bound is highest among those that fit.

    Errors: InputError where none fits.
    """
    found = []
    for candidate in candidates(plan):
        try:
            found.append(report(candidate))
            outcome = f"MFU at most {found[-1]['mfu_bound']:.1%}"
        except InputError as error:
            outcome = str(error)
        if not plan.json:
            console.print(f"batch {candidate.batch}, mesh {candidate.mesh}, remat {candidate.remat}: {outcome}")
    if not found:
        raise InputError(f"--search: no batch, mesh and remat policy fits {plan.topology} x {plan.slices}")
    return max(found, key=lambda each: each["mfu_bound"])


def candidates(plan: Plan) -> Iterator[Plan]:
    for batch in (plan.batch // 2, plan.batch, plan.batch * 2):
        for mesh, remat in product(meshes(plan, batch), get_args(RematPolicy)):
            yield replace(plan, batch=batch, mesh=mesh, remat=remat)


def meshes(plan: Plan, batch: int) -> list[tuple[int, int, int]]:
    """One copy a slice; tensor is 1 or what lies along one dimension of the torus or two; all that divide the batch."""
    devices, sizes = len(topology_devices(plan.topology, plan.slices)) // plan.slices, torus(plan.topology)
    tensors = sorted({1, *sizes, *(prod(sizes[i : i + 2]) for i in range(len(sizes) - 1))})
    found = [(plan.slices, devices // tensor, tensor) for tensor in tensors if devices % tensor == 0]
    return [mesh for mesh in found if batch and batch % (mesh[0] * mesh[1]) == 0]


def report(plan: Plan) -> dict[str, Any]:
    """Errors: InputError where the step does not compile for the topology, such as for want of memory."""
    config, layout = published(plan.model, "--model"), row_layout(plan)
    runtime, state = begun(plan, config)
    began = time.monotonic()
    compiled = compile_step(plan, state, batch_of(plan, layout, runtime))
    seconds = time.monotonic() - began
    counts = count(compiled.as_text(), runtime.sizes)
    counts.flops += kernel_flops(counts, config, layout, plan.batch * config.num_heads / runtime.devices)
    params = parameter_count(state.model)
    return (
        {"model": plan.model, "method": plan.method, "topology": plan.topology, "slices": plan.slices,
         "batch": plan.batch, "tokens": plan.tokens, "remat": plan.remat, "mesh": runtime.sizes,
         "devices": runtime.devices, "params": params}
        | memory(plan, state, config, runtime, compiled.memory_analysis())
        | speed(plan, counts, config, params, layout, runtime)
        | {"compile_seconds": seconds}
    )


def row_layout(plan: Plan) -> Layout:
    n = 2 if METHODS[plan.method].gamma is None else 3
    response = plan.tokens // 2 // n // 8 * 8
    return Layout(plan.tokens - n * response, response, n)


def begun(plan: Plan, config: ModelConfig) -> tuple[Runtime, TrainState]:
    """Step 0 on the mesh of the plan, or on the first that divides model and batch."""
    devices = topology_devices(plan.topology, plan.slices)
    faults = [f"--batch {plan.batch}: no mesh of {len(devices)} devices divides it"]
    for data, fsdp, tensor in [plan.mesh] if plan.mesh else meshes(plan, plan.batch):
        runtime = make_runtime(RuntimeConfig(data, fsdp, tensor, remat=plan.remat, dtype="bfloat16"), devices)
        try:
            return runtime, start(config, plan.optimizer, runtime)
        except InputError as error:
            faults.append(str(error))
    raise InputError(faults[-1])


def start(config: ModelConfig, optimizer: OptimizerConfig, runtime: Runtime) -> TrainState:
    """Shapes and shardings of the state of step 0."""

    def make() -> TrainState:
        zero = Hyperparameters(jnp.zeros(()), jnp.zeros(2))
        model = Transformer(config, jax.random.key(0), runtime)
        return start_state(model, optimizer, SCHEDULE, 0.0, zero)

    return abstract_sharded(jax.eval_shape(make), runtime)


def batch_of(plan: Plan, layout: Layout, runtime: Runtime) -> Batch:
    num_rewards = {"none": 0, "single": 1, "ensemble": plan.num_reward_models}
    length, n, labels = layout.length, layout.num_responses, layout.num_labels

    def array(dtype: Any, *shape: int) -> Any:
        sharding = runtime.sharding(BATCH)
        return jax.ShapeDtypeStruct((plan.batch, *shape), dtype, sharding=sharding)

    sizes = [length] * 3 + [labels] * 3 + [n]
    inputs = Inputs._make(array(jnp.int32, size) for size in sizes)
    rewards = array(jnp.float32, 2, num_rewards[METHODS[plan.method].rewards])
    return Batch(inputs, Targets(array(jnp.float32, n), rewards))


def compile_step(plan: Plan, state: TrainState, batch: Batch) -> Any:
    try:
        return policy_step.lower(plan.method, plan.optimizer, SCHEDULE, state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(out_of_memory(plan, str(error))) from error


def out_of_memory(plan: Plan, text: str) -> str:
    used = re.search(r"Used (\S+) of (\S+) hbm|temporaries \((\S+)\) exceeds available HBM \((\S+)\)", text)
    if "RESOURCE_EXHAUSTED" not in text or not used:
        return f"{plan.model} on {plan.topology}: the TPU compiler says: {text.splitlines()[0]}"
    advice = "a smaller --batch, a --mesh with more fsdp or tensor, more chips"
    more = "" if plan.remat == "full" else "--remat full, "
    need = "a device needs {} of {} HBM".format(*filter(None, used.groups()))
    return f"{plan.model} on {plan.topology}: does not fit: {need}; try {more}{advice}"


def memory(plan: Plan, state: TrainState, config: ModelConfig, runtime: Runtime, stats: Any) -> dict[str, Any]:
    """Bytes of HBM a chip. Saved activations are one residual stream a layer under full remat, else not told apart."""
    chip = chip_of(plan.topology)
    kept = 2 * plan.batch * plan.tokens * config.d_model * config.num_layers / runtime.devices * (plan.remat == "full")
    parts = {"parameters": shard_bytes(state.model), "optimizer": shard_bytes(state.opt_state), "activations": kept,
             "temporaries": stats.temp_size_in_bytes - kept, "program": stats.generated_code_size_in_bytes}
    total = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
             + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)
    return {"hbm_bytes_per_chip": total * chip.devices, "hbm_limit_bytes": chip.hbm_bytes,
            "hbm_parts": {name: int(value * chip.devices) for name, value in parts.items()},
            "fits": total * chip.devices <= chip.hbm_bytes}


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kernel_flops(counts: Counts, config: ModelConfig, layout: Layout, heads: float) -> float:
    """FLOPs of attention's kernels on a device with `heads` heads of rows; the compiled program does not state them."""
    one = heads * visited_products(layout) * 2 * config.head_dim
    return sum(one * products * times for call, times in counts.uncounted.items()
               for name, products in PRODUCTS.items() if name in call)


def visited_products(layout: Layout) -> int:
    """Pairs of query and key in the blocks that the mask does not skip."""
    size, mask = block_sizes(layout.length).block_q, SharedPrefix(layout)
    starts = range(0, layout.length, size)
    return size**2 * sum(bool(mask[q : q + size, k : k + size].any()) for q in starts for k in starts)


def speed(
    plan: Plan, counts: Counts, config: ModelConfig, params: int, layout: Layout, runtime: Runtime
) -> dict[str, Any]:
    model = plan.batch * plan.tokens * model_flops(config, params, plan.tokens, layout.num_labels)
    dense = 12 * config.num_layers * config.num_heads * config.head_dim
    needed = model - plan.batch * dense * (plan.tokens**2 - visited_products(layout))
    spans = {axis: spanned(size, torus(plan.topology)) for axis, size in runtime.sizes.items()}
    slow = "data" if plan.slices > 1 else ""
    limit = bound(counts, chip_of(plan.topology), runtime.sizes, model, spans, slow)
    done = counts.flops * runtime.devices
    return {"model_flops": model, "compiled_flops": done, "recompute_factor": done / needed,
            "bytes_moved_per_device": counts.collective_bytes, "seconds": limit.seconds, "binding": limit.binding,
            "step_seconds_bound": limit.step_seconds, "mfu_bound": limit.mfu}


def show(plan: Plan, found: dict[str, Any]) -> None:
    gib, mesh = 2**30, " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    parts = ", ".join(f"{name} {value / gib:.2f}" for name, value in found["hbm_parts"].items())
    moved = ", ".join(f"{axes} {value / 1e9:.1f}" for axes, value in found["bytes_moved_per_device"].items())
    seconds = ", ".join(f"{part} {value:.3f}" for part, value in found["seconds"].items())
    room = "fits" if found["fits"] else "DOES NOT FIT"
    for line in (
        f"{found['model']}, {found['method']}, {found['batch']} pairs x {found['tokens']} tokens a step, "
        f"remat {found['remat']}; compiled in {found['compile_seconds']:.0f} s",
        f"devices     {found['devices']} of {plan.topology} x {plan.slices}; mesh {mesh}",
        f"parameters  {found['params'] / 1e9:.2f}B",
        f"HBM a chip  {found['hbm_bytes_per_chip'] / gib:.2f} of {found['hbm_limit_bytes'] / gib:.1f} GiB: {room} "
        "(total, temporaries and program: the compiler's; others: arithmetic)",
        f"            {parts}",
        f"FLOPs       {found['model_flops']:.3e} a step of the model's own (arithmetic: PaLM's 6N + 12LHQT, "
        f"vocabulary at labels); {found['compiled_flops']:.3e} compiled (attention kernels: arithmetic)",
        f"recompute   {found['recompute_factor']:.3f} times the products of one forward and backward pass",
        f"network     GB a device sends a step (the compiler's): {moved}",
        f"seconds     each part alone at its peak (arithmetic): {seconds}",
        f"bound       {found['step_seconds_bound']:.3f} s a step by {found['binding']}: "
        f"MFU at most {found['mfu_bound']:.1%}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
