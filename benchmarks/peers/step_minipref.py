"""`python -m benchmarks.peers.step_minipref FOLDER`: DPO steps as `python -m scale.run align` makes them.

The shapes of the batches are those that `scale.train.batches` chooses for a run of `RUN` steps of such batches.
"""

# ruff: noqa: E402
from scale.memory import keep_freed_memory

keep_freed_memory()

import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.peers.work import BETA, LEARNING_RATE, Turns, Work, load
from scale.data.dataset import Dataset
from scale.data.packing import Tokens
from scale.io.model_folder import load_policy
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.align import align_step
from scale.train.batches import COMPILATION, Schedule, shapes_for
from scale.train.loop import TrainingConfig, hyper
from scale.train.optimizer import OptimizerConfig, start_state

RUN = 1000


def schedule(work: Work, model: Transformer) -> Schedule:
    """`scale.train.batches.schedule` on the rows in their order; that one draws the order."""
    n, tokens = len(work.ends), Tokens(work.ids, work.ends)
    data = Dataset(tokens, work.ref_logps, np.zeros((n, 2, 0), np.float32), np.arange(n))
    rows = np.arange(n).reshape(-1, work.batch)
    shapes = shapes_for(tokens.lengths[rows], model, COMPILATION * work.steps / RUN)
    return Schedule(data, rows, shapes, model.runtime)


def main(folder: Path) -> None:
    turns, work, optimizer_config = Turns(jax.devices()[0].device_kind), load(folder), OptimizerConfig()
    policy = load_policy(folder / "model", make_runtime(RuntimeConfig(dtype=work.dtype))).model  # type: ignore[arg-type]
    batches = schedule(work, policy)
    constant = TrainingConfig(RUN, work.batch, LEARNING_RATE, warmup=0, end_lr_ratio=1.0)
    state = start_state(policy, optimizer_config, hyper(constant, BETA))
    del policy
    while turns.asked():
        losses = []
        for i in range(work.steps):
            state, metrics = align_step("dpo", optimizer_config, state, batches.batch(i))
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        stats = jax.devices()[0].memory_stats() or {}
        turns.done(losses, stats.get("peak_bytes_in_use", 0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
