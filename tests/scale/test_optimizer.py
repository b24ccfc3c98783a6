"""The learning rate by hand; PaLM's Adafactor against loops in NumPy, layer by layer; that both
optimizers and the z-loss reach the step."""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Batch, Targets
from minipref.training import Hyperparameters
from scale.model.config import ModelConfig
from scale.model.response_logps import response_logps
from scale.model.transformer import Transformer
from scale.train.optimizer import OptimizerConfig, Schedule, learning_rate, make_optimizer
from scale.train.steps import policy_step, sft_step, start_state
from tests.scale.test_model import ROWS, inputs_of

CONSTANT = Schedule(warmup=0, end_lr_ratio=1.0, num_steps=10)


# ---- the learning rate


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.0), (4, 1.0), (10, 1.0)]
)
def test_warm_up_without_decay(step, expected):
    assert float(Schedule(4, 1.0, 11)(step)) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (5, 0.6), (10, 0.2)])
@pytest.mark.parametrize("warmup", [0, 1])
def test_decay_is_linear_from_the_peak_to_its_end_at_the_last_step(warmup, step, expected):
    assert float(Schedule(warmup, 0.2, 11)(step)) == pytest.approx(expected)


def test_warm_up_and_decay_multiply():
    assert float(Schedule(4, 0.0, 5)(1)) == pytest.approx(0.5 * 0.75)


def test_a_run_of_one_step_has_the_peak():
    assert float(Schedule(0, 0.1, 1)(0)) == 1.0


def test_the_peak_is_part_of_the_state_and_the_schedule_counts_steps():
    """Adam's first update is lr / (1 + eps / |g|); equal gradients give equal updates before the
    learning rate."""
    optimizer = make_optimizer("adam", Schedule(4, 1.0, 9))
    params, gradient = jnp.zeros(2), jnp.asarray([0.5, -0.5])
    for peak in (0.1, 0.7):
        state = make_optimizer("adam", Schedule(4, 1.0, 9), peak).init(params)
        for share in (0.25, 0.5, 0.75, 1.0, 1.0):
            change, state = optimizer.update(gradient, state, params)
            np.testing.assert_allclose(change, [-share * peak, share * peak], rtol=1e-4)


# ---- Adafactor


class Params(NamedTuple):
    embedding: jax.Array
    blocks: jax.Array  # two layers


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def adafactor(params, gradients):
    """The updates of one array at each step, before the learning rate."""
    v, m, updates = np.zeros_like(params), np.zeros_like(params), []
    for t, g in enumerate(gradients, 1):
        decay = 1 - t**-0.8
        v = decay * v + (1 - decay) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        u = u / max(1, rms(u)) * max(rms(params), 1e-3)
        m = 0.9 * m + 0.1 * u
        updates.append(m)
    return updates


def test_adafactor_by_hand():
    """The layers of a stacked parameter have sizes and gradients of their own."""
    rng = np.random.default_rng(0)
    params = Params(rng.normal(size=(3, 2)), rng.normal(size=(2, 4)) * [[1], [100]])
    raw = [
        Params(rng.normal(size=(3, 2)) * s, rng.normal(size=(2, 4)) * s * [[1], [9]])
        for s in (1.0, 0.001, 5.0)
    ]
    norms = [np.sqrt(sum((a**2).sum() for a in g)) for g in raw]
    clipped = [Params(*(a / max(1, n) for a in g)) for g, n in zip(raw, norms, strict=True)]
    expected = [
        adafactor(params.embedding, [g.embedding for g in clipped]),
        *(adafactor(params.blocks[i], [g.blocks[i] for g in clipped]) for i in range(2)),
    ]

    optimizer, params = (
        make_optimizer("adafactor", CONSTANT, 1.0),
        jax.tree.map(jnp.asarray, params),
    )
    state = optimizer.init(params)
    for t, gradient in enumerate(raw):
        change, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, params)
        changes = change.embedding, *change.blocks
        for array, updates in zip(changes, expected, strict=True):
            np.testing.assert_allclose(array, -updates[t], rtol=2e-5)


# ---- the step

CONFIG = ModelConfig(vocab_size=24, num_layers=2, d_model=16, num_heads=2, head_dim=8, d_ff=24)
SCHEDULE = Schedule(warmup=1, end_lr_ratio=0.1, num_steps=200)
DPO = Hyperparameters(jnp.asarray(0.1), jnp.zeros(2))


def make_model():
    """Weights from NumPy: nothing to compile."""
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32), like)


jitted_logps = eqx.filter_jit(response_logps)


def after_a_step(optimizer, method=None):
    """The model before and the state after a step, and its metrics; of SFT without a method.

    The policy is its own reference.
    """
    model, inputs = make_model(), inputs_of(ROWS)
    state = start_state(jax.tree.map(jnp.copy, model), optimizer, SCHEDULE, 0.01, DPO)
    assert float(learning_rate(SCHEDULE, state)) == pytest.approx(0.01)
    targets = Targets(jitted_logps(model, inputs).logps, jnp.zeros((2, 2, 0)))
    step = partial(policy_step, method) if method else sft_step
    state, metrics = step(optimizer, SCHEDULE, state, Batch(inputs, targets))
    return model, state, {name: np.asarray(value) for name, value in metrics.items()}


def test_the_z_loss_is_the_mean_square_of_log_z_where_there_are_labels():
    model, _, plain = after_a_step(OptimizerConfig())
    _, _, metrics = after_a_step(OptimizerConfig(z_loss=0.1))
    inputs = inputs_of(ROWS)
    log_normalizers = np.asarray(jitted_logps(model, inputs).log_normalizers)
    log_z = log_normalizers[np.asarray(inputs.response_ids) < 2]
    assert len(log_z) == 10
    assert metrics["z_loss"] == pytest.approx(np.mean(log_z**2), rel=1e-5)
    assert metrics["loss"] == pytest.approx(plain["loss"] + 0.1 * np.mean(log_z**2), rel=1e-5)
    assert metrics["grad_norm"] != plain["grad_norm"]


def test_log_normalizers_are_those_of_all_logits():
    model, inputs = make_model(), inputs_of(ROWS)
    logits = np.asarray(eqx.filter_jit(model)(inputs) @ model.embedding.T, np.float64)
    all_normalizers = np.log(np.exp(logits).sum(-1))
    expected = np.take_along_axis(all_normalizers, np.asarray(inputs.logit_positions), 1)
    log_normalizers = jitted_logps(model, inputs).log_normalizers
    np.testing.assert_allclose(log_normalizers, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_first_step_of_adafactor_moves_each_layer_by_a_tenth_of_its_size():
    """v is g^2 at first, so the update is the sign of g (RMS 1) times the RMS of the parameter,
    times 1 - 0.9, times the learning rate."""
    model, state, metrics = after_a_step(OptimizerConfig("adafactor"))
    assert metrics["learning_rate"] == pytest.approx(0.01) and metrics["tokens"] == 18
    before, after = np.asarray(model.blocks.query), np.asarray(state.model.blocks.query)
    for layer in range(2):
        expected = 0.01 * 0.1 * rms(before[layer])
        assert rms(after[layer] - before[layer]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_adafactor_and_the_z_loss_reach_the_step_of_a_policy():
    """The loss of DPO is ln 2 where the policy is its reference."""
    metrics = after_a_step(OptimizerConfig("adafactor", z_loss=0.1), "dpo")[2]
    assert metrics.keys() >= {"rewards/margins", "loss"} and metrics["z_loss"] > 1
    assert metrics["loss"] == pytest.approx(np.log(2) + 0.1 * metrics["z_loss"], rel=1e-5)
