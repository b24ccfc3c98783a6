"""Every claim holds on instances that Hypothesis draws.

Every erratum's counterexample refutes what is printed.
"""

import inspect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference import claims, errata
from reference.__main__ import CLAIMS
from reference.loglinear import log_softmax

HOLD = list(dict.fromkeys(claim.function for claim in CLAIMS if claim.counterexample is None))
TABLE = {"prompts": (1, 3), "responses": (2, 5), "models": (1, 4)}
SIZES = {**TABLE, "pairs": (1, 6), "vocabulary": (2, 8), "length": (1, 8)}
SHAPES = {
    "rewards": ("models", "prompts", "responses"),
    "margins": ("pairs",),
    "reward_margins": ("models", "pairs"),
    "theta": ("vocabulary",),
}
POSITIVE = st.floats(-2, 2).map(lambda exponent: 10.0**exponent)
WHOLE = st.integers(-3, 3).map(float)  # which makes ties
REAL = st.floats(-10, 10).map(lambda x: round(x, 6))  # no denormals


def policies(*shape):
    return arrays(float, shape, elements=st.floats(-6, 6)).map(log_softmax)


def values(*shape):
    return st.one_of(arrays(float, shape, elements=WHOLE), arrays(float, shape, elements=REAL))


def rivals(*shape):
    rngs = st.integers(0, 2**32 - 1).map(np.random.default_rng)
    return rngs.map(lambda rng: log_softmax(rng.normal(size=(20, *shape))))


def argument(name, sizes):
    """A strategy for the argument of this name."""
    table = (sizes["prompts"], sizes["responses"])
    tokens = arrays(int, sizes["length"], elements=st.integers(0, sizes["vocabulary"] - 1))
    strategies = {
        **dict.fromkeys(("beta", "gamma", "tau"), POSITIVE),
        "alpha": st.floats(-1, 3)
        .map(lambda exponent: 1 + 10.0**exponent)
        .filter(lambda alpha: alpha != 2),
        "arms": st.just(sizes["responses"] + 1),
        **dict.fromkeys(("ref_logps", "policy_logps"), policies(*table)),
        "rivals": rivals(*table),
        **dict.fromkeys(("margin", "reward_margin"), st.one_of(WHOLE, REAL)),
        **{key: values(*(sizes[size] for size in shape)) for key, shape in SHAPES.items()},
        **dict.fromkeys(
            ("chosen", "rejected"), st.one_of(tokens, tokens.map(lambda t: np.minimum(t, 1)))
        ),
    }
    return strategies[name]


@st.composite
def instances(draw, claim):
    sizes = {name: draw(st.integers(*limits)) for name, limits in SIZES.items()}
    return {name: draw(argument(name, sizes)) for name in inspect.signature(claim).parameters}


@pytest.mark.parametrize("claim", HOLD, ids=lambda claim: claim.__name__)
def test_claim_holds(claim):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(instances(claim))
    def holds(instance):
        assert claim(**instance).margin >= 0

    holds()


@pytest.mark.parametrize("erratum", errata.ERRATA, ids=lambda erratum: erratum.printed.__name__)
def test_counterexample_refutes(erratum):
    assert erratum.printed(**erratum.counterexample).margin < 0


@pytest.mark.parametrize("erratum", errata.ERRATA, ids=lambda erratum: erratum.printed.__name__)
def test_corrected_claim_holds_on_the_counterexample(erratum):
    """Where both take the same arguments."""
    if set(inspect.signature(erratum.corrected).parameters) == set(erratum.counterexample):
        assert erratum.corrected(**erratum.counterexample).margin >= 0


# By hand: what each printed claim measures on its counterexample, and what it should be.
BY_HAND = {
    # pi_1 = (e, 1/e) / (e + 1/e). r2: its advantage is -tanh 1, its reverse KL tanh 1 - log cosh 1.
    "printed_theorem_2": (0.0, math.log(math.cosh(1)) - 2 * math.tanh(1)),
    # -KL of (3/8, 5/8), and of the mean of (1/4, 3/4) and (1/2, 1/2).
    "printed_convexity": (
        -(0.375 * math.log(0.75) + 0.625 * math.log(1.25)),
        -(0.25 * math.log(0.5) + 0.75 * math.log(1.5)) / 2,
    ),
    # d = log-odds of pi: (2 - d)^2 / 2 + KL has slope sigmoid(d) - 1/2 - (2 - d), 0 at
    # d = 1.65979017.
    "printed_pessimism": (1.65979017 * (2 - 1.65979017), -2 * (2 - 1.65979017)),
    "printed_strictness": (0.0, -1e-6),
    # (1, 1, -2)
    "printed_norm": (1.0, 2e-9),
    # log 2 + log 4 < 2 log 3
    "printed_convexity_in_psi": (math.log(9), math.log(8)),
    # alpha - 1 = 1/2
    "printed_alpha": (1e-6, -math.log(2)),
    # Steps of 2/3 at tau = 1: 2 (2/3 - 1)^2 + (4/3 - 1)^2.
    "printed_special_case": (1 / 3, 1e-9),
    # Three steps of 1, not two.
    "printed_arms": (1.0, 3e-9),
    # 1 + 2 (the KL and the loss are 1), not 1/2 + 1.
    "printed_gamma": (1.5, 2.5e-9),
    # KL = log 2 - log 3 / 2, twice.
    "printed_sampled_kl": (
        math.log(2) - math.log(3) / 2,
        1e-9 * (1 + math.log(2) - math.log(3) / 2),
    ),
    # pi(y_w) / pi(y_l) = 1e-6.
    "printed_limit": (math.log(1 + 1e6), 1e-6),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_counterexample_by_hand(name):
    erratum = next(each for each in errata.ERRATA if each.printed.__name__ == name)
    measured, bound, _ = erratum.printed(**erratum.counterexample)
    assert (measured, bound) == pytest.approx(BY_HAND[name], rel=1e-6, abs=1e-9)


def test_similar_responses_degrade_less_here_by_hand():
    """Against acb, aab has Delta = (1, 0, -1) and k = 2 - 3 = -1.

    Against bbb it has Delta = (2, -2) and k = 4 - 2 - 6 = -4.
    """
    instance = errata.WORDS
    for other, expected in ((instance["similar"], -1), (instance["distinct"], -4)):
        _, count, difference, _ = claims.bag_descent(np.zeros(3), instance["chosen"], other, 1.0)
        assert count @ difference - 3 * np.max(difference) == expected


def test_strictness_by_hand():
    """Against cc, all tokens of ab are in argmax (1, 1, -2).

    Against ac, b is and a is not, and the bound falls.
    """
    words = {"theta": np.zeros(3), "chosen": np.array([0, 1]), "beta": 1.0}
    assert errata.printed_strictness(**words, rejected=np.array([2, 2])).margin < 0
    assert errata.printed_strictness(**words, rejected=np.array([0, 2])).margin >= 0


def test_evidence():
    assert claims.identity(1.0, 1.0, 1e-3) == (0.0, 2e-3, 2e-3)
    assert claims.identity(np.array([1.0, 1.5]), 1.0, 0.0).margin == -0.5
    assert claims.at_most([1.0, 3.0], [2.0, 2.0], 0.0) == (3.0, 2.0, -1.0)
    failing, holding, nothing = (
        claims.Evidence(0.0, 0.0, margin) for margin in (-1.0, 1.0, math.nan)
    )
    assert claims.worst(holding, failing) == failing
    assert claims.worst(holding, failing, nothing) is nothing


def test_claims_are_distinct():
    assert len({(row.function, row.place) for row in CLAIMS}) == len(CLAIMS)
