"""The methods of section 6, the corrected `hull` and the baseline `mean`, as rows of one table.

A method is data: a pair term, the rewards it needs, and the weight of its KL term over training. Nothing else
in the project asks which method it is running. The same table is in `reference/methods.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minipref.objectives import (
    Loss,
    Scalar,
    dpo,
    ensemble_distillation,
    ensemble_weights,
    hull_distillation,
    hull_weights,
    ipo,
    mean_distillation,
    mean_weights,
    pessimistic,
)


class Method(NamedTuple):
    """One row of the table.

    pair_loss: (margins [B], reward_margins [K, B], strength) -> scalar; K may be 0 where rewards are "none".
    strength:  what the paper calls the pair term's own strength.
    rewards:   how many reward models the pair term reads.
    gamma:     the KL term's weight at the first and at the last step, linear between; (0, 0) is no KL term.
    weights:   like pair_loss, but returns each reward model's weight [K]; None where rewards are "none".
    """

    pair_loss: Callable
    strength: Literal["beta", "tau"]
    rewards: Literal["none", "single", "ensemble"]
    gamma: tuple[float, float]
    weights: Callable | None


def over_pairs(
    objective: Callable, margins: Float[Array, " B"], reward_margins: Float[Array, "K B"], strength: Scalar
) -> Loss:
    """The batch mean of an objective of one margin, in the signature of `pair_loss`; rewards are not read.

    Shapes: margins [B], reward_margins [K, B] -> scalar.
    """
    return jnp.mean(jax.vmap(objective, (0, None))(margins, strength))


NO_KL = (0.0, 0.0)
ANNEALED = (1e-4, 1e-2)  # section 6.1

# fmt: off
METHODS: dict[str, Method] = {
    "dpo":    Method(partial(over_pairs, dpo), "beta", "none",     NO_KL,    None),              # Eq. 6
    "ipo":    Method(partial(over_pairs, ipo), "tau",  "none",     NO_KL,    None),              # section 7.1
    "d-dpo":  Method(mean_distillation,        "beta", "single",   NO_KL,    mean_weights),      # Eq. 7
    "p-dpo":  Method(partial(over_pairs, dpo), "beta", "none",     ANNEALED, None),              # Eq. 13
    "dp-dpo": Method(mean_distillation,        "beta", "single",   ANNEALED, mean_weights),      # Eq. 11
    "e-dpo":  Method(ensemble_distillation,    "beta", "ensemble", ANNEALED, ensemble_weights),  # Eq. 11
    "hull":   Method(hull_distillation,        "beta", "ensemble", ANNEALED, hull_weights),      # ours
    "mean":   Method(mean_distillation,        "beta", "ensemble", NO_KL,    mean_weights),      # baseline
}
# fmt: on


def gamma_at(gamma: tuple[Scalar, Scalar], fraction: Scalar) -> Scalar:
    """The KL weight after a fraction of training: linear from gamma's first entry (0) to its last (1).

    Source: section 6.1. The paper writes gamma as beta / alpha (Eq. 11) and as alpha / beta (section 6.1);
    this is the number that multiplies the KL.
    """
    first, last = map(jnp.asarray, gamma)
    return first + (last - first) * fraction


def method_loss(
    method: Method,
    margins: Float[Array, " B"],
    reward_margins: Float[Array, "K B"],
    kls: Float[Array, " S"],
    strength: Scalar,
    fraction: Scalar,
) -> Loss:
    """What a method minimises on one batch: its pair term and its weighted KL.

    pair_loss + gamma(fraction) mean_s KL_s

    Shapes: margins [B], reward_margins [K, B], kls [S] (estimates of the forward KL, for instance one for
    each sampled response; S may differ from B) -> scalar. Errors: ValueError if kls is empty and the method
    has a KL term. Source: Eq. 11, Eq. 13.
    """
    if len(kls) == 0 and method.gamma != NO_KL:
        raise ValueError("this method has a KL term, so it needs at least one KL estimate")
    pair = method.pair_loss(margins, reward_margins, strength)
    mean_kl = jnp.sum(kls, dtype=pair.dtype) / max(len(kls), 1)
    return pessimistic(pair, mean_kl, gamma_at(method.gamma, fraction))
