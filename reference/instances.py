"""Random instances of the claims: an argument's name says how it is drawn, so a claim's signature is all it needs."""

import inspect
from types import SimpleNamespace

import numpy as np

from reference.loglinear import log_softmax

SIZES = {"prompts": 3, "responses": 5, "models": 4, "pairs": 6, "vocabulary": 8, "length": 8}  # at most
LEAST = {"responses": 2, "vocabulary": 2}  # 1 for the others


def log_uniform(rng, low, high):
    """A scalar whose logarithm is uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def policy(rng, *shape):
    """Log-probabilities, from nearly uniform to nearly deterministic."""
    return log_softmax(log_uniform(rng, 0.1, 4) * rng.normal(size=shape))


def values(rng, *shape):
    """Rewards or margins of any scale; every third draw is rounded, so that it has ties."""
    drawn = log_uniform(rng, 0.1, 10) * rng.normal(size=shape)
    return np.round(drawn) if rng.integers(3) == 0 else drawn


def tokens(rng, sizes):
    """A response; half the draws keep to two tokens, which makes dense counts."""
    return rng.integers(2 if rng.integers(2) else sizes.vocabulary, size=sizes.length)


ARGUMENTS = {  # name -> (rng, sizes) -> value
    **dict.fromkeys(("beta", "gamma", "tau"), lambda rng, s: log_uniform(rng, 1e-2, 1e2)),
    "alpha": lambda rng, s: 1 + log_uniform(rng, 1e-1, 1e3),
    "arms": lambda rng, s: s.responses + 1,
    **dict.fromkeys(("ref_logps", "policy_logps"), lambda rng, s: policy(rng, s.prompts, s.responses)),
    "rivals": lambda rng, s: policy(rng, 30, s.prompts, s.responses),
    "rewards": lambda rng, s: values(rng, s.models, s.prompts, s.responses),
    **dict.fromkeys(("margin", "reward_margin"), lambda rng, s: values(rng)[()]),
    "margins": lambda rng, s: values(rng, s.pairs),
    "reward_margins": lambda rng, s: values(rng, s.models, s.pairs),
    "theta": lambda rng, s: values(rng, s.vocabulary),
    **dict.fromkeys(("chosen", "rejected"), tokens),
}


def draw(claim, rng):
    """Arguments for a claim, by name, all of the same random sizes, degenerate ones included."""
    sizes = SimpleNamespace(**{name: int(rng.integers(LEAST.get(name, 1), most + 1)) for name, most in SIZES.items()})
    return {name: ARGUMENTS[name](rng, sizes) for name in inspect.signature(claim).parameters}
