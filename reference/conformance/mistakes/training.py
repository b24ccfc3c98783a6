"""Mistakes in training: each changes what the steps of a run are made of."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import Function, Mistake, Values, at, on

TABLES = ("table", "ref_table")


def step_by_step(step: Callable) -> Callable[[Function], Function]:
    """A run whose steps are `step(function, params, inputs, table, before)` -> loss, next table.

    `inputs` has the batches of one step, and `before` is the table one step ago, or the reference's
    before the first.
    """

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            losses: list[float] = []
            table, before = (inputs[name] for name in TABLES)
            for batch in inputs["batches"]:
                one = inputs | {"batches": batch[None], "table": table}
                loss, after = step(function, params, one, before)
                table, before = after, table
                losses.append(loss)
            return {"losses": np.array(losses), "parameters": table}

        return mistaken

    return change


def one_step(function: Function, params: Values, inputs: Values) -> tuple[float, np.ndarray]:
    made = function(params, inputs)
    return made["losses"][0], made["parameters"]


def reference_now(function: Function, params: Values, inputs: Values, before: np.ndarray):
    return one_step(function, params, inputs | {"ref_table": inputs["table"]})


def reference_behind(function: Function, params: Values, inputs: Values, before: np.ndarray):
    return one_step(function, params, inputs | {"ref_table": before})


def without_first(function: Function, params: Values, inputs: Values, before: np.ndarray):
    loss, table = one_step(function, params, inputs)
    first = before is inputs["ref_table"]
    return loss, inputs["table"] if first else table


def updated(direction: Callable) -> Callable[[Function], Function]:
    """A run with updates `direction(gradients, table)`, of the gradients up to this step, times the
    learning rate."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            rate, table = params["learning_rate"], inputs["table"]
            losses, gradients = list[float](), list[np.ndarray]()
            for batch in inputs["batches"]:
                one = inputs | {"batches": batch[None], "table": table}
                loss, after = one_step(function, params, one)
                losses.append(loss)
                gradients.append((table - after) / rate)
                table = table - rate * direction(gradients, table)
            return {"losses": np.array(losses), "parameters": table}

        return mistaken

    return change


