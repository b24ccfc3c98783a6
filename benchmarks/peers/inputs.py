"""The inputs of the kit's cases: their names, and log-probabilities that a softmax can give."""

from typing import Any

import numpy as np

Values = dict[str, Any]

SIDES = ("chosen", "rejected")
POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SCORES = ("score_chosen", "score_rejected")


def lowered(inputs: Values) -> Values:
    """The same log-ratios, from log-probabilities below 0 as a softmax gives them.

    The log-probabilities of both models fall by the same amount.

    Raises:
        ValueError: There is not one log-probability for each response.
    """
    shapes = {lengths(inputs, side).shape for side in SIDES}
    shapes |= {inputs[name].shape for name in POLICY + REFERENCE}
    if len(shapes) > 1:
        raise ValueError("not one log-probability a response")
    drop = max(0.0, 1.0 + max(np.max(inputs[name]) for name in POLICY + REFERENCE))
    sides = dict(zip(POLICY + REFERENCE, SIDES + SIDES, strict=True))
    return {name: inputs[name] - drop * lengths(inputs, side) for name, side in sides.items()}


def lengths(inputs: Values, side: str) -> np.ndarray:
    """Tokens of each response: one where the case does not say."""
    return inputs.get(f"{side}_lengths", np.ones(len(inputs[f"policy_{side}_logps"]), int))
