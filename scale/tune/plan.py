"""What `tune` prints before it starts: the rows, the stages, and about what they cost.

Times are rough: the work of a stage, counted in products with weights, over a measured or known
speed. They leave out compilation, and are meant to tell minutes from hours.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from scale.console import console
from scale.health import warn
from scale.model.adapters import AdapterConfig, adapted, partition
from scale.model.flops import model_flops
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.chips import peak_flops
from scale.parallel.mesh import RuntimeConfig
from scale.stages.align import Align
from scale.stages.command_line import command_line
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.export import Export
from scale.stages.reward import STATE_BYTES, Reward, side_by_side
from scale.stages.score import Score
from scale.train.loop import TrainingConfig
from scale.tune.pipeline import PURPOSES
from scale.tune.survey import HELD_OUT_ROWS, Survey

PROCESS = 2**30  # bytes of the interpreter, its programs, and freed memory that it keeps
FULLEST = 0.9  # share of the memory from which on the plan warns
TRAINS, READS, SAMPLES = 0.45, 0.45, 0.2
"""Shares of the speed of a large product at which a model trains, reads and samples: those of
SmolLM2-135M on a CPU (`benchmarks/results/peers.md`)."""
FORWARD = 1 / 3  # of the FLOPs of a training step
FLOAT = 4  # bytes
BYTES = {"float32": 4, "bfloat16": 2}


SMALLER = (
    "shorter --limits, --accumulation, --runtime.remat full, --runtime.dtype bfloat16, or a "
    "smaller --batch-size"
)


@dataclass(frozen=True)
class Cost:
    """What a stage costs, about: products with weights, in FLOPs, and memory."""

    trained: float = 0.0
    read: float = 0.0
    sampled: float = 0.0
    bytes: float = 0.0

    def seconds(self, dtype: str) -> float:
        work = self.trained / TRAINS + self.read / READS + self.sampled / SAMPLES
        return work / speed(dtype)


@cache
def speed(dtype: str) -> float:
    """FLOP/s of a large product on all devices: the known peak, or for float32 measured here."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak:
        return peak * jax.device_count() * BYTES["bfloat16"] / BYTES[dtype]
    product: Callable[..., Any] = jax.jit(jnp.matmul)
    size = 1024
    matrix = jnp.ones((size, size))
    seconds = []
    for _ in range(4):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


@dataclass(frozen=True)
class Work:
    """The work of reading and writing rows of a survey's lengths with its model."""

    survey: Survey
    reward_models: int
    """Those that score the pairs."""
    adapter: AdapterConfig
    dtype: str
    """Of activations."""

    @cached_property
    def trained_parameters(self) -> int:
        """Those of the adapters, or all."""

        def trained() -> Any:
            model = Transformer(self.survey.config, jax.random.key(0))
            return partition(adapted(model, self.adapter, jax.random.key(0)))[0]

        return parameter_count(eqx.filter_eval_shape(trained))

    @property
    def state(self) -> float:
        """Bytes of what a training step changes, and of its gradient."""
        return STATE_BYTES * float(self.trained_parameters)

    @property
    def trunk(self) -> float:
        """Bytes of the weights that a model to be trained is made of, beside its state."""
        return self.weights if self.adapter.rank else FLOAT * float(self.survey.parameters)

    @property
    def weights(self) -> float:
        """Bytes of a model that is only read."""
        return BYTES[self.dtype] * float(self.survey.parameters)

    def training(self, lengths: np.ndarray) -> float:
        """FLOPs of training on rows whose parts have these lengths [N, parts]."""
        return self.flops(lengths, self.trained_parameters if self.adapter.rank else None)

    def reading(self, lengths: np.ndarray) -> float:
        """FLOPs of a forward pass over rows."""
        return FORWARD * self.flops(lengths, None)

    def flops(self, lengths: np.ndarray, adapters: int | None) -> float:
        """Those of the model's own, without recomputation."""
        tokens = lengths.sum(1)
        labels = lengths[:, 1:].sum(1).mean()
        survey = self.survey
        mean, own = tokens.mean(), survey.parameters
        each = model_flops(survey.config, own, mean, max(labels, 1.0), adapters)
        return float(tokens.sum() * each)

    def drawn(self, prompts: int) -> float:
        """Of drawing a sample at so many prompts."""
        return 2.0 * self.survey.parameters * prompts * self.survey.limits.response

    def activations(
        self, lengths: np.ndarray, training: TrainingConfig, runtime: RuntimeConfig
    ) -> float:
        """Bytes that a part of a batch keeps for its gradient: of each layer the products with
        weights, or its input alone; twice, since the gradient of scanned layers copies them."""
        config, rows = self.survey.config, training.batch_size / training.accumulation
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        products = heads + 3 * config.d_model + 2 * config.d_ff
        kept = config.num_layers * (config.d_model if runtime.remat == "full" else products)
        return 2 * BYTES[runtime.dtype] * kept * lengths.sum(1).mean() * rows


