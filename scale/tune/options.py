"""The options of `tune`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from minipref.methods import METHODS
from scale.model.adapters import AdapterConfig
from scale.parallel.mesh import RuntimeConfig
from scale.stages.align import MethodName
from scale.stages.stage import Stage
from scale.train.metrics import LoggerName


@dataclass(frozen=True)
class TuneLimits:
    """Length limits; those that are not given follow from the rows."""

    prompt: int | None = None
    """Tokens of a prompt, of which a longer one keeps the end. Default: enough for 95% of the rows,
    as far as the model's sequences allow."""
    response: int | None = None
    """Tokens of a response; a longer one is not used. Default: enough for 95% of the rows."""


@dataclass(frozen=True, kw_only=True)
class Options(Stage):
    """What `tune` asks for."""

    QUICK_ROWS: ClassVar[int] = 32
    QUICK_REWARD_MODELS: ClassVar[int] = 2

    data: Path
    """Preference rows: `prompt`, `chosen`, `rejected`. A file, a pattern such as
    'shards/*.parquet', or an id of the Hugging Face hub, `ORG/NAME:SPLIT`."""
    model: Path
    """The model to align: a Hugging Face folder, an id of its hub, a .gguf file, smollm2, or a
    folder of ours."""
    out: Path = Path("runs/tune")
    """Folder of the run: report.md, curves.png, the aligned model in hf/, and a folder for each
    stage."""
    method: MethodName = "e-dpo"
    """The objective; README.md has the table."""
    beta: float | None = None
    """Weight of the KL in Eq. 1: the larger, the nearer the policy stays to the model (for ipo its
    tau). Default: 0.1."""
    epochs: float = 1.0
    """Passes over the pairs, of the policy and of each reward model."""
    learning_rate: float | None = None
    """Peak learning rate of the policy; the reward models' is four times it. Default: 5e-6 for a
    model of up to 0.5 billion parameters, 1e-6 up to 3 billion, 5e-7 above."""
    batch_size: int = 16
    """Pairs of a step."""
    accumulation: int = 1
    """Parts of a batch that pass through the model one after another: less memory, more time."""
    reward_models: int = 3
    """How many, for the methods that distil an ensemble; each learns from a bootstrap sample."""
    rows: int | None = None
    """Only the first so many rows of --data. Default: all."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used: the command stops, or the row is left out and
    listed in data/bad_rows.txt."""
    quick: bool = False
    """Rehearse every stage on 32 rows and 2 steps of 2 pairs: whether data and model can be read,
    not whether a batch fits into memory. The real run needs another --out."""
    seed: int = 0
    """Seed of the split, of the order of rows and of all random draws."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters, trained in place of the model's weights: less memory, and learning rates
    ten times as high."""
    limits: TuneLimits = field(default_factory=TuneLimits)
    """Length limits."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    @property
    def hf(self) -> Path:
        """The folder of the exported model, whose name says where it is a rehearsal's."""
        return self.out / ("hf-rehearsal" if self.quick else "hf")

    @property
    def num_reward_models(self) -> int:
        """How many reward models the method distils."""
        several = self.QUICK_REWARD_MODELS if self.quick else self.reward_models
        return {"none": 0, "single": 1, "ensemble": several}[METHODS[self.method].rewards]

    @property
    def used_rows(self) -> int | None:
        """The first so many rows are used."""
        if not self.quick:
            return self.rows
        return min(self.rows or self.QUICK_ROWS, self.QUICK_ROWS)
