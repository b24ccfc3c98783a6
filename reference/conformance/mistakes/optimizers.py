"""Mistakes in what a step does with its gradient: other optimizers, clipping and schedules."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import Function, Mistake, at
from reference.conformance.mistakes.steps import Step, Updated, step_by_step

MOST = 5
"""Steps of a warm-up that are looked for, at most."""


def updated(direction: Callable) -> Callable[[Function], Function]:
    """A run with updates `direction(gradients, table)`, of the gradients up to this step, times the
    learning rate."""

    def step(one: Step) -> Updated:
        loss, gradient = one.gradient()
        one.memory.append(gradient)
        return loss, one.moved(direction(one.memory, one.table))

    return step_by_step(step)


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


def clipped(gradient: np.ndarray, largest: float, epsilon: float) -> np.ndarray:
    """The gradient, whose norm is no larger; PyTorch adds an epsilon to it."""
    return gradient * min(largest / (np.linalg.norm(gradient) + epsilon), 1.0)


def clipped_once(largest: float, epsilon: float, one: Step) -> Updated:
    loss, gradient = one.gradient()
    return loss, one.moved(clipped(gradient, largest, epsilon))


def clipped_in_parts(largest: float, epsilon: float, one: Step) -> Updated:
    """The mean of the clipped gradients of the micro-batches."""
    loss, _ = one.right()
    parts = [one.gradient(batches=rows[None, None])[1] for rows in one.inputs["batches"][0]]
    update = np.mean([clipped(part, largest, epsilon) for part in parts], axis=0)
    return loss, one.moved(update)


def clipped_each_time(largest: float, epsilon: float, one: Step) -> Updated:
    """The gradient that is accumulated is clipped after each micro-batch."""
    (loss, _), batches = one.right(), one.inputs["batches"][0]
    gradient = np.zeros_like(one.table)
    for rows in batches:
        _, part = one.gradient(batches=rows[None, None])
        gradient = clipped(gradient + part / len(batches), largest, epsilon)
    return loss, one.moved(gradient)


def normed(gradients: list[np.ndarray], table: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(gradients[-1])
    return gradients[-1] / (norm if norm > 0 else 1.0)


def rates(factor_of: Callable[[int, int], float]) -> Callable[[Function], Function]:
    """The learning rate of each step times a factor of its number and theirs."""

    def step(one: Step) -> Updated:
        loss, gradient = one.gradient()
        return loss, one.moved(factor_of(one.number, one.steps) * gradient)

    return step_by_step(step)


def scheduled(warmup: int, first: int, fall: Callable, number: int, steps: int) -> float:
    """A factor that rises by 1 / warmup in each step of the warm-up, and then falls.

    It begins with 0, or where `first` is 1 with 1 / warmup.
    """
    if number < warmup:
        return (number + first) / warmup
    return float(fall((number - warmup) / (steps - warmup)))


FALLS: dict[str, Callable[[float], float]] = {
    "": lambda share: 1.0,
    " falls to 0 linearly": lambda share: 1 - share,
    " falls to 0 as a cosine": lambda share: (1 + np.cos(np.pi * share)) / 2,
}


def schedules() -> Iterator[Mistake]:
    """Schedules with a warm-up from 0 or from its first fraction, and without one."""
    warmups = [(0, 0), *((n, first) for n in range(1, MOST + 1) for first in (0, 1) if n > first)]
    for warmup, first in warmups:
        begins = f"1/{warmup}" if first else "0"
        rises = f" rises from {begins} over {warmup} step{'s' * (warmup > 1)}" * (warmup > 0)
        for falls, fall in FALLS.items():
            if rises or falls:
                both = " and" * bool(rises and falls)
                name = f"with a learning_rate that{rises}{both}{falls}"
                yield Mistake(name, "optimizer", rates(partial(scheduled, warmup, first, fall)))


# fmt: off
OPTIMIZERS = (
    *(Mistake(f"with {what} clipped to norm {{c}}{words}", "optimizer",
        lambda function, c, step=step, epsilon=epsilon:
            step_by_step(partial(step, c, epsilon))(function))
        for what, step in (
            ("gradients", clipped_once),
            ("the gradient of each micro-batch", clipped_in_parts),
            ("the gradient so far, after each micro-batch,", clipped_each_time))
        for words, epsilon in (("", 0.0), (" as in PyTorch", 1e-6))),
    Mistake("at {c} times the learning_rate", "optimizer",
        lambda function, c: at(learning_rate=lambda r: c * r)(function)),
    Mistake("with a learning_rate that each step multiplies by {c}", "optimizer",
        lambda function, c: rates(lambda number, steps: c**number)(function)),
    Mistake("with momentum {c}", "optimizer",
        lambda function, c: updated(lambda g, table: discounted(g, c))(function)),
    Mistake("with weight decay {c}", "optimizer",
        lambda function, c: updated(lambda g, table: g[-1] + c * table)(function)),
    Mistake("with gradients that are not zeroed between the steps", "optimizer",
        updated(lambda g, table: discounted(g, 1.0))),
    *(Mistake(f"with Adam (0.9, {second:g}){words}", "optimizer",
        updated(partial(adam, second, decay)))
        for second in (0.999, 0.95)
        for decay, words in ((0.0, ""), (0.01, " and weight decay 0.01"))),
    Mistake("with the gradient's sign alone", "optimizer",
        updated(lambda g, table: np.sign(g[-1]))),
    Mistake("with the gradient over its norm", "optimizer", updated(normed)),
    Mistake("with the first step skipped", "optimizer", rates(lambda n, steps: float(n > 0))),
    Mistake("with the last step skipped", "optimizer",
        rates(lambda n, steps: float(n < steps - 1))),
    *schedules(),
)
# fmt: on
