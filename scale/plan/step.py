"""The step of a stage, compiled for TPUs that are not there."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from minipref.batch import Batch, Inputs, Targets
from minipref.reward_models import RewardModel, stack
from minipref.training import Hyperparameters, TrainState
from scale.data.layout import round_up
from scale.errors import InputError
from scale.model.adapters import adapted, matrices, partition, stored, trunk_of
from scale.model.inference import ROWS, jitted_logps
from scale.model.sampling import sample
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.mesh import BATCH, Runtime, make_runtime
from scale.parallel.sharding import abstract_sharded
from scale.plan.options import TRAINED, PlanOptions
from scale.plan.topology import meshes, topology_devices
from scale.stages.reward import STATE_BYTES, side_by_side
from scale.stages.sample import Sample
from scale.train.loop import TrainingConfig
from scale.train.steps import policy_step, reward_step, sft_step, start_reward_states, start_state

SCHEDULE = TrainingConfig().schedule


class Placed(NamedTuple):
    """A model on a mesh: shapes and shardings, no arrays.

    Attributes:
        runtime: The mesh.
        state: The state of step 0; of a stage that trains nothing, None.
        frozen: What is not trained of the model, if there is something.
        parameters: The number of parameters of one model, adapters left out.
        multiplied: Those of its matrices: norms and biases multiply no matrix.
        adapters: Those of its adapters; None without.
        members: Reward models that are trained side by side; 1 of other stages.
    """

    runtime: Runtime
    state: Any
    frozen: Any
    parameters: int
    multiplied: int
    adapters: int | None
    members: int

    @property
    def shards(self) -> int:
        """Among how many devices the rows of a step are split."""
        return self.runtime.batch_shards


def place(options: PlanOptions) -> Placed:
    """The model on the given mesh, or on the first one that divides it.

    Raises:
        InputError: No mesh divides the model.
    """
    faults = []
    for runtime in runtimes(options):
        try:
            return on_mesh(options, runtime)
        except InputError as error:
            faults.append(str(error))
    raise InputError(faults[-1])


def runtimes(options: PlanOptions) -> Iterator[Runtime]:
    """The mesh that is asked for, or those that are worth a trial."""
    devices, given = topology_devices(options.topology, options.slices), options.runtime
    if (given.data, given.fsdp, given.tensor) != (1, 0, 1):
        yield make_runtime(given, devices)
        return
    for data, fsdp, tensor in meshes(options.topology, options.slices):
        mesh = replace(given, data=data, fsdp=fsdp, tensor=tensor)
        yield make_runtime(mesh, devices)


def on_mesh(options: PlanOptions, runtime: Runtime) -> Placed:
    """The model on one mesh.

    Raises:
        InputError: The mesh does not divide it.
    """
    model, reads = options.config, options.stage not in TRAINED
    is_reward = options.stage == "reward"

    def trunk() -> Transformer:
        policy = Transformer(model, jax.random.key(0), runtime)
        return stored(policy, runtime.dtype) if reads or options.adapter.rank else policy

    def parts() -> tuple[Any, Any]:
        policy = adapted(trunk(), options.adapter, jax.random.key(0))
        whole = RewardModel(policy, model.d_model, jax.random.key(0)) if is_reward else policy
        return partition(whole)

    like = eqx.filter_eval_shape(trunk)
    parameters, multiplied = parameter_count(like), sum(m.size for m in matrices(like))
    if reads:
        whole = abstract_sharded(like, runtime)
        return Placed(runtime, None, whole, parameters, multiplied, None, 1)
    trained, frozen = eqx.filter_eval_shape(parts)
    adapters = parameter_count(trunk_of(trained)) if options.adapter.rank else None
    members = members_at_once(options, parameters, runtime) if is_reward else 1
    start = partial(start_of_stage, options, members)
    state = abstract_sharded(eqx.filter_eval_shape(lambda: start(parts()[0])), runtime)
    frozen = None if frozen is None else abstract_sharded(frozen, runtime)
    return Placed(runtime, state, frozen, parameters, multiplied, adapters, members)


def start_of_stage(options: PlanOptions, members: int, trained: Any) -> TrainState:
    """The state of step 0 of a stage that trains `trained`."""
    if options.stage == "reward":
        return start_reward_states(stack([trained] * members), SCHEDULE, 0.0)
    zero = Hyperparameters(jnp.zeros(()), jnp.zeros(2))
    given = zero if options.stage == "align" else None
    return start_state(trained, options.optimizer, SCHEDULE, 0.0, given)


def members_at_once(options: PlanOptions, parameters: int, runtime: Runtime) -> int:
    """How many reward models `reward` trains at once."""
    several, bytes_of_one = options.num_reward_models, STATE_BYTES * parameters / runtime.devices
    return several if side_by_side(several, bytes_of_one, options.adapter) else 1


def smallest_batch(options: PlanOptions, placed: Placed) -> int:
    """The fewest rows of a step; of stages that train nothing, those that they read at a time."""
    rows = {"score": ROWS, "sample": ROWS * 4 // Sample.n}.get(options.stage, 1)
    shards = placed.shards * options.accumulation
    return round_up(rows, shards)


def inputs_of(options: PlanOptions, runtime: Runtime, *rows: int) -> Inputs:
    """Shapes and shardings of packed rows [*rows, length]; the last axis of `rows` is split."""
    layout = options.layout
    sizes = [layout.length] * 3 + [layout.num_labels] * 3 + [layout.num_responses]
    axes = [None] * (len(rows) - 1) + [BATCH]
    sharding = runtime.sharding(*axes)  # type: ignore[arg-type]
    arrays = (jax.ShapeDtypeStruct((*rows, n), jnp.int32, sharding=sharding) for n in sizes)
    return Inputs(*arrays)  # type: ignore[arg-type]


def batch_of(options: PlanOptions, placed: Placed, rows: int) -> Batch:
    """Shapes and shardings of the batch of a step, in parts where it is accumulated."""
    runtime, parts = placed.runtime, options.accumulation
    several = (placed.members,) if options.stage == "reward" else ()
    lead = (*several, parts) if parts > 1 else several
    inputs = inputs_of(options, runtime, *lead, rows // parts)

    def target(*shape: int) -> Any:
        sharding = runtime.sharding(*[None] * len(several), BATCH)
        return jax.ShapeDtypeStruct((*several, rows, *shape), jnp.float32, sharding=sharding)

    rewards = options.distilled if options.stage == "align" else 0
    columns = options.layout.num_responses if options.stage == "align" else 0
    return Batch(inputs, Targets(target(columns), target(2, rewards)))


def lowered(options: PlanOptions, placed: Placed, rows: int) -> Any:
    """The step of a stage, not yet compiled."""
    runtime, state, frozen = placed.runtime, placed.state, placed.frozen
    match options.stage:
        case "align":
            batch = batch_of(options, placed, rows)
            step = (options.method, options.optimizer, SCHEDULE)
            return policy_step.lower(*step, state, batch, frozen=frozen)
        case "sft":
            batch = batch_of(options, placed, rows)
            return sft_step.lower(options.optimizer, SCHEDULE, state, batch, frozen=frozen)
        case "reward":
            batch = batch_of(options, placed, rows)
            return reward_step.lower(SCHEDULE, state, batch, frozen=frozen)
        case "score":
            reads = jax.jit(lambda model, inputs: jitted_logps(model, inputs))
            return reads.lower(frozen, inputs_of(options, runtime, rows))
        case "sample":
            return lowered_sampling(options, placed, rows)


def lowered_sampling(options: PlanOptions, placed: Placed, rows: int) -> Any:
    """Sampling at so many prompts."""
    max_new = options.limits.response

    @jax.jit
    def draw(model: Transformer, prompts: Inputs) -> Any:
        return sample(
            model, prompts, jax.random.key(0), n=Sample.n, max_new=max_new, stops=(1,), pad=0
        )

    return draw.lower(placed.frozen, prompts_of(options.limits.prompt, placed.runtime, rows))


def prompts_of(length: int, runtime: Runtime, rows: int) -> Inputs:
    """Shapes and shardings of so many prompts of `length` tokens, end to end."""
    sequences = runtime.batch_shards
    tokens = (sequences, rows // sequences * length)
    shapes = [tokens] * 2 + [(rows, length)] + [(sequences, 0)] * 3 + [(rows, 0)]
    sharding = runtime.sharding(BATCH)
    arrays = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in shapes)
    return Inputs(*arrays)  # type: ignore[arg-type]


def compile_step(options: PlanOptions, placed: Placed, rows: int) -> Any:
    """Compile the very function that the stage runs.

    Returns:
        A `jax.stages.Compiled`.

    Raises:
        InputError: It does not compile for the topology, such as for want of memory.
    """
    try:
        return lowered(options, placed, rows).compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(compiler_message(options, str(error))) from error


_SIZES = r"Used (\S+) of (\S+) hbm|temporaries \((\S+)\) exceeds available HBM \((\S+)\)"


def compiler_message(options: PlanOptions, text: str) -> str:
    """A sentence about an error of the TPU compiler: the memory that is needed and there, with
    advice, or the first line of `text`."""
    sizes = re.search(_SIZES, text)
    place = f"{options.model} on {options.topology}"
    if "RESOURCE_EXHAUSTED" not in text or not sizes:
        return f"{place}: the TPU compiler says: {text.splitlines()[0]}"
    needed, there = filter(None, sizes.groups())
    return f"{place}: does not fit: a device needs {needed} of {there} HBM; {advice(options)}"


def advice(options: PlanOptions) -> str:
    """What needs less memory."""
    trained = options.stage in TRAINED
    remedies = {
        "--runtime.remat full": trained and options.runtime.remat != "full",
        "--runtime.dtype bfloat16": options.runtime.dtype != "bfloat16",
        "--accumulation": trained,
        "--adapter.rank": trained and not options.adapter.rank,
        "a smaller --batch": True,
        "more --runtime.fsdp or --runtime.tensor": True,
        "more chips": True,
    }
    return "try " + ", ".join(name for name, helps in remedies.items() if helps)
