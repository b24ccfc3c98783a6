"""Section 6 from corpus to figures: which stage reads what, and nothing else."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

from minipref.methods import METHODS
from scale.console import console
from scale.data.dataset import Limits
from scale.data.rows import read
from scale.errors import InputError
from scale.files import write_json
from scale.model.config import ModelConfig
from scale.paper.presets import GRID, GRIDS, OPTIONS, searched
from scale.paper.report import prompt_text, terminal_table, write_report
from scale.paper.results import Outcome, Policy, write_results
from scale.parallel.workers import execute_all, workers
from scale.stages.align import Align, MethodName, require_steps, snapshot_steps
from scale.stages.bias import Bias
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.pairs import Pairs
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.stages.stage import Stage, describe, execute
from scale.stages.sweep import require_distinct
from scale.train.loop import TrainingConfig

ALL_METHODS: tuple[MethodName, ...] = tuple(METHODS)
REWARD_MODELS = ("single", "ensemble")  # r_rho, and the r_{rho,b}
PARTS = ("train", "validation")
Evaluation = tuple[dict[str, float], list[dict[str, Any]]]  # means over prompts; a row for each


@dataclass(frozen=True, kw_only=True)
class Paper(Stage):
    """Section 6 end to end: corpus, SFT, oracle, biased data, reward models, policies, report.

    The defaults are those of the miniature.
    """

    out: Path = Path("runs/paper")
    """Folder of the run: report.md, results.csv, figures, and a folder for each stage."""
    preset: Literal["miniature", "paper"] = "miniature"
    """miniature: minutes on a laptop, hyperparameters by `python -m benchmarks.search`. paper:
    section 6.1's own sizes and grids, for accelerators, with a model of 0.4 billion parameters."""
    data: Path | None = None
    """Rows with `prompt` and `completion`. Default: the docstring corpus."""
    rhos: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Length biases rho of the training sets D_rho."""
    methods: tuple[MethodName, ...] = ALL_METHODS
    """Methods to train."""
    seeds: int = 1
    """Repetitions of all that follows the oracle: biased sets, reward models, policies, samples."""
    betas: tuple[float, ...] = ()
    """Candidates for beta (ipo: for its tau). All are trained; the best on validation prompts is
    kept. Default: what the search selected, or section 6.1's grids."""
    learning_rates: tuple[float, ...] = ()
    """Candidates for the policies' learning rate. Default: what the search selected."""
    most_kl: float | None = 10.0
    """Candidates further than this from pi_ref (nats, validation prompts) are not kept, because
    they may exploit errors of the oracle."""
    pairs: int = 3000
    """Pairs of each D_rho, at most."""
    length_biases: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.8)
    """Length biases b of the ensemble's training sets."""
    samples: int = 3
    """Samples of pi_ref for each training prompt."""
    snapshots: int = 1
    """Points along each policy's training that are evaluated too, to compare at equal KL."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the policy and of every reward model."""
    limits: Limits = field(default_factory=lambda: Limits(48, 24, "right"))
    """Length limits."""
    sft: TrainingConfig = field(default_factory=lambda: TrainingConfig(600, 32, 1.5e-2, 50))
    """Training of pi_ref."""
    oracle: TrainingConfig = field(default_factory=lambda: TrainingConfig(800, 32, 1e-3))
    """Training of the oracle reward model."""
    reward: TrainingConfig = field(default_factory=lambda: TrainingConfig(100, 16, 2e-3))
    """Training of each reward model; the seed is the repetition's."""
    align: TrainingConfig = field(default_factory=lambda: TrainingConfig(120, 16, 3e-3))
    """Training of each policy; the seed is the repetition's, the learning rate a candidate."""

    def run(self) -> dict[str, Any]:
        self.check()
        findings = {name: execute(stage) for name, stage in self.shared_stages().items()}
        trained, outcomes = [], []
        with workers(max(len(self.methods), len(REWARD_MODELS) * len(self.rhos))) as pool:
            for seed in range(self.seeds):
                policies = self.train(pool, seed)
                trained += policies
                selected = [best(cell, self.most_kl) for cell in by_cell(policies)]
                outcomes += self.test(pool, selected, seed)
        write_results(self.out / "results.csv", trained, outcomes)
        write_json(self.out / "config.json", describe(self)["options"])
        rows = read(self.out / "corpus/test.parquet", need=("prompt", "completion"))
        completions = {prompt_text(row["prompt"]): row["completion"] for row in rows}
        write_report(self.out, outcomes, findings, completions, self.length_biases)
        console.print(terminal_table(outcomes))
        console.print(f"{self.seeds} seed{'s' * (self.seeds > 1)}; {self.out / 'report.md'}")
        return {"policies": len(trained)}

    def check(self) -> None:
        """Refuse what would fail in a later stage, or let two runs write one folder."""
        for name in ("rhos", "methods", "length_biases"):
            if not getattr(self, name):
                raise InputError(f"--{name.replace('_', '-')}: none")
        require_distinct(self, ("rhos", "methods", "betas", "learning_rates"))
        require_steps(self.snapshots, self.align.steps)

    def shared_stages(self) -> dict[str, Stage]:
        """Stages 1 to 3, which do not depend on rho, method or seed, in order."""
        out, limits = self.out, self.limits
        stages: dict[str, Stage] = {"corpus": Corpus(out=out / "corpus", data=self.data)}
        stages["sft"] = Sft(
            out=out / "sft", data=out / "corpus/train.parquet", model=self.model, limits=limits,
            validation=out / "corpus/validation.parquet", training=self.sft,
        )  # fmt: skip
        for part in PARTS:
            samples = out / f"samples/{part}"
            stages[f"samples, {part}"] = Sample(
                out=samples, policy=out / "sft", data=out / f"corpus/{part}.parquet",
                n=self.samples, limits=limits,
            )  # fmt: skip
            pairs = Pairs(out=out / f"pairs/{part}", data=samples / "rows.parquet")
            stages[f"pairs, {part}"] = pairs
        stages["oracle"] = Reward(
            out=out / "oracle", data=out / "pairs/train/human.parquet", init=out / "sft",
            validation=out / "pairs/validation/human.parquet", training=self.oracle, limits=limits,
        )  # fmt: skip
        for part in PARTS:
            stages[f"labels, {part}"] = Score(
                out=out / f"labelled/{part}", data=out / f"pairs/{part}/rows.parquet", relabel=True,
                rewards=out / "oracle", reference=out / "sft", limits=limits,
            )  # fmt: skip
        return stages

    def train(self, pool: ProcessPoolExecutor, seed: int) -> list[Policy]:
        """Stages 4 to 6 of one repetition; validation values where there is a choice."""
        chains = [self.rewards_of(rho, n, seed) for n in REWARD_MODELS for rho in self.rhos]
        execute_all(pool, chains, "reward models", execute)
        cells = product(self.rhos, self.methods)
        policies = [policy for cell in cells for policy in self.policies(*cell, seed)]
        groups = [[self.alignment(policy) for policy in group] for group in by_method(policies)]
        execute_all(pool, groups, "policies, by method", execute)
        choices = [[p.path for p in cell] for cell in by_cell(policies) if len(cell) > 1]
        values: dict[Path, dict[str, Any]] = {
            path: {"validation": findings["advantage"], "validation_kl": findings["kl"]}
            for path, (findings, _) in self.evaluate(pool, "validation", choices, seed).items()
        }
        return [policy._replace(**values.get(policy.path, {})) for policy in policies]

    def test(
        self, pool: ProcessPoolExecutor, selected: Sequence[Policy], seed: int
    ) -> list[Outcome]:
        """Stage 7: the selected policies on test prompts, at each snapshot and at the end."""
        paths = {policy: list(self.points(policy).values()) for policy in selected}
        groups = [[path for p in group for path in paths[p]] for group in by_method(selected)]
        evaluations = self.evaluate(pool, "test", groups, seed)
        outcomes = []
        for policy in selected:
            findings, rows = zip(*(evaluations[path] for path in paths[policy]), strict=True)
            outcomes.append(Outcome(policy, list(self.points(policy)), list(rows), list(findings)))
        return outcomes

    def evaluate(
        self, pool: ProcessPoolExecutor, part: str, groups: Sequence[Sequence[Path]], seed: int
    ) -> dict[Path, Evaluation]:
        """Evaluate policies on a part of the corpus; each group is one stage."""
        stages = [
            Evaluate(
                out=self.out / f"seed-{seed}/{part}/{i}", data=self.out / f"corpus/{part}.parquet",
                policies=tuple(group), reference=self.out / "sft", rewards=self.out / "oracle",
                seed=seed, limits=self.limits,
            )
            for i, group in enumerate(groups)
        ]  # fmt: skip
        if not stages:
            return {}
        results = execute_all(pool, [[s] for s in stages], f"evaluation on {part}", execute)
        evaluations = {}
        for stage, [findings] in zip(stages, results, strict=True):
            rows = read(stage.out / "rows.parquet", need=("prompt",))
            for i, path in enumerate(stage.policies):
                own = [row for row in rows if row["policy"] == i]
                evaluations[path] = (findings["policies"][i], own)
        return evaluations

    def folder(self, seed: int, rho: float) -> Path:
        return self.out / f"seed-{seed}/rho-{rho:g}"

    def rewards_of(self, rho: float, name: str, seed: int) -> list[Stage]:
        """Stages 4 and 5: D_rho, and r_rho or the ensemble r_{rho,b}; their rewards of D_rho."""
        folder, labelled = self.folder(seed, rho) / name, self.out / "labelled"
        rows, rewards = folder / "data/rows.parquet", folder / "rewards"
        bias = Bias(
            out=folder / "data", data=labelled / "train/rows.parquet", rho=rho, seed=seed,
            tokenizer=self.out / "sft", size=self.pairs,
        )  # fmt: skip
        reward = Reward(
            out=rewards, data=rows, init=self.out / "sft", limits=self.limits,
            length_biases=self.length_biases if name == "ensemble" else (),
            validation=labelled / "validation/rows.parquet",
            training=replace(self.reward, seed=seed),
        )  # fmt: skip
        score = Score(out=folder / "scored", data=rows, rewards=rewards, limits=self.limits)
        return [bias, reward, score]

    def policies(self, rho: float, method: MethodName, seed: int) -> list[Policy]:
        """The candidates of one method at one bias: each beta with each learning rate."""
        folder = self.folder(seed, rho) / "policies"
        beta, rate = searched(method, rho)
        betas = GRIDS.get(method, GRID) if self.preset == "paper" else (beta,)
        return [
            Policy(folder / f"{method}-{beta:g}-{rate:g}", rho, method, beta, rate, seed)
            for beta, rate in product(self.betas or betas, self.learning_rates or (rate,))
        ]

    def points(self, policy: Policy) -> dict[int, Path]:
        """The policy's snapshots and, last, its end, by step."""
        steps = snapshot_steps(self.align.steps, self.snapshots)
        snapshots = {step: policy.path / f"step-{step}" for step in steps}
        return snapshots | {self.align.steps: policy.path}

    def alignment(self, policy: Policy) -> Align:
        """Stage 6."""
        rewards = "ensemble" if METHODS[policy.method].rewards == "ensemble" else "single"
        training = replace(self.align, learning_rate=policy.learning_rate, seed=policy.seed)
        return Align(
            out=policy.path, policy=self.out / "sft", method=policy.method, beta=policy.beta,
            data=self.folder(policy.seed, policy.rho) / rewards / "scored/rows.parquet",
            validation=self.out / "labelled/validation/rows.parquet", snapshots=self.snapshots,
            training=training, limits=self.limits,
        )  # fmt: skip


PRESETS = {name: Paper(**options) for name, options in OPTIONS.items()}


def by_method(policies: Sequence[Policy]) -> list[list[Policy]]:
    """One group a method, in which a worker compiles the step once."""
    methods = dict.fromkeys(policy.method for policy in policies)
    return [[policy for policy in policies if policy.method == method] for method in methods]


def by_cell(policies: Sequence[Policy]) -> list[list[Policy]]:
    """The candidates of each (rho, method), in order."""
    return [list(cell) for _, cell in groupby(policies, key=lambda p: (p.rho, p.method))]


def best(cell: Sequence[Policy], most_kl: float | None) -> Policy:
    """The best candidate within the KL budget; the nearest to pi_ref where none is within it."""
    near = [p for p in cell if most_kl is None or (p.validation_kl or 0.0) <= most_kl]
    if near:
        return max(near, key=lambda policy: policy.validation or 0.0)
    return min(cell, key=lambda policy: policy.validation_kl or 0.0)
