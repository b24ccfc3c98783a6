"""Scores and samples of rows in packed batches, against those of each row alone."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from minipref.batch import Targets
from minipref.reward_models import RewardModel, ensemble_rewards, stack
from scale.data.dataset import Dataset
from scale.data.layout import Layout, smallest_shape
from scale.data.packing import pack, tokenized_rows
from scale.data.tokenizer import Tokenizer
from scale.model import batch_shapes, inference
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer

CONFIG = ModelConfig(60, 2, 16, 2, 8, 32, num_kv_heads=1, block="sequential", norm="rms")


def dataset_of(rows, layout=None) -> Dataset:
    nothing = np.zeros((len(rows), 0), np.float32), np.zeros((len(rows), 2, 0), np.float32)
    return Dataset(tokenized_rows(rows), Targets(*nothing), np.arange(len(rows)), layout)


def numbered(lengths) -> Dataset:
    """Row i has a prompt of so many tokens i, and one response `[i]`."""
    return dataset_of([([i] * n, [[i]]) for i, n in enumerate(lengths)])


def first_tokens(seen):
    """A function that gives each row ten times its number, and keeps the rows of its batches."""

    def function(model, inputs):
        ends = np.asarray(inputs.reward_positions)
        rows = np.asarray(inputs.tokens)[0][ends[:, 0]]
        seen.append(rows.tolist())
        return jnp.asarray(10 * rows[:, None])

    return function


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, jax.random.key(0))


@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 4), (3, 4), (4, 4), (5, 4), (9, 4), (7, 1)])
def test_over_batches_gives_each_row_once_and_in_order(monkeypatch, model, n, size):
    monkeypatch.setattr(inference, "ROWS", size)
    seen = []
    lengths = [3, 9, 1, 7, 5, 2, 8, 4, 6][:n]
    outputs = inference.over_batches(first_tokens(seen), model, numbered(lengths))
    assert type(outputs) is np.ndarray
    np.testing.assert_array_equal(outputs, 10 * np.arange(n)[:, None])
    assert [len(rows) for rows in seen] == [min(size, n)] * -(-n // size)
    rows, shortest = np.concatenate(seen), int(np.argmin(lengths))
    copies = -n % min(size, n)
    assert np.bincount(rows).tolist() == [1 + copies * (i == shortest) for i in range(n)]


def test_batches_of_a_window_have_equal_totals(monkeypatch):
    """By hand: 9 8 7 6 5 4 3 2 in a window of two batches of four rows, 1 and its copies after it.
    Of one sequence each: 9 6 5 2 and 8 7 4 3. Of two: the turns are 9 8 7 6 | 2 3 4 5."""
    monkeypatch.setattr(inference, "ROWS", 4)
    monkeypatch.setattr(inference, "WINDOW", 2)
    tokens = np.array([3, 9, 1, 7, 5, 2, 8, 4, 6])
    one, two = (tokens[inference.even_batches(tokens, n)].tolist() for n in (1, 2))
    assert one == [[9, 6, 5, 2], [8, 7, 4, 3], [1, 1, 1, 1]]
    assert two == [[9, 2, 8, 3], [7, 4, 6, 5], [1, 1, 1, 1]]


def test_blocks_that_are_there_are_not_computed_again(tmp_path, monkeypatch, model):
    """Three blocks of two batches of two rows; the first and the third are there."""
    monkeypatch.setattr(inference, "ROWS", 2)
    monkeypatch.setattr(inference, "BLOCK", 4)
    monkeypatch.setattr(inference, "WINDOW", 1)
    seen, items = [], []

    def counted(sequence, label, status):
        for item in sequence:
            yield item
            items.append((item, status().split()[1]))

    monkeypatch.setattr(inference, "track", counted)
    rows, function = numbered(range(11, 0, -1)), first_tokens(seen)
    whole = inference.over_batches(function, model, rows, "x", tmp_path)
    np.testing.assert_array_equal(whole, 10 * np.arange(11)[:, None])
    assert items == [(i, "rows/s") for i in range(6)]
    (tmp_path / "x-2-2/values.npy").unlink()
    seen.clear()
    items.clear()
    again = inference.over_batches(function, model, rows, "x", tmp_path)
    np.testing.assert_array_equal(again, whole)
    assert seen == [[4, 5], [6, 7]] and len(items) == 6


def random_rows(n: int, responses: int = 3) -> list:
    rng = np.random.default_rng(0)

    def tokens(least, most):
        return rng.integers(2, 60, rng.integers(least, most)).tolist()

    return [(tokens(1, 20), [tokens(0, 30) for _ in range(responses)]) for _ in range(n)]


def alone(function, rows) -> np.ndarray:
    """The outputs of each row in a batch of its own, which it fills."""
    outputs = []
    for row in rows:
        tokens = tokenized_rows([row])
        inputs = pack(tokens, smallest_shape(tokens.lengths, 1))
        outputs.append(np.asarray(function(jax.tree.map(jnp.asarray, inputs))))
    return np.concatenate(outputs)


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_log_probs_are_those_of_each_row_alone(monkeypatch, model, seconds):
    """37 rows in batches of 8, in many shapes where compiling costs nothing, and in one."""
    monkeypatch.setattr(inference, "ROWS", 8)
    monkeypatch.setattr(inference, "COMPILE_SECONDS", seconds)
    rows = random_rows(37)
    dataset = dataset_of(rows)
    shapes = inference.shapes_of(dataset, np.arange(40).reshape(5, 8) % 37, model)
    assert len(set(shapes)) == (1 if seconds else 5)
    expected = alone(lambda inputs: inference.jitted_logps(model, inputs), rows)
    found = inference.sequence_logps(model, dataset)
    assert found.shape == (37, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rewards_are_those_of_each_row_alone(monkeypatch):
    monkeypatch.setattr(inference, "ROWS", 4)
    keys = jax.random.split(jax.random.key(1), 2)
    models = stack([RewardModel(Transformer(CONFIG, key), 16, key) for key in keys])
    rows = random_rows(10, responses=2)
    expected = alone(lambda inputs: ensemble_rewards(models, inputs), rows)
    found = inference.rewards(models, dataset_of(rows))
    assert found.shape == (10, 2, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rows_in_regions_have_the_shape_of_their_layout(monkeypatch, model):
    monkeypatch.setattr(inference, "ROWS", 4)
    rows, layout, seen = random_rows(6), Layout(20, 30, 3), []

    def function(model, inputs):
        seen.append(inputs.tokens.shape)
        return inference.jitted_logps(model, inputs)

    found = inference.over_batches(function, model, dataset_of(rows, layout))
    assert seen == [(4, 128)] * 2
    expected = alone(lambda inputs: inference.jitted_logps(model, inputs), rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class Numbers(Tokenizer):
    """A token's text is its number; 1 ends a sample."""

    stops = (1,)
    pad = 0

    def decode(self, ids):
        return " ".join(map(str, ids))


