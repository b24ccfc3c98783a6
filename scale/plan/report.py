"""The figures of a plan: memory, work and speed limit of a compiled step."""

import time
from math import prod
from typing import Any

import jax

from minipref.training import TrainState
from scale.model.config import ModelConfig
from scale.model.flops import model_flops
from scale.model.presets import published
from scale.model.transformer import parameter_count
from scale.parallel.chips import chip_of
from scale.parallel.mesh import Runtime
from scale.plan.attention_flops import kernel_flops, visited_pairs
from scale.plan.hlo import Counts, count
from scale.plan.roofline import bound
from scale.plan.step import StepConfig, batch_of, compile_step, place, row_layout
from scale.plan.topology import spanned, torus


def report(config: StepConfig) -> dict[str, Any]:
    """Compiles a step and counts what it does.

    Args:
        config: The step.

    Returns:
        The figures that `plan --json` prints.

    Raises:
        InputError: The step does not compile for the topology, such as for want of memory.
    """
    model, layout = published(config.model, "--model"), row_layout(config)
    runtime, state = place(config, model)
    start_time = time.monotonic()
    compiled = compile_step(config, state, batch_of(config, layout, runtime))
    seconds = time.monotonic() - start_time
    counts = count(compiled.as_text(), runtime.sizes)
    heads = config.batch * model.num_heads / runtime.devices
    counts.flops += kernel_flops(counts.uncounted, layout, heads, model.head_dim)
    params = parameter_count(state.model)
    names = ("model", "method", "topology", "slices", "batch", "tokens", "remat")
    return (
        {name: getattr(config, name) for name in names}
        | {"mesh": runtime.sizes, "devices": runtime.devices, "params": params}
        | memory(config, state, model, runtime, compiled.memory_analysis())
        | speed(config, counts, model, params, runtime)
        | {"compile_seconds": seconds}
    )


def memory(
    config: StepConfig, state: TrainState, model: ModelConfig, runtime: Runtime, stats: Any
) -> dict[str, Any]:
    """Bytes of main memory that a chip needs.

    Args:
        config: The step.
        state: Its state.
        model: The shape of the model.
        runtime: The mesh.
        stats: The compiler's, `compiled.memory_analysis()`.

    Returns:
        The total, the limit and the parts.
    """
    chip, saved = chip_of(config.topology), _saved_activations(config, model) / runtime.devices
    temporaries, program = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    parts = {"parameters": shard_bytes(state.model), "optimizer": shard_bytes(state.opt_state),
             "activations": saved, "temporaries": temporaries - saved, "program": program}
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = (stats.argument_size_in_bytes + results + temporaries + program) * chip.devices
    return {
        "hbm_bytes_per_chip": total,
        "hbm_limit_bytes": chip.hbm_bytes,
        "hbm_parts": {name: int(size * chip.devices) for name, size in parts.items()},
        "fits": total <= chip.hbm_bytes,
    }


def _saved_activations(config: StepConfig, model: ModelConfig) -> int:
    """One residual stream a layer under full remat; else they are among the temporaries."""
    is_full = config.remat == "full"
    return 2 * config.batch * config.tokens * model.d_model * model.num_layers * is_full


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree on one device.

    Args:
        tree: Arrays with shardings.

    Returns:
        The sum over its leaves.
    """
    leaves = jax.tree.leaves(tree)
    return sum(prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def speed(
    config: StepConfig, counts: Counts, model: ModelConfig, params: int, runtime: Runtime
) -> dict[str, Any]:
    """FLOPs, traffic and the speed limit that follows from them.

    Args:
        config: The step.
        counts: What one device does in it.
        model: The shape of the model.
        params: Its number of parameters.
        runtime: The mesh.

    Returns:
        FLOPs of all devices, bytes of one device, seconds of a step.
    """
    total, needed = _step_flops(config, model, params)
    spans = {axis: spanned(size, torus(config.topology)) for axis, size in runtime.sizes.items()}
    slow = "data" if config.slices > 1 else ""
    limit = bound(counts, chip_of(config.topology), runtime.sizes, total, spans, slow)
    compiled = counts.flops * runtime.devices
    return {
        "model_flops": total,
        "compiled_flops": compiled,
        "recompute_factor": compiled / needed,
        "bytes_moved_per_device": counts.collective_bytes,
        "seconds": limit.seconds,
        "binding": limit.binding,
        "step_seconds_bound": limit.step_seconds,
        "mfu_bound": limit.mfu,
    }


def _step_flops(config: StepConfig, model: ModelConfig, params: int) -> tuple[float, float]:
    """The model's FLOPs of a step; and without those in the blocks that the mask skips."""
    layout = row_layout(config)
    by_token = model_flops(model, params, config.tokens, layout.num_labels)
    total = config.batch * config.tokens * by_token
    by_pair = 12 * model.num_layers * model.num_heads * model.head_dim
    skipped = config.batch * by_pair * (config.tokens**2 - visited_pairs(layout))
    return total, total - skipped
