"""Random instances of the claims. The name of an argument says how it is drawn."""

import inspect
from types import SimpleNamespace

import numpy as np

from reference.loglinear import log_softmax

LARGEST = {"prompts": 3, "responses": 5, "models": 4, "pairs": 6, "vocabulary": 8, "length": 8}
SMALLEST = {"responses": 2, "vocabulary": 2}  # 1 for the others


def log_uniform(rng, low, high):
    """A random scalar whose logarithm is uniform.

    Args:
        rng: a NumPy generator.
        low, high: the limits, above 0.

    Returns:
        A float between the limits.
    """
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def policy(rng, *shape):
    """Random policies, from nearly uniform to nearly deterministic.

    Args:
        rng: a NumPy generator.
        shape: the shape, whose last axis holds the outcomes.

    Returns:
        Normalised log-probabilities of that shape, in nats.
    """
    return log_softmax(log_uniform(rng, 0.1, 4) * rng.normal(size=shape))


def values(rng, *shape):
    """Random rewards or margins of a random scale. One draw of three is rounded, so it has ties.

    Args:
        rng: a NumPy generator.
        shape: the shape.

    Returns:
        Values of that shape, in nats.
    """
    drawn = log_uniform(rng, 0.1, 10) * rng.normal(size=shape)
    return np.round(drawn) if rng.integers(3) == 0 else drawn


def tokens(rng, sizes):
    """A random response. Half of the draws use two tokens only, so their counts are high.

    Args:
        rng: a NumPy generator.
        sizes: an object with `vocabulary` and `length`.

    Returns:
        Token ids [length].
    """
    return rng.integers(2 if rng.integers(2) else sizes.vocabulary, size=sizes.length)


ARGUMENTS = {  # name -> (rng, sizes) -> value
    **dict.fromkeys(("beta", "gamma", "tau"), lambda rng, s: log_uniform(rng, 1e-2, 1e2)),
    "alpha": lambda rng, s: 1 + log_uniform(rng, 1e-1, 1e3),
    "arms": lambda rng, s: s.responses + 1,
    **dict.fromkeys(
        ("ref_logps", "policy_logps"), lambda rng, s: policy(rng, s.prompts, s.responses)
    ),
    "rivals": lambda rng, s: policy(rng, 30, s.prompts, s.responses),
    "rewards": lambda rng, s: values(rng, s.models, s.prompts, s.responses),
    **dict.fromkeys(("margin", "reward_margin"), lambda rng, s: values(rng)[()]),
    "margins": lambda rng, s: values(rng, s.pairs),
    "reward_margins": lambda rng, s: values(rng, s.models, s.pairs),
    "theta": lambda rng, s: values(rng, s.vocabulary),
    **dict.fromkeys(("chosen", "rejected"), tokens),
}


def draw(claim, rng):
    """Random arguments for a claim, by name, all of the same random sizes.

    Sizes include the degenerate ones: one prompt, one pair, one reward model, one token.

    Args:
        claim: a function of `claims` or `errata`.
        rng: a NumPy generator.

    Returns:
        Argument name -> value.
    """
    sizes = {
        name: int(rng.integers(SMALLEST.get(name, 1), largest + 1))
        for name, largest in LARGEST.items()
    }
    arguments = inspect.signature(claim).parameters
    return {name: ARGUMENTS[name](rng, SimpleNamespace(**sizes)) for name in arguments}
