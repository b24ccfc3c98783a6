"""Several rows in one packed sequence: the arrays by hand, the same losses as rows alone, nothing
seen across rows; and the shapes of a run."""

import functools
import operator
from dataclasses import replace
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Batch, Targets
from minipref.methods import METHODS
from minipref.training import Hyperparameters
from scale.data.dataset import Dataset, batch_indices
from scale.data.layout import BatchShape, smallest_shape
from scale.data.packing import pack, shared_out, tokenized_rows
from scale.model.batch_shapes import coarsen_sizes, merge_sizes, smallest_sizes
from scale.model.config import ModelConfig
from scale.model.response_logps import response_logps
from scale.model.transformer import Transformer
from scale.train.batches import plan_batches, row_order
from scale.train.loop import TrainingConfig
from scale.train.optimizer import OptimizerConfig
from scale.train.steps import language_model_loss, policy_loss, policy_step, start_state

CONFIG = ModelConfig(
    60, 2, 16, 2, 8, 32, num_kv_heads=1, block="sequential", norm="rms", tie_embeddings=False
)
ROWS = [
    ([5, 6, 7], [[8, 9, 1], [10, 1], [11]]),
    ([15, 16], [[17], [18, 19, 1], []]),
    ([25, 26, 27, 28, 29], [[25, 1], [26, 27, 28, 1], [29, 1]]),
    ([35], [[36, 1], [37, 1], [38, 39, 36, 1]]),
]


def make_dataset() -> Dataset:
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 2, 3)).astype(np.float32)
    ref_logps = rng.normal(size=(4, 3)).astype(np.float32) - 9
    return Dataset(tokenized_rows(ROWS), Targets(ref_logps, rewards), np.arange(4))


def packed(num_sequences: int, spare: int = 0) -> Batch:
    """The four rows in some packed sequences, every size `spare` larger than needed."""
    dataset = make_dataset()
    smallest = smallest_shape(dataset.tokens.lengths, num_sequences)
    shape = BatchShape(num_sequences, *(size + spare for size in smallest[1:]))
    return jax.tree.map(jnp.asarray, dataset.batch(np.arange(4), shape))


def test_two_rows_in_a_sequence_by_hand():
    inputs = pack(tokenized_rows([ROWS[0], ROWS[3]]), BatchShape(1, 20, 14, 11))
    expected = {
        "tokens": [[5, 6, 7, 8, 9, 1, 10, 1, 11, 35, 36, 1, 37, 1, 38, 39, 36, 1, 0, 0]],
        "positions": [[0, 1, 2, 3, 4, 5, 3, 4, 3, 0, 1, 2, 1, 2, 1, 2, 3, 4, 0, 0]],
        "segment_ids": [
            [0, 0, 0, 1, 1, 1, 2, 2, 3, -1, -1],
            [0, 1, 1, 2, 2, 3, 3, 3, 3, -1, -1],
        ],
        "labels": [[8, 9, 1, 10, 1, 11, 36, 1, 37, 1, 38, 39, 36, 1]],
        "logit_positions": [[2, 3, 4, 2, 6, 2, 9, 10, 9, 12, 9, 14, 15, 16]],
        "response_ids": [[0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 5]],
        "reward_positions": [[5, 7, 8], [11, 13, 17]],
    }
    assert {name: array.tolist() for name, array in inputs._asdict().items()} == expected


def every_loss(model, batch):
    """The losses of all methods and of supervised fine-tuning."""
    hyperparameters = Hyperparameters(jnp.asarray(0.1), jnp.asarray((0.5, 0.5)))
    losses = [language_model_loss(0.0, model, batch)[0]]
    for method, row in METHODS.items():
        num_reward_models = {"none": 0, "single": 1, "ensemble": 3}[row.rewards]
        rewards = batch.targets.rewards[..., :num_reward_models]
        own = batch._replace(targets=batch.targets._replace(rewards=rewards))
        losses.append(policy_loss(method, 0.0, model, own, hyperparameters, 0.0)[0])
    return jnp.stack(losses)


@eqx.filter_jit
def losses_and_gradients(model, batch):
    """One loss after another, so that one backward pass is compiled for all."""
    arrays, static = eqx.partition(model, eqx.is_array)

    def gradient(weights):
        def loss(arrays):
            losses = every_loss(eqx.combine(arrays, static), batch)
            return weights @ losses, losses

        gradients, losses = jax.grad(loss, has_aux=True)(arrays)
        return losses, gradients

    losses, gradients = jax.lax.map(gradient, jnp.eye(1 + len(METHODS)))
    return losses[0], gradients


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def of_rows(model):
    """The losses and gradients of a row in each sequence."""
    return losses_and_gradients(model, packed(4))


