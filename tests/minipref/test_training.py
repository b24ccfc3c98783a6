"""The training step, on a model that is a table of log-probabilities."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import minipref as mp
from minipref.methods import METHODS
from tests.minipref.test_losses import DPO, LOGPS, arguments


class Table(eqx.Module):
    logps: jax.Array
    name: str = eqx.field(static=True, default="table")


def preference(method):
    """`method`'s loss of a table; the batch is what `arguments` gives besides beta and gamma."""

    def loss_fn(model, batch, hyperparameters, progress):
        gamma = None if METHODS[method].gamma is None else hyperparameters.gamma
        ref, rewards = batch
        logps, beta = model.logps.astype(jnp.float32), hyperparameters.beta
        return mp.preference_loss(
            method, logps, ref, rewards=rewards, beta=beta, gamma=gamma, progress=progress
        )

    return loss_fn


def problem(method):
    (_, logps, ref), options = arguments(method)
    return logps, (ref, options.get("rewards"))


def hyperparameters(beta=0.5, gamma=(0.0, 0.0)):
    return mp.Hyperparameters(*(jnp.asarray(x, jnp.float32) for x in (beta, gamma)))


def reward_loss_fn(model, batch, hyperparameters, progress):
    return mp.reward_loss(model.logps)


SGD = optax.sgd(0.1)
ADAM = optax.chain(optax.scale_by_adam(), optax.scale(-0.1))


def test_progress_and_gamma_reach_both_ends():
    state = mp.init_state(Table(LOGPS), SGD, 5)
    steps = [state._replace(step=jnp.asarray(s)) for s in range(5)]
    assert [float(mp.progress(s)) for s in steps] == [0, 0.25, 0.5, 0.75, 1]
    assert mp.progress(mp.init_state(Table(LOGPS), SGD, 1)) == 0
    logps, batch = problem("p-dpo")
    state = mp.init_state(Table(logps), optax.sgd(0.0), 3, hyperparameters(gamma=(0.25, 0.75)))
    losses = []
    for _ in range(3):
        state, metrics = mp.train_step(preference("p-dpo"), optax.sgd(0.0), state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, [DPO + 0.25, DPO + 0.5, DPO + 0.75], rtol=1e-6)


def test_one_step_of_gradient_descent_by_hand():
    """DPO at the reference: gradient -/+ 1/4 (beta 1/2, one pair), norm sqrt(2)/4, rate 0.1."""
    logps = jnp.asarray([[-1.0, -2.0]])
    state = mp.init_state(Table(logps), SGD, 10, hyperparameters())
    new, metrics = mp.train_step(preference("dpo"), SGD, state, (logps, None))
    np.testing.assert_allclose(new.model.logps, [[-1 + 0.1 / 4, -2 - 0.1 / 4]], rtol=1e-6)
    assert metrics["loss"] == pytest.approx(np.log(2))
    assert metrics["grad_norm"] == pytest.approx(2**0.5 / 4)
    assert new.step == 1 and new.num_steps == 10 and new.model.name == "table"


def test_a_batch_and_hyperparameters_of_ones_own():
    """Nothing but the loss reads them: loss a x^2 with a = 3 at x = 2 has gradient 12."""

    def loss_fn(model, batch, hyperparameters, progress):
        return hyperparameters["a"] * batch["x"] ** 2 * model["w"], {"mine": progress}

    optimizer = optax.sgd(1.0)
    state = mp.init_state({"w": jnp.asarray(5.0)}, optimizer, 2, {"a": jnp.asarray(3.0)})
    new, metrics = mp.train_step(loss_fn, optimizer, state, {"x": jnp.asarray(2.0)})
    assert new.model["w"] == 5 - 12 and metrics["mine"] == 0 and metrics["loss"] == 60


def test_an_update_keeps_the_weights_type():
    logps, batch = problem("dpo")
    state = mp.init_state(Table(logps.astype(jnp.bfloat16)), SGD, 10, hyperparameters())
    new, _ = mp.train_step(preference("dpo"), SGD, state, batch)
    assert new.model.logps.dtype == jnp.bfloat16
    assert not np.array_equal(new.model.logps, state.model.logps)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_decreases_its_own_loss(method):
    """Gradient descent with a small step on one batch, while gamma stands still."""
    logps, batch = problem(method)
    optimizer = optax.sgd(0.05)
    state = mp.init_state(Table(logps), optimizer, 100, hyperparameters(gamma=(0.01, 0.01)))
    step = eqx.filter_jit(partial(mp.train_step, preference(method), optimizer))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.all(np.diff(losses) < 0), losses


def test_a_vmapped_sweep_is_each_value_alone():
    logps, batch = problem("e-dpo")
    values = [hyperparameters(0.5, (0.0, 0.1)), hyperparameters(0.1, (0.3, 0.0))]
    step = eqx.filter_jit(partial(mp.train_step, preference("e-dpo"), ADAM))
    alone = [mp.init_state(Table(logps), ADAM, n, h) for n, h in zip((4, 9), values, strict=True)]
    swept = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    for _ in range(3):
        vmapped = eqx.filter_vmap(step, in_axes=(eqx.if_array(0), None))
        swept, together = vmapped(swept, batch)
        alone, one_by_one = zip(*(step(s, batch) for s in alone), strict=True)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(swept), jax.tree.leaves(alone[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)
        for name, value in one_by_one[i].items():
            np.testing.assert_allclose(
                together[name][i], value, rtol=1e-5, atol=1e-6, err_msg=name
            )
    assert not np.allclose(swept.model.logps[0], swept.model.logps[1])


def test_an_ensemble_is_its_models_trained_alone():
    models = [Table(LOGPS[:, :2] * s) for s in (1.0, -0.5, 0.1)]
    step = eqx.filter_jit(partial(mp.train_step, reward_loss_fn, ADAM))
    alone = [mp.init_state(m, ADAM, 10) for m in models]
    ensemble = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    for _ in range(3):
        vmapped = eqx.filter_vmap(step, in_axes=(eqx.if_array(0), None))
        ensemble, metrics = vmapped(ensemble, None)
        alone = [step(s, None)[0] for s in alone]
    assert metrics["loss"].shape == (3,)
    for i, state in enumerate(alone):
        np.testing.assert_allclose(ensemble.model.logps[i], state.model.logps, rtol=1e-6)


def test_the_step_is_pure():
    logps, batch = problem("dpo")
    state = mp.init_state(Table(logps), ADAM, 10, hyperparameters())
    first, second = (mp.train_step(preference("dpo"), ADAM, state, batch) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state.step == 0
    np.testing.assert_array_equal(state.model.logps, logps)
