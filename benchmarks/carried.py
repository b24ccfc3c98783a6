"""`python -m benchmarks.carried --run runs/paper`: Eq. 11's minimum over the whole expectation.

Footnote 5 takes the minimum over reward models on every minibatch, and so do `e-dpo` and `hull`.
Eq. 11 itself has the minimum outside the expectation. Taken so,
- e-dpo is the best, by training loss, of K runs of dp-dpo, one on each reward model;
- hull carries simplex weights (a softmax of trained logits) in the training state, and minimises
  over them along with the policy.

The command reads the first seed of a complete miniature. It trains these two beside the miniature's
own e-dpo and hull, with the same hyperparameters, and prints the advantage over pi_ref, by the
village's true reward, on the validation prompts.
Those prompts chose the hyperparameters for the minibatch versions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from benchmarks.machine import describe
from minipref.batch import Batch
from minipref.losses import Metrics
from minipref.methods import ANNEALED, gamma_at
from minipref.objectives import (
    Loss,
    distillation,
    log_ratio_margin,
    pessimistic,
    sampled_forward_kl,
)
from minipref.training import Hyperparameters, TrainState, init_state, train_step
from scale.console import console
from scale.data.dataset import batch_indices, take
from scale.data.rows import provenance, read, write
from scale.io import model_folder
from scale.model.response_logps import response_logps
from scale.model.transformer import Transformer
from scale.paper.pipeline import PRESETS
from scale.paper.repetition import Repetition
from scale.stages.align import MONITORED, Align, MethodName
from scale.stages.stage import execute
from scale.train.loop import train
from scale.train.metrics import records
from scale.train.optimizer import Schedule, make_optimizer

SPEED = 30.0
"""How much faster than a weight of the policy a logit moves: 120 steps of Adam with a learning rate
of 3e-3 must cross the simplex."""


class Carried(eqx.Module):
    """A policy, and the logits of the weights of K reward models."""

    policy: Transformer
    logits: Float[Array, " K"]

    @property
    def weights(self) -> Float[Array, " K"]:
        return jax.nn.softmax(SPEED * self.logits)


def mixture_loss(
    model: Carried, batch: Batch, hyperparameters: Hyperparameters, progress: ArrayLike
) -> tuple[Loss, Metrics]:
    """Eq. 11 with a mixture of the rewards in place of the nearest of them."""
    logps, ref = response_logps(model.policy, batch.inputs).logps, batch.targets.ref_logps
    margins = jax.vmap(log_ratio_margin)(logps[:, 0], logps[:, 1], ref[:, 0], ref[:, 1])
    rewards, (beta, gamma) = batch.targets.rewards, hyperparameters
    reward_margins = (rewards[:, 0] - rewards[:, 1]) @ model.weights
    pair_loss = jax.vmap(distillation, (0, 0, None))(margins, reward_margins, beta).mean()
    kl = jax.vmap(sampled_forward_kl)(ref[:, 2], logps[:, 2]).mean()
    loss = pessimistic(pair_loss, kl, gamma_at((gamma[0], gamma[1]), progress))
    return loss, {"ensemble/weights": model.weights}


@partial(jax.jit, static_argnums=0)
def mixture_step(schedule: Schedule, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One step of the policy and of the logits."""
    return train_step(mixture_loss, make_optimizer("adam", schedule), state, batch)


def carried_hull(stage: Align, out: Path) -> Path:
    """Train hull with carried weights; the folder of the policy."""
    policy, training = model_folder.load_policy(stage.policy), stage.training
    batch = stage.dataset(policy, stage.data, read(stage.data), MONITORED).all
    start = Carried(policy.model, jnp.zeros(batch.targets.rewards.shape[2]))
    beta, gamma = (jnp.asarray(x, jnp.float32) for x in (stage.beta_value, ANNEALED))
    optimizer = make_optimizer("adam", training.schedule, training.learning_rate)
    state = init_state(start, optimizer, training.steps, Hyperparameters(beta, gamma))
    num_rows = len(batch.targets.rewards)
    indices = partial(batch_indices, num_rows, training.batch_size, training.seed)
    trained = train(
        partial(mixture_step, training.schedule),
        state,
        lambda step: take(batch, indices(step)),
        training.steps,
        out,
        "carried",
    )
    model_folder.save(replace(policy, path=out, model=trained.policy))
    weights = np.round(np.asarray(trained.weights, float), 2).tolist()
    console.print("  final weights:", weights)
    return out


def best_model(stage: Align, out: Path) -> Path:
    """Train dp-dpo on each reward model; the folder with the lowest loss over its last quarter."""
    rows, runs = read(stage.data), []
    for k in range(len(rows[0]["score_chosen"])):
        one = [row | {s: row[s][k] for s in ("score_chosen", "score_rejected")} for row in rows]
        data = out / f"{k}.parquet"
        write(data, one, provenance(stage.data))
        run = replace(stage, out=out / str(k), data=data, method="dp-dpo", validation=None)
        execute(run)
        runs.append(run)
    losses = np.array([list(records(r.out / "metrics.jsonl", "loss").values()) for r in runs])
    last = losses[:, -stage.training.steps // 4 :].mean(1)
    best = int(np.argmin(last))
    console.print(f"  losses {np.round(last, 4).tolist()}: model {best}")
    return runs[best].out


@dataclass(frozen=True)
class Options:
    """Where the runs are."""

    run: Path = Path("runs/paper")
    """Folder of a complete miniature."""
    out: Path = Path("runs/carried")
    """Folder for the policies trained here."""


WHOLE: tuple[tuple[MethodName, Callable[[Align, Path], Path]], ...] = (
    ("e-dpo", best_model),
    ("hull", carried_hull),
)


def policies(repetition: Repetition, rho: float, out: Path) -> dict[str, Path]:
    """Name and folder of the four policies of one rho."""
    paths: dict[str, Path] = {}
    for method, train_whole in WHOLE:
        [policy] = repetition.policies(rho, method)
        stage = replace(repetition.alignment(policy), snapshots=0)
        paths[f"{method}, each minibatch"] = policy.path
        paths[f"{method}, whole"] = train_whole(stage, out / f"{method}-{rho:g}")
    return paths


def main(options: Options) -> None:
    """Train the policies and print the table."""
    paper = replace(PRESETS["miniature"], out=options.run)
    repetition = Repetition(paper, 0)
    print(f"{describe()}\n\n| rho | minimum | advantage | low | high | KL |")
    print("|---|---|---|---|---|---|")
    for rho in paper.rhos:
        paths = policies(repetition, rho, options.out)
        stage = repetition.evaluation("validation", rho, [*paths.values()])
        stage = replace(stage, out=options.out / f"validation-{rho:g}")
        for name, result in zip(paths, execute(stage)["policies"], strict=True):
            values = (f"{result[key]:+.3f}" for key in ("advantage", "low", "high", "kl"))
            print(f"| {rho:g} | {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