def reward_cost(stage: Reward, work: Work) -> Cost:
    lengths, several = work.survey.kept[stage.data.stem], stage.num_reward_models
    held_out = stage.validation.stem if stage.validation else "test"
    pairs = stage.training.steps * stage.training.batch_size
    at_once = several if side_by_side(several, work.state, work.adapter) else 1
    return Cost(
        trained=work.training(lengths) * pairs / len(lengths) * several,
        read=work.reading(work.survey.kept[held_out]) * several,
        bytes=work.trunk + at_once * work.state
        + work.activations(lengths, stage.training, stage.runtime),
    )  # fmt: skip


def score_cost(stage: Score, work: Work) -> Cost:
    lengths = work.survey.kept[stage.data.stem][: stage.rows]
    models = 1 + (work.reward_models if stage.rewards else 0)
    return Cost(
        read=work.reading(lengths) * models,
        sampled=work.drawn(len(lengths)) if stage.reads_samples else 0.0,
        bytes=models * work.weights,
    )


def align_cost(stage: Align, work: Work) -> Cost:
    lengths, held_out = work.survey.kept["train"], work.survey.kept["test"][:HELD_OUT_ROWS]
    training, looks = stage.training, 1 + stage.training.steps // stage.every
    if stage.row.gamma is not None:
        lengths = np.pad(lengths, ((0, 0), (0, 1)), constant_values=stage.limits.response)
    return Cost(
        trained=work.training(lengths) * training.steps * training.batch_size / len(lengths),
        read=work.reading(held_out) * looks,
        bytes=work.trunk + work.state + work.activations(lengths, training, stage.runtime),
    )


def evaluate_cost(stage: Evaluate, work: Work) -> Cost:
    lengths = work.survey.kept["test"]
    return Cost(
        read=4 * work.reading(lengths[:, :2]),
        sampled=2 * work.drawn(len(lengths)),
        bytes=3 * work.weights,
    )


COSTS: dict[type, Callable[[Any, Work], Cost]] = {
    Corpus: lambda stage, work: Cost(),
    Reward: reward_cost,
    Score: score_cost,
    Align: align_cost,
    Evaluate: evaluate_cost,
    Export: lambda stage, work: Cost(bytes=2 * work.weights),
}


def print_plan(stages: dict[str, Any], work: Work, refused: list[str]) -> None:
    """Print the rows, and each stage with its cost and its command."""
    survey, costs = work.survey, [COSTS[type(stage)](stage, work) for stage in stages.values()]
    dtype, memory = stages["policy"].runtime.dtype, device_memory()
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    machine = f"{devices}, {dtype}, {gib(memory)} of memory"
    for line in (machine, *rows_text(survey, refused)):
        console.print(f"  {line}", markup=False)
    table = Table("stage", "about", "memory", title="the plan", title_justify="left")
    for name, cost in zip(stages, costs, strict=True):
        table.add_row(PURPOSES[name], duration(cost.seconds(dtype)), gib(cost.bytes + PROCESS))
    table.add_section()
    total = sum(cost.seconds(dtype) for cost in costs)
    most = max(cost.bytes for cost in costs) + PROCESS
    table.add_row("in all, without compilation", duration(total), gib(most))
    console.print(table)
    if most > FULLEST * memory:
        warn([f"{gib(most)} may be more than there is: {SMALLER}"])
    for stage in stages.values():
        console.print(f"  {command_line(stage)}", markup=False, style="dim")


def device_memory() -> float:
    """Bytes of all devices; on a CPU, of the machine."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = sum(each.get("bytes_limit", 0) for each in stats) * jax.process_count()
    return float(limits or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def rows_text(survey: Survey, refused: Sequence[str]) -> list[str]:
    """How many rows are used for what, and why the others are not."""
    limits, prompts = survey.limits, f"all prompts are within {survey.limits.prompt} tokens"
    if survey.cut:
        prompts = (
            f"of {survey.cut} prompts only the last {limits.prompt} tokens are kept, without what "
            "opens the conversation"
        )
    parts = ", ".join(f"{len(lengths)} {name}" for name, lengths in survey.kept.items())
    reasons = survey.dropped | {"that cannot be read": len(refused)}
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    tokens = sum(int(lengths.sum()) for lengths in survey.kept.values())
    return [
        f"{survey.rows} rows: {parts}" + f"; not used: {dropped}" * bool(dropped),
        prompts,
        f"{tokens:,} tokens in all",
    ]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
