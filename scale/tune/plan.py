"""What `tune` prints before it starts: the rows, the stages, and about what they cost.

Times are rough: the work of a stage, counted in products with weights, over a measured or known
speed. They leave out compilation, and are meant to tell minutes from hours.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from scale.console import console
from scale.model.flops import model_flops
from scale.parallel.chips import peak_flops
from scale.stages.align import Align
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.export import Export
from scale.stages.reward import SIDE_BY_SIDE, STATE_BYTES, Reward
from scale.stages.score import Score
from scale.tune.command_line import command_line
from scale.tune.pipeline import HELD_OUT_ROWS, PURPOSES
from scale.tune.survey import Survey

TRAINS, READS, SAMPLES = 0.45, 0.45, 0.2
"""Shares of the speed of a large product at which a model trains, reads and samples: those of
SmolLM2-135M on a CPU (`benchmarks/results/peers.md`)."""
FORWARD = 1 / 3  # of the FLOPs of a training step
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Cost:
    """What a stage costs, about: products with weights, in FLOPs, and memory."""

    trained: float = 0.0
    read: float = 0.0
    sampled: float = 0.0
    bytes: float = 0.0

    @property
    def seconds(self) -> float:
        work = self.trained / TRAINS + self.read / READS + self.sampled / SAMPLES
        return work / speed()


@cache
def speed() -> float:
    """FLOP/s of a large float32 product on all devices: the known peak, or measured here."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak:
        return peak * jax.device_count()
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

    def flops(self, lengths: np.ndarray) -> float:
        """Of training on rows whose parts have these lengths [N, parts], without recomputation."""
        tokens = lengths.sum(1)
        labels = lengths[:, 1:].sum(1).mean()
        survey = self.survey
        each = model_flops(survey.config, survey.parameters, tokens.mean(), max(labels, 1.0))
        return float(tokens.sum() * each)

    def drawn(self, prompts: int) -> float:
        """Of drawing a sample at so many prompts."""
        return 2.0 * self.survey.parameters * prompts * self.survey.limits.response

    def activations(self, lengths: np.ndarray, batch_size: int) -> float:
        """Bytes that a step keeps for its gradient, where products with weights are kept: twice,
        since the gradient of scanned layers copies them."""
        config = self.survey.config
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        kept = config.num_layers * (heads + 3 * config.d_model + 2 * config.d_ff)
        return 2 * FLOAT * kept * lengths.sum(1).mean() * batch_size

    @property
    def weights(self) -> float:
        return FLOAT * float(self.survey.parameters)


def reward_cost(stage: Reward, work: Work) -> Cost:
    lengths, several = work.survey.kept[stage.data.stem], stage.num_reward_models
    pairs = stage.training.steps * stage.training.batch_size
    state = STATE_BYTES * work.survey.parameters
    at_once = several if several * state <= SIDE_BY_SIDE else 1
    return Cost(
        trained=work.flops(lengths) * pairs / len(lengths) * several,
        read=FORWARD * work.flops(work.survey.kept["test"]) * several,
        bytes=work.weights
        + at_once * (state + work.activations(lengths, stage.training.batch_size)),
    )


def score_cost(stage: Score, work: Work) -> Cost:
    lengths = work.survey.kept[stage.data.stem][: stage.rows]
    models = 1 + (work.reward_models if stage.rewards else 0)
    return Cost(
        read=FORWARD * work.flops(lengths) * models,
        sampled=work.drawn(len(lengths)) if stage.reads_samples else 0.0,
        bytes=models * work.weights,
    )


def align_cost(stage: Align, work: Work) -> Cost:
    lengths, held_out = work.survey.kept["train"], work.survey.kept["test"][:HELD_OUT_ROWS]
    training, looks = stage.training, 1 + stage.training.steps // stage.every
    if stage.row.gamma is not None:
        lengths = np.pad(lengths, ((0, 0), (0, 1)), constant_values=stage.limits.response)
    state = STATE_BYTES * work.survey.parameters + work.weights
    return Cost(
        trained=work.flops(lengths) * training.steps * training.batch_size / len(lengths),
        read=FORWARD * work.flops(held_out) * looks,
        bytes=state + work.activations(lengths, training.batch_size),
    )


def evaluate_cost(stage: Evaluate, work: Work) -> Cost:
    lengths = work.survey.kept["test"]
    return Cost(
        read=4 * FORWARD * work.flops(lengths[:, :2]),
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
    for line in rows_text(survey, refused):
        console.print(f"  {line}", markup=False)
    table = Table("stage", "about", "memory", title="the plan", title_justify="left")
    for name, cost in zip(stages, costs, strict=True):
        table.add_row(PURPOSES[name], duration(cost.seconds), f"{cost.bytes / 2**30:.1f} GiB")
    table.add_section()
    total, most = sum(cost.seconds for cost in costs), max(cost.bytes for cost in costs)
    table.add_row("in all, without compilation", duration(total), f"{most / 2**30:.1f} GiB")
    console.print(table)
    for stage in stages.values():
        console.print(f"  {command_line(stage)}", markup=False, style="dim")


def rows_text(survey: Survey, refused: list[str]) -> list[str]:
    """How many rows are used for what, and why the others are not."""
    parts = ", ".join(f"{len(lengths)} {name}" for name, lengths in survey.kept.items())
    reasons = survey.dropped | {"that cannot be read": len(refused)}
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    tokens = sum(int(lengths.sum()) for lengths in survey.kept.values())
    limits = survey.limits
    return [
        f"{survey.rows} rows: {parts}" + f"; not used: {dropped}" * bool(dropped),
        f"{tokens:,} tokens, within {limits.prompt} of a prompt ({survey.cut} prompts are cut on "
        f"the left) and {limits.response} of a response",
    ]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to two digits."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
