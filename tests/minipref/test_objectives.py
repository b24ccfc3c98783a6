"""minipref's objectives against hand-computed values, against `reference`, and at the edges."""

import inspect
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import reference.objectives as ref
from minipref import objectives, weights

SHARED = runpy.run_path(str(Path(__file__).parents[1] / "reference" / "test_objectives.py"))
HAND, NAMES, central_differences = SHARED["HAND"], SHARED["NAMES"], SHARED["central_differences"]

# dtype: (value, gradient), relative to the largest magnitude that enters the computation. Inputs
# are rounded to the dtype first, so that only the arithmetic is compared.
TOLERANCE = {
    "float64": (
        1e-12,
        1e-6,
    ),  # some 1e4 rounding errors; the reference's gradient is a central difference
    "float32": (
        2e-5,
        1e-4,
    ),  # about 100 rounding errors of 1.2e-7, and the hull's ridge of up to 6e-6
    "bfloat16": (
        2e-5,
        1e-2,
    ),  # the arithmetic is float32; gradients come back in bfloat16, spaced 2^-8 = 4e-3
}
DTYPES = list(TOLERANCE)
SCALARS = [
    "log_ratio_margin",
    "bradley_terry",
    "dpo",
    "ipo",
    "distillation",
    "sampled_forward_kl",
    "pessimistic",
]
BATCHED = ["mean_distillation", "ensemble_distillation", "hull_distillation"]
POLICIES = ["forward_kl", "rlhf"]
DIFFERENTIATED = [*SCALARS, *BATCHED, *POLICIES]
JITTED = {name: jax.jit(getattr(objectives, name)) for name in BATCHED}
JITTED["hull_weights"] = jax.jit(weights.hull_weights)
ENSEMBLES = [("hull_distillation", members, "float64") for members in range(1, 7)]
ENSEMBLES += [("hull_distillation", 5, dtype) for dtype in DTYPES[1:]]
ENSEMBLES += [(name, 4, dtype) for name in BATCHED[:2] for dtype in DTYPES]
POSITIVE = {"beta", "tau"}
moderate = st.floats(-8, 8, width=16)
positive = st.floats(0.125, 3, width=16)
quick = settings(max_examples=15, deadline=None, derandomize=True)


def function(name):
    return getattr(objectives, name, None) or getattr(weights, name)


def arguments(name):
    return list(inspect.signature(getattr(ref, name)).parameters)


def value_and_gradients(name):
    return jax.jit(
        jax.value_and_grad(getattr(objectives, name), argnums=tuple(range(len(arguments(name)))))
    )


VALUE_AND_GRADIENTS = {name: value_and_gradients(name) for name in DIFFERENTIATED}


def rounded(args, dtype):
    """The arguments in a dtype, and the same numbers in float64."""
    narrow = [jnp.asarray(arg, dtype) for arg in args]
    return narrow, [np.asarray(arg, np.float64) for arg in narrow]


def assert_agrees(name, args, dtype):
    """Value and derivatives agree with the reference in float64 at the same rounded arguments."""
    value_tolerance, gradient_tolerance = TOLERANCE[dtype]
    with jax.enable_x64(dtype == "float64"):
        narrow, wide = rounded(args, dtype)
        value, gradients = VALUE_AND_GRADIENTS[name](*narrow)
    assert value.dtype == ("float64" if dtype == "float64" else "float32")
    targets = [1 / wide[1]] if name == "ipo" else []
    scale = (1 + sum(np.max(np.abs(arg)) for arg in [*wide, *targets])) ** 2
    np.testing.assert_allclose(
        value, getattr(ref, name)(*wide), rtol=0, atol=value_tolerance * scale
    )
    for position, gradient in enumerate(gradients):
        expected = central_differences(getattr(ref, name), wide, position)
        slope = max(scale, np.max(np.abs(expected)))
        np.testing.assert_allclose(
            np.asarray(gradient, float), expected, rtol=0, atol=gradient_tolerance * slope
        )


@pytest.mark.parametrize("hand", HAND, ids=NAMES)
def test_by_hand(hand):
    compute = function(hand.name)
    with jax.enable_x64(True):
        args = [
            jnp.asarray(np.asarray(arg)) for arg in hand.args
        ]  # a bare float would be weakly typed
        np.testing.assert_allclose(compute(*args), hand.value, rtol=1e-12, atol=1e-14)
        for position, expected in hand.gradient.items():
            gradient = jax.grad(compute, argnums=position)(*args)
            np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("hand", HAND, ids=NAMES)
