"""What the adapters of PyTorch libraries share: arrays to tensors, and gradients back to arrays."""

from typing import NamedTuple

import numpy as np
import torch

from benchmarks.peers.inputs import POLICY, REFERENCE, SIDES, Values, lengths, lowered


def differentiable(inputs: Values, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Inputs as tensors that have gradients."""
    return {
        name: torch.tensor(inputs[name], dtype=torch.float32, requires_grad=True) for name in names
    }


def constants(inputs: Values, names: tuple[str, ...]) -> list[torch.Tensor]:
    """Inputs as tensors without gradients."""
    return [torch.tensor(inputs[name], dtype=torch.float32) for name in names]


def gradients(loss: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The gradients by the leaves, from the library's own backward pass."""
    loss.backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}


def means(**values: torch.Tensor) -> dict[str, float]:
    """`chosen=x` as `{"rewards/chosen": mean of x}`."""
    return {f"rewards/{name}": value.mean().item() for name, value in values.items()}


def labelled(inputs: Values) -> torch.Tensor:
    """Labels [B, T]: the tokens that the mask marks, and -100 elsewhere.

    Raises:
        ValueError: The shapes differ.
    """
    return torch.tensor(np.where(inputs["completion_mask"] == 1, inputs["input_ids"], -100))


def scored(logps: torch.Tensor, logits: dict[str, torch.Tensor]) -> Values:
    """The answer of `logps/sum` and `logps/mean`."""
    return {"logps": logps.detach().numpy(), "grads": gradients(logps.sum(), logits)}


class Rows(NamedTuple):
    """Chosen rows, then rejected rows: one prompt token and a response, all of token 0.

    The log-probability of a response is spread evenly over its tokens. The rest of the probability
    is that of token 1, which never occurs.

    Attributes:
        leaves: The log-probabilities under the policy, with gradients.
        ref: Those under the reference.
        logits: Logits of the policy.
        ref_logits: Logits of the reference.
        completion_mask: 1 at the tokens of responses.
    """

    leaves: dict[str, torch.Tensor]
    ref: list[torch.Tensor]
    logits: torch.Tensor
    ref_logits: torch.Tensor
    completion_mask: torch.Tensor


def rows_of(inputs: Values) -> Rows:
    """Rows whose responses have the log-ratios of a case."""
    lower = lowered(inputs)
    leaves, ref = differentiable(lower, POLICY), constants(lower, REFERENCE)
    sizes = torch.tensor(np.concatenate([lengths(inputs, side) for side in SIDES]))[:, None]
    logit_positions = torch.arange(int(sizes.max()) + 1) < sizes

    def logits(logps: list[torch.Tensor]) -> torch.Tensor:
        tokens = torch.where(logit_positions, torch.cat(logps)[:, None] / sizes, -1.0)
        return torch.stack([tokens, torch.log(-torch.expm1(tokens))], -1)

    mask = logit_positions.roll(1, 1).long()
    return Rows(leaves, ref, logits(list(leaves.values())), logits(ref), mask)


class Turns(torch.nn.Module):
    """A language model that returns these logits, one after the other."""

    def __init__(self, *logits: torch.Tensor):
        super().__init__()
        self.left = list(logits)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.left.pop(0)[:, : tokens.shape[1]]
