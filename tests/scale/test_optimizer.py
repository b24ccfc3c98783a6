"""PaLM's Adafactor against loops in NumPy, layer by layer; that both optimisers and the z-loss reach the step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.training import loss_of, sft_loss
from scale.model.config import ModelConfig
from scale.model.response_logps import logps_and_normalizers
from scale.model.transformer import Transformer
from scale.train.loop import TrainingConfig, hyper
from scale.train.optimizer import ADAFACTOR, OptimizerConfig, language_step, start_state
from tests.scale.test_model import ROWS, batch_of


class Params(NamedTuple):
    embedding: jax.Array
    blocks: jax.Array  # two layers


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def adafactor(params, gradients):
    """Updates of each step, before the learning rate, of one array."""
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
    raw = [Params(rng.normal(size=(3, 2)) * s, rng.normal(size=(2, 4)) * s * [[1], [9]]) for s in (1.0, 0.001, 5.0)]
    norms = [np.sqrt(sum((a**2).sum() for a in g)) for g in raw]
    clipped = [Params(*(a / max(1, n) for a in g)) for g, n in zip(raw, norms, strict=True)]
    expected = [adafactor(params.embedding, [g.embedding for g in clipped]),
                *(adafactor(params.blocks[i], [g.blocks[i] for g in clipped]) for i in range(2))]

    state = ADAFACTOR.init(jax.tree.map(jnp.asarray, params))
    for t, gradient in enumerate(raw):
        update, state = ADAFACTOR.update(jax.tree.map(jnp.asarray, gradient), state, jax.tree.map(jnp.asarray, params))
        for found, wanted in zip((update.embedding, *update.blocks), expected, strict=True):
            np.testing.assert_allclose(found, wanted[t], rtol=2e-5)


CONFIG = ModelConfig(vocab_size=24, num_layers=2, d_model=16, num_heads=2, head_dim=8, d_ff=24)


def stepped(optimizer_config, loss=sft_loss):
    model = Transformer(CONFIG, jax.random.key(0))
    state = start_state(jax.tree.map(jnp.copy, model), optimizer_config, hyper(TrainingConfig(learning_rate=0.01, warmup=1)))
    batch = batch_of(ROWS)._replace(ref_logps=jnp.zeros((2, 2)))
    state, metrics = jax.jit(language_step, static_argnums=(0, 1))(loss, optimizer_config, state, batch)
    return model, state, {name: np.asarray(value) for name, value in metrics.items()}


def test_the_z_loss_is_the_mean_square_of_log_z_where_there_are_labels():
    model, _, plain = stepped(OptimizerConfig())
    _, _, metrics = stepped(OptimizerConfig(z_loss=0.1))
    batch = batch_of(ROWS)
    z = np.asarray(logps_and_normalizers(model, batch).log_normalizers)[np.asarray(batch.response_ids) < 2]
    assert len(z) == 10
    assert metrics["z_loss"] == pytest.approx(np.mean(z**2), rel=1e-5)
    assert metrics["loss"] == pytest.approx(plain["loss"] + 0.1 * np.mean(z**2), rel=1e-5)
    assert metrics["grad_norm"] != plain["grad_norm"]


def test_log_normalizers_are_those_of_all_logits():
    model, batch = Transformer(CONFIG, jax.random.key(0)), batch_of(ROWS)
    logits = np.asarray(model(batch) @ model.embedding.T, np.float64)
    at = np.take_along_axis(np.log(np.exp(logits).sum(-1)), np.asarray(batch.logit_positions), 1)
    np.testing.assert_allclose(logps_and_normalizers(model, batch).log_normalizers, at, rtol=1e-5)


def test_the_first_step_of_adafactor_moves_each_layer_by_a_tenth_of_its_size():
    """v is g^2 at first, so the update is the sign of g (RMS 1) times the parameter's RMS, times 1 - 0.9, times lr."""
    model, state, _ = stepped(OptimizerConfig("adafactor"))
    moved = np.asarray(state.model.blocks.query - model.blocks.query)
    for layer in range(2):
        assert rms(moved[layer]) == pytest.approx(0.01 * 0.1 * rms(np.asarray(model.blocks.query[layer])), rel=1e-3)
    assert stepped(OptimizerConfig("adafactor"), loss_of("dpo"))[2].keys() >= {"rewards/margins", "loss"}
