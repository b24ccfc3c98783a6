"""The figures of a plan: memory, work and speed limit of a compiled step."""

import time
from math import prod
from typing import Any

import jax

from scale.model.flops import model_flops
from scale.parallel.chips import chip_of
from scale.plan.attention_flops import kernel_flops, visited_pairs
from scale.plan.hlo import Counts, count
from scale.plan.options import PlanOptions
from scale.plan.roofline import Bound, bound
from scale.plan.step import Placed, advice, compile_step
from scale.plan.topology import spanned, torus
from scale.stages.sample import Sample

FORWARD = 1 / 3  # of the model FLOPs of a training step


def report(options: PlanOptions, placed: Placed, rows: int) -> dict[str, Any]:
    """Compile a step and count what it does.

    Args:
        options: The stage and the pod.
        placed: Its model on a mesh.
        rows: Rows of a step.

    Returns:
        The figures that `plan --json` prints.

    Raises:
        InputError: The step does not compile for the topology, such as for want of memory.
    """
    runtime, layout, model = placed.runtime, options.layout, options.config
    start_time = time.monotonic()
    compiled = compile_step(options, placed, rows)
    seconds = time.monotonic() - start_time
    counts = count(compiled.as_text(), runtime.sizes, loop_trips=options.limits.response)
    heads = rows * model.num_heads / runtime.devices
    counts.flops += kernel_flops(counts.uncounted, layout, heads, model.head_dim)
    names = ("stage", "model", "method", "topology", "slices")
    return (
        {name: getattr(options, name) for name in names}
        | {"batch": rows, "tokens": layout.length, "remat": options.runtime.remat}
        | {"dtype": options.runtime.dtype, "mesh": runtime.sizes, "devices": runtime.devices}
        | {"params": placed.parameters, "adapter_params": placed.adapters}
        | {"reward_models": placed.members}
        | memory(options, placed, compiled.memory_analysis())
        | speed(options, placed, rows, counts)
        | {"compile_seconds": seconds}
    )


def memory(options: PlanOptions, placed: Placed, stats: Any) -> dict[str, Any]:
    """Bytes of main memory that a chip needs: the total, the limit and the parts.

    Args:
        options: The pod.
        placed: The model on it.
        stats: The compiler's, `compiled.memory_analysis()`.
    """
    chip, state = chip_of(options.topology), placed.state
    temporaries, program = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = (stats.argument_size_in_bytes + results + temporaries + program) * chip.devices
    parts = {
        "parameters": shard_bytes(placed.frozen) + shard_bytes(state and state.model),
        "optimizer": shard_bytes(state and state.opt_state),
        "activations and temporaries": temporaries,
        "program": program,
    }
    return {
        "hbm_bytes_per_chip": total,
        "hbm_limit_bytes": chip.hbm_bytes,
        "hbm_parts": {name: int(size * chip.devices) for name, size in parts.items()},
        "fits": total <= chip.hbm_bytes,
        "advice": "" if total <= chip.hbm_bytes else advice(options),
    }


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays with shardings on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def speed(options: PlanOptions, placed: Placed, rows: int, counts: Counts) -> dict[str, Any]:
    """FLOPs of all devices, bytes of one, and the speed limit that follows from them.

    Args:
        options: The stage and the pod.
        placed: Its model.
        rows: Rows of a step.
        counts: What one device does in it.
    """
    runtime = placed.runtime
    needed = step_flops(options, placed, rows)
    limit = limit_of(options, runtime.sizes, counts, needed)
    compiled = counts.flops * runtime.devices
    return {
        "model_flops": needed,
        "compiled_flops": compiled,
        "recompute_factor": compiled / needed,
        "bytes_moved_per_device": counts.collective_bytes,
        "seconds": limit.seconds,
        "binding": limit.binding,
        "step_seconds_bound": limit.step_seconds,
        "mfu_bound": limit.mfu,
    }


def limit_of(options: PlanOptions, sizes: dict[str, int], counts: Counts, needed: float) -> Bound:
    """The roofline of a step on the pod."""
    spans = {axis: spanned(size, torus(options.topology)) for axis, size in sizes.items()}
    slow = "data" if options.slices > 1 else ""
    return bound(counts, chip_of(options.topology), sizes, needed, spans, slow)


def step_flops(options: PlanOptions, placed: Placed, rows: int) -> float:
    """The model's own FLOPs of a step, in the blocks of attention that the mask does not skip."""
    layout, model, parameters = options.layout, options.config, placed.multiplied
    if options.stage == "sample":
        return sampled_flops(options, placed, rows)
    labels = 0 if options.stage == "reward" else layout.num_labels
    by_token = model_flops(model, parameters, layout.length, labels, placed.adapters)
    by_pair = 12 * model.num_layers * model.num_heads * model.head_dim
    skipped = by_pair * (layout.length**2 - visited_pairs(layout))
    whole = rows * placed.members * (layout.length * by_token - skipped)
    return whole * (FORWARD if options.stage == "score" else 1)


def sampled_flops(options: PlanOptions, placed: Placed, rows: int) -> float:
    """Of `sample`: each prompt is read once, and each sample has as many tokens as it may."""
    model, (prompt, response) = options.config, (options.limits.prompt, options.limits.response)
    read = model_flops(model, placed.multiplied, prompt, 0) * prompt
    drawn = model_flops(model, placed.multiplied, prompt + response) * response * Sample.n
    return FORWARD * rows * (read + drawn)