def test_eager_jit_and_vmap_agree(hand):
    compute, args = function(hand.name), [jnp.asarray(arg) for arg in hand.args]
    eager = compute(*args)
    twice = jax.jit(jax.vmap(compute))(*[jnp.stack([arg, arg]) for arg in args])
    np.testing.assert_allclose(jax.jit(compute)(*args), eager, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(twice, jnp.stack([eager, eager]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCALARS)
@quick
@given(data=st.data())
def test_scalars_match_the_reference(name, dtype, data):
    assert_agrees(
        name,
        [data.draw(positive if arg in POSITIVE else moderate) for arg in arguments(name)],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POLICIES)
@quick
@given(data=st.data())
def test_distributions_match_the_reference(name, dtype, data):
    logits = arrays(np.float64, 4, elements=moderate)
    args = [np.asarray(jax.nn.log_softmax(jnp.asarray(data.draw(logits)))) for _ in range(2)]
    args += [data.draw(logits), data.draw(positive)] if name == "rlhf" else []
    assert_agrees(name, args, dtype)


@pytest.mark.parametrize(("name", "members", "dtype"), ENSEMBLES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_ensembles_match_the_reference(name, members, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    margins, rewards = 3 * rng.normal(size=5), rng.normal(size=(members, 5)) + data.draw(moderate)
    assert_agrees(name, [margins, rewards, data.draw(positive)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("name", ["dpo", "ipo", "distillation", "bradley_terry", *BATCHED])
def test_extreme_margins_stay_finite(name, size, dtype):
    extreme = {"margin": size, "reward_margin": -size, "beta": 1.0, "tau": 0.1}
    extreme |= {"margins": [size, -size], "reward_margins": [[-size, size], [size, size]]}
    with jax.enable_x64(dtype == "float64"):
        args = [jnp.asarray(extreme[arg], dtype) for arg in arguments(name)]
        leaves = jax.tree.leaves(VALUE_AND_GRADIENTS[name](*args))
    assert all(np.all(np.isfinite(np.asarray(leaf, float))) for leaf in leaves)


@pytest.mark.parametrize("x", [-1e4, -40.0, 1e-6, 40.0, 80.0])
def test_bradley_terry_against_fifty_digits(x):
    x = float(np.float32(x))
    with mpmath.workdps(50):
        exact = float(mpmath.log1p(mpmath.exp(-mpmath.mpf(x))))
        slope = float(-1 / (1 + mpmath.exp(mpmath.mpf(x))))
    assert float(objectives.bradley_terry(jnp.float32(x))) == pytest.approx(exact, rel=3e-7)
    assert float(jax.grad(objectives.bradley_terry)(jnp.float32(x))) == pytest.approx(
        slope, rel=1e-5
    )


def test_masked_tokens_reach_neither_value_nor_gradient():
    logps, mask = jnp.array([-1.0, jnp.nan, -jnp.inf]), jnp.array([True, False, False])
    value, gradient = jax.value_and_grad(objectives.sequence_logp)(logps, mask)
    assert value == -1
    np.testing.assert_array_equal(gradient, [1, 0, 0])


def test_a_sum_of_bfloat16_tokens_is_taken_in_float32():
    tokens = jnp.full(300, -1.0, jnp.bfloat16)  # in bfloat16 the running sum would stop at -256
    assert objectives.sequence_logp(tokens, jnp.ones(300, bool)) == -300


def test_python_scalars_do():
    assert objectives.distillation(3.0, 2, 0.5) == 0.25
    assert objectives.dpo(0, 1) == pytest.approx(np.log(2))


def test_forward_kl_gradient_ignores_impossible_outcomes():
    ref_logps, policy = jnp.array([0.0, -jnp.inf]), jnp.array([-1.0, -jnp.inf])
    gradients = jax.grad(objectives.forward_kl, (0, 1))(ref_logps, policy)
    np.testing.assert_array_equal(gradients, [[2, 0], [-1, 0]])


def awkward_ensembles():
    """Named batches on which a simplex minimiser may stumble: (margins, reward_margins)."""
    rng = np.random.default_rng(7)
    margins, rewards = rng.normal(size=5), rng.normal(size=(4, 5))
    opposite = np.stack([rewards[0], -rewards[0], rewards[1], -rewards[1]])
    return {
        "duplicates": (margins, rewards[[0, 0, 1, 1]]),
        "all the same": (margins, rewards[[0, 0, 0, 0]]),
        "nearly the same": (margins, rewards[0] + 1e-4 * rewards),
        "perfect member": (margins, np.stack([margins, *rewards[:3]])),
        "all perfect": (margins, np.stack([margins] * 4)),
        "zero": (np.zeros(5), np.zeros((4, 5))),
        "opposite": (np.zeros(5), opposite),
        "one broken member": (1e-2 * margins, np.stack([1e4 + rewards[0], *(1e-2 * rewards[1:])])),
        "one good member": (margins, np.stack([margins + 1e-3 * rewards[0], *(1e2 * rewards[1:])])),
        "one pair": (margins[:1], rewards[:, :1]),
        "tiny": (1e-12 * margins, 1e-12 * rewards),
        "huge": (1e8 * margins, 1e8 * rewards),
        "collinear": (margins, margins + np.outer([1.0, 2.0, 3.0, 4.0], rewards[0])),
    }


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", awkward_ensembles())
def test_hull_on_awkward_ensembles(case, dtype):
    """It is within 1e-4 (float32) of the enumerated minimum, relative to the best member's loss."""
    with jax.enable_x64(dtype == "float64"):
        (margins, rewards), (wide_margins, wide_rewards) = rounded(awkward_ensembles()[case], dtype)
        weights = np.asarray(JITTED["hull_weights"](margins, rewards, 1.0), float)
    exact, best = (
        f(wide_margins, wide_rewards, 1.0)
        for f in (ref.hull_distillation, ref.ensemble_distillation)
    )
    found = np.mean((weights @ wide_rewards - wide_margins) ** 2)
    assert np.all(weights >= 0)
    assert np.sum(weights) == pytest.approx(1, abs=1e-6)
    assert found <= exact + {"float64": 1e-11, "float32": 1e-4}[dtype] * best + 1e-30


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("pairs", [3, 64])
def test_sixteen_members_satisfy_the_optimality_conditions(pairs, dtype):
    """At the minimum no member's slope is below the mixture's, and those with w_k > 0 equal it."""
    rng = np.random.default_rng(pairs)
    shape = (20, 16, pairs)
    batches = (
        rng.normal(size=shape[::2]),
        rng.normal(size=shape) * rng.uniform(0.1, 3, size=(20, 16, 1)) + 0.5,
    )
    with jax.enable_x64(dtype == "float64"):
        (margins, rewards), wide = rounded(batches, dtype)
        weights = jax.vmap(JITTED["hull_weights"], (0, 0, None))(margins, rewards, 1.0)
    residuals, weights = wide[1] - wide[0][:, None], np.asarray(weights, float)
    slopes = np.einsum("nkb,njb,nj->nk", residuals, residuals, weights) / pairs
    excess = slopes - np.sum(slopes * weights, axis=1, keepdims=True)
    unit = np.sqrt(np.mean(residuals**2, axis=2)) * np.sqrt(
        np.mean(residuals**2, axis=2).min(axis=1, keepdims=True)
    )
    tolerance = {"float64": 1e-11, "float32": 1e-2}[dtype]
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=1e-5)
    assert np.all(weights >= 0)
    assert np.all(excess >= -tolerance * unit)
    assert np.all(np.abs(weights * excess) <= tolerance * unit)


@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_hull_ensemble_and_members_are_ordered(seed):
    """The hull holds the average and the corners; the corners' minimum is not above any corner."""
    rng = np.random.default_rng(seed)
    margins, rewards = jnp.asarray(rng.normal(size=6)), jnp.asarray(rng.normal(size=(5, 6)))
    hull, ensemble, mean = (
        JITTED[name](margins, rewards, 1.0)
        for name in ("hull_distillation", "ensemble_distillation", "mean_distillation")
    )
    assert hull <= min(ensemble, mean) * (1 + 1e-4) + 1e-6
    assert ensemble <= JITTED["mean_distillation"](margins, rewards[:1], 1.0) * (1 + 1e-6)


def test_hull_with_nan_returns():
    assert np.isnan(JITTED["hull_distillation"](jnp.full(2, jnp.nan), jnp.zeros((3, 2)), 1.0))
