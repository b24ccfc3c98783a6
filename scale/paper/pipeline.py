"""Section 6 from corpus to figures: which stage reads what, and nothing else."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

from minipref.methods import METHODS
from scale.console import console
from scale.data.dataset import Limits
from scale.data.rows import read
from scale.files import write_json
from scale.model.config import ModelConfig
from scale.paper.report import prompt_text, terminal_table, write_report
from scale.paper.results import Outcome, Policy, write_results
from scale.parallel.workers import execute_all, workers
from scale.stages.align import Align, MethodName, snapshot_steps
from scale.stages.bias import Bias
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.pairs import Pairs
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.stages.stage import Stage, describe, execute
from scale.train.loop import TrainingConfig

ALL_METHODS: tuple[MethodName, ...] = tuple(METHODS)


@dataclass(frozen=True, kw_only=True)
class Paper(Stage):
    """Section 6 end to end: corpus, SFT, oracle, biased data, reward models, eight methods, evaluation, report."""

    out: Path = Path("runs/paper")
    """Folder of the run: report.md, results.csv, figures, and a folder for each stage."""
    preset: Literal["miniature", "paper"] = "miniature"
    """miniature: minutes on a laptop, hyperparameters as found by `python -m benchmarks.search`. paper: section
    6.1's own sizes and grids, for accelerators, with a model of 0.4 billion parameters."""
    data: Path | None = None
    """Rows with `prompt` and `completion`. Default: the embedded docstring corpus."""
    rhos: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Length biases rho of the training sets D_rho."""
    methods: tuple[MethodName, ...] = ALL_METHODS
    """Methods to train."""
    seeds: int = 1
    """Repetitions of all that follows the oracle: biased sets, reward models, policies, samples."""
    betas: tuple[float, ...] = ()
    """Candidates for beta (ipo: for its tau). All are trained, and the best on validation prompts is
    kept. Default: what the search found, or section 6.1's grids."""
    learning_rates: tuple[float, ...] = ()
    """Candidates for the policies' learning rate. Default: what the search found."""
    most_kl: float | None = 10.0
    """Candidates further than this from pi_ref (nats, validation prompts) are not kept: they may fool the oracle."""
    pairs: int = 3000
    """Pairs of each D_rho, at most."""
    length_biases: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.8)
    """Length biases b of the ensemble's training sets."""
    samples: int = 3
    """Samples of pi_ref for each training prompt."""
    snapshots: int = 1
    """Points along each policy's training that are evaluated too, for comparisons at equal KL."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the policy and of every reward model."""
    limits: Limits = field(default_factory=lambda: Limits(48, 24, "right"))
    """Length limits."""
    sft: TrainingConfig = field(default_factory=lambda: TrainingConfig(600, 32, 1.5e-2, 50))
    """Training of pi_ref."""
    oracle: TrainingConfig = field(default_factory=lambda: TrainingConfig(800, 32, 1e-3))
    """Training of the oracle reward model."""
    reward: TrainingConfig = field(default_factory=lambda: TrainingConfig(100, 16, 2e-3))
    """Training of each reward model; its seed is the repetition's."""
    align: TrainingConfig = field(default_factory=lambda: TrainingConfig(120, 16, 3e-3))
    """Training of each policy; its learning rate is searched, or found before, and its seed the repetition's."""

    def candidates(self, method: str, rho: float) -> list[tuple[float, float]]:
        """(beta, learning rate) of each policy to train."""
        beta, rate = searched(method, rho)
        betas = GRIDS.get(method, GRID) if self.preset == "paper" else (beta,)
        return list(product(self.betas or betas, self.learning_rates or (rate,)))

    def run(self) -> dict[str, Any]:
        facts = self.shared_stages()
        trained, outcomes = [], []
        with workers(max(len(self.methods), len(BIASES_OF) * len(self.rhos))) as pool:
            for seed in range(self.seeds):
                policies = self.train(pool, seed)
                selected = [best(cell, self.most_kl) for cell in by_cell(policies)]
                trained += policies
                outcomes += self.test(pool, selected, seed)
        write_results(self.out / "results.csv", trained, outcomes)
        write_json(self.out / "config.json", describe(self)["options"])
        test = read(self.out / "corpus/test.parquet", COMPLETIONS)
        human = {prompt_text(row["prompt"]): row["completion"] for row in test}
        write_report(self.out, outcomes, facts | {"biases": self.length_biases}, human)
        console.print(terminal_table(outcomes))
        console.print(f"{self.seeds} seed{'s' * (self.seeds > 1)}; {self.out / 'report.md'}")
        return {"policies": len(trained)}

    def shared_stages(self) -> dict[str, dict[str, Any]]:
        """Stages 1 to 3, which do not depend on rho, method or seed: their findings."""
        stages = {"corpus": Corpus(out=self.out / "corpus", data=self.data), "sft": self.supervised()}
        for part in ("train", "validation"):
            stages |= self.pairs_of(part)
        stages["oracle"] = self.oracle_stage()
        stages |= {f"labels, {part}": self.labels_of(part) for part in ("train", "validation")}
        return {name: execute(stage) for name, stage in stages.items()}

    def supervised(self) -> Sft:
        at = self.out / "corpus"
        return Sft(out=self.out / "sft", data=at / "train.parquet", validation=at / "validation.parquet",
                   model=self.model, training=self.sft, limits=self.limits)

    def pairs_of(self, part: str) -> dict[str, Stage]:
        sampled, data = self.out / f"samples/{part}", self.out / f"corpus/{part}.parquet"
        return {
            f"samples, {part}": Sample(out=sampled, policy=self.out / "sft", data=data, n=self.samples,
                                       limits=self.limits),
            f"pairs, {part}": Pairs(out=self.out / f"pairs/{part}", data=sampled / "rows.parquet"),
        }

    def oracle_stage(self) -> Reward:
        at = self.out / "pairs"
        return Reward(out=self.out / "oracle", data=at / "train/human.parquet", init=self.out / "sft",
                      validation=at / "validation/human.parquet", training=self.oracle, limits=self.limits)

    def labels_of(self, part: str) -> Score:
        return Score(out=self.out / f"labelled/{part}", data=self.out / f"pairs/{part}/rows.parquet", relabel=True,
                     rewards=self.out / "oracle", reference=self.out / "sft", limits=self.limits)

    def at(self, seed: int, rho: float) -> Path:
        return self.out / f"seed-{seed}" / f"rho-{rho:g}"

    def train(self, pool: ProcessPoolExecutor, seed: int) -> list[Policy]:
        """Stages 4 to 6 of one repetition, and model selection where there is a choice."""
        chains = [self.rewards_of(rho, name, seed) for name in BIASES_OF for rho in self.rhos]
        execute_all(pool, chains, "reward models", execute)
        cells = list(product(self.rhos, self.methods))
        policies = [p for rho, method in cells for p in self.policies(rho, method, seed)]
        execute_all(pool, [[self.alignment(p) for p in group] for group in by_method(policies)], "policies, by method", execute)
        searched = [cell for cell in by_cell(policies) if len(cell) > 1]
        found = self.evaluate(pool, "validation", [[p.path for p in cell] for cell in searched], seed)
        values = {p.path: {"validation": each["advantage"], "validation_kl": each["kl"]}
                  for cell, stage in zip(searched, found, strict=True)
                  for p, each in zip(cell, stage, strict=True)}
        return [p._replace(**values.get(p.path, {})) for p in policies]

    def rewards_of(self, rho: float, name: str, seed: int) -> list[Stage]:
        """Stages 4 and 5: D_rho, and r_rho or the ensemble r_{rho,b}; their rewards of D_rho as columns."""
        at, labelled = self.at(seed, rho) / name, self.out / "labelled"
        biases = self.length_biases if name == "ensemble" else ()
        return [
            Bias(out=at / "data", data=labelled / "train/rows.parquet", tokenizer=self.out / "sft", rho=rho,
                 size=self.pairs, seed=seed),
            Reward(out=at / "rewards", data=at / "data/rows.parquet", init=self.out / "sft", length_biases=biases,
                   validation=labelled / "validation/rows.parquet", training=replace(self.reward, seed=seed),
                   limits=self.limits),
            Score(out=at / "scored", data=at / "data/rows.parquet", rewards=at / "rewards", limits=self.limits),
        ]

    def policies(self, rho: float, method: MethodName, seed: int) -> list[Policy]:
        """The candidates of one method at one bias."""
        folder = self.at(seed, rho) / "policies"
        return [Policy(folder / f"{method}-{beta:g}-{rate:g}", rho, method, beta, rate, seed)
                for beta, rate in self.candidates(method, rho)]

    def alignment(self, policy: Policy) -> Align:
        """Stage 6."""
        method = METHODS[policy.method]
        rewards = "ensemble" if method.rewards == "ensemble" else "single"
        return Align(
            out=policy.path, data=self.at(policy.seed, policy.rho) / rewards / "scored/rows.parquet",
            policy=self.out / "sft", method=policy.method, beta=policy.beta, snapshots=self.snapshots,
            validation=self.out / "labelled/validation/rows.parquet", limits=self.limits,
            training=replace(self.align, learning_rate=policy.learning_rate, seed=policy.seed),
        )

    def test(self, pool: ProcessPoolExecutor, selected: list[Policy], seed: int) -> list[Outcome]:
        """Stage 7: the selected policies on test prompts, at each snapshot and at the end."""
        steps = [*snapshot_steps(self.align.steps, self.snapshots), self.align.steps]
        groups = by_method(selected)
        paths = [[path for p in group for path in (*(p.path / f"step-{s}" for s in steps[:-1]), p.path)]
                 for group in groups]
        found = self.evaluate(pool, "test", paths, seed)
        return [outcome for group, stage in zip(groups, found, strict=True)
                for outcome in outcomes_of(group, steps, stage)]

    def evaluate(
        self, pool: ProcessPoolExecutor, part: str, groups: list[list[Path]], seed: int
    ) -> list[list[dict[str, Any]]]:
        """Findings and rows of each policy of each group."""
        at = self.out / f"seed-{seed}" / part
        stages = [Evaluate(out=at / str(i), data=self.out / f"corpus/{part}.parquet", policies=tuple(group),
                           reference=self.out / "sft", rewards=self.out / "oracle", seed=seed, limits=self.limits)
                  for i, group in enumerate(groups)]
        found = execute_all(pool, [[stage] for stage in stages], f"evaluation on {part}", execute) if stages else []
        tables = [read(stage.out / "rows.parquet", need=("prompt",)) for stage in stages]
        return [[each | {"rows": [r for r in rows if r["policy"] == i]} for i, each in enumerate(f["policies"])]
                for [f], rows in zip(found, tables, strict=True)]


