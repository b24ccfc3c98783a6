"""Mistakes in training: each changes what the steps of a run are made of."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import Function, Mistake, Values, at, on, on_case
from reference.conformance.mistakes.optimizers import OPTIMIZERS
from reference.conformance.mistakes.steps import Step, Updated, step_by_step
from reference.conformance.mistakes.tokens import MASKS


def reference_now(one: Step) -> Updated:
    return one.right(ref_table=one.table)


def reference_behind(one: Step) -> Updated:
    return one.right(ref_table=one.before)


def synchronised(move: Callable[[int, np.ndarray, np.ndarray], np.ndarray], one: Step) -> Updated:
    """After each step the reference becomes `move(number, reference, policy)`."""
    ref = one.memory[-1] if one.memory else one.inputs["ref_table"]
    loss, table = one.right(ref_table=ref)
    one.memory.append(move(one.number, ref, table))
    return loss, table


def each(n: int, number: int, ref: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table if (number + 1) % n == 0 else ref


def after_step(one: Step) -> Updated:
    """The loss is that after the step."""
    _, table = one.right()
    loss, _ = one.right(table=table)
    return loss, table


def micro_steps(function: Function) -> Function:
    """Each micro-batch is a step; the loss of a step is the mean of theirs."""

    def mistaken(params: Values, inputs: Values) -> Values:
        steps, parts, rows = inputs["batches"].shape
        made = function(params, inputs | {"batches": inputs["batches"].reshape(-1, 1, rows)})
        return made | {"losses": made["losses"].reshape(steps, parts).mean(axis=1)}

    return mistaken


def parts_averaged(split: Callable, one: Step) -> Updated:
    """Each part of a step alone, then the mean of their losses and updates."""
    parts = [np.reshape(part, (1, 1, -1)) for part in split(one.inputs["batches"][0])]
    losses, tables = zip(*(one.right(batches=part) for part in parts), strict=True)
    return float(np.mean(losses)), np.mean(tables, axis=0)


def one_part(index: int, divided: bool, one: Step) -> Updated:
    """The update of one micro-batch, beside the loss of the whole step."""
    loss, _ = one.right()
    batches = one.inputs["batches"]
    _, gradient = one.gradient(batches=batches[:, [index]])
    return loss, one.moved(gradient / (batches.shape[1] if divided else 1))


def reported(index: int, divided: bool, one: Step) -> Updated:
    """The loss of one micro-batch, beside the update of the whole step."""
    _, table = one.right()
    batches = one.inputs["batches"]
    loss, _ = one.right(batches=batches[:, [index]])
    return loss / (batches.shape[1] if divided else 1), table


def scaled(factor: Callable, one: Step) -> Updated:
    """The loss of a step times a factor of its inputs."""
    loss, gradient = one.gradient()
    by = factor(one.inputs)
    return by * loss, one.moved(by * gradient)


def tokens_of(inputs: Values) -> int:
    return inputs["chosen_mask"][np.ravel(inputs["batches"]), 1:].sum()


def smoothed(share: float, one: Step) -> Updated:
    """The chosen responses' tokens have `share` of their label spread over the vocabulary."""
    loss, gradient = one.gradient()
    rows = np.ravel(one.inputs["batches"])
    before = one.inputs["chosen_ids"][rows, :-1][one.inputs["chosen_mask"][rows, 1:] == 1]
    logps = one.table - np.logaddexp.reduce(one.table, axis=1, keepdims=True)
    counts = np.bincount(before, minlength=len(logps))[:, None] / len(before)
    uniform = counts * (np.exp(logps) - 1 / logps.shape[1])
    spread = -np.sum(counts * logps) / logps.shape[1]
    update = (1 - share) * gradient + share * uniform
    return (1 - share) * loss + share * spread, one.moved(update)


def positions(of: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[Function], Function]:
    """The reference is read for other pairs: `of(batches, pairs)`."""
    return on(lambda x: {"ref_batches": of(x["batches"], len(x["chosen_ids"]))})


def masks(mask_of: Callable, params: Values, inputs: Values) -> Values:
    """Another mask of both responses, as in the log-probabilities of tokens."""
    return {
        name: mask_of(params, {"input_ids": inputs[ids]}, inputs[name])
        for ids, name in (("chosen_ids", "chosen_mask"), ("rejected_ids", "rejected_mask"))
    }


def of_masks(mask_of: Callable) -> Callable[[Function], Function]:
    return on_case(partial(masks, mask_of))


