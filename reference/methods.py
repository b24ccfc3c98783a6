"""The methods of section 6, our corrected `hull` and the baseline `mean`, as rows of one table.

A method is data: its pair term, the rewards that it reads and the schedule of its KL term. Nothing
else in the project asks which method it is running: names, labels, defaults and the choices of the
command line derive from this table. The same table is in `minipref/methods.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from reference.objectives import (
    dpo,
    ensemble_distillation,
    hull_distillation,
    ipo,
    mean_distillation,
    pessimistic,
)
from reference.weights import ensemble_weights, hull_weights, mean_weights


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        label: The name that tables and figures show.
        pair_loss: (margins [B], reward_margins [K, B], beta) -> scalar. K may be 0 where `rewards`
            is "none". IPO's tau is its beta.
        rewards: How many reward models the pair term reads.
        gamma: The KL term's weight at the first and at the last step, linear between them; None
            where the method has no KL term.
        weights: (margins, reward_margins, beta) -> the weight of each reward model [K]; None where
            `rewards` is "none".
        beta: The default of beta.
    """

    label: str
    pair_loss: Callable
    rewards: Literal["none", "single", "ensemble"]
    gamma: tuple[float, float] | None
    weights: Callable | None
    beta: float = 0.1


def over_pairs(objective, margins, reward_margins, beta):
    """The batch mean of an objective of one margin, with the signature of `pair_loss`.

    Args:
        objective: (margin, beta) -> scalar.
        margins: h [B], nats.
        reward_margins: [K, B]; not read.
        beta: Scalar.

    Returns:
        Scalar.
    """
    return np.mean([objective(margin, beta) for margin in margins])


ANNEALED = (1e-4, 1e-2)  # section 6.1

METHODS: dict[str, Method] = {
    "dpo": Method("DPO", partial(over_pairs, dpo), "none", None, None),  # Eq. 6
    "ipo": Method("IPO", partial(over_pairs, ipo), "none", None, None),  # section 7.1
    "d-dpo": Method("d-DPO", mean_distillation, "single", None, mean_weights),  # Eq. 7
    "p-dpo": Method("p-DPO", partial(over_pairs, dpo), "none", ANNEALED, None),  # Eq. 13
    "dp-dpo": Method("dp-DPO", mean_distillation, "single", ANNEALED, mean_weights),  # Eq. 11
    # Eq. 11, the minimum over each minibatch (footnote 5)
    "e-dpo": Method("e-DPO", ensemble_distillation, "ensemble", ANNEALED, ensemble_weights),
    # ours, and a baseline without pessimism
    "hull": Method("hull (ours)", hull_distillation, "ensemble", ANNEALED, hull_weights),
    "mean": Method("mean (baseline)", mean_distillation, "ensemble", None, mean_weights),
}


def gamma_at(gamma, progress):
    """The weight of the KL term at some point of training.

    gamma_first + (gamma_last - gamma_first) progress

    The paper writes gamma as beta / alpha (Eq. 11) and as alpha / beta (section 6.1). Here it is
    the number that multiplies the KL.

    Args:
        gamma: The weights at the first and at the last step.
        progress: 0 at the first step, 1 at the last.

    Returns:
        Scalar.

    Source: section 6.1.
    """
    first, last = gamma
    return first + (last - first) * progress


def method_loss(method, margins, reward_margins, kls, beta, progress):
    """The loss of a method on one batch: its pair term, and its KL term if it has one.

    pair_loss + gamma(progress) mean_s KL_s

    Args:
        method: A row of `METHODS`.
        margins: h [B], nats.
        reward_margins: rho [K, B]; K may be 0 for a method without rewards.
        kls: Estimates of the forward KL [S], nats, for instance one for each sampled response. S
            may differ from B. A method without a KL term does not read them.
        beta: Scalar.
        progress: 0 at the first step, 1 at the last.

    Returns:
        Scalar.

    Raises:
        ValueError: `kls` is empty and the method has a KL term.

    Source: Eq. 11, Eq. 13.
    """
    pair = method.pair_loss(margins, reward_margins, beta)
    if method.gamma is None:
        return pair
    if len(kls) == 0:
        raise ValueError("this method has a KL term, so it needs at least one KL estimate")
    return pessimistic(pair, np.mean(kls), gamma_at(method.gamma, progress))
