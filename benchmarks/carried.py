"""`python -m benchmarks.carried --run runs/paper`: Eq. 11's minimum over the whole expectation, not each minibatch.

Footnote 5 takes the minimum over reward models on every minibatch, and `e-dpo` and `hull` do as it says. Eq. 11 itself
has it outside the expectation. Taken so,
- e-dpo is the best, by training loss, of K dp-dpo runs, one on each reward model;
- hull carries simplex weights (a softmax of trained logits) in the training state, minimised along with the policy.

Reads a complete miniature, trains these beside its own e-dpo and hull at the same hyperparameters, and prints the
advantage over pi_ref on the validation prompts, which chose those hyperparameters for the minibatch versions.
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

from benchmarks.machine import describe
from minipref.methods import gamma_at
from minipref.objectives import distillation, log_ratio_margin, pessimistic, sampled_forward_kl
from minipref.training import init_state, train_step
from scale.console import console
from scale.data.dataset import batch_indices, take
from scale.data.rows import provenance, read, write
from scale.io import model_folder
from scale.model.response_logps import logps
from scale.model.transformer import Transformer
from scale.paper.figures import records
from scale.paper.pipeline import PRESETS, Paper
from scale.stages.align import Align, MethodName
from scale.stages.evaluate import Evaluate
from scale.stages.stage import execute
from scale.train.loop import hyper, train
from scale.train.optimizer import ADAM

SPEED = 30.0  # how much faster than a weight of the policy a logit moves: 120 Adam steps of 3e-3 must cross the simplex


class Carried(eqx.Module):
    policy: Transformer
    logits: jax.Array


def forward(model, batch):
    return logps(model.policy, batch), jax.nn.softmax(SPEED * model.logits)


def loss(outputs, batch, settings, fraction):
    """Eq. 11 with a mixture of the rewards in place of the nearest of them."""
    (values, weights), ref = outputs, batch.ref_logps
    margins = jax.vmap(log_ratio_margin)(values[:, 0], values[:, 1], ref[:, 0], ref[:, 1])
    mixed = (batch.scores[:, 0] - batch.scores[:, 1]) @ weights
    pair_loss = jax.vmap(distillation, (0, 0, None))(margins, mixed, settings.strength).mean()
    kl = jax.vmap(sampled_forward_kl)(ref[:, 2], values[:, 2]).mean()
    return pessimistic(pair_loss, kl, gamma_at(tuple(settings.gamma), fraction)), {"ensemble/weights": weights}


@eqx.filter_jit
def step(state, batch):
    return train_step(forward, loss, ADAM, state, batch)


def carried_hull(stage: Align, out: Path) -> Path:
    policy = model_folder.load_policy(stage.policy)
    data = stage.load(policy, stage.data, ["chosen", "rejected", "ref_sample"]).data
    start = Carried(policy.model, jnp.zeros(data.scores.shape[2]))
    state = init_state(start, ADAM, hyper(stage.training, stage.beta or 0.0, (1e-4, 1e-2)))
    indices = partial(batch_indices, len(data.tokens), stage.training.batch_size, stage.training.seed)
    trained = train(step, state, lambda i: take(data, indices(i)), stage.training.steps, out, "carried")
    model_folder.save(out, trained.policy, policy.config, policy.tokenizer)
    console.print("  final weights:", np.round(np.asarray(jax.nn.softmax(SPEED * trained.logits), float), 2).tolist())
    return out


def best_member(stage: Align, out: Path) -> Path:
    """dp-dpo on each member alone; the run with the lowest loss over its last quarter."""
    rows, runs = read(stage.data), []
    for k in range(len(rows[0]["score_chosen"])):
        one = [row | {s: row[s][k] for s in ("score_chosen", "score_rejected")} for row in rows]
        write(out / f"{k}.parquet", one, provenance(stage.data))
        runs.append(replace(stage, out=out / str(k), data=out / f"{k}.parquet", method="dp-dpo", validation=None))
        execute(runs[-1])
    losses = np.array([list(records(r.out / "metrics.jsonl", "loss").values()) for r in runs])
    last = losses[:, -stage.training.steps // 4 :].mean(1)
    console.print(f"  losses {np.round(last, 4).tolist()}: member {int(np.argmin(last))}")
    return runs[int(np.argmin(last))].out


@dataclass(frozen=True)
class Options:
    run: Path = Path("runs/paper")
    """Folder of a complete miniature."""
    out: Path = Path("runs/carried")
    """Folder for the policies trained here."""


def policies(paper: Paper, rho: float, out: Path) -> dict[str, Path]:
    """The four policies of one rho."""
    found: dict[str, Path] = {}
    methods: tuple[tuple[MethodName, Callable[[Align, Path], Path]], ...] = (
        ("e-dpo", best_member), ("hull", carried_hull))
    for method, whole in methods:
        [policy] = paper.policies(rho, method, 0)
        stage = replace(paper.alignment(policy), snapshots=0)
        found |= {f"{method}, each minibatch": policy.path, f"{method}, whole": whole(stage, out / f"{method}-{rho:g}")}
    return found


def main(options: Options) -> None:
    paper = replace(PRESETS["miniature"], out=options.run)
    print(f"{describe()}\n\n| rho | minimum | advantage | low | high | KL |\n|---|---|---|---|---|---|")
    for rho in paper.rhos:
        found = policies(paper, rho, options.out)
        stage = Evaluate(out=options.out / f"validation-{rho:g}", data=options.run / "corpus/validation.parquet",
                         policies=tuple(found.values()), reference=options.run / "sft", rewards=options.run / "oracle",
                         limits=paper.limits)
        for name, each in zip(found, execute(stage)["policies"], strict=True):
            values = " | ".join(f"{each[k]:+.3f}" for k in ("advantage", "low", "high", "kl"))
            print(f"| {rho:g} | {name} | {values} |")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
