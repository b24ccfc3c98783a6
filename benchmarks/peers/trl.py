"""TRL as a client: `python -m reference.conformance --adapter benchmarks.peers.trl:adapter`.

The loss methods of the trainers themselves run, on a model that returns the logits of the case.
`smoothed` sets `label_smoothing` where `loss_type` is `sigmoid`. TRL's documentation claims nothing
about this, so `adapter` does not claim `dpo/conservative`.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from trl import maybe_extract_prompt
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.peers.inputs import REFERENCE, SCORES, SIDES, Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import (
    Rows,
    constants,
    differentiable,
    gradients,
    labelled,
    rows_of,
    scored,
)

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)
DPO = {
    "ld_alpha": None,
    "precompute_ref_logps": True,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "loss_weights": [1.0],
}


class LogitsModel(torch.nn.Module):
    """A language model of these logits [B, T, V].

    They are the hidden states, and the unembedding, which TRL fuses, is the identity.
    """

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        lowest = torch.finfo(torch.float32).min
        self.hidden = logits.clamp_min(lowest)  # a matrix product takes no infinities
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        add_fused_lm_head(self, outputs=FIELDS)  # type: ignore[arg-type]  # TRL reads what is above

    def forward(self) -> None:
        """TRL replaces it."""

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.eye(self.hidden.shape[-1]), bias=None)


def trainer(**attributes: Any) -> Any:
    """An object with the attributes of a trainer that its loss method reads."""
    metrics: dict[str, list[float]] = defaultdict(list)
    shared = {
        "model": SimpleNamespace(training=False),
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
    }
    state = {"_metrics": {"eval": metrics}, "_total_train_tokens": 0}
    return SimpleNamespace(**shared, **attributes, **state)


def preference(loss_type: str, params: Values, inputs: Values) -> Values:
    return preference_of_rows(loss_type, params, rows_of(inputs))


def preference_of_rows(loss_type: str, params: Values, rows: Rows) -> Values:
    smoothing = params.get("label_smoothing", 0.0)
    fake = trainer(**DPO, loss_types=[loss_type], beta=params["beta"], label_smoothing=smoothing)
    ids = torch.zeros_like(rows.completion_mask)
    batch = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": rows.completion_mask}
    batch |= dict(zip(REFERENCE, rows.ref, strict=True))
    loss = DPOTrainer._compute_loss(fake, LogitsModel(rows.logits), batch, False)
    logged = {name: values[0] for name, values in fake._metrics["eval"].items()}
    metrics = {name: value for name, value in logged.items() if name.startswith("rewards/")}
    return {"loss": loss.item(), "grads": gradients(loss, rows.leaves), "metrics": metrics}


def reward(params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, SCORES)
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    outputs = SimpleNamespace(logits=torch.cat(list(leaves.values()))[:, None])
    margin = {"margin": constants(inputs, ("margins",))[0]} if "margins" in inputs else {}
    loss = RewardTrainer.compute_loss(fake, lambda **_: outputs, margin)
    logged = fake._metrics["eval"]
    metrics = {"rewards/margins": logged["margin"][0], "rewards/accuracies": logged["accuracy"][0]}
    return {"loss": loss.item(), "grads": gradients(loss, leaves), "metrics": metrics}


def sequences(params: Values, inputs: Values) -> Values:
    """The sums that `DPOTrainer` forms of what the fused unembedding returns."""
    leaves = differentiable(inputs, ("logits",))
    tokens = LogitsModel(leaves["logits"])(labels=labelled(inputs), fused_lm_head=True).log_probs
    return scored(tokens.sum(1), leaves)


def row(params: Values, inputs: Values) -> Values:
    """The row that TRL makes; a reply of one turn becomes its text."""
    extracted = maybe_extract_prompt(inputs)

    def as_text(reply: Any) -> Any:
        one_turn = isinstance(reply, list) and len(reply) == 1
        return reply[0]["content"] if one_turn else reply

    texts = {name: as_text(extracted[name]) for name in SIDES}
    return {"prompt": extracted["prompt"]} | texts


adapter = Table(
    {
        ("dpo", "plain"): partial(preference, "sigmoid"),
        ("dpo", "robust"): partial(preference, "robust"),
        ("ipo", "token-mean"): partial(preference, "ipo"),
        ("reward", "bradley-terry"): reward,
        ("reward", "margin"): reward,
        ("logps", "sum"): sequences,
        ("data", "explicit"): row,
        ("data", "conversations"): row,
    }
)
smoothed = Table({("dpo", "conservative"): partial(preference, "sigmoid")})
