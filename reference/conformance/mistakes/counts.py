"""Mistakes in the number of tokens that the log-probabilities of responses are divided by."""

from collections.abc import Callable

import numpy as np

from reference.conformance.mistakes.mistake import Function, Mistake, Values, then


def counted(count_of: Callable, name: str = "completion_mask") -> Callable[[Function], Function]:
    """The mean over another number of tokens: `count_of(mask)` [B] of a whole mask."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        right = np.maximum(inputs["completion_mask"][:, 1:].sum(axis=1), 1)
        return multiplied(made, right / np.maximum(count_of(inputs[name]), 1))

    return then(outputs)


def over(count_of: Callable) -> Callable[[Function], Function]:
    """All log-probabilities over one number: `count_of(mask)`."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        mask = inputs["completion_mask"]
        return multiplied(made, np.full(len(mask), 1 / np.maximum(count_of(mask), 1)))

    return then(outputs)


def multiplied(made: Values, factors: np.ndarray) -> Values:
    """The log-probability of each row times a factor."""
    grads = made["grads"]["logits"] * factors[:, None, None]
    return {"logps": made["logps"] * factors, "grads": {"logits": grads}}


# fmt: off
COUNTS = (
    Mistake("with all tokens of the row but one counted, the prompt and padding too",
        "mask-dropped", counted(lambda m: len(m[0]) - 1)),
    Mistake("with position 0 counted", "mask-dropped", counted(lambda m: m.sum(axis=1))),
    Mistake("with one token more counted", "mask-dropped",
        counted(lambda m: m[:, 1:].sum(axis=1) + 1)),
    Mistake("with the largest number of tokens in the batch counted", "mask-dropped",
        counted(lambda m: np.full(len(m), m[:, 1:].sum(axis=1).max()))),
    Mistake("with the batch's mean number of tokens counted", "mask-dropped",
        counted(lambda m: np.full(len(m), m[:, 1:].sum(axis=1).mean()))),
    Mistake("with all tokens of the batch counted", "mean-of-means",
        counted(lambda m: np.full(len(m), m[:, 1:].sum()))),
    Mistake("with the tokens of the row counted, the prompt and padding too", "mask-dropped",
        counted(lambda m: np.full(len(m), len(m[0])))),
    Mistake("with the tokens of the row but padding counted", "mask-dropped",
        counted(lambda m: m.sum(axis=1), "attention_mask")),
    Mistake("with the tokens of the row but the first and padding counted", "mask-dropped",
        counted(lambda m: m[:, 1:].sum(axis=1), "attention_mask")),
    Mistake("with the root of the number of tokens", "mask-dropped",
        counted(lambda m: m[:, 1:].sum(axis=1) ** 0.5)),
    Mistake("with one token fewer counted", "mask-dropped",
        counted(lambda m: m[:, 1:].sum(axis=1) - 1)),
    Mistake("over the number of all tokens of the batch", "mean-of-means",
        over(lambda m: m[:, 1:].sum())),
    Mistake("over the number of rows", "batch-sum", over(len)),
)
# fmt: on
