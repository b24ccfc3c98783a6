"""Level 2: from logits, labels and masks to sequence log-probabilities, with their gradients.

Each function takes the params and inputs of a case and returns its outputs. Gradients are derived
by hand. `ahead`, `add`, `mask_of` and `last_of` are for `mistakes/`: how many positions too late a
label's logits are read, how the log-probabilities of tokens are added, which of a response's are,
and what is taken for the prompt's last position.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Values = dict[str, Any]


def total(weights: np.ndarray, logps: np.ndarray) -> float:
    """The sum of weight times log-probability over the tokens [T] of a row."""
    return np.dot(weights, logps)


def summed(params: Values, inputs: Values, ahead: int = 0, add: Callable = total) -> Values:
    """The log-probability of each response, summed over tokens; 0 where the mask marks none.

    log pi(y | x) = sum_t mask_t log softmax(logits_{t-1})[id_t]

    Source: section 3.1.
    """
    mask = inputs["completion_mask"][:, 1:]
    return _scored(inputs, {"logps": mask}, _before(mask, ahead), add)


def averaged(params: Values, inputs: Values, ahead: int = 0, add: Callable = total) -> Values:
    """`summed` divided by the number of tokens that the mask marks; 0 where it marks none."""
    mask = inputs["completion_mask"][:, 1:]
    weights = {"logps": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)}
    return _scored(inputs, weights, _before(mask, ahead), add)


def shared_prefix(
    params: Values,
    inputs: Values,
    ahead: int = 0,
    add: Callable = total,
    mask_of: Callable = np.asarray,
    last_of: Callable = np.asarray,
) -> Values:
    """The log-probabilities of both responses of rows `[prompt | chosen | rejected]`.

    Segments are 0, 1 and 2, and -1 for padding. The last position of the prompt predicts the
    first token of EACH response.
    """
    segments = inputs["segments"]
    last = last_of(np.sum(segments == 0, axis=1, keepdims=True) - 1)
    starts = segments[:, 1:] != segments[:, :-1]
    logit_positions = np.where(starts, last, _before(starts, ahead))
    weights = {"chosen_logps": segments[:, 1:] == 1, "rejected_logps": segments[:, 1:] == 2}
    masks = {name: mask_of(weight) for name, weight in weights.items()}
    return _scored(inputs, masks, logit_positions, add)


def _before(mask: np.ndarray, ahead: int) -> np.ndarray:
    """The position before each of positions 1, 2, ..., or `ahead` further on."""
    return np.broadcast_to(np.arange(mask.shape[1]) + ahead, mask.shape)


def _scored(
    inputs: Values, weights: Values, logit_positions: np.ndarray, add: Callable
) -> Values:
    """Weighted sums of the log-probabilities of slots 1.., and the gradient of their total."""
    rows = np.arange(len(logit_positions))[:, None]
    logits, ids = inputs["logits"][rows, logit_positions], inputs["input_ids"][:, 1:]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    labels = np.eye(logits.shape[-1])[ids]
    tokens = np.take_along_axis(logps, ids[..., None], axis=-1)[..., 0]
    sums = {
        name: np.array(
            [add(w, np.where(w, t, 0.0)) for w, t in zip(weight, tokens, strict=True)]
        )
        for name, weight in weights.items()
    }
    grad = np.zeros(inputs["logits"].shape)
    np.add.at(
        grad,
        (rows, logit_positions),
        np.sum(list(weights.values()), axis=0)[..., None] * (labels - np.exp(logps)),
    )
    return sums | {"grads": {"logits": grad}}
