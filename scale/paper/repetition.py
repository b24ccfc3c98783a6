"""One repetition of section 6: which stage reads what, and nothing else.

A repetition draws everything anew from its seed: the corpus, pi_ref, samples, pairs, reward models
and policies. So repetitions are independent, and their means have Student's interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from minipref.methods import METHODS
from scale.io.model_folder import VILLAGE
from scale.paper.options import Options
from scale.paper.presets import GRID, GRIDS, searched
from scale.paper.results import Policy
from scale.stages.align import Align, MethodName, snapshot_steps
from scale.stages.bias import Bias
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.pairs import Pairs
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.stages.stage import Stage

REWARD_MODELS = ("single", "ensemble")  # r_rho, and the r_{rho,b}
PARTS = ("train", "validation")


def reward_models_of(method: str) -> str:
    """Which of `REWARD_MODELS` scores the pairs of a method."""
    return "ensemble" if METHODS[method].rewards == "ensemble" else "single"


@dataclass(frozen=True)
class Repetition:
    """The stages of one seed."""

    options: Options
    seed: int

    @property
    def out(self) -> Path:
        return self.options.out / f"seed-{self.seed}"

    @property
    def judge(self) -> Path:
        """Who labels pairs and evaluates policies: the true reward, where there is one."""
        return self.out / "oracle" if self.options.data else VILLAGE

    def shared_stages(self) -> dict[str, Stage]:
        """Stages 1 to 3, which depend on neither rho nor method, in order."""
        options, out = self.options, self.out
        stages: dict[str, Stage] = {
            "corpus": Corpus(
                out=out / "corpus", data=options.data, pages=options.pages, seed=self.seed
            ),
            "sft": Sft(
                out=out / "sft", data=out / "corpus/train.parquet", init=options.init,
                model=options.model, validation=out / "corpus/validation.parquet",
                limits=options.limits, training=replace(options.sft, seed=self.seed),
            ),
        }  # fmt: skip
        for part in PARTS:
            samples = out / f"samples/{part}"
            stages[f"samples, {part}"] = Sample(
                out=samples, policy=out / "sft", data=out / f"corpus/{part}.parquet",
                prompts=options.prompts, n=options.samples, limits=options.limits, seed=self.seed,
            )  # fmt: skip
            stages[f"pairs, {part}"] = Pairs(
                out=out / f"pairs/{part}", data=samples / "rows.parquet", seed=self.seed
            )
        if options.data:
            stages["oracle"] = self.oracle()
        for part in PARTS:
            stages[f"labels, {part}"] = Score(
                out=out / f"labelled/{part}", data=out / f"pairs/{part}/rows.parquet", relabel=True,
                rewards=self.judge, reference=out / "sft", limits=options.limits,
            )  # fmt: skip
        return stages

    def oracle(self) -> Reward:
        """Section 6.1's oracle, which stands in for people: a reward model of human preferences."""
        pairs = self.out / "pairs"
        return Reward(
            out=self.out / "oracle", data=pairs / "train/human.parquet", init=self.out / "sft",
            validation=pairs / "validation/human.parquet", limits=self.options.limits,
            training=replace(self.options.oracle, seed=self.seed),
        )  # fmt: skip

    def folder(self, rho: float) -> Path:
        return self.out / f"rho-{rho:g}"

    def reward_stages(self, rho: float, name: str) -> list[Stage]:
        """Stages 4 and 5: D_rho, and r_rho or the ensemble r_{rho,b}; their rewards of D_rho."""
        options, labelled = self.options, self.out / "labelled"
        folder = self.folder(rho) / name
        rows, rewards = folder / "data/rows.parquet", folder / "rewards"
        bias = Bias(
            out=folder / "data", data=labelled / "train/rows.parquet", rho=rho, seed=self.seed,
            tokenizer=self.out / "sft", size=options.pairs,
        )  # fmt: skip
        reward = Reward(
            out=rewards, data=rows, init=self.out / "sft", limits=options.limits,
            length_biases=options.length_biases if name == "ensemble" else (),
            validation=labelled / "validation/rows.parquet",
            training=replace(options.reward, seed=self.seed),
        )  # fmt: skip
        score = Score(out=folder / "scored", data=rows, rewards=rewards, limits=options.limits)
        return [bias, reward, score]

    def policies(self, rho: float, method: MethodName) -> list[Policy]:
        """The candidates of one method at one bias: each beta with each learning rate."""
        options, folder = self.options, self.folder(rho) / "policies"
        beta, rate = searched(method, rho)
        betas = GRIDS.get(method, GRID) if options.preset == "paper" else (beta,)
        return [
            Policy(folder / f"{method}-{beta:g}-{rate:g}", rho, method, beta, rate, self.seed)
            for beta, rate in product(options.betas or betas, options.learning_rates or (rate,))
        ]

    def alignment(self, policy: Policy) -> Align:
        """Stage 6."""
        options = self.options
        rewards = reward_models_of(policy.method)
        training = replace(options.align, learning_rate=policy.learning_rate, seed=self.seed)
        return Align(
            out=policy.path, policy=self.out / "sft", method=policy.method, beta=policy.beta,
            data=self.folder(policy.rho) / rewards / "scored/rows.parquet",
            validation=self.out / "labelled/validation/rows.parquet", snapshots=options.snapshots,
            training=training, limits=options.limits, every=max(100, training.steps // 10),
        )  # fmt: skip

    def points(self, policy: Policy) -> dict[int, Path]:
        """The policy's snapshots and, last, its end, by step."""
        steps = snapshot_steps(self.options.align.steps, self.options.snapshots)
        snapshots = {step: policy.path / f"step-{step}" for step in steps}
        return snapshots | {self.options.align.steps: policy.path}

    def evaluation(self, part: str, rho: float, policies: Sequence[Path]) -> Evaluate:
        """Stage 7: the policies of one rho on a part of the corpus."""
        options = self.options
        return Evaluate(
            out=self.folder(rho) / part, data=self.out / f"corpus/{part}.parquet",
            policies=tuple(policies), reference=self.out / "sft", rewards=self.judge,
            n=options.test_samples, seed=self.seed, limits=options.limits,
        )  # fmt: skip