@pytest.mark.slow
@pytest.mark.parametrize(("num_sequences", "spare"), [*product((1, 2), (0, 8))])
def test_packed_sequences_give_the_losses_and_gradients_of_rows(
    model, of_rows, num_sequences, spare
):
    """One sequence and two, without and with spare positions."""
    losses, gradients = losses_and_gradients(model, packed(num_sequences, spare))
    for i, name in enumerate(["sft", *METHODS]):
        np.testing.assert_allclose(losses[i], of_rows[0][i], rtol=1e-5, err_msg=name)
        for leaf, expected in zip(*map(jax.tree.leaves, (gradients, of_rows[1])), strict=True):
            atol = 1e-5 * float(jnp.abs(expected[i]).max())
            np.testing.assert_allclose(leaf[i], expected[i], rtol=1e-4, atol=atol, err_msg=name)
            assert atol > 0


def plan_of(dataset, model, parts=1):
    training = TrainingConfig(steps=1, batch_size=4, accumulation=parts)
    return plan_batches(dataset, training, model)


@pytest.mark.slow
def test_parts_of_a_batch_give_the_losses_and_gradients_of_the_whole(model):
    """Model 0 is the nearest in the first half and model 1 in the second, so that the minimum over
    the batch is not that of its halves."""
    dataset = make_dataset()
    order = plan_of(dataset, model).rows[0]
    rewards = np.zeros((4, 2, 3), np.float32)
    rewards[:, 0] = 2.0
    rewards[order[:2], 0, 0] = rewards[order[2:], 0, 1] = 0.0
    dataset = replace(dataset, targets=dataset.targets._replace(rewards=rewards))
    whole, batch = plan_of(dataset, model).batch(0), plan_of(dataset, model, parts=2).batch(0)
    assert batch.inputs.tokens.shape[:2] == (2, 1)
    losses, gradients = losses_and_gradients(model, batch)
    expected_losses, expected = losses_and_gradients(model, whole)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        for i, name in enumerate(["sft", *METHODS]):
            atol = 1e-5 * float(jnp.abs(theirs[i]).max())
            np.testing.assert_allclose(ours[i], theirs[i], rtol=1e-4, atol=atol, err_msg=name)
    shape = BatchShape(2, 16, 16, 16)
    halves = [
        every_loss(model, jax.tree.map(jnp.asarray, dataset.batch(half, shape)))
        for half in np.split(order, 2)
    ]
    index = 1 + list(METHODS).index("e-dpo")
    assert sum(halves)[index] / 2 < losses[index] - 0.5


@pytest.mark.slow
def test_parts_of_a_batch_need_the_memory_of_one():
    config = ModelConfig(vocab_size=60, num_layers=4, d_model=32, num_heads=2, head_dim=16, d_ff=64)
    rng = np.random.default_rng(0)
    rows = [(rng.integers(5, 60, 40).tolist(), [rng.integers(5, 60, 40).tolist()] * 2)] * 32
    targets = Targets(np.zeros((32, 2), np.float32), np.zeros((32, 2, 0), np.float32))
    dataset = Dataset(tokenized_rows(rows), targets, np.arange(32))

    def bytes_of(parts):
        training = TrainingConfig(steps=1, batch_size=32, accumulation=parts)
        model = Transformer(config, jax.random.key(0))
        batch = plan_batches(dataset, training, model).batch(0)
        hyperparameters = Hyperparameters(jnp.asarray(0.1), jnp.zeros(2))
        state = start_state(model, OptimizerConfig(), training.schedule, 1e-3, hyperparameters)
        step = policy_step.lower("dpo", OptimizerConfig(), training.schedule, state, batch)
        return step.compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(8) < bytes_of(1) / 4


@pytest.mark.parametrize("num_sequences", [1, 2])
def test_rows_of_a_sequence_do_not_see_each_other(model, num_sequences):
    """Rows share no token but the end, and the embedding is no output layer: its gradient says
    what is seen."""
    inputs = packed(num_sequences).inputs
    gradient_of_row = eqx.filter_grad(lambda m, row: response_logps(m, inputs).logps[row].sum())
    gradient = eqx.filter_jit(gradient_of_row)
    for row, (prompt, responses) in enumerate(ROWS):
        embedding = np.asarray(gradient(model, jnp.asarray(row)).embedding)
        seen = np.flatnonzero(np.abs(embedding).sum(1))
        own = {t for t in [*prompt, *functools.reduce(operator.iadd, responses, [])] if t != 1}
        assert set(seen) - {1} <= own and set(prompt) <= set(seen)


