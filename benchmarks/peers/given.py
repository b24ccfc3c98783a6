"""What the adapters share: names of inputs, and inputs that a softmax can give."""

from typing import Any

import numpy as np

Values = dict[str, Any]

SIDES = ("chosen", "rejected")
POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SCORES = ("score_chosen", "score_rejected")


def lowered(inputs: Values) -> Values:
    """The same log-ratios, from log-probabilities below 0 as a softmax gives them: both models' fall by as much.

    Errors: ValueError where they are not as many as the responses.
    """
    sizes = {lengths(inputs, side).shape for side in SIDES} | {inputs[name].shape for name in POLICY + REFERENCE}
    if len(sizes) > 1:
        raise ValueError("not one log-probability a response")
    drop = max(0.0, 1.0 + max(np.max(inputs[name]) for name in POLICY + REFERENCE))
    return {f"{who}_{side}_logps": inputs[f"{who}_{side}_logps"] - drop * lengths(inputs, side)
            for who in ("policy", "ref") for side in SIDES}


def lengths(inputs: Values, side: str) -> np.ndarray:
    """Tokens of each response: one where the case does not say."""
    return inputs.get(f"{side}_lengths", np.ones(len(inputs[f"policy_{side}_logps"]), int))
