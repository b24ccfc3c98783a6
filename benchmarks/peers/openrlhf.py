"""OpenRLHF as a client of the conformance kit.

    python -m reference.conformance --adapter benchmarks.peers.openrlhf:adapter

Its modules import DeepSpeed and FlashAttention. Empty modules stand in for both, because nothing
that is called here uses them.
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


FLASH_ATTENTION = ("", ".bert_padding", ".utils", ".utils.distributed")
for missing in ("deepspeed", *(f"flash_attn{name}" for name in FLASH_ATTENTION)):
    sys.modules.setdefault(missing, StandIn(missing))

from openrlhf.models.loss import DPOLoss, LogExpLoss, PairWiseLoss  # noqa: E402
from openrlhf.models.utils import log_probs_from_logits  # noqa: E402
from openrlhf.trainer.dpo_trainer import DPOTrainer  # noqa: E402

from benchmarks.peers.inputs import POLICY, REFERENCE, SCORES, Values  # noqa: E402
from benchmarks.peers.table import Table  # noqa: E402
from benchmarks.peers.torch_common import constants, differentiable, gradients, means, scored  # noqa: E402


def preference(ipo: bool, params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, POLICY)
    loss_fn = DPOLoss(params["beta"], params.get("label_smoothing", 0.0), ipo)
    loss, chosen, rejected = loss_fn(*leaves.values(), *constants(inputs, REFERENCE))
    metrics = means(chosen=chosen, rejected=rejected)
    return {"loss": loss.item(), "grads": gradients(loss, leaves), "metrics": metrics}


def reward(loss_fn: torch.nn.Module, params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, SCORES)
    margins = constants(inputs, ("margins",)) if "margins" in inputs else []
    loss = loss_fn(*leaves.values(), *margins)
    return {"loss": loss.item(), "grads": gradients(loss, leaves)}


def sequences(reduction: int, params: Values, inputs: Values) -> Values:
    """The log-probabilities of responses, summed (0) or averaged (1).

    The trainer masks the prompt by its length, and padding by the attention mask.
    """
    leaves, ids = differentiable(inputs, ("logits",)), torch.tensor(inputs["input_ids"])
    tokens = log_probs_from_logits(leaves["logits"][:, :-1], ids[:, 1:])
    mask = torch.tensor(inputs["attention_mask"])
    logps = DPOTrainer._get_batch_logps(None, tokens, mask, prompt_lengths(inputs))
    return scored(logps[reduction], leaves)


def prompt_lengths(inputs: Values) -> list[int]:
    """The positions before each response.

    Raises:
        ValueError: The mask is not that of one response that lasts to the end of the row.
    """
    mask, attended = inputs["completion_mask"], inputs["attention_mask"]
    before = np.where(mask.any(1), mask.argmax(1), mask.shape[1])
    if not np.array_equal(mask, attended * (np.arange(attended.shape[1]) >= before[:, None])):
        raise ValueError("no length of a prompt gives this mask")
    return before.tolist()


adapter = Table(
    {
        ("dpo", "plain"): partial(preference, False),
        ("dpo", "conservative"): partial(preference, False),
        ("ipo", "sum"): partial(preference, True),
        ("reward", "bradley-terry"): partial(reward, PairWiseLoss()),
        ("reward", "margin"): partial(reward, PairWiseLoss()),
        ("logps", "sum"): partial(sequences, 0),
        ("logps", "mean"): partial(sequences, 1),
    }
)
logexp = Table(
    {("reward", dialect): partial(reward, LogExpLoss()) for dialect in ("bradley-terry", "margin")}
)
