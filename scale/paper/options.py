"""The options of section 6: what a run draws, trains and evaluates."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minipref.methods import METHODS
from scale.data.dataset import Limits
from scale.data.village import NUM_ROWS
from scale.model.config import ModelConfig
from scale.stages.align import MethodName
from scale.stages.stage import Stage
from scale.train.loop import TrainingConfig

ALL_METHODS: tuple[MethodName, ...] = tuple(METHODS)


@dataclass(frozen=True, kw_only=True)
class Options(Stage):
    """Section 6 end to end: corpus, SFT, oracle, biased data, reward models, policies, report.

    The defaults are those of the miniature.
    """

    EXTENDS = ("seeds",)
    out: Path = Path("runs/paper")
    """Folder of the run: report.md, results.csv, figures, and a folder for each stage."""
    preset: Literal["miniature", "paper"] = "miniature"
    """miniature: minutes on a laptop, hyperparameters by `python -m benchmarks.search`. paper:
    section 6.1's own sizes and grids, for accelerators, with a model of 0.4 billion parameters."""
    data: Path | None = None
    """Rows with `prompt` and `completion`; an oracle reward model of the human completions labels
    pairs and judges policies, as in section 6.1. Default: the village of `scale.data.village`,
    which has a true reward."""
    pages: int = NUM_ROWS
    """Rows of the village, without --data."""
    rhos: tuple[float, ...] = (0.2, 0.5, 0.8)
    """Length biases rho of the training sets D_rho."""
    methods: tuple[MethodName, ...] = ALL_METHODS
    """Methods to train."""
    seeds: int = 3
    """Repetitions, which draw everything anew: corpus, pi_ref, samples, reward models, policies."""
    seed: int = 0
    """The first seed; the others follow it."""
    betas: tuple[float, ...] = ()
    """Candidates for beta (ipo: for its tau). All are trained; the best on validation prompts is
    kept. Default: those of `searched.csv` (by `python -m benchmarks.search`), else the method's
    own; with --preset paper section 6.1's grids."""
    learning_rates: tuple[float, ...] = ()
    """Candidates for the policies' learning rate. Default: those of `searched.csv`, else 1e-3."""
    most_kl: float | None = 10.0
    """Candidates further than this from pi_ref (nats, validation prompts) are not kept, because
    they may exploit errors of the oracle."""
    pairs: int = 2000
    """Pairs of each D_rho, at most."""
    length_biases: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.8)
    """Length biases b of the ensemble's training sets."""
    prompts: int | None = 5000
    """Training prompts that pi_ref is sampled at, at most. None: all."""
    samples: int = 3
    """Samples of pi_ref for each of those prompts."""
    test_samples: int = 1
    """Samples of each policy, and of pi_ref, for each validation and test prompt."""
    snapshots: int = 0
    """Points along each policy's training that are evaluated too, to compare at equal KL."""
    init: Path | None = None
    """The policy that fine-tuning starts from, with its tokenizer: a folder of ours, a Hugging Face
    folder, an id of its hub, a .gguf file, or smollm2. Then --model is not used. Default: one made
    from scratch."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            vocab_size=576, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=64
        )
    )
    """Shape of the policy and of every reward model."""
    limits: Limits = field(default_factory=lambda: Limits(56, 24))
    """Length limits."""
    sft: TrainingConfig = field(default_factory=lambda: TrainingConfig(2000, 16, 5e-3, 50))
    """Training of pi_ref."""
    oracle: TrainingConfig = field(default_factory=lambda: TrainingConfig(800, 32, 1e-3))
    """Training of the oracle reward model."""
    reward: TrainingConfig = field(default_factory=lambda: TrainingConfig(120, 16, 3e-3))
    """Training of each reward model; the seed is the repetition's."""
    align: TrainingConfig = field(default_factory=lambda: TrainingConfig(100, 16, 1e-3))
    """Training of each policy; the seed is the repetition's, the learning rate a candidate."""
