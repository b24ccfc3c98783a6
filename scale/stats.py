"""Intervals and tests over per-prompt values, as in section 6."""

import math

import numpy as np


def bootstrap_interval(values: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean of independent values [N] (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wald_p(differences: np.ndarray) -> float:
    """Two-sided p of mean 0 for paired differences [N]: z = mean / standard error against N(0, 1)."""
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    return math.erfc(abs(differences.mean()) / error / math.sqrt(2)) if error else 1.0


def holm(p: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment for testing several hypotheses at once."""
    adjusted, running = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        running = max(running, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = running
    return adjusted
