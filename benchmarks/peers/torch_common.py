"""What the adapters of the PyTorch libraries share: arrays to tensors, and gradients back."""

from typing import NamedTuple

import numpy as np
import torch

from benchmarks.peers.given import POLICY, REFERENCE, SIDES, Values, lengths, lowered


def leaves(inputs: Values, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Tensors to differentiate in."""
    return {name: torch.tensor(inputs[name], dtype=torch.float32, requires_grad=True) for name in names}


def constants(inputs: Values, names: tuple[str, ...]) -> list[torch.Tensor]:
    return [torch.tensor(inputs[name], dtype=torch.float32) for name in names]


def gradients(loss: torch.Tensor, given: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """By the library's own backward pass."""
    loss.backward()
    return {name: leaf.grad.numpy() for name, leaf in given.items() if leaf.grad is not None}


def means(**values: torch.Tensor) -> dict[str, float]:
    """`chosen=x` as `{"rewards/chosen": mean of x}`."""
    return {f"rewards/{name}": value.mean().item() for name, value in values.items()}


def labelled(inputs: Values) -> torch.Tensor:
    """Labels [B, T]: the tokens that the mask marks, -100 elsewhere. Errors: ValueError where shapes differ."""
    return torch.tensor(np.where(inputs["completion_mask"] == 1, inputs["input_ids"], -100))


def scored(logps: torch.Tensor, logits: dict[str, torch.Tensor]) -> Values:
    """The answer of `logps/sum` and `logps/mean`."""
    return {"logps": logps.detach().numpy(), "grads": gradients(logps.sum(), logits)}


class Rows(NamedTuple):
    """Chosen, then rejected rows of one prompt token and a response, of token 0 throughout.

    Each response's log-probability is spread evenly over its tokens; the rest is that of token 1, which never occurs.
    """

    given: dict[str, torch.Tensor]
    ref: list[torch.Tensor]
    logits: torch.Tensor
    ref_logits: torch.Tensor
    completion_mask: torch.Tensor


def rows_of(inputs: Values) -> Rows:
    lower = lowered(inputs)
    given, ref = leaves(lower, POLICY), constants(lower, REFERENCE)
    sizes = torch.tensor(np.concatenate([lengths(inputs, side) for side in SIDES]))[:, None]
    predictors = torch.arange(int(sizes.max()) + 1) < sizes

    def logits(logps: list[torch.Tensor]) -> torch.Tensor:
        tokens = torch.where(predictors, torch.cat(logps)[:, None] / sizes, -1.0)
        return torch.stack([tokens, torch.log(-torch.expm1(tokens))], -1)

    mask = predictors.roll(1, 1).long()
    return Rows(given, ref, logits(list(given.values())), logits(ref), mask)
