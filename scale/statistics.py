"""Intervals and tests over seeds and prompts, as in section 6.

A repetition of section 6 draws everything anew, its test prompts too. So the means of the seeds are
independent draws of one number, whose spread has both parts, that of seeds and that of prompts, and
Student's interval over them is exact where they are normal. (Seeds that share prompts would need a
crossed model.) One seed alone cannot show its own part: its interval covers prompts only.

The functions import `scipy.stats` themselves: it takes 0.7 s of CPU, and few commands need it.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Name = TypeVar("Name")


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap 95% interval of the mean of independent values [N] (Efron 1979)."""
    from scipy.stats import bootstrap

    if len(values) == 1:  # scipy refuses it
        return float(values[0]), float(values[0])
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0)
    low, high = drawn.confidence_interval
    return float(low), float(high)


def interval(seeds: Sequence[np.ndarray]) -> tuple[float, float]:
    """The 95% interval of the mean over seeds and prompts.

    Args:
        seeds: The values of each seed's own prompts, S arrays [N].

    Returns:
        Student's interval of the seeds' means. With one seed: the bootstrap's over prompts.
    """
    return student_interval(seed_means(seeds)) if len(seeds) > 1 else bootstrap_interval(seeds[0])


def student_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95% interval of the mean of independent values [N], N >= 2."""
    from scipy.stats import sem, t

    half = t.ppf(0.975, len(values) - 1) * sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def p_value(seeds: Sequence[np.ndarray]) -> float:
    """The two-sided p that the mean of differences is 0: Student's test over the seeds' means.

    Args:
        seeds: Differences, paired by prompt: S arrays [N].

    Returns:
        It is 1 where all means are equal (up to rounding), as these show no spread to compare with.
        With one seed: Wald's test over prompts.
    """
    from scipy.stats import ttest_1samp

    if len(seeds) == 1:
        return wald_p(seeds[0])
    means = seed_means(seeds)
    if np.allclose(means, means[0], rtol=1e-9, atol=1e-12):
        return 1.0
    return float(ttest_1samp(means, 0.0).pvalue)


def seed_means(seeds: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of each seed [S]."""
    return np.array([values.mean() for values in seeds])


def wald_p(differences: np.ndarray) -> float:
    """The two-sided p that paired differences [N] have mean 0: mean / standard error on N(0, 1).

    It is 1 where the standard error is 0 or N is 1.
    """
    from scipy.stats import norm, sem

    error = sem(differences) if len(differences) > 1 else 0.0
    return float(2 * norm.sf(abs(differences.mean()) / error)) if error else 1.0


def holm(p: dict[Name, float]) -> dict[Name, float]:
    """Holm's step-down adjustment for several hypotheses, which `scipy.stats` does not have."""
    adjusted, running = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        running = max(running, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = running
    return adjusted


def value_at(kl: float, kls: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values [N] of a path of P policies where its KL first reaches `kl`.

    They are linear between neighbours in the running maximum of the KL. Beyond the path they are
    those of its start or end.

    Args:
        kl: The KL to reach.
        kls: The KL of each policy [P].
        values: The values of each policy [P, N].
    """
    reached = np.maximum.accumulate(kls)
    i = int(np.searchsorted(reached, kl))
    if i in (0, len(kls)):
        return values[min(i, len(kls) - 1)]
    weight = (kl - reached[i - 1]) / (reached[i] - reached[i - 1])
    return (1 - weight) * values[i - 1] + weight * values[i]
