"""`python -m benchmarks.smollm2`: section 6 with SmolLM2-135M on docstrings, for one GPU.

The language is real, so that there is no true reward. As in section 6.1 a reward model of human
completions, the oracle, labels the pairs. The judge is another reward model, of other rows: it has
seen none of the prompts that the oracle and the policies were trained on. There is one seed. The
command prints the table; a killed run goes on.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from scale.data.dataset import Limits
from scale.data.docstrings import docstrings
from scale.data.rows import split, write
from scale.paper.pipeline import PRESETS, Paper, findings_of
from scale.paper.repetition import Repetition
from scale.stages.align import MethodName
from scale.stages.evaluate import Evaluate
from scale.stages.pairs import Pairs
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.stage import Stage, execute
from scale.train.loop import TrainingConfig

RHOS = (0.2, 0.8)
METHODS: tuple[MethodName, ...] = ("dpo", "d-dpo", "e-dpo", "mean")


@dataclass(frozen=True)
class Run:
    """The sizes. The defaults are for one GPU with 80 GB."""

    out: Path = Path("runs/smollm2")
    """Folder of the run."""
    model: Path = Path("smollm2")
    """The policy to fine-tune: a folder of ours or of Hugging Face's, a .gguf file, or smollm2."""
    rows: int = 8000
    """Docstrings, at most."""
    prompts: int = 2000
    """Training prompts that pi_ref is sampled at."""
    pairs: int = 1500
    """Pairs of each D_rho, at most."""
    steps: int = 150
    """Steps of fine-tuning, of each reward model and of each policy."""
    batch_size: int = 32
    """Rows of a batch."""
    learning_rate: float = 1e-5
    """Of the policies; five times this for pi_ref and reward models."""
    beta: float = 0.1
    """Of every method."""

    def training(self, factor: float) -> TrainingConfig:
        return TrainingConfig(self.steps, self.batch_size, factor * self.learning_rate)

    def paper(self) -> Paper:
        """Section 6 as in the paper, without the rows of the judge."""
        return replace(
            PRESETS["miniature"], out=self.out / "paper", data=self.out / "run.parquet",
            init=self.model, rhos=RHOS, methods=METHODS, seeds=1, betas=(self.beta,),
            learning_rates=(self.learning_rate,),
            prompts=self.prompts, pairs=self.pairs, limits=Limits(192, 64), sft=self.training(5),
            oracle=self.training(5), reward=self.training(5), align=self.training(1),
        )  # fmt: skip

    def judge(self, policy: Path, limits: Limits) -> list[Stage]:
        """A reward model of the other rows."""
        folder = self.out / "judge"
        samples, pairs = folder / "samples", folder / "pairs"
        return [
            Sample(
                out=samples, policy=policy, data=self.out / "judge.parquet", n=2, limits=limits,
                prompts=self.prompts,
            ),
            Pairs(out=pairs, data=samples / "rows.parquet"),
            Reward(
                out=folder / "rewards", data=pairs / "human.parquet", init=policy, limits=limits,
                training=self.training(5),
            ),
        ]  # fmt: skip

    def evaluation(self, repetition: Repetition, rho: float) -> Evaluate:
        """The policies of one rho, by the judge."""
        paths = [p.path for method in METHODS for p in repetition.policies(rho, method)]
        evaluation = repetition.evaluation("test", rho, paths)
        out = evaluation.out.with_name("test-judge")
        return replace(evaluation, out=out, rewards=self.out / "judge/rewards")


def main(run: Run) -> None:
    """Run all stages, and print the advantages by the judge."""
    every = docstrings()
    spread = every[:: -(-len(every) // run.rows)]
    parts = split(spread, {"run": 0.7, "judge": 0.3}, seed=1)  # not the seed of `corpus`
    for name, rows in parts.items():
        write(run.out / f"{name}.parquet", rows, {})
    paper = run.paper()
    execute(paper)
    repetition = Repetition(paper, paper.seed)
    for stage in run.judge(repetition.out / "sft", paper.limits):
        execute(stage)
    print("| rho | method | advantage [95%] | win | tie | loss | KL | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    for rho in RHOS:
        evaluation = run.evaluation(repetition, rho)
        execute(evaluation)
        for method, found in zip(METHODS, findings_of(evaluation)["policies"], strict=True):
            interval = "{advantage:+.3f} [{low:+.3f}, {high:+.3f}]".format_map(found)
            rest = "{win:.2f} | {tie:.2f} | {loss:.2f} | {kl:.2f} | {tokens:.1f}".format_map(found)
            print(f"| {rho} | {method} | {interval} | {rest} |")


if __name__ == "__main__":
    main(tyro.cli(Run, description=__doc__))