BIASES_OF = ("single", "ensemble")


COMPLETIONS = ("prompt", "completion")


def outcomes_of(group: list[Policy], steps: list[int], found: list[dict[str, Any]]) -> list[Outcome]:
    """`found` has a place for each step of each policy of the group, in order."""
    per_policy = [found[i * len(steps) : (i + 1) * len(steps)] for i in range(len(group))]
    return [Outcome(policy, steps, [each["rows"] for each in points],
                    [{k: v for k, v in each.items() if k != "rows"} for each in points])
            for policy, points in zip(group, per_policy, strict=True)]


def by_method(policies: list[Policy]) -> list[list[Policy]]:
    """One group a method: a worker compiles each method's step once."""
    methods = dict.fromkeys(p.method for p in policies)
    return [[p for p in policies if p.method == method] for method in methods]


def by_cell(policies: list[Policy]) -> list[list[Policy]]:
    """The candidates of each (rho, method), in order."""
    return [list(cell) for _, cell in groupby(policies, key=lambda p: (p.rho, p.method))]


def best(cell: list[Policy], most_kl: float | None) -> Policy:
    """Of candidates within the KL budget the one with the largest advantage; the nearest one where none is within."""
    near = [p for p in cell if most_kl is None or (p.validation_kl or 0.0) <= most_kl]
    return max(near, key=lambda p: p.validation or 0.0) if near else min(cell, key=lambda p: p.validation_kl or 0.0)


