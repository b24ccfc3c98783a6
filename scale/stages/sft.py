"""`sft`: supervised fine-tuning, which makes pi_ref."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from scale.data.dataset import Dataset, Limits
from scale.data.table import scan
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.io.model_folder import ModelFolder, load_trunk, save
from scale.model.adapters import AdapterConfig, combine, partition
from scale.model.config import ModelConfig
from scale.model.inference import sequence_logps
from scale.model.presets import published
from scale.model.transformer import Transformer, parameter_count
from scale.parallel.mesh import Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import initialise
from scale.stages.stage import Stage
from scale.train.batches import BatchPlan, plan_batches
from scale.train.loop import TrainingConfig, train
from scale.train.metrics import LoggerName
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import sft_step, start_state

# first weights are drawn once, and on a CPU random bits take long to compile: 5.7 s in the village
QUICKLY = {"xla_backend_optimization_level": 1}


@dataclass(frozen=True, kw_only=True)
class Sft(Stage):
    """Supervised fine-tuning: a language model of completions given prompts, which becomes pi_ref.

    Without --init, a tokenizer (BPE) and a model are made from scratch.
    """

    data: Path
    """Rows with `prompt` and `completion`, or preference rows: their chosen response is the
    completion."""
    init: Path | None = None
    """The policy to start from, with its tokenizer: a folder of ours, a Hugging Face folder, an id
    of its hub, a .gguf file, or smollm2. Then --model is not used."""
    validation: Path | None = None
    """Held-out rows: their loss is reported."""
    shape: str | None = None
    """A published shape (palm-8b, llama-3-8b, smollm2-135m, ...) to make from scratch, with all of
    its vocabulary."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of a model made from scratch."""
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(600, 32, 1.5e-2, 50))
    """The training run."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and z-loss."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters, trained in place of the weights of --init."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""
    log: tuple[LoggerName, ...] = ()
    """Where metrics go besides `metrics.jsonl`: tensorboard, wandb (extra `logging`)."""

    def run(self) -> dict[str, Any]:
        need = "prompt", "completion"
        rows = scan(self.data, need)
        held_out = scan(self.validation, need) if self.validation else None
        start = self.start(rows, make_runtime(self.runtime))
        dataset = start.make_dataset(rows, ["completion"], self.limits, str(self.data))
        validation = (
            start.make_dataset(held_out, ["completion"], self.limits, str(self.validation))
            if held_out is not None
            else None
        )
        training = self.training.for_rows(len(dataset))
        batches = plan_batches(dataset, training, start.model)
        model = self.fit(start.model, batches, training)
        save(replace(start, path=self.out, model=model))
        findings = {"rows": len(dataset), "rows seen": batches.rows.size}
        findings |= {"parameters": parameter_count(model)}
        return findings | batches.findings | validate(model, validation)

    def start(self, rows: Sequence[dict[str, Any]], runtime: Runtime) -> ModelFolder:
        """The model and tokenizer to train: those of --init, or new ones."""
        if self.init:
            return load_trunk(self.init, runtime, self.adapter, self.training.seed)
        if self.adapter.rank:
            raise InputError("--adapter.rank: adapters need a model below them; name --init")
        shape = published(self.shape, "--shape") if self.shape else self.model
        require_heads(shape)
        longest = max(shape.max_seq_len, self.limits.prompt + self.limits.response)
        config = replace(shape, max_seq_len=longest)
        texts = (as_text(row[name]) for row in rows for name in ("prompt", "completion"))
        tokenizer = train_tokenizer(texts, config.vocab_size)
        key = jax.random.key(self.training.seed)
        model = initialise(lambda key: Transformer(config, key, runtime), key, options=QUICKLY)
        return ModelFolder(self.out, model, config, tokenizer)

    def fit(
        self, model: Transformer, batches: BatchPlan, training: TrainingConfig
    ) -> Transformer:
        schedule = training.schedule
        throughput = batches.throughput(model)
        start, frozen = partition(model)
        trained = train(
            partial(sft_step, self.optimizer, schedule, frozen=frozen),
            start_state(start, self.optimizer, schedule, training.learning_rate),
            batches.batch,
            training.steps,
            self.out,
            "sft",
            record=self.record,
            loggers=self.log,
            throughput=throughput,
            rows_fn=batches.names,
        )
        return combine(trained, frozen)


def require_heads(shape: ModelConfig) -> None:
    """Refuse heads that RoPE cannot turn, or that the key/value heads do not divide."""
    if shape.head_dim % 2:
        raise InputError(f"--model.head-dim {shape.head_dim}: must be even")
    if shape.num_heads % shape.num_kv_heads:
        raise InputError(
            f"--model.num-kv-heads {shape.num_kv_heads}: does not divide {shape.num_heads} heads"
        )


def validate(model: Transformer, dataset: Dataset | None) -> dict[str, float]:
    """The loss on --validation."""
    if dataset is None:
        return {}
    logp = sequence_logps(model, dataset).sum()
    tokens = dataset.tokens.lengths[:, 1:].sum()
    return {"validation loss (nats a token)": float(-logp / tokens)}


def as_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt or a completion as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
