"""TRL as a client: `python -m reference.conformance --adapter benchmarks.peers.trl:adapter`.

The trainers' own loss methods run on a model that answers what it is given. `smoothed` sets `label_smoothing` where
`loss_type` is `sigmoid`, for which TRL's documentation claims nothing; so `adapter` does not claim `dpo/conservative`.
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

from benchmarks.peers.given import REFERENCE, SCORES, SIDES, Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import Rows, constants, gradients, labelled, leaves, rows_of, scored

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
DPO = {"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "use_weighting": False,
       "loss_weights": [1.0]}


class Given(torch.nn.Module):
    """A language model of these logits [B, T, V] under TRL's fused unembedding, here the identity."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.hidden = logits.clamp_min(torch.finfo(torch.float32).min)  # no matrix product takes infinities
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        add_fused_lm_head(self, outputs=FIELDS)  # type: ignore[arg-type]  # TRL reads what is above

    def forward(self) -> None:
        """TRL replaces it."""

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.eye(self.hidden.shape[-1]), bias=None)


def trainer(**attributes: Any) -> Any:
    """What of a trainer its loss method reads."""
    metrics: dict[str, list[float]] = defaultdict(list)
    shared = {"model": SimpleNamespace(training=False), "accelerator": ACCELERATOR, "aux_loss_enabled": False}
    return SimpleNamespace(**shared, **attributes, _metrics={"eval": metrics}, _total_train_tokens=0)


def preference(loss_type: str, params: Values, inputs: Values) -> Values:
    return of_rows(loss_type, params, rows_of(inputs))


def of_rows(loss_type: str, params: Values, rows: Rows) -> Values:
    smoothing = params.get("label_smoothing", 0.0)
    fake = trainer(**DPO, loss_types=[loss_type], beta=params["beta"], label_smoothing=smoothing)
    ids = torch.zeros_like(rows.completion_mask)
    batch = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": rows.completion_mask}
    batch |= dict(zip(REFERENCE, rows.ref, strict=True))
    loss = DPOTrainer._compute_loss(fake, Given(rows.logits), batch, False)
    metrics = {name: values[0] for name, values in fake._metrics["eval"].items() if name.startswith("rewards/")}
    return {"loss": loss.item(), "grads": gradients(loss, rows.given), "metrics": metrics}


def reward(params: Values, inputs: Values) -> Values:
    given = leaves(inputs, SCORES)
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    outputs = SimpleNamespace(logits=torch.cat(list(given.values()))[:, None])
    margin = {"margin": constants(inputs, ("margins",))[0]} if "margins" in inputs else {}
    loss = RewardTrainer.compute_loss(fake, lambda **_: outputs, margin)
    logged = fake._metrics["eval"]
    metrics = {"rewards/margins": logged["margin"][0], "rewards/accuracies": logged["accuracy"][0]}
    return {"loss": loss.item(), "grads": gradients(loss, given), "metrics": metrics}


def sequences(params: Values, inputs: Values) -> Values:
    """`DPOTrainer` adds up what the fused unembedding returns."""
    given = leaves(inputs, ("logits",))
    tokens = Given(given["logits"])(labels=labelled(inputs), fused_lm_head=True).log_probs
    return scored(tokens.sum(1), given)


def row(params: Values, inputs: Values) -> Values:
    """A reply of one turn as its text."""
    made = maybe_extract_prompt(inputs)
    replies = {name: made[name] for name in SIDES}
    texts = {name: r[0]["content"] if isinstance(r, list) and len(r) == 1 else r for name, r in replies.items()}
    return {"prompt": made["prompt"]} | texts


adapter = Table({
    ("dpo", "plain"): partial(preference, "sigmoid"),
    ("dpo", "robust"): partial(preference, "robust"),
    ("ipo", "token-mean"): partial(preference, "ipo"),
    ("reward", "bradley-terry"): reward,
    ("reward", "margin"): reward,
    ("logps", "sum"): sequences,
    ("data", "explicit"): row,
    ("data", "conversations"): row,
})
smoothed = Table({("dpo", "conservative"): partial(preference, "sigmoid")})
