"""ms-swift's DPO as a client of the conformance kit.

    python -m reference.conformance --adapter benchmarks.peers.ms_swift:adapter

It needs a TRL below 1.0, which lies in a folder of its own.
"""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.peers.registry import TRL029

sys.path.insert(0, str(TRL029))

import torch
from swift.rlhf_trainers.dpo_trainer import DPOTrainer

from benchmarks.peers.inputs import POLICY, REFERENCE, SIDES, Values, lengths
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import constants, differentiable, gradients, means


def preference(loss_type: str, params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, POLICY)
    logps = [*leaves.values(), *constants(inputs, REFERENCE)]
    if loss_type == "ipo":
        counts = [torch.tensor(lengths(inputs, side)) for side in SIDES]
        logps = [
            DPOTrainer._get_ipo_sequence_logps(sums, counts[i % 2]) for i, sums in enumerate(logps)
        ]
    losses, chosen, rejected = DPOTrainer.dpo_loss(trainer(params), *logps, loss_type)
    loss, metrics = losses.mean(), means(chosen=chosen, rejected=rejected)
    answer = {"loss": loss.item(), "per_example": losses.detach().numpy(), "metrics": metrics}
    return answer | {"grads": gradients(loss, leaves)}


def trainer(params: Values) -> Any:
    """An object with the attributes of a trainer that its loss method reads."""
    return SimpleNamespace(
        beta=params["beta"],
        label_smoothing=params.get("label_smoothing", 0.0),
        reference_free=False,
        f_divergence_type="reverse_kl",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )


adapter = Table(
    {
        ("dpo", "plain"): partial(preference, "sigmoid"),
        ("dpo", "conservative"): partial(preference, "sigmoid"),
        ("dpo", "robust"): partial(preference, "robust"),
        ("ipo", "token-mean"): partial(preference, "ipo"),
    }
)
