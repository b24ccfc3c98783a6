"""What the study varies besides rho and method, on the pi_ref and the test pages of its seeds.

- `gamma`: the weight of the KL term is constant, not annealed (the paper's figure B.5).
- `epochs`: policies of ten epochs over fewer or more pairs, evaluated on their way, too.
- `longer`: reward models are trained four times as long.
- `unbiased`: pairs with the length bias that they were labelled with (section 6.3).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from minipref.methods import METHODS
from scale.data.rows import read
from scale.data.village import assess, read_page
from scale.paper.pipeline import Paper, findings_of
from scale.paper.repetition import REWARD_MODELS, Repetition, reward_models_of
from scale.parallel.workers import execute_all, usable_cores, workers
from scale.stages.align import Align, MethodName, snapshot_steps
from scale.stages.evaluate import Evaluate
from scale.stages.stage import Stage, execute, needs

CONSTANT = (1e-2, 1e-2)
RHOS = (0.2, 0.5, 0.8)
EPOCHS = 10
NUM_PAIRS = (250, 1000, 4000)
OVERFITTING: tuple[MethodName, ...] = ("dpo", "d-dpo", "e-dpo")
DISTILLING: tuple[MethodName, ...] = ("d-dpo", "e-dpo", "mean")
UNBIASED: tuple[MethodName, ...] = ("dpo", "e-dpo")
FINDINGS = ("advantage", "win", "tie", "loss", "kl", "tokens")
COLUMNS = (
    *("experiment", "seed", "rho", "method", "baseline", "pairs", "epochs", "reward_accuracy"),
    *FINDINGS,
)


def labelled(
    experiment: str, seed: int, rho: float, method: str, findings: dict[str, Any]
) -> dict[str, Any]:
    """A row of `variations.csv`: one policy, and those of `FINDINGS` that there are."""
    labels = {"experiment": experiment, "seed": seed, "rho": rho, "method": method}
    return labels | {name: findings[name] for name in FINDINGS if name in findings}


@dataclass(frozen=True)
class Beside(Repetition):
    """The same seed with other options: its reward models and policies have a folder of their own.

    Attributes:
        name: Of that folder.
    """

    name: str

    def folder(self, rho: float) -> Path:
        return super().folder(rho) / self.name


@dataclass(frozen=True)
class Variation:
    """One policy of an experiment."""

    experiment: str
    repetition: Repetition
    rho: float
    align: Align

    def chains(self) -> list[list[Stage]]:
        """The stages that make it, and its evaluation."""
        rewards = [self.repetition.reward_stages(self.rho, name) for name in REWARD_MODELS]
        return [*rewards, [self.align], [self.evaluation()]]

    def points(self) -> dict[float, Path]:
        """The snapshots and the end of training, by epochs."""
        training, pairs = self.align.training, self.repetition.options.pairs
        steps = snapshot_steps(training.steps, self.align.snapshots)
        paths = [*(self.align.out / f"step-{step}" for step in steps), self.align.out]
        epochs = [step * training.batch_size / pairs for step in (*steps, training.steps)]
        return dict(zip(epochs, paths, strict=True))

    def evaluation(self) -> Evaluate:
        evaluation = self.repetition.evaluation("test", self.rho, [*self.points().values()])
        return replace(evaluation, out=self.align.out.with_name(f"{self.align.out.name}-test"))

    def rows(self) -> Iterator[dict[str, Any]]:
        findings = findings_of(self.evaluation())["policies"]
        known = accuracies(self.repetition, self.rho, self.align.method)
        for epochs, values in zip(self.points(), findings, strict=True):
            yield self.row(values) | {"epochs": epochs, "reward_accuracy": known}

    def row(self, findings: dict[str, Any]) -> dict[str, Any]:
        labels = self.experiment, self.repetition.seed, self.rho, self.align.method
        return labelled(*labels, findings) | {"pairs": self.repetition.options.pairs}

    def true_rewards(self) -> np.ndarray:
        """The rewards of the samples at the end of training [prompts, n]."""
        rows = read(self.evaluation().out / "rows.parquet", need=("prompt",))
        last = [row for row in rows if row["policy"] == len(self.points()) - 1]
        return np.array(
            [[assess(read_page(r["prompt"]), text).reward for text in r["samples"]] for r in last]
        )


def run(paper: Paper) -> list[dict[str, Any]]:
    """The rows of the one seed of a complete run, with `COLUMNS`."""
    repetition = Repetition(replace(paper, snapshots=0), paper.seed)
    experiments = (gammas, epochs, longer, unbiased)
    variations = [variation for experiment in experiments for variation in experiment(repetition)]
    every = [chain for variation in variations for chain in variation.chains()]
    chains = [*{chain[0].out: chain for chain in every}.values()]  # each once
    with workers(len(usable_cores())) as pool:
        execute_all(pool, chains, "variations", execute, needs(chains))
    rows = [row for variation in variations for row in variation.rows()]
    return [*rows, versus(*variations[-2:])]


def accuracies(repetition: Repetition, rho: float, method: str) -> str:
    """The held-out accuracy of each reward model that a method distils, with spaces between."""
    [_, reward, _] = repetition.reward_stages(rho, reward_models_of(method))
    return " ".join(f"{accuracy:.4f}" for accuracy in findings_of(reward)["held-out accuracy"])


def variation(experiment: str, repetition: Repetition, rho: float, method: MethodName) -> Variation:
    """The policy with the hyperparameters of the search."""
    [policy] = repetition.policies(rho, method)
    return Variation(experiment, repetition, rho, repetition.alignment(policy))


def gammas(repetition: Repetition) -> Iterator[Variation]:
    """Each method with a KL term, with a constant weight of it."""
    with_kl = [name for name in repetition.options.methods if METHODS[name].gamma is not None]
    for rho, method in product(RHOS, with_kl):
        annealed = variation("gamma", repetition, rho, method)
        out = annealed.align.out.with_name(f"{annealed.align.out.name}-constant")
        yield replace(annealed, align=replace(annealed.align, out=out, gamma=CONSTANT))


def epochs(repetition: Repetition) -> Iterator[Variation]:
    """Ten epochs over different numbers of pairs without a length bias."""
    options = repetition.options
    for pairs, method in product(NUM_PAIRS, OVERFITTING):
        steps = EPOCHS * pairs // options.align.batch_size
        training = replace(options.align, steps=steps)
        varied = replace(options, pairs=pairs, align=training, snapshots=2)
        beside = Beside(varied, repetition.seed, f"{pairs}-pairs")
        yield variation("epochs", beside, 0.5, method)


def longer(repetition: Repetition) -> Iterator[Variation]:
    """What distils reward models that are trained longer."""
    options = repetition.options
    reward = replace(options.reward, steps=4 * options.reward.steps)
    beside = Beside(replace(options, reward=reward), repetition.seed, f"{reward.steps}-steps")
    for rho, method in product(RHOS, DISTILLING):
        yield variation("longer", beside, rho, method)


def unbiased(repetition: Repetition) -> Iterator[Variation]:
    """DPO and e-DPO at the length bias that the labelled pairs have."""
    [bias, *_] = repetition.reward_stages(repetition.options.rhos[0], "single")
    natural = round(findings_of(bias)["that share of --data"], 2)
    for method in UNBIASED:
        yield variation("unbiased", repetition, natural, method)


def versus(theirs: Variation, ours: Variation) -> dict[str, Any]:
    """The second policy's samples against the first one's, as `evaluate` compares with pi_ref's."""
    margins = ours.true_rewards() - theirs.true_rewards()
    findings = {
        "advantage": margins.mean(),
        "win": (margins > 0).mean(),
        "tie": (margins == 0).mean(),
        "loss": (margins < 0).mean(),
    }
    return ours.row(findings) | {"baseline": theirs.align.method}
