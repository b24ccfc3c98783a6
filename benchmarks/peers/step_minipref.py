"""`python -m benchmarks.peers.step_minipref FOLDER`: the DPO steps of `python -m scale.run align`.

The batches have the shapes that `scale.train.batches` chooses for a run of `RUN_STEPS` steps of
such batches.
"""

# ruff: noqa: E402
from scale.memory import keep_freed_memory

keep_freed_memory()

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.work import BETA, LEARNING_RATE, Turns, Work, load
from minipref.batch import Targets
from minipref.training import Hyperparameters
from scale.data.dataset import Dataset
from scale.data.packing import TokenizedRows
from scale.io.model_folder import load_policy
from scale.model.batch_shapes import COMPILE_SECONDS, choose_shapes
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.train.batches import BatchPlan
from scale.train.loop import TrainingConfig
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import policy_step, start_state

RUN_STEPS = 1000


def plan(work: Work, model: Transformer) -> BatchPlan:
    """The rows in their order, which `scale.train.batches.plan_batches` would draw instead."""
    n, tokens = len(work.ends), TokenizedRows(work.ids, work.ends)
    rewards = np.zeros((n, 2, 0), np.float32)
    targets = Targets(work.ref_logps, rewards)  # type: ignore[arg-type]  # NumPy arrays
    dataset = Dataset(tokens, targets, np.arange(n))
    rows = np.arange(n).reshape(-1, work.batch)
    compile_seconds = COMPILE_SECONDS * work.steps / RUN_STEPS
    shapes = choose_shapes(tokens.lengths[rows], model, compile_seconds)
    return BatchPlan(dataset, rows, shapes, model.runtime)


def main(folder: Path) -> None:
    """Take turns until there are no more."""
    turns, work, config = Turns(jax.devices()[0].device_kind), load(folder), OptimizerConfig()
    runtime = make_runtime(RuntimeConfig(dtype=work.dtype))  # type: ignore[arg-type]
    policy = load_policy(folder / "model", runtime).model
    batches = plan(work, policy)
    constant = TrainingConfig(RUN_STEPS, work.batch, LEARNING_RATE, warmup=0, end_lr_ratio=1.0)
    schedule = constant.schedule
    hyperparameters = Hyperparameters(jnp.asarray(BETA, jnp.float32), jnp.zeros(2, jnp.float32))
    state = start_state(policy, config, schedule, LEARNING_RATE, hyperparameters)
    del policy
    while turns.wait():
        losses = []
        for i in range(work.steps):
            state, metrics = policy_step("dpo", config, schedule, state, batches.batch(i))
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        stats = jax.devices()[0].memory_stats() or {}
        turns.report(losses, stats.get("peak_bytes_in_use", 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
