"""Hand-computed values and derivatives of every objective.

`HAND` is shared with the JAX layer's tests, which load it by path: the two layers cannot be wrong
together.
"""

import math
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest

from reference import objectives, weights

LN2, LN3 = math.log(2), math.log(3)
NAN, INF = math.nan, math.inf
HALVES = [-LN2, -LN2]
QUARTERS = [-2 * LN2, LN3 - 2 * LN2]  # log of (1/4, 3/4)
SWAPPED = QUARTERS[::-1]

# Two pairs, two reward models. Residuals at beta 1/2: e1 = (3/2, -3/2), e2 = (1/2, 1/2).
MARGINS, REWARDS, BETA = [1.0, 3.0], [[2.0, 0.0], [1.0, 2.0]], 0.5


class Hand(NamedTuple):
    """A call, its value, and the gradient of its outputs' sum in some arguments, by position."""

    name: str
    args: tuple
    value: Any
    gradient: dict[int, Any]


HAND = [
    # A sum over positions 0 and 2; each contributes with slope 1.
    Hand("sequence_logp", ([-1.0, -2.0, -4.0], [1, 0, 1]), -5.0, {0: [1, 0, 1]}),
    # Nothing unmasked: the empty sum.
    Hand("sequence_logp", ([NAN, -INF], [0, 0]), 0.0, {0: [0, 0]}),
    # (-1 + 3) - (-2 + 5) = 2 - 3; the slopes are the signs.
    Hand("log_ratio_margin", (-1.0, -2.0, -3.0, -5.0), -1.0, {0: 1, 1: -1, 2: -1, 3: 1}),
    # sigmoid(0) = 1/2. d/dx [-log sigmoid(x)] = -(1 - sigmoid(x)) = -1/2.
    Hand("bradley_terry", (0.0,), LN2, {0: -0.5}),
    # sigmoid(ln 3) = 3/4; slope -1/4.
    Hand("bradley_terry", (LN3,), 2 * LN2 - LN3, {0: -0.25}),
    # beta h = ln 3; slope -1/4 times beta = 1/2 in h, times h = 2 ln 3 in beta.
    Hand("dpo", (2 * LN3, 0.5), 2 * LN2 - LN3, {0: -0.125, 1: -LN3 / 2}),
    # beta h = -ln 3: sigmoid = 1/4, slope -3/4.
    Hand("dpo", (-2 * LN3, 0.5), 2 * LN2, {0: -0.375, 1: 1.5 * LN3}),
    # 1 - 4 = -3; slope 2 (-3) in h; 2 (-3) / tau^2 = -6 * 16 in tau.
    Hand("ipo", (1.0, 0.25), 9.0, {0: -6, 1: -96}),
    # 2 - 3/2 = 1/2; slopes 2 (1/2) times -beta, 1, -h.
    Hand("distillation", (3.0, 2.0, 0.5), 0.25, {0: -0.5, 1: 1, 2: -3}),
    # Mean rewards (3/2, 1): e = (1, -1/2), loss (1 + 1/4) / 2.
    # 2 e / B = e: slopes -beta e; e / K; -e . h = 1/2.
    Hand(
        "mean_distillation",
        (MARGINS, REWARDS, BETA),
        0.625,
        {0: [-0.5, 0.25], 1: [[0.5, -0.25], [0.5, -0.25]], 2: 0.5},
    ),
    Hand("mean_weights", (MARGINS, REWARDS, BETA), [0.5, 0.5], {}),
    # Losses 9/4 and 1/4 (mean: 5/4). The second: slopes -beta e2, e2, -e2 . h = -2.
    Hand(
        "ensemble_distillation",
        (MARGINS, REWARDS, BETA),
        0.25,
        {0: [-0.25, -0.25], 1: [[0, 0], [0.5, 0.5]], 2: -2},
    ),
    Hand("ensemble_weights", (MARGINS, REWARDS, BETA), [0, 1], {}),
    # At h = 0 the residuals are the rewards: the first model is nearer at one pair of three, the
    # second over the batch.
    Hand(
        "nearest_shares",
        ([0.0, 0.0, 0.0], [[0.0, 2.0, 2.0], [1.0, 1.0, -1.0]], BETA),
        [1 / 3, 2 / 3],
        {},
    ),
    # e1 . e2 = 0, so 9/4 w^2 + 1/4 (1 - w)^2: w = (1/4) / (5/2) = 1/10.
    # e = e1/10 + 9 e2/10 = (3/5, 3/10): (9/25 + 9/100) / 2 = 9/40.
    # Slopes -beta e; w_k e; -e . h = -(3/5 + 9/10).
    Hand(
        "hull_distillation",
        (MARGINS, REWARDS, BETA),
        0.225,
        {0: [-0.3, -0.15], 1: [[0.06, 0.03], [0.54, 0.27]], 2: -1.5},
    ),
    Hand("hull_weights", (MARGINS, REWARDS, BETA), [0.1, 0.9], {}),
    # 1/2 ln 2 + 1/2 ln(2/3) (the reverse: 1/4 ln 1/2 + 3/4 ln 3/2).
    # Slopes: -p in log pi, p (log p - log pi + 1) in log pi_ref.
    Hand(
        "forward_kl",
        (HALVES, QUARTERS),
        LN2 - LN3 / 2,
        {0: [(LN2 + 1) / 2, (LN2 - LN3 + 1) / 2], 1: [-0.5, -0.5]},
    ),
    # The reference never says the second outcome.
    Hand("forward_kl", ([0.0, -INF], HALVES), LN2, {1: [-1, 0]}),
    Hand("sampled_forward_kl", (-1.0, -3.0), 2.0, {0: 1, 1: -1}),
    Hand("pessimistic", (2.0, 3.0, 0.5), 3.5, {0: 1, 1: 0.5, 2: 3}),
    # 1/4 + 9/4 - 2 (1/4 ln 1/2 + 3/4 ln 3/2).
    # Slopes: pi in the rewards, minus the divergence in beta.
    Hand(
        "rlhf",
        (QUARTERS, HALVES, [1.0, 3.0], 2.0),
        2.5 - 1.5 * LN3 + 2 * LN2,
        {2: [0.25, 0.75], 3: LN2 - 0.75 * LN3},
    ),
    # Policies (1/4, 3/4) and (3/4, 1/4). Advantages: the first reward 1/2 and -1, the second -1/2
    # and 1. Means -1/4 and 1/4 (a minimum inside the mean would give -3/4).
    # Slopes (pi - pi_ref) / 2 in the first reward.
    Hand(
        "pessimistic_rlhf",
        (
            [QUARTERS, SWAPPED],
            [HALVES, HALVES],
            [[[1.0, 3.0], [0.0, 4.0]], [[3.0, 1.0], [4.0, 0.0]]],
            2.0,
        ),
        -0.25 - 1.5 * LN3 + 2 * LN2,
        {2: [[[-0.125, 0.125], [0.125, -0.125]], [[0, 0], [0, 0]]], 3: LN2 - 0.75 * LN3},
    ),
]
NAMES = [f"{hand.name}-{i}" for i, hand in enumerate(HAND)]


