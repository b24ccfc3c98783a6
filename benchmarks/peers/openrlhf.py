"""OpenRLHF as a client: `python -m reference.conformance --adapter benchmarks.peers.openrlhf:adapter`.

Its modules import DeepSpeed and FlashAttention, of which nothing that is called here makes use: empty modules stand in.
"""

import importlib.machinery
import sys
import types
from functools import partial

import numpy as np
import torch


class StandIn(types.ModuleType):
    """A package with any name in it."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__, self.__path__ = importlib.machinery.ModuleSpec(name, None), []

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


for missing in ("deepspeed", *(f"flash_attn{part}" for part in ("", ".bert_padding", ".utils", ".utils.distributed"))):
    sys.modules.setdefault(missing, StandIn(missing))

from openrlhf.models.loss import DPOLoss, LogExpLoss, PairWiseLoss  # noqa: E402
from openrlhf.models.utils import log_probs_from_logits  # noqa: E402
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402

from benchmarks.peers.given import POLICY, REFERENCE, SCORES, Values  # noqa: E402
from benchmarks.peers.table import Table  # noqa: E402
from benchmarks.peers.torch_common import constants, gradients, leaves, means, scored  # noqa: E402


def preference(ipo: bool, params: Values, inputs: Values) -> Values:
    given = leaves(inputs, POLICY)
    loss_fn = DPOLoss(params["beta"], params.get("label_smoothing", 0.0), ipo)
    loss, chosen, rejected = loss_fn(*given.values(), *constants(inputs, REFERENCE))
    metrics = means(chosen=chosen, rejected=rejected)
    return {"loss": loss.item(), "grads": gradients(loss, given), "metrics": metrics}


def reward(loss_fn: torch.nn.Module, params: Values, inputs: Values) -> Values:
    given = leaves(inputs, SCORES)
    margins = constants(inputs, ("margins",)) if "margins" in inputs else []
    loss = loss_fn(*given.values(), *margins)
    return {"loss": loss.item(), "grads": gradients(loss, given)}


def sequences(which: int, params: Values, inputs: Values) -> Values:
    """The trainer masks what stands before the response by the length of the prompt, and padding by its mask."""
    given, ids = leaves(inputs, ("logits",)), torch.tensor(inputs["input_ids"])
    tokens = log_probs_from_logits(given["logits"][:, :-1], ids[:, 1:])
    logps = DPOTrainer._get_batch_logps(None, tokens, torch.tensor(inputs["attention_mask"]), prompts(inputs))
    return scored(logps[which], given)


def prompts(inputs: Values) -> list[int]:
    """Slots before each response. Errors: ValueError where the mask is not that of one response to the row's end."""
    mask, attended = inputs["completion_mask"], inputs["attention_mask"]
    before = np.where(mask.any(1), mask.argmax(1), mask.shape[1])
    if not np.array_equal(mask, attended * (np.arange(attended.shape[1]) >= before[:, None])):
        raise ValueError("a mask that no length of a prompt gives")
    return before.tolist()


adapter = Table({
    ("dpo", "plain"): partial(preference, False),
    ("dpo", "conservative"): partial(preference, False),
    ("ipo", "sum"): partial(preference, True),
    ("reward", "bradley-terry"): partial(reward, PairWiseLoss()),
    ("reward", "margin"): partial(reward, PairWiseLoss()),
    ("logps", "sum"): partial(sequences, 0),
    ("logps", "mean"): partial(sequences, 1),
})
logexp = Table({("reward", dialect): partial(reward, LogExpLoss()) for dialect in ("bradley-terry", "margin")})