def discounted(gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """The sum of gradients, each times `decay` to the power of its age."""
    ages = np.arange(len(gradients))[::-1]
    return np.tensordot(decay**ages, gradients, axes=1)


def adam(second: float, decay: float, gradients: list[np.ndarray], table: np.ndarray) -> np.ndarray:
    """Adam, whose first decay is 0.9; with weight decay it is AdamW."""
    steps = len(gradients)
    mean = discounted(gradients, 0.9) * 0.1 / (1 - 0.9**steps)
    square = discounted([g * g for g in gradients], second) * (1 - second) / (1 - second**steps)
    return mean / (np.sqrt(square) + 1e-8) + decay * table


def clipped(largest: float, epsilon: float, gradients: list[np.ndarray], table: np.ndarray):
    """The gradient, whose norm is no larger; PyTorch adds an epsilon to it."""
    return gradients[-1] * min(largest / (np.linalg.norm(gradients[-1]) + epsilon), 1.0)


def normed(gradients: list[np.ndarray], table: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(gradients[-1])
    return gradients[-1] / (norm if norm > 0 else 1.0)


def after_step(function: Function, params: Values, inputs: Values, before: np.ndarray):
    """The loss is that after the step."""
    _, table = one_step(function, params, inputs)
    loss, _ = one_step(function, params, inputs | {"table": table})
    return loss, table


def rates(factor_of: Callable[[int, int], float]) -> Callable[[Function], Function]:
    """The learning rate of each step times a factor of its number and theirs."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            table, losses, steps = inputs["table"], [], len(inputs["batches"])
            for number, batch in enumerate(inputs["batches"]):
                rate = params["learning_rate"] * factor_of(number, steps)
                one = inputs | {"batches": batch[None], "table": table}
                loss, table = one_step(function, params | {"learning_rate": rate}, one)
                losses.append(loss)
            return {"losses": np.array(losses), "parameters": table}

        return mistaken

    return change


def micro_steps(function: Function) -> Function:
    """Each micro-batch is a step; the loss of a step is the mean of theirs."""

    def mistaken(params: Values, inputs: Values) -> Values:
        steps, parts, rows = inputs["batches"].shape
        made = function(params, inputs | {"batches": inputs["batches"].reshape(-1, 1, rows)})
        return made | {"losses": made["losses"].reshape(steps, parts).mean(axis=1)}

    return mistaken


def parts_averaged(split: Callable, function: Function, params: Values, inputs: Values, before):
    """Each part of a step alone, then the mean of their losses and updates."""
    made = [
        one_step(function, params, inputs | {"batches": np.reshape(rows, (1, 1, -1))})
        for rows in split(inputs["batches"][0])
    ]
    losses, tables = zip(*made, strict=True)
    return np.mean(losses), np.mean(tables, axis=0)


def one_part(index: int, divided: bool, function: Function, params: Values, inputs: Values, before):
    """The update of one micro-batch, beside the loss of the whole step."""
    loss, _ = one_step(function, params, inputs)
    batches, table = inputs["batches"], inputs["table"]
    _, after = one_step(function, params, inputs | {"batches": batches[:, [index]]})
    return loss, table + (after - table) / (batches.shape[1] if divided else 1)


def scaled(factor: Callable, function: Function, params: Values, inputs: Values, before):
    """The loss of a step times a factor of its inputs."""
    loss, table = one_step(function, params, inputs)
    by = factor(inputs)
    return by * loss, inputs["table"] + by * (table - inputs["table"])


def tokens_of(inputs: Values) -> int:
    return inputs["chosen_mask"][np.ravel(inputs["batches"]), 1:].sum()


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
    Mistake("with the reference where training starts", "reference-moves",
        on(lambda x: {"ref_table": x["table"]})),
    Mistake("with micro-batches added, not averaged", "accumulation-scale", rate(1)),
    Mistake("with micro-batches divided by their number twice", "accumulation-scale", rate(-1)),
    Mistake("with the gradient ascended", "sign", at(learning_rate=lambda r: -r)),
    Mistake("with the first step skipped", "accumulation-scale", step_by_step(without_first)),
    *(Mistake(f"with gradients clipped to norm {{c}}{words}", "optimizer",
        lambda function, c, epsilon=epsilon: updated(partial(clipped, c, epsilon))(function))
        for words, epsilon in (("", 0.0), (" as in PyTorch", 1e-6))),
    Mistake("with the first micro-batch of each step alone", "accumulation-lost",
        on(lambda x: {"batches": x["batches"][:, :1]})),
    Mistake("with the last micro-batch of each step alone", "accumulation-lost",
        on(lambda x: {"batches": x["batches"][:, -1:]})),
    *(Mistake(f"with the gradient of the {side} micro-batch alone{words}", "accumulation-lost",
        step_by_step(partial(one_part, index, divided)))
        for side, index in (("first", 0), ("last", -1))
        for words, divided in (("", False), (", divided by their number", True))),
    Mistake("with micro-batches as steps of their own", "accumulation-scale", micro_steps),
    Mistake("with the batches of the steps in reverse order", "accumulation-scale",
        on(lambda x: {"batches": x["batches"][::-1]})),
    Mistake("at {c} times the learning_rate", "optimizer",
        lambda function, c: at(learning_rate=lambda r: c * r)(function)),
    Mistake("with momentum {c}", "optimizer",
        lambda function, c: updated(lambda g, table: discounted(g, c))(function)),
    Mistake("with gradients that are not zeroed between the steps", "optimizer",
        updated(lambda g, table: discounted(g, 1.0))),
    *(Mistake(f"with Adam (0.9, {second:g}){words}", "optimizer",
        updated(partial(adam, second, decay)))
        for second in (0.999, 0.95)
        for decay, words in ((0.0, ""), (0.01, " and weight decay 0.01"))),
    Mistake("with weight decay {c}", "optimizer",
        lambda function, c: updated(lambda g, table: g[-1] + c * table)(function)),
    Mistake("with the gradient's sign alone", "optimizer",
        updated(lambda g, table: np.sign(g[-1]))),
    Mistake("with the gradient over its norm", "optimizer", updated(normed)),
    Mistake("with the losses after the steps", "order", step_by_step(after_step)),
    Mistake("with a learning_rate that falls to 0 linearly", "optimizer",
        rates(lambda number, steps: 1 - number / steps)),
    Mistake("with a learning_rate that falls to 0 as a cosine", "optimizer",
        rates(lambda number, steps: (1 + np.cos(np.pi * number / steps)) / 2)),
    Mistake("with a learning_rate that rises linearly", "optimizer",
        rates(lambda number, steps: (number + 1) / steps)),
    Mistake("with the last step skipped", "accumulation-scale",
        rates(lambda number, steps: float(number < steps - 1))),
    Mistake("with the first batch in every step", "order",
        on(lambda x: {"batches": np.broadcast_to(x["batches"][:1], x["batches"].shape)})),
    Mistake("with the mean of each micro-batch's token mean", "mean-of-means",
        step_by_step(partial(parts_averaged, list))),
    Mistake("with the mean of each row's token mean", "mean-of-means",
        step_by_step(partial(parts_averaged, np.ravel))),
    Mistake("with the tokens added, not averaged", "batch-sum",
        step_by_step(partial(scaled, tokens_of))),
    Mistake("with the tokens added, over the number of rows", "sum-mean", step_by_step(
        partial(scaled, lambda x: tokens_of(x) / x["batches"].size))),
)
# fmt: on
