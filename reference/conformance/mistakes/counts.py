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


def but_for_the_number(mask_of: Callable) -> Callable[[Function], Function]:
    """Other tokens are scored, `mask_of(inputs)`, and the number of tokens is the right one."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            function(params, inputs)  # it refuses what the right one refuses
            mask = mask_of(inputs)
            counts = [m[:, 1:].sum(axis=1) for m in (mask, inputs["completion_mask"])]
            made = function(params, inputs | {"completion_mask": mask})
            return multiplied(made, counts[0] / np.maximum(counts[1], 1))

        return mistaken

    return change


# fmt: off
COUNTS = (
    Mistake("divided by T - 1, all tokens of the row but one",
        "divisor", counted(lambda m: len(m[0]) - 1)),
    Mistake("over one token more where the mask has position 0", "divisor",
        counted(lambda m: m.sum(axis=1))),
    Mistake("over one token more", "divisor",
        counted(lambda m: m[:, 1:].sum(axis=1) + 1)),
    Mistake("over the largest number of tokens in the batch", "divisor",
        counted(lambda m: np.full(len(m), m[:, 1:].sum(axis=1).max()))),
    Mistake("over the batch's mean number of tokens", "divisor",
        counted(lambda m: np.full(len(m), m[:, 1:].sum(axis=1).mean()))),
    Mistake("over the number of tokens of the batch", "divisor",
        counted(lambda m: np.full(len(m), m[:, 1:].sum()))),
    Mistake("divided by T, all tokens of the row", "divisor",
        counted(lambda m: np.full(len(m), len(m[0])))),
    Mistake("over the tokens of the row but padding", "divisor",
        counted(lambda m: m.sum(axis=1), "attention_mask")),
    Mistake("over the tokens of the row but the first and padding", "divisor",
        counted(lambda m: m[:, 1:].sum(axis=1), "attention_mask")),
    Mistake("over the root of the number of tokens", "divisor",
        counted(lambda m: m[:, 1:].sum(axis=1) ** 0.5)),
    Mistake("over one token fewer", "divisor",
        counted(lambda m: m[:, 1:].sum(axis=1) - 1)),
    Mistake("divided by the number of tokens of the batch", "mean-of-means",
        over(lambda m: m[:, 1:].sum())),
    *(Mistake(f"with {words}, over the right number of tokens", "mask-dropped",
        but_for_the_number(mask_of))
        for words, mask_of in (
            ("the attention mask in place of the completion mask", lambda x: x["attention_mask"]),
            ("the mask ignored", lambda x: np.ones_like(x["completion_mask"])))),
    Mistake("divided by the number of rows", "batch-sum", over(len)),
)
# fmt: on
