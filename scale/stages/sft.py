from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from minipref.batch import Batch
from minipref.training import Metrics, TrainState, sft_loss
from scale.data.dataset import Limits
from scale.data.rows import read
from scale.data.tokenizer import train_tokenizer
from scale.io import model_folder as folders
from scale.model.config import ModelConfig
from scale.model.inference import sequence_logps
from scale.model.presets import published
from scale.model.response_logps import sum_of_logps
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.mesh import Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import initialise
from scale.stages.stage import TOKENS, Stage
from scale.train.batches import Schedule, schedule
from scale.train.loop import Training, hyper, train
from scale.train.metrics import LoggerName
from scale.train.optimizer import OptimizerConfig, language_step, start_state


@dataclass(frozen=True, kw_only=True)
class Sft(Stage):
    """Supervised fine-tuning: a language model of completions given prompts, which becomes pi_ref.

    Without --init, a tokenizer (BPE) and a model are made from scratch.
    """

    data: Path
    """Rows with `prompt` and `completion`, or preference rows (their chosen response is the completion)."""
    init: Path | None = None
    """Folder of a policy to start from, with its tokenizer; then --model is not used."""
    validation: Path | None = None
    """Held-out rows: their loss is reported."""
    shape: str | None = None
    """A published shape (palm-8b, llama-3-8b, smollm2-135m, ...) to make from scratch, with all of its vocabulary."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of a model made from scratch."""
    training: Training = field(default_factory=lambda: Training(600, 32, 1.5e-2, 50))
    """The training run."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and z-loss."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def inputs(self) -> list[Path]:
        return [path for path in (self.data, self.init, self.validation) if path]

    def run(self) -> dict[str, Any]:
        rows = read(self.data, need=("prompt", "completion"))
        runtime = make_runtime(self.runtime)
        start = self.start(rows, runtime)
        data = start.encode(rows, ["completion"], self.limits, str(self.data), self.out / TOKENS)
        batches = schedule(data, self.training, start.model)
        trained = replace(start, model=self.fit(start.model, batches))
        folders.save(self.out, trained.model, trained.config, trained.codec)
        found = {"rows": len(data), "parameters": parameter_count(trained.model)} | batches.findings
        return found | self.validate(trained)

    def start(self, rows: list[dict[str, Any]], runtime: Runtime) -> folders.Folder:
        if self.init:
            return folders.load_policy(self.init, runtime)
        shape = published(self.shape, "--shape") if self.shape else self.model
        config = replace(shape, max_seq_len=max(shape.max_seq_len, self.limits.prompt + self.limits.response))
        codec = train_tokenizer((text(row[f]) for row in rows for f in ("prompt", "completion")), config.vocab_size)
        key = jax.random.key(self.training.seed)
        return folders.Folder(self.out, initialise(lambda: Transformer(config, key, runtime)), config, codec)

    def fit(self, model: Transformer, batches: Schedule) -> Transformer:
        state, speed = start_state(model, self.optimizer, hyper(self.training)), batches.speed(model)
        return train(partial(sft_step, self.optimizer), state, batches.batch, self.training.steps, self.out, "sft",
                     record=self.record, loggers=self.log, speed=speed)

    def validate(self, trained: folders.Folder) -> dict[str, float]:
        if not self.validation:
            return {}
        rows = read(self.validation, need=("prompt", "completion"))
        data = trained.encode(rows, ["completion"], self.limits, str(self.validation)).data
        total = sequence_logps(trained.model, data).sum()
        return {"validation loss (nats a token)": float(-total / (data.response_ids == 0).sum())}


def text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def sft_step(optimizer: OptimizerConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    return language_step(sft_loss, optimizer, state, batch, sum_of_logps)
