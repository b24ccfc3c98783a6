"""TorchRL's reward model loss as a client of the conformance kit.

python -m reference.conformance --adapter benchmarks.peers.torchrl:adapter
"""

from types import SimpleNamespace
from typing import Any

import torch
from torchrl.modules.models.llm import GPT2RewardModel

from benchmarks.peers.inputs import SCORES, Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import differentiable, gradients

PADDING = 2


def reward(params: Values, inputs: Values) -> Values:
    """Responses of one token, which differ."""
    leaves = differentiable(inputs, SCORES)
    chosen, rejected = (batch(i, leaf[:, None]) for i, leaf in enumerate(leaves.values()))
    loss = GPT2RewardModel._compute_reward_loss(chosen, rejected, PADDING)
    return {"loss": loss.item(), "grads": gradients(loss, leaves)}


def batch(token: int, rewards: torch.Tensor) -> Any:
    """Rows of this token, with a reward at each."""
    ids = torch.full(rewards.shape, token)
    return SimpleNamespace(input_ids=ids, rewards=rewards)


adapter = Table({("reward", "bradley-terry"): reward})