def over_right_number(mask_of: Callable, one: Step) -> Updated:
    """Another mask in the loss of tokens, and not in their number."""
    other = masks(mask_of, one.params, one.inputs)
    loss, gradient = one.gradient(**other)
    share = tokens_of(one.inputs | other) / tokens_of(one.inputs)
    return share * loss, one.moved(share * gradient)


def rate(power: int) -> Callable[[Function], Function]:
    """The learning rate times a power of the number of micro-batches."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            factor = inputs["batches"].shape[1] ** power
            return at(learning_rate=lambda rate: factor * rate)(function)(params, inputs)

        return mistaken

    return change


# fmt: off
TRAINING = (
    Mistake("with the policy as its own reference", "reference-moves", step_by_step(reference_now)),
    Mistake("with a reference one step behind the policy", "reference-moves",
        step_by_step(reference_behind)),
    *(Mistake(f"with the reference replaced by the policy every {n} steps", "reference-moves",
        step_by_step(partial(synchronised, partial(each, n)))) for n in range(2, 6)),
    Mistake("with the reference moved by {c} of the way to the policy after each step",
        "reference-moves", lambda function, c: step_by_step(partial(synchronised,
            lambda number, ref, table: ref + c * (table - ref)))(function)),
    Mistake("with the reference where training starts", "reference-moves",
        on(lambda x: {"ref_table": x["table"]})),
    Mistake("with the reference of the pairs in the order of the data, not of the batches",
        "order", positions(
            lambda batches, pairs: np.arange(batches.size).reshape(batches.shape) % pairs)),
    Mistake("with the reference of the pairs at the batch's own positions", "order",
        positions(lambda batches, pairs: np.broadcast_to(
            np.arange(batches[0].size).reshape(batches.shape[1:]), batches.shape))),
    Mistake("with the reference of the pairs at the micro-batch's own positions", "order",
        positions(lambda batches, pairs: np.broadcast_to(
            np.arange(batches.shape[-1]), batches.shape))),
    Mistake("with micro-batches added, not averaged", "accumulation-scale", rate(1)),
    Mistake("with micro-batches divided by their number twice", "accumulation-scale", rate(-1)),
    Mistake("with the gradient ascended", "sign", at(learning_rate=lambda r: -r)),
    Mistake("with the first micro-batch of each step alone", "accumulation-lost",
        on(lambda x: {"batches": x["batches"][:, :1]})),
    Mistake("with the last micro-batch of each step alone", "accumulation-lost",
        on(lambda x: {"batches": x["batches"][:, -1:]})),
    *(Mistake(f"with the gradient of the {side} micro-batch alone{words}", "accumulation-lost",
        step_by_step(partial(one_part, index, divided)))
        for side, index in (("first", 0), ("last", -1))
        for words, divided in (("", False), (", divided by their number", True))),
    *(Mistake(f"with the loss of the {side} micro-batch alone reported{words}", "metrics",
        step_by_step(partial(reported, index, divided)))
        for side, index in (("first", 0), ("last", -1))
        for words, divided in (("", False), (", divided by their number", True))),
    Mistake("with micro-batches as steps of their own", "accumulation-scale", micro_steps),
    Mistake("with the batches of the steps in reverse order", "accumulation-scale",
        on(lambda x: {"batches": x["batches"][::-1]})),
    Mistake("with the losses after the steps", "order", step_by_step(after_step)),
    Mistake("with the first batch in every step", "order",
        on(lambda x: {"batches": np.broadcast_to(x["batches"][:1], x["batches"].shape)})),
    Mistake("with label smoothing {c} over the vocabulary", "link",
        lambda function, c: step_by_step(partial(smoothed, c))(function)),
    Mistake("with the mean of each micro-batch's token mean", "mean-of-means",
        step_by_step(partial(parts_averaged, list))),
    Mistake("with the mean of each row's token mean", "mean-of-means",
        step_by_step(partial(parts_averaged, np.ravel))),
    Mistake("with the tokens added, not averaged", "batch-sum",
        step_by_step(partial(scaled, tokens_of))),
    Mistake("with the tokens added, over the number of rows", "sum-mean", step_by_step(
        partial(scaled, lambda x: tokens_of(x) / x["batches"].size))),
    *OPTIMIZERS,
    *(Mistake(name, flag, of_masks(mask_of)) for name, flag, mask_of in MASKS),
    *(Mistake(f"{name}, over the right number of tokens", flag,
        step_by_step(partial(over_right_number, mask_of))) for name, flag, mask_of in MASKS),
)
# fmt: on