def test_shapes_are_joined_while_that_costs_less_than_a_compilation():
    """Ten uses of 32 and one each of 64 and 96: 32 -> 64 costs 320 more, 64 -> 96 32 more."""
    sizes = np.asarray([[32]] * 10 + [[64], [96]])
    cases = (10.0, [32, 64, 96]), (33.0, [32, 96, 96]), (641.0, [96, 96, 96])
    for compile_cost, expected in cases:
        merged = merge_sizes(sizes, lambda s: s[:, 0], compile_cost)
        assert merged[[0, 10, 11], 0].tolist() == expected


def test_a_joint_shape_is_large_enough_in_every_size():
    sizes = np.asarray([[32, 96], [64, 32]])
    assert merge_sizes(sizes, lambda s: s.sum(1), 1e9).tolist() == [[64, 96]] * 2


def test_the_sizes_of_batches():
    """Two batches of two rows with a prompt and a response each: by hand, rounded up to 16."""
    lengths = np.asarray([[[20, 20], [1, 2]], [[30, 3], [30, 40]]])
    assert smallest_sizes(lengths, 1).tolist() == [[48, 32, 48], [112, 48, 80]]
    assert smallest_sizes(lengths, 2).tolist() == [[48, 32, 48], [80, 48, 80]]


def test_the_batches_of_a_run_hold_their_rows_whole(model):
    dataset = make_dataset()
    plan = plan_batches(dataset, replace(TrainingConfig(), steps=5, batch_size=2), model)
    lengths = dataset.tokens.lengths.sum(1)
    for step, rows in enumerate(plan.rows):
        inputs, first = plan.batch(step).inputs, rows[0]
        assert (inputs.segment_ids >= 0).sum(1).tolist() == lengths[rows].tolist()
        tokens = dataset.all.inputs.tokens[first, : lengths[first]]
        assert inputs.tokens[0, : lengths[first]].tolist() == tokens.tolist()
    positions = sum(shape.num_sequences * shape.length for shape in plan.shapes)
    share = round(lengths[plan.rows].sum() / positions, 3)
    assert plan.findings == {"shapes of a step": 1, "positions that hold a token": share}


def test_sizes_are_coarsened_where_that_costs_less_than_a_compilation():
    """Multiples of a quarter or an eighth of the power of two below: 128, 64 and 16, or the halves.
    The cost is the length: of two steps of 1024 or 960 instead of 928 it is 192 or 64 more."""
    sizes = np.array([[928, 448, 84], [928, 512, 64], [1024, 3, 1]])
    quarters = [[1024, 448, 96], [1024, 512, 64], [1024, 3, 1]]
    eighths = [[960, 448, 88], [960, 512, 64], [1024, 3, 1]]
    for compile_cost, expected in ((1921, quarters), (1920, eighths), (65, eighths)):
        assert coarsen_sizes(sizes, lambda s: s[:, 0], float(compile_cost)).tolist() == expected
    assert coarsen_sizes(sizes, lambda s: s[:, 0], 64.0).tolist() == sizes.tolist()


def test_rows_are_dealt_so_that_groups_have_equal_totals():
    """By hand: 8 7 | 5 6 | 4 3 | 1 2 are the turns of two groups, each of 18 tokens."""
    tokens, rows = np.array([3, 8, 1, 7, 2, 6, 4, 5]), np.arange(8)
    assert tokens[shared_out(rows, tokens, 2)].tolist() == [[8, 5, 4, 1], [7, 6, 3, 2]]


@pytest.mark.parametrize("num_sequences", [1, 2, 4])
def test_every_window_of_steps_has_the_rows_of_its_permutations(num_sequences):
    """And the totals of its batches, and of the packed sequences of a batch, differ by no more than
    the longest row less the shortest: what one has more in a turn, it has less in the next, and
    these differences are gaps, which do not overlap, in the order of all lengths. Which rows a
    batch has does not depend on its sequences."""
    training = TrainingConfig(steps=160, batch_size=8 * num_sequences)
    tokens = np.random.default_rng(0).integers(1, 101, 3000)
    order = row_order(tokens, training, 5, num_sequences)
    plain = batch_indices(3000, order.size, 5, 0).reshape(order.shape)
    for start in (0, 64, 128):
        window = slice(start, start + 64)
        assert sorted(order[window].flat) == sorted(plain[window].flat)
        totals = [tokens[rows[window]].sum(1) for rows in (order, plain)]
        assert np.ptp(totals[0]) <= 99 < 200 < np.ptp(totals[1])
        sequences = tokens[order[window]].reshape(-1, num_sequences, 8).sum(2)
        assert np.ptp(sequences, axis=1).max() <= 99
    assert np.array_equal(np.sort(order), np.sort(row_order(tokens, training, 5, 1)))
    assert not np.array_equal(order, row_order(tokens, training, 6, num_sequences))
