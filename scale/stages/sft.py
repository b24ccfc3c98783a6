from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from minipref.training import init_state, sft_loss, train_step
from scale import folders
from scale.batches import Encoded, Limits, batch_indices, encode, take
from scale.inference import sequence_logps
from scale.model import ModelConfig, Transformer, logps
from scale.rows import read
from scale.stages.base import Stage
from scale.tokenizer import Codec, train_codec
from scale.train import OPTIMIZER, Training, hyper, train


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
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of a model made from scratch."""
    training: Training = field(default_factory=lambda: Training(600, 32, 1.5e-2, 50))
    """The training run."""
    limits: Limits = field(default_factory=Limits)
    """Length limits."""

    def inputs(self) -> list[Path]:
        return [path for path in (self.data, self.init, self.validation) if path]

    def run(self) -> dict[str, Any]:
        rows = read(self.data, need=("prompt", "completion"))
        config, codec, model = self.start(rows)
        data = encode(codec, rows, ["completion"], self.limits, str(self.data))
        model = fit(model, data, self.training, self.out)
        folders.save(self.out, model, config, codec)
        parameters = sum(a.size for a in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
        return {"rows": len(data.kept), "parameters": parameters} | self.validate(model, codec)

    def start(self, rows: list[dict[str, Any]]) -> tuple[ModelConfig, Codec, Transformer]:
        if self.init:
            folder = folders.load_policy(self.init)
            return folder.config, folder.codec, folder.model
        codec = train_codec((text(row[f]) for row in rows for f in ("prompt", "completion")), self.model.vocab)
        return self.model, codec, Transformer(self.model, jax.random.key(self.training.seed))

    def validate(self, model: Transformer, codec: Codec) -> dict[str, float]:
        if not self.validation:
            return {}
        rows = read(self.validation, need=("prompt", "completion"))
        data = encode(codec, rows, ["completion"], self.limits, str(self.validation)).data
        total = sequence_logps(model, data).sum()
        return {"validation loss (nats a token)": float(-total / (data.owners == 0).sum())}


def text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


@eqx.filter_jit
def sft_step(state, batch):
    return train_step(logps, sft_loss, OPTIMIZER, state, batch)


def fit(model: Transformer, data: Encoded, training: Training, out: Path) -> Transformer:
    state = init_state(model, OPTIMIZER, hyper(training))
    indices = partial(batch_indices, len(data.kept), training.batch, training.seed)
    return train(sft_step, state, lambda i: take(data.data, indices(i)), training.steps, out, "sft")