TOKENIZER = Numbers(tokenizers.Tokenizer(tokenizers.models.BPE()))


def generated(model, rows, **options):
    return inference.generate(
        model, TOKENIZER, dataset_of([(prompt, []) for prompt, _ in rows]),
        max_new_tokens=9, label="x", **{"n": 2, "seed": 0, "temperature": 1.0} | options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ending(model) -> Transformer:
    """A model that often ends a sample: token 1 has a larger logit than others."""
    return eqx.tree_at(lambda m: m.embedding, model, 0.3 * model.embedding)


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_samples_come_in_the_order_of_the_prompts_with_their_log_probs(
    monkeypatch, ending, seconds
):
    """11 prompts in batches of 4, in several shapes where compiling costs nothing: the
    log-probabilities are those of a forward pass over what is returned."""
    monkeypatch.setattr(inference, "ROWS", 2)
    monkeypatch.setattr(batch_shapes, "COMPILE_SECONDS", seconds)
    rows = [([5] * n, []) for n in (3, 40, 17, 5, 33, 20, 2, 8, 38, 11, 7)]
    samples = generated(ending, rows)
    assert [len(own) for own in samples] == [2] * 11
    complete = [s.complete for own in samples for s in own]
    assert any(complete) and not all(complete)
    for sample in (s for own in samples for s in own):
        ended = sample.ids[-1] == 1
        assert sample.complete == ended and 1 not in sample.ids[:-1] and len(sample.ids) <= 9
        assert sample.text == " ".join(map(str, sample.ids[: len(sample.ids) - ended]))
    scored = [(p, [s.ids for s in own]) for (p, _), own in zip(rows, samples, strict=True)]
    expected = alone(lambda inputs: inference.jitted_logps(ending, inputs), scored)
    found = [[s.logp for s in own] for own in samples]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_prompts_stand_end_to_end_in_the_shape_of_their_batch(monkeypatch, model):
    """Longest first, in multiples of 16; without rows over which to save, in one shape."""
    batches = np.array([[0, 1], [2, 3]])
    prompts = dataset_of([([5] * n, []) for n in (33, 3, 16, 2)])
    for seconds, sizes in ((0.0, [(48, 48), (32, 16)]), (5.0, [(48, 48), (48, 48)])):
        monkeypatch.setattr(batch_shapes, "COMPILE_SECONDS", seconds)
        shapes = batch_shapes.choose_prompt_shapes(prompts.tokens.lengths[batches], model, 9)
        assert [tuple(shape) for shape in shapes] == [(1, w, 0, row) for w, row in sizes]


def test_a_seed_repeats_its_samples_and_another_does_not(ending):
    rows = random_rows(6)
    first = generated(ending, rows)
    assert generated(ending, rows) == first != generated(ending, rows, seed=1)


def test_greedy_samples_do_not_depend_on_the_batch(monkeypatch, model):
    rows = random_rows(7)
    together = generated(model, rows, temperature=0.0)
    monkeypatch.setattr(inference, "ROWS", 1)
    apart = generated(model, rows, temperature=0.0)
    assert [[s.ids for s in own] for own in together] == [[s.ids for s in own] for own in apart]


def test_what_is_computed_is_kept_and_mapped(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return np.arange(3), np.arange(4)

    for _ in range(2):
        first, second = inference.cached(tmp_path / "kept", ("first", "second"), make)
        assert (
            isinstance(second, np.memmap)
            and first.tolist() == [0, 1, 2]
            and second.tolist() == [0, 1, 2, 3]
        )
    assert calls == [1]
