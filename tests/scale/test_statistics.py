import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from scale.statistics import bootstrap_interval, holm, interval, p_value, value_at, wald_p

VALUES = np.array([0.3, -0.1, 0.8, 0.4, 0.2, 0.5])


def test_holm_by_hand():
    """Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which may not fall below the last."""
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_wald_by_hand():
    """Mean 2.1 / 6 = 0.35, variance 0.455 / 5 = 0.091, so z = 0.35 / sqrt(0.091 / 6) = 2.842."""
    assert wald_p(VALUES) == pytest.approx(0.004483, abs=1e-6)
    assert wald_p(-VALUES) == wald_p(VALUES)


def test_one_value_or_no_difference_proves_nothing():
    assert wald_p(np.array([3.0])) == 1.0
    assert wald_p(np.zeros(5)) == 1.0


def test_interval_and_p_by_hand():
    """Means 1 and 3: mean 2, standard error 1, and Student's t of one degree of freedom, 12.706.

    That distribution is Cauchy's, so p = 1 - 2 atan(2) / pi.
    """
    seeds = [np.array([0.0, 2.0]), np.array([3.0])]
    assert interval(seeds) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert p_value(seeds) == pytest.approx(1 - 2 * np.arctan(2) / np.pi)
    assert interval([np.full(4, 0.5)] * 3) == (0.5, 0.5)
    assert p_value([np.zeros(4)] * 3) == 1.0


def test_seeds_with_equal_means_prove_nothing():
    """Two seeds may have equal means by chance; 0.1 + 0.2 is not 0.3 in floating point."""
    assert p_value([np.full(4, 0.5)] * 3) == 1.0
    assert p_value([np.array([0.3]), np.array([0.1 + 0.2])]) == 1.0
    assert p_value([np.array([0.3]), np.array([0.30001])]) < 0.001


def test_one_seed_has_the_interval_and_the_test_over_prompts():
    assert interval([VALUES]) == bootstrap_interval(VALUES)
    assert p_value([VALUES]) == wald_p(VALUES)


@pytest.mark.parametrize(("num_seeds", "seed_sd"), [(3, 0.0), (3, 0.2), (10, 0.05)])
def test_intervals_over_seeds_and_prompts_are_calibrated(num_seeds, seed_sd):
    """2,000 runs with a mean of 0.3: the interval holds it in 95% +- 1.5% of them.

    Each seed has 40 prompts of its own, whose values have standard deviation 0.8, so that a mean
    over prompts has 0.13. The standard error of the share is 0.5%.
    """
    rng = np.random.default_rng(num_seeds)
    inside = 0
    for run in range(2000):
        seeds = rng.normal(0.3, seed_sd, (num_seeds, 1)) + rng.normal(0, 0.8, (num_seeds, 40))
        low, high = interval(list(seeds))
        inside += low <= 0.3 <= high
        if run < 100:
            assert (p_value(list(seeds - 0.3)) >= 0.05) == (low <= 0.3 <= high)
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_bootstrap_interval_is_near_the_normal_one():
    values = np.random.default_rng(0).normal(1.0, 2.0, 500)
    normal = scipy.stats.norm.interval(0.95, values.mean(), scipy.stats.sem(values))
    assert bootstrap_interval(values) == pytest.approx(normal, abs=0.02)
    assert bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5)


def test_bootstrap_interval_of_zeros_and_ones_is_binomial():
    """The resampled sum of 50 ones in 200 values is Binomial(200, 1/4): a percentile is a count."""
    values = np.repeat([0.0, 1.0], [150, 50])
    low, high = scipy.stats.binom.ppf([0.025, 0.975], 200, 0.25) / 200
    assert bootstrap_interval(values) == pytest.approx((low, high), abs=2 / 200)


def test_bootstrap_interval_of_one_value_is_that_value():
    assert bootstrap_interval(np.array([0.3])) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("kl", "value"), [(-1, 0), (0, 0), (1, 0.5), (2, 1), (2.5, 4.5), (3, 4), (4, 3), (9, 3)]
)
def test_value_at_by_hand(kl, value):
    """The KL falls from 2 to 1: its running maximum is 0, 2, 2, 4, so the first 2 stands for 2."""
    kls, values = np.array([0.0, 2.0, 1.0, 4.0]), np.array([[0.0], [1.0], [5.0], [3.0]])
    assert value_at(float(kl), kls, values) == pytest.approx([value])


def test_value_at_is_per_prompt():
    kls, values = np.array([0.0, 2.0]), np.array([[0.0, 0.0], [4.0, -8.0]])
    assert value_at(0.5, kls, values).tolist() == [1.0, -2.0]


@given(st.lists(st.floats(0.001, 5), min_size=1, max_size=5), st.floats(0, 1))
def test_value_at_lies_on_the_path(increments, share):
    kls = np.cumsum([0.0, *increments])
    kl = share * float(kls[-1])
    assert value_at(kl, kls, 3 * kls[:, None]) == pytest.approx([3 * kl])
