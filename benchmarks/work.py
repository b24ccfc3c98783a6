"""Made-up work for a training step, the arithmetic that it needs, and processes to measure it in."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from minipref.batch import Batch
from minipref.methods import METHODS
from minipref.training import Metrics, TrainState
from scale.data.dataset import pack
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import ONE_DEVICE, Runtime
from scale.parallel.sharding import initialise
from scale.train.loop import TrainingConfig, hyper
from scale.train.optimizer import OptimizerConfig, start_state

FIELDS = ["chosen", "rejected", "ref_sample"]
RECIPE = OptimizerConfig()


@dataclass(frozen=True)
class Work:
    """The work of one step."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(8192, 6, 384, 6, 64, 1536))
    """Shape of the decoder."""
    batch: int = 8
    """Rows of a step."""
    prompt: int = 96
    """Tokens of each prompt."""
    response: int = 48
    """Tokens of each response."""
    num_reward_models: int = 5
    """Rewards that e-dpo, hull and mean are given as columns."""


def first_state(work: Work, runtime: Runtime = ONE_DEVICE) -> TrainState:
    model = initialise(partial(Transformer, work.model, runtime=runtime), jax.random.key(0))
    return start_state(model, RECIPE, hyper(TrainingConfig(), 0.1, (1e-4, 1e-2)))


def rows(work: Work, responses: int, num_reward_models: int) -> Batch:
    """Made-up rows without padding: random tokens, reference log-probs and scores."""
    rng = np.random.default_rng(0)
    pieces = [(tokens(rng, work, work.prompt), [tokens(rng, work, work.response) for _ in range(responses)])
              for _ in range(work.batch)]
    columns = [{"ref_chosen_logps": -300.0, "ref_rejected_logps": -300.0, "ref_sample_logps": -300.0,
                "score_chosen": rng.normal(size=num_reward_models).tolist(), "score_rejected": rng.normal(size=num_reward_models).tolist()}
               for _ in range(work.batch)]
    return pack(pieces, columns, FIELDS[:responses])


def tokens(rng: np.random.Generator, work: Work, n: int) -> list[int]:
    return rng.integers(5, work.model.vocab_size, n).tolist()


def rows_of(method: str, work: Work) -> Batch:
    """As many responses and rewards as the method reads."""
    num_reward_models = {"none": 0, "single": 1, "ensemble": work.num_reward_models}[METHODS[method].rewards]
    return rows(work, responses_of(method), num_reward_models)


def responses_of(method: str) -> int:
    return 3 if max(METHODS[method].gamma) else 2


def matmul_work(work: Work, responses: int) -> float:
    """FLOPs of one step's matrix products: forward, and twice that backward; attention over the slots that exist, all
    pairs of them; the vocabulary at the labels alone. What is computed again does not count."""
    m, labels = work.model, responses * work.response
    slots = work.prompt + labels
    layer = m.d_model * (2 * m.head_dim * (m.num_heads + m.num_kv_heads) + 3 * m.d_ff)
    attention = 2 * m.num_heads * m.head_dim * slots
    per_row = m.num_layers * slots * (layer + attention) + labels * m.d_model * m.vocab_size
    return 6.0 * work.batch * per_row


def repeated(step: Callable, state: TrainState, batch: Batch) -> Callable[[], Metrics]:
    """Steps that go on one from the other."""
    latest = [state]

    def run() -> Metrics:
        latest[0], metrics = step(latest[0], batch)
        return metrics

    return run


def alone(call: Callable, *arguments: Any) -> Any:
    """What a call gives in a new process, whose peak memory is the call's own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()
