"""The table of methods, in both layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference.methods as ref
from minipref.methods import METHODS, gamma_at, method_loss

# Residuals (3/2, -3/2) and (1/2, 1/2) at beta 1/2, as in the hand values of the objectives.
MARGINS, REWARDS, KLS, BETA = [1.0, 3.0], [[2.0, 0.0], [1.0, 2.0]], [1.0, 2.0, 6.0], 0.5
DPO = np.mean(np.log1p(np.exp([-0.5, -1.5])))
PAIR = {  # by hand; the single reward model is the second
    "dpo": DPO,
    "ipo": 1.0,  # targets of 2: (-1)^2 and 1^2
    "d-dpo": 0.25,
    "p-dpo": DPO,
    "dp-dpo": 0.25,
    "e-dpo": 0.25,
    "hull": 0.225,
    "mean": 0.625,
}
WEIGHTS = {"d-dpo": [1], "dp-dpo": [1], "e-dpo": [0, 1], "hull": [0.1, 0.9], "mean": [0.5, 0.5]}
MEMBERS = {"none": slice(0, 0), "single": slice(1, 2), "ensemble": slice(0, 2)}
PESSIMISTIC = ["p-dpo", "dp-dpo", "e-dpo", "hull"]


def batch(name):
    rewards = np.array(REWARDS)[MEMBERS[METHODS[name].rewards]]
    return np.array(MARGINS), rewards, np.array(KLS)


def test_the_layers_have_the_same_table():
    assert list(METHODS) == list(ref.METHODS) == list(PAIR)
    for name, method in METHODS.items():
        own, other = method._asdict(), ref.METHODS[name]._asdict()
        for field in ("label", "rewards", "gamma", "beta"):
            assert own[field] == other[field]
        assert (
            (method.weights is None)
            == (ref.METHODS[name].weights is None)
            == (method.rewards == "none")
        )


def test_who_is_pessimistic():
    """The paper's pessimistic methods and ours have section 6.1's schedule; no other has a KL."""
    assert [name for name, method in METHODS.items() if method.gamma == (1e-4, 1e-2)] == PESSIMISTIC
    assert {method.gamma for name, method in METHODS.items() if name not in PESSIMISTIC} == {None}


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_losses_by_hand(name, progress):
    """Mean KL 3; gamma goes from 1e-4 to 1e-2 linearly."""
    gamma = 1e-4 + progress * 0.0099 if name in PESSIMISTIC else 0.0
    margins, rewards, kls = batch(name)
    expected = PAIR[name] + 3 * gamma
    assert ref.method_loss(
        ref.METHODS[name], margins, rewards, kls, BETA, progress
    ) == pytest.approx(expected)
    loss = method_loss(METHODS[name], *map(jnp.asarray, (margins, rewards, kls)), BETA, progress)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_by_hand(name):
    margins, rewards, _ = batch(name)
    np.testing.assert_allclose(
        ref.METHODS[name].weights(margins, rewards, BETA), WEIGHTS[name], atol=1e-12
    )
    weights = METHODS[name].weights(jnp.asarray(margins), jnp.asarray(rewards), BETA)
    np.testing.assert_allclose(weights, WEIGHTS[name], atol=1e-4)


@pytest.mark.parametrize("name", PESSIMISTIC)
def test_a_kl_term_needs_kl_estimates(name):
    margins, rewards, _ = batch(name)
    with pytest.raises(ValueError, match="KL"):
        ref.method_loss(ref.METHODS[name], margins, rewards, np.zeros(0), BETA, 0.0)
    with pytest.raises(ValueError, match="KL"):
        method_loss(
            METHODS[name], jnp.asarray(margins), jnp.asarray(rewards), jnp.zeros(0), BETA, 0.0
        )


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(PESSIMISTIC)))
def test_no_kl_term_needs_none(name):
    margins, rewards, _ = batch(name)
    exact = ref.method_loss(ref.METHODS[name], margins, rewards, np.zeros(0), BETA, 0.0)
    loss = method_loss(
        METHODS[name], jnp.asarray(margins), jnp.asarray(rewards), jnp.zeros(0), BETA, 0.0
    )
    assert exact == pytest.approx(PAIR[name])
    assert float(loss) == pytest.approx(PAIR[name], rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_one_compiled_loss_serves_every_beta_and_step(name):
    traces = []

    @jax.jit
    def loss(beta, progress):
        traces.append(None)
        return method_loss(METHODS[name], *map(jnp.asarray, batch(name)), beta, progress)

    losses = {float(loss(beta, progress)) for beta in (0.5, 2.0) for progress in (0.0, 1.0)}
    assert len(traces) == 1
    assert len(losses) == (4 if name in PESSIMISTIC else 2)


def test_gamma_is_linear():
    for layer in (gamma_at, ref.gamma_at):
        np.testing.assert_allclose([layer((1.0, 3.0), f) for f in (0.0, 0.5, 1.0)], [1, 2, 3])


def test_gradients_pass_through_the_table():
    """d-DPO has slope 2 (r - beta h)(-beta) / B = -1/4 for both pairs.

    Each KL estimate has slope gamma / 3.
    """
    args = [jnp.asarray(arg) for arg in batch("dp-dpo")]
    gradient = jax.grad(
        lambda m, k: method_loss(METHODS["dp-dpo"], m, args[1], k, BETA, 1.0), (0, 1)
    )
    margins, kls = gradient(args[0], args[2])
    np.testing.assert_allclose(margins, [-0.25, -0.25], rtol=1e-6)
    np.testing.assert_allclose(kls, [1e-2 / 3] * 3, rtol=1e-6)
