"""Intervals and tests over per-prompt values, as in section 6."""

import math
from typing import TypeVar

import numpy as np
from scipy.special import stdtrit

Name = TypeVar("Name")


def bootstrap_interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean of independent values [N] (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def seed_interval(means: np.ndarray) -> tuple[float, float]:
    """Student's 95% interval of the mean of S >= 2 seeds' means [S]."""
    half = stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) / math.sqrt(len(means))
    return float(means.mean() - half), float(means.mean() + half)


def wald_p(differences: np.ndarray) -> float:
    """Two-sided p of mean 0 for paired differences [N]: z = mean / standard error against N(0, 1); 1 where N is 1."""
    error = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return math.erfc(abs(differences.mean()) / error / math.sqrt(2)) if error else 1.0


def holm(p: dict[Name, float]) -> dict[Name, float]:
    """Holm's step-down adjustment for testing several hypotheses at once."""
    adjusted, running = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        running = max(running, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = running
    return adjusted


def value_at(kl: float, kls: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [N] of a path of P policies where their KL [P] first reaches `kl`, from their values [P, N].

    Linear between neighbouring policies in the running maximum of the KL; the path's start or end beyond it.
    """
    reached = np.maximum.accumulate(kls)
    i = int(np.searchsorted(reached, kl))
    if i in (0, len(kls)):
        return values[min(i, len(kls) - 1)]
    weight = (kl - reached[i - 1]) / (reached[i] - reached[i - 1])
    return (1 - weight) * values[i - 1] + weight * values[i]