def central_differences(function, args, position, step=1e-5):
    """The gradient of the sum of a float64 function's outputs in one of its arguments."""
    base = np.asarray(args[position], np.float64)

    def total(flat):
        return np.sum(function(*args[:position], flat.reshape(base.shape), *args[position + 1 :]))

    units = step * np.eye(base.size)
    slopes = [
        (total(base.ravel() + unit) - total(base.ravel() - unit)) / (2 * step) for unit in units
    ]
    return np.reshape(slopes, base.shape)


def function(name):
    return getattr(objectives, name, None) or getattr(weights, name)


@pytest.mark.parametrize("hand", HAND, ids=NAMES)
def test_value_by_hand(hand):
    args = [np.asarray(arg, np.float64) for arg in hand.args]
    np.testing.assert_allclose(function(hand.name)(*args), hand.value, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("hand", HAND, ids=NAMES)
def test_derivative_by_hand(hand):
    args = [np.asarray(arg, np.float64) for arg in hand.args]
    for position, expected in hand.gradient.items():
        gradient = central_differences(function(hand.name), args, position)
        np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-8)


def test_every_objective_has_a_hand_value():
    public = {
        name
        for module in (objectives, weights)
        for name, item in vars(module).items()
        if getattr(item, "__module__", "") == module.__name__
    }
    assert {hand.name for hand in HAND} == {name for name in public if not name.startswith("_")}


@pytest.mark.parametrize("x", [-1e4, -40.0, -1e-9, 1e-9, 40.0, 700.0])
def test_bradley_terry_against_fifty_digits(x):
    with mpmath.workdps(50 + 320):
        exact = mpmath.log(1 + mpmath.exp(-mpmath.mpf(x)))
    assert objectives.bradley_terry(x) == pytest.approx(float(exact), rel=1e-15)


def test_forward_kl_with_an_underflowing_reference_against_fifty_digits():
    tail = mpmath.mpf(10) ** -30
    with mpmath.workdps(50):
        exact = tail * (mpmath.log(tail) + 1) + (1 - tail) * (
            mpmath.log(1 - tail) - mpmath.log(1 - mpmath.exp(-1))
        )
    ref = [float(mpmath.log(tail)), 0.0]
    policy = [-1.0, math.log1p(-math.exp(-1))]
    assert objectives.forward_kl(ref, policy) == pytest.approx(float(exact), rel=1e-15)


def test_forward_kl_is_infinite_where_the_policy_excludes_what_the_reference_says():
    assert objectives.forward_kl(HALVES, [0.0, -INF]) == INF


def test_hull_reaches_zero_between_opposite_rewards():
    """FACTS' smallest counterexample to Theorem 2 for finite sets: r and -r at h = 0."""
    rewards = np.array([[2.0], [-2.0]])
    assert objectives.ensemble_distillation(np.zeros(1), rewards, 1.0) == 4.0
    assert objectives.hull_distillation(np.zeros(1), rewards, 1.0) == pytest.approx(0.0, abs=1e-30)
    np.testing.assert_allclose(weights.hull_weights(np.zeros(1), rewards, 1.0), [0.5, 0.5])


def test_hull_is_not_above_any_point_of_the_simplex():
    rng = np.random.default_rng(0)
    for _ in range(20):
        margins, rewards = rng.normal(size=6), rng.normal(size=(4, 6)) + 1
        hull = objectives.hull_distillation(margins, rewards, 0.3)
        mixtures = rng.dirichlet(np.ones(4), size=500) @ rewards
        assert hull <= np.min(np.mean((mixtures - 0.3 * margins) ** 2, axis=1)) + 1e-12
