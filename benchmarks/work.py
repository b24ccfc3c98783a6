"""Random batches for a training step, and the FLOPs that the step needs."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minipref.batch import Batch, Targets
from minipref.losses import Metrics
from minipref.methods import METHODS
from minipref.training import Hyperparameters, TrainState
from scale.data.layout import smallest_shape
from scale.data.packing import pack, tokenized_rows
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import ONE_DEVICE, Runtime
from scale.parallel.sharding import initialise
from scale.train.loop import TrainingConfig
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import start_state

OPTIMIZER, TRAINING = OptimizerConfig(), TrainingConfig()
SCHEDULE = TRAINING.schedule
BETA, GAMMA = 0.1, (1e-4, 1e-2)


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
    """Reward models whose rewards e-dpo, hull and mean read."""

    def row_length(self, num_responses: int) -> int:
        """Tokens of a row: its prompt and its responses."""
        return self.prompt + num_responses * self.response


def first_state(work: Work, runtime: Runtime = ONE_DEVICE) -> TrainState:
    """The state before the first step, with random weights."""
    model = initialise(partial(Transformer, work.model, runtime=runtime), jax.random.key(0))
    return start_state(model, OPTIMIZER, SCHEDULE, TRAINING.learning_rate, hyperparameters(BETA))


def hyperparameters(beta: float) -> Hyperparameters:
    """beta, with the KL weights of section 6.1."""
    return Hyperparameters(jnp.asarray(beta, jnp.float32), jnp.asarray(GAMMA, jnp.float32))


def random_batch(work: Work, num_responses: int, num_reward_models: int) -> Batch:
    """A batch without padding, one row in each sequence: random tokens and random rewards."""
    rng = np.random.default_rng(0)
    lengths = [work.prompt] + [work.response] * num_responses
    rows = [[random_tokens(rng, work, n) for n in lengths] for _ in range(work.batch)]
    tokens = tokenized_rows([(prompt, responses) for prompt, *responses in rows])
    inputs = pack(tokens, smallest_shape(tokens.lengths, work.batch))
    ref_logps = np.full((work.batch, num_responses), -300.0, np.float32)
    rewards = rng.normal(size=(work.batch, 2, num_reward_models)).astype(np.float32)
    return Batch(inputs, Targets(ref_logps, rewards))  # type: ignore[arg-type]  # NumPy arrays


def random_tokens(rng: np.random.Generator, work: Work, n: int) -> list[int]:
    return rng.integers(5, work.model.vocab_size, n).tolist()


def batch_for(method: str, work: Work) -> Batch:
    """A random batch with as many responses and rewards as the method reads."""
    counts = {"none": 0, "single": 1, "ensemble": work.num_reward_models}
    return random_batch(work, num_responses(method), counts[METHODS[method].rewards])


def num_responses(method: str) -> int:
    """The responses of a row: chosen, rejected, and a sample where the method has a KL term."""
    return 2 if METHODS[method].gamma is None else 3


def matmul_work(work: Work, num_responses: int) -> float:
    """The FLOPs of the matrix products of one step: forward, and twice as many backward.

    Attention counts all pairs of a row's positions. The unembedding counts at the labels alone.
    What a step computes twice counts once.
    """
    m, labels = work.model, num_responses * work.response
    positions = work.row_length(num_responses)
    layer = m.d_model * (2 * m.head_dim * (m.num_heads + m.num_kv_heads) + 3 * m.d_ff)
    attention = 2 * m.num_heads * m.head_dim * positions
    per_row = m.num_layers * positions * (layer + attention) + labels * m.d_model * m.vocab_size
    return 6.0 * work.batch * per_row


def repeated(step: Callable, state: TrainState, batch: Batch) -> Callable[[], Metrics]:
    """A function that takes the next step at each call."""
    latest = [state]

    def run() -> Metrics:
        latest[0], metrics = step(latest[0], batch)
        return metrics

    return run


def in_new_process(call: Callable, *arguments: Any) -> Any:
    """The result of a call in a process of its own, whose peak memory is that of the call alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()