def searched(method: str, rho: float) -> tuple[float, float]:
    """(beta, learning rate) of `python -m benchmarks.search` at the nearest rho, or the defaults."""
    by_rho = SEARCHED.get(method, {rho: (METHODS[method].beta, 3e-3)})
    return by_rho[min(by_rho, key=lambda r: abs(r - rho))]


# section 6.1
GRID = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0)
GRIDS = {"ipo": (0.01, 0.1, 1.0, 3.0, 5.0, 10.0, 25.0)}


SEARCHED: dict[str, dict[float, tuple[float, float]]] = {
    "dpo": {0.2: (3.0, 1e-3), 0.5: (0.03, 3e-3), 0.8: (0.3, 3e-3)},
    "ipo": {0.2: (1.0, 3e-3), 0.5: (0.03, 3e-3), 0.8: (0.1, 3e-3)},
    "d-dpo": {0.2: (3.0, 3e-3), 0.5: (0.01, 3e-3), 0.8: (0.3, 3e-3)},
    "p-dpo": {0.2: (0.01, 3e-3), 0.5: (0.1, 3e-3), 0.8: (0.3, 3e-3)},
    "dp-dpo": {0.2: (3.0, 3e-3), 0.5: (0.03, 1e-2), 0.8: (0.3, 3e-3)},
    "e-dpo": {0.2: (0.3, 3e-3), 0.5: (3.0, 3e-3), 0.8: (0.3, 3e-3)},
    "hull": {0.2: (0.03, 1e-2), 0.5: (0.03, 1e-2), 0.8: (0.03, 1e-2)},
    "mean": {0.2: (0.03, 3e-3), 0.5: (0.01, 3e-3), 0.8: (0.1, 3e-3)},
}


REWARD = TrainingConfig(3_000, 64, 4e-6, 0, 1.0)


PRESETS = {
    "miniature": Paper(),
    "paper": Paper(  # what section 6.1 leaves open, PaLM-2-XS's shape and its fine-tuning, is our choice
        out=Path("runs/paper-scale"),
        preset="paper",
        rhos=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        learning_rates=(1e-6,),
        most_kl=None,
        pairs=30_000,
        model=ModelConfig(vocab_size=32_768, num_layers=24, d_model=1024, num_heads=8, head_dim=128, d_ff=4096),
        limits=Limits(512, 128),
        sft=TrainingConfig(5_000, 64, 1e-4, 500),
        oracle=REWARD,
        reward=REWARD,
        align=TrainingConfig(10_000, 16, 1e-6, 0, 1.0),
    ),
}
