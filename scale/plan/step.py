"""The training step of `align`, compiled for TPUs that are not there."""

import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from minipref.batch import Batch, Inputs, Targets
from minipref.methods import METHODS
from minipref.training import Hyperparameters, TrainState
from scale.data.layout import LANES, Layout
from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import BATCH, Remat, Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import abstract_sharded
from scale.plan.topology import meshes, topology_devices
from scale.stages.align import MethodName
from scale.train.loop import TrainingConfig
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import policy_step, start_state

SCHEDULE = TrainingConfig().schedule


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A step, and the pod that it is compiled for."""

    model: str = "palm-540b"
    """Shape: palm-8b, palm-62b, palm-540b, llama-3-8b, llama-3-70b or smollm2-135m."""
    method: MethodName = "e-dpo"
    """Which row of the table of methods."""
    topology: str = "v4:12x16x16"
    """TPU generation and chips along each dimension of a slice."""
    slices: int = 1
    """Slices, joined by the data-center network; they lie along the mesh axis `data`."""
    batch: int = 1024
    """Pairs of a step, over all devices."""
    tokens: int = 2048
    """Positions of a row."""
    num_reward_models: int = 5
    """Reward models of an ensemble method."""
    mesh: tuple[int, int, int] | None = None
    """Devices along data, fsdp and tensor. Default: one copy of the model in each slice, and the
    smallest tensor that divides the work."""
    remat: Remat = "full"
    """What the backward pass computes again: nothing, all but matrix products, or each layer from
    its input."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adafactor", 1e-4))
    """Optimizer and z-loss."""


def row_layout(config: StepConfig) -> Layout:
    """How a row is divided: half for the prompt, half for the responses.

    Args:
        config: The step. A method with a KL term has three responses, the others two.

    Returns:
        The layout; responses have a multiple of 8 positions.

    Raises:
        InputError: The positions do not fill the lanes, so that the step has more than --tokens.
    """
    if config.tokens % LANES:
        raise InputError(f"--tokens {config.tokens}: must be a multiple of {LANES}")
    n = 2 if METHODS[config.method].gamma is None else 3
    response = config.tokens // 2 // n // 8 * 8
    return Layout(config.tokens - n * response, response, n)


def place(config: StepConfig, model: ModelConfig) -> tuple[Runtime, TrainState]:
    """Places step 0 on the given mesh, or on the first mesh that divides the model and the batch.

    Args:
        config: The step.
        model: The shape of the model.

    Returns:
        The mesh, and the state as shapes and shardings.

    Raises:
        InputError: No mesh divides the model and the batch.
    """
    devices = topology_devices(config.topology, config.slices)
    shapes = [config.mesh] if config.mesh else None
    faults = [f"--batch {config.batch}: no mesh of {len(devices)} devices divides it"]
    for mesh in shapes or meshes(config.topology, config.slices, config.batch):
        options = RuntimeConfig(*mesh, remat=config.remat, dtype="bfloat16")
        runtime = make_runtime(options, devices)
        try:
            return runtime, start(model, config.optimizer, runtime)
        except InputError as error:
            faults.append(str(error))
    raise InputError(faults[-1])


def start(config: ModelConfig, optimizer: OptimizerConfig, runtime: Runtime) -> TrainState:
    """Shapes and shardings of the state of step 0.

    Args:
        config: The shape of the model.
        optimizer: Which optimizer holds a state.
        runtime: The mesh.

    Returns:
        A state of `jax.ShapeDtypeStruct`.
    """

    def make() -> TrainState:
        zero = Hyperparameters(jnp.zeros(()), jnp.zeros(2))
        model = Transformer(config, jax.random.key(0), runtime)
        return start_state(model, optimizer, SCHEDULE, 0.0, zero)

    return abstract_sharded(jax.eval_shape(make), runtime)


def batch_of(config: StepConfig, layout: Layout, runtime: Runtime) -> Batch:
    """Shapes and shardings of a batch.

    Args:
        config: The step.
        layout: That of its rows.
        runtime: The mesh.

    Returns:
        A batch of `jax.ShapeDtypeStruct`, rows split over data and fsdp.
    """
    num_rewards = {"none": 0, "single": 1, "ensemble": config.num_reward_models}
    length, n, labels = layout.length, layout.num_responses, layout.num_labels

    def array(dtype: Any, *shape: int) -> Any:
        sharding = runtime.sharding(BATCH)
        return jax.ShapeDtypeStruct((config.batch, *shape), dtype, sharding=sharding)

    sizes = [length] * 3 + [labels] * 3 + [n]
    inputs = Inputs._make(array(jnp.int32, size) for size in sizes)
    rewards = array(jnp.float32, 2, num_rewards[METHODS[config.method].rewards])
    return Batch(inputs, Targets(array(jnp.float32, n), rewards))


def compile_step(config: StepConfig, state: TrainState, batch: Batch) -> Any:
    """Compiles the very function that `align` runs.

    Args:
        config: The step.
        state: Shapes and shardings of the state.
        batch: Shapes and shardings of the batch.

    Returns:
        A `jax.stages.Compiled`.

    Raises:
        InputError: It does not compile for the topology, such as for want of memory.
    """
    try:
        lowered = policy_step.lower(config.method, config.optimizer, SCHEDULE, state, batch)
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(compiler_message(config, str(error))) from error


_SIZES = r"Used (\S+) of (\S+) hbm|temporaries \((\S+)\) exceeds available HBM \((\S+)\)"


def compiler_message(config: StepConfig, text: str) -> str:
    """A sentence about an error of the TPU compiler.

    Args:
        config: The step.
        text: What the compiler says.

    Returns:
        The memory that is needed and there, with advice, or the first line of `text`.
    """
    sizes = re.search(_SIZES, text)
    if "RESOURCE_EXHAUSTED" not in text or not sizes:
        first = text.splitlines()[0]
        return f"{config.model} on {config.topology}: the TPU compiler says: {first}"
    advice = "a smaller --batch, a --mesh with more fsdp or tensor, more chips"
    remat = "" if config.remat == "full" else "--remat full, "
    need = "a device needs {} of {} HBM".format(*filter(None, sizes.groups()))
    return f"{config.model} on {config.topology}: does not fit: {need}; try {remat}{advice}"
