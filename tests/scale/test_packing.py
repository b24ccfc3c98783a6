"""Rows in lines: the arrays by hand, the same losses as rows alone, nothing seen across rows; and a run's shapes."""

import functools
import operator
from dataclasses import replace
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Batch
from minipref.methods import METHODS
from minipref.training import loss_of, sft_loss
from scale.data.dataset import Dataset, on_disk
from scale.data.layout import smallest_shape
from scale.data.packing import pack, tokenized_rows
from scale.model.config import ModelConfig
from scale.model.response_logps import logps, sum_of_logps
from scale.model.transformer import Transformer
from scale.train.batches import few, least_sizes, schedule
from scale.train.loop import TrainingConfig, hyper

CONFIG = ModelConfig(60, 2, 16, 2, 8, 32, num_kv_heads=1, block="sequential", norm="rms", tie_embeddings=False)
PIECES = [([5, 6, 7], [[8, 9, 1], [10, 1], [11]]), ([15, 16], [[17], [18, 19, 1], []]),
          ([25, 26, 27, 28, 29], [[25, 1], [26, 27, 28, 1], [29, 1]]), ([35], [[36, 1], [37, 1], [38, 39, 36, 1]])]


def dataset() -> Dataset:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4, 2, 3)).astype(np.float32)
    return Dataset(tokenized_rows(PIECES), rng.normal(size=(4, 3)).astype(np.float32) - 9, scores, np.arange(4))


def batch(lines: int, spare: int = 0) -> Batch:
    rows = dataset()
    shape = Shape(*(size + spare * (i > 0) for i, size in enumerate(smallest_shape(rows.tokens.lengths, lines))))
    return jax.tree.map(jnp.asarray, rows.batch(np.arange(4), shape))


def test_two_rows_in_a_line_by_hand():
    found = dict(zip(Batch._fields, pack(tokenized_rows([PIECES[0], PIECES[3]]), Shape(1, 20, 14, 11)), strict=False))
    expected = {
        "tokens": [[5, 6, 7, 8, 9, 1, 10, 1, 11, 35, 36, 1, 37, 1, 38, 39, 36, 1, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 5, 3, 4, 3, 0, 1, 2, 1, 2, 1, 2, 3, 4, 0, 0]],
        "segments": [[0, 0, 0, 1, 1, 1, 2, 2, 3, -1, -1], [0, 1, 1, 2, 2, 3, 3, 3, 3, -1, -1]],
        "labels": [[8, 9, 1, 10, 1, 11, 36, 1, 37, 1, 38, 39, 36, 1]],
        "logit_positions": [[2, 3, 4, 2, 6, 2, 9, 10, 9, 12, 9, 14, 15, 16]],
        "response_ids": [[0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 5]],
        "last": [[5, 7, 8], [11, 13, 17]],
    }
    assert {name: array.tolist() for name, array in found.items()} == expected


@pytest.mark.parametrize("method", [*METHODS, "sft"])
def test_lines_give_the_losses_and_gradients_of_rows(method):
    """One line and two, without and with spare slots."""
    model, values = Transformer(CONFIG, jax.random.key(0)), hyper(TrainingConfig(), 0.1, (0.5, 0.5))

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(model, batch):
        if method == "sft":
            return sft_loss(sum_of_logps(model, batch), batch, values, 0.0)[0]
        rewards = {"none": 0, "single": 1, "ensemble": 3}[METHODS[method].rewards]
        batch = batch._replace(scores=batch.scores[..., :rewards])
        return loss_of(method)(logps(model, batch), batch, values, 0.0)[0]

    alone, slopes = loss(model, batch(4))
    for lines, spare in product((1, 2), (0, 8)):
        packed, found = loss(model, batch(lines, spare))
        np.testing.assert_allclose(packed, alone, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("lines", [1, 2])
def test_rows_of_a_line_do_not_see_each_other(lines):
    """Rows share no token but the end, and the embedding is no output layer: its gradient says what is seen."""
    model = Transformer(CONFIG, jax.random.key(1))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m, row: logps(m, batch(lines))[row].sum()))
    for row in range(4):
        of_row = gradient(model, jnp.asarray(row))
        seen = np.flatnonzero(np.abs(np.asarray(of_row.embedding)).sum(1))
        own = {t for t in [*PIECES[row][0], *functools.reduce(operator.iadd, PIECES[row][1], [])] if t != 1}
        assert set(seen) - {1} <= own and set(PIECES[row][0]) <= set(seen)


def test_shapes_are_joined_while_that_costs_less_than_a_compilation():
    """Ten uses of 32 and one each of 64 and 96: 32 -> 64 costs 320 more, 64 -> 96 32 more."""
    sizes = np.asarray([[32]] * 10 + [[64], [96]])
    for price, expected in ((10, [32, 64, 96]), (33, [32, 96, 96]), (641, [96, 96, 96])):
        assert few(sizes, lambda s: s[:, 0], price)[[0, 10, 11], 0].tolist() == expected


def test_a_joint_shape_is_large_enough_in_every_size():
    sizes = np.asarray([[32, 96], [64, 32]])
    assert few(sizes, lambda s: s.sum(1), 1e9).tolist() == [[64, 96]] * 2


def test_the_sizes_of_batches():
    """Two batches of two rows with a prompt and a response each: lengths by hand, rounded up to 32."""
    lengths = np.asarray([[[20, 20], [1, 2]], [[30, 3], [30, 40]]])
    assert least_sizes(lengths, 1).tolist() == [[64, 32, 64], [128, 64, 96]]
    assert least_sizes(lengths, 2).tolist() == [[64, 32, 64], [96, 64, 96]]


def test_the_batches_of_a_run_hold_their_rows_whole():
    data, model = dataset(), Transformer(CONFIG, jax.random.key(0))
    run = schedule(data, replace(TrainingConfig(), steps=5, batch=2), model)
    lengths = data.tokens.lengths.sum(1)
    for step, rows in enumerate(run.rows):
        found = run.batch_size(step)
        assert (found.segment_ids >= 0).sum(1).tolist() == lengths[rows].tolist()
        assert found.tokens[0, : lengths[rows[0]]].tolist() == data.data.tokens[rows[0], : lengths[rows[0]]].tolist()
    slots = sum(shape.lines * shape.width for shape in run.shapes)
    assert run.findings == {"shapes of a step": 1, "slots that hold a token": round(lengths[run.rows].sum() / slots, 3)}


def test_rows_are_tokenised_once_and_mapped(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return np.arange(3), np.arange(4)

    for _ in range(2):
        first, second = on_disk(tmp_path / "tokens", ("first", "second"), make)
        assert isinstance(second, np.memmap) and first.tolist() == [0, 1, 2] and second.tolist() == [0, 1, 2, 3]
    assert calls == [1]
