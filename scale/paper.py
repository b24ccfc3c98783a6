"""Section 6 from corpus to figures: which stage reads what, and nothing else."""

from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from minipref.methods import METHODS
from scale.batches import Limits
from scale.model import ModelConfig
from scale.stages.align import Align, MethodName
from scale.stages.base import Stage, execute
from scale.stages.bias import Bias
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.pairs import Pairs
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.train import Training

ALL_METHODS: tuple[MethodName, ...] = get_args(MethodName)


@dataclass(frozen=True, kw_only=True)
class Paper(Stage):
    """Section 6 end to end: corpus, SFT, oracle, biased data, reward models, eight methods, evaluation, report."""

    out: Path = Path("runs/paper")
    """Folder of the run: report.md, results.csv, figures, and a folder for each stage."""
    preset: Literal["miniature", "paper"] = "miniature"
    """miniature: minutes on a laptop, hyperparameters as found by `python -m benchmarks.search`. paper: section
    6.1's own sizes and grids, for accelerators."""
    data: Path | None = None
    """Rows with `prompt` and `completion`. Default: the embedded docstring corpus."""
    rhos: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Length biases rho of the training sets D_rho."""
    methods: tuple[MethodName, ...] = ALL_METHODS
    """Methods to train."""
    seeds: int = 1
    """Repetitions of all that follows the oracle: biased sets, reward models, policies, samples."""
    betas: tuple[float, ...] = ()
    """Candidates for beta: all are trained, the best on validation is kept. Default: what the search found."""
    taus: tuple[float, ...] = ()
    """Candidates for IPO's tau. Default: what the search found."""
    learning_rates: tuple[float, ...] = ()
    """Candidates for the policies' learning rate. Default: what the search found."""
    pairs: int = 6000
    """Pairs of each D_rho, at most."""
    biases: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.8)
    """Length biases b of the ensemble's training sets."""
    samples: int = 4
    """Samples of pi_ref for each training prompt."""
    snapshots: int = 3
    """Points along each policy's training that are evaluated too, for comparisons at equal KL."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the policy and of every reward model."""
    limits: Limits = field(default_factory=lambda: Limits(56, 26, "keep-start"))
    """Length limits."""
    sft: Training = field(default_factory=lambda: Training(900, 32, 1.5e-2, 50))
    """Training of pi_ref."""
    oracle: Training = field(default_factory=lambda: Training(500, 32, 1e-3))
    """Training of the oracle reward model."""
    reward: Training = field(default_factory=lambda: Training(120, 32, 1e-3))
    """Training of each reward model."""
    align: Training = field(default_factory=lambda: Training(200, 16, 3e-3))
    """Training of each policy; its learning rate is searched, or found before."""

    def inputs(self) -> list[Path]:
        return [self.data] if self.data else []

    def candidates(self, method: str, rho: float) -> list[tuple[float, float]]:
        """(strength, learning rate) of each policy to train."""
        strength, rate = found(method, rho)
        strengths = self.betas if METHODS[method].strength == "beta" else self.taus
        return list(product(strengths or (strength,), self.learning_rates or (rate,)))

    def run(self) -> dict[str, Any]:
        self.shared_stages()
        results = [row for seed in range(self.seeds) for row in self.one_seed(seed)]
        return {"policies": len(results)}

    def shared_stages(self) -> None:
        """Stages 1 to 3: what does not depend on rho, method or seed."""
        at = self.out
        execute(Corpus(out=at / "corpus", data=self.data))
        execute(Sft(out=at / "sft", data=at / "corpus/train.parquet", validation=at / "corpus/validation.parquet",
                    model=self.model, training=self.sft, limits=self.limits))
        for part in ("train", "validation"):
            execute(Sample(out=at / f"samples/{part}", policy=at / "sft", data=at / f"corpus/{part}.parquet",
                           n=self.samples, limits=self.limits))
            execute(Pairs(out=at / f"pairs/{part}", data=at / f"samples/{part}/rows.parquet"))
        execute(Reward(out=at / "oracle", data=at / "pairs/train/human.parquet", init=at / "sft",
                       validation=at / "pairs/validation/human.parquet", training=self.oracle, limits=self.limits))
        for part in ("train", "validation"):
            execute(Score(out=at / f"labelled/{part}", data=at / f"pairs/{part}/rows.parquet", relabel=True,
                          rewards=at / "oracle", reference=at / "sft", limits=self.limits))

    def one_seed(self, seed: int) -> list[dict[str, Any]]:
        """Stages 4 to 7 of one repetition: a row for each policy."""
        at = self.out / f"seed-{seed}"
        for rho in self.rhos:
            self.rewards_of(at / f"rho-{rho}", rho, seed)
        policies = [p for cell in product(self.rhos, self.methods) for p in self.policies(at, *cell, seed)]
        validated = self.validate(policies, at, seed)
        selected = [max(cell, key=lambda p: p.validation) for cell in by_cell(validated)]
        self.test(selected, at, seed)
        return []

    def validate(self, policies: list["Policy"], at: Path, seed: int) -> list["Policy"]:
        """Model selection (section 6.1): the candidates' advantage on validation prompts; no search, no cost."""
        searched = [p for cell in by_cell(policies) if len(cell) > 1 for p in cell]
        if not searched:
            return policies
        found = execute(self.evaluation(at / "validation", "validation", [p.path for p in searched], seed))
        values = {p.path: each["advantage"] for p, each in zip(searched, found["policies"], strict=True)}
        return [p._replace(validation=values.get(p.path, 0.0)) for p in policies]

    def test(self, selected: list["Policy"], at: Path, seed: int) -> None:
        """The selected policies on test prompts, at each snapshot and at the end."""
        paths = [path for p in selected for path in (*snapshots(p.path, self.snapshots, self.align.steps), p.path)]
        execute(self.evaluation(at / "test", "test", paths, seed))

    def evaluation(self, out: Path, part: str, policies: list[Path], seed: int) -> Evaluate:
        return Evaluate(out=out, data=self.out / f"corpus/{part}.parquet", policies=tuple(policies),
                        reference=self.out / "sft", rewards=self.out / "oracle", seed=seed, limits=self.limits)

    def rewards_of(self, at: Path, rho: float, seed: int) -> None:
        """Stages 4 and 5: D_rho, r_rho and the ensemble r_{rho,b}; their rewards of D_rho as columns."""
        labelled = self.out / "labelled"
        execute(Bias(out=at / "data", data=labelled / "train/rows.parquet", tokenizer=self.out / "sft", rho=rho,
                     size=self.pairs, seed=seed))
        for name, biases in (("single", ()), ("ensemble", self.biases)):
            execute(Reward(out=at / f"rewards-{name}", data=at / "data/rows.parquet", init=self.out / "sft",
                           validation=labelled / "validation/rows.parquet", biases=biases,
                           training=replace(self.reward, seed=seed), limits=self.limits))
            execute(Score(out=at / f"scored-{name}", data=at / "data/rows.parquet", rewards=at / f"rewards-{name}",
                          limits=self.limits))

    def policies(self, at: Path, rho: float, method: MethodName, seed: int) -> list["Policy"]:
        """Stage 6: the candidates of one method at one bias."""
        scored = "ensemble" if METHODS[method].rewards == "ensemble" else "single"
        trained = []
        for strength, rate in self.candidates(method, rho):
            path = at / f"rho-{rho}" / "policies" / f"{method}-{strength:g}-{rate:g}"
            execute(Align(out=path, data=at / f"rho-{rho}/scored-{scored}/rows.parquet",
                          policy=self.out / "sft", method=method, strength=strength, snapshots=self.snapshots,
                          validation=self.out / "labelled/validation/rows.parquet",
                          training=replace(self.align, learning_rate=rate, seed=seed), limits=self.limits))
            trained.append(Policy(path, rho, method, strength, rate, seed))
        return trained


class Policy(NamedTuple):
    """One trained candidate; `validation` is its advantage on validation prompts where there was a choice."""

    path: Path
    rho: float
    method: MethodName
    strength: float
    learning_rate: float
    seed: int
    validation: float = 0.0


def by_cell(policies: list[Policy]) -> list[list[Policy]]:
    """The candidates of each (rho, method), in order."""
    return [list(cell) for _, cell in groupby(policies, key=lambda p: (p.rho, p.method))]


def snapshots(path: Path, number: int, steps: int) -> list[Path]:
    return [path / f"step-{(i + 1) * (steps // (number + 1))}" for i in range(number)]


def found(method: str, rho: float) -> tuple[float, float]:
    """(strength, learning rate) that `python -m benchmarks.search` found at the nearest rho."""
    nearest = min(FOUND[method], key=lambda r: abs(r - rho))
    return FOUND[method][nearest]


FOUND: dict[str, dict[float, tuple[float, float]]] = {
    method: {rho: (1.0 if method == "ipo" else 0.3, 3e-3) for rho in (0.2, 0.5, 0.8)} for method in ALL_METHODS
}

PRESETS = {
    "miniature": Paper(),
    "paper": Paper(
        out=Path("runs/paper-scale"),
        preset="paper",
        rhos=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        betas=(0.01, 0.1, 1, 3, 10, 30, 100),
        taus=(0.01, 0.1, 1, 3, 5, 10, 25),
        learning_rates=(1e-6,),
        pairs=30_000,
        limits=Limits(512, 128, "drop"),
        reward=Training(3_000, 64, 4e-6, 0, 1.0),
        align=Training(10_000, 16, 1e-6, 0, 1.0),
    ),
}
