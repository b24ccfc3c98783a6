"""Rows of text as token ids and targets; packing by hand; which rows make up a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipref.batch import Batch, Inputs, Targets, attention_mask
from minipref.logps import response_logps, response_rewards
from scale.console import console
from scale.data import dataset as dataset_module
from scale.data.dataset import Limits, batch_indices, make_dataset, take, truncate
from scale.data.layout import BatchShape, Layout, layout_of, smallest_shape
from scale.data.packing import pack, tokenized_rows
from scale.data.tokenizer import EOS, ROLE_IDS, Tokenizer, train_tokenizer
from scale.errors import InputError

ASSISTANT = 4


class Words(Tokenizer):
    """One token a word, the number that it spells, so that lengths are seen in the text."""

    def __init__(self):
        """No backend."""

    def texts_ids(self, texts):
        return [[*map(int, text.split())] for text in texts]


def one_row(prompt, responses, length, num_labels, layout=None):
    """The arrays of one row in one sequence."""
    shape = BatchShape(1, length, num_labels, length)
    inputs = pack(tokenized_rows([(prompt, responses)]), shape, layout)
    return Inputs(*[array[0] for array in inputs])


def test_a_row_is_the_picture_in_batch():
    p, a, b, c, eos = 9, 5, 6, 7, 1
    inputs = one_row([p, p, p], [[a, b, eos], [c, eos]], 9, 6)
    expected = {
        "tokens": [p, p, p, a, b, eos, c, eos, 0],
        "positions": [0, 1, 2, 3, 4, 5, 3, 4, 0],
        "segment_ids": [0, 0, 0, 1, 1, 1, 2, 2, -1],
        "labels": [a, b, eos, c, eos, 0],
        "logit_positions": [2, 3, 4, 2, 6, 0],
        "response_ids": [0, 0, 0, 1, 1, 2],
        "reward_positions": [5, 7],
    }
    assert {name: list(array) for name, array in inputs._asdict().items()} == expected
    assert {array.dtype for array in inputs} == {np.dtype(np.int32)}


def test_a_row_without_responses():
    inputs = one_row([8, 9], [], 4, 0)
    expected = [[8, 9, 0, 0], [0, 1, 0, 0], [0, 0, -1, -1], [], [], [], []]
    assert [list(array) for array in inputs] == expected


def test_an_empty_response_is_read_at_the_prompts_end():
    """It has no position of its own; another response's would give it that one's reward."""
    inputs = one_row([8, 9], [[], [7], []], 4, 2)
    assert list(inputs.response_ids) == [1, 3] and list(inputs.logit_positions) == [1, 0]
    assert list(inputs.segment_ids) == [0, 0, 2, -1] and list(inputs.reward_positions) == [1, 2, 1]


# ---- rows in regions


def test_a_row_in_regions():
    """The picture in `minipref.batch` again: regions of 122 and twice 3 positions."""
    p, a, b, c, eos = 9, 5, 6, 7, 1
    inputs = one_row([p, p, p], [[a, b, eos], [c, eos]], 128, 6, Layout(4, 3, 2))
    between = [0] * 119
    expected = {
        "tokens": [p, p, p, *between, a, b, eos, c, eos, 0],
        "positions": [0, 1, 2, *between, 3, 4, 5, 3, 4, 0],
        "segment_ids": [0, 0, 0, *[-1] * 119, 1, 1, 1, 2, 2, -1],
        "labels": [a, b, eos, c, eos, 0],
        "logit_positions": [2, 122, 123, 2, 125, 0],
        "response_ids": [0, 0, 0, 1, 1, 2],
        "reward_positions": [124, 126],
    }
    assert {name: list(array) for name, array in inputs._asdict().items()} == expected
    assert {array.dtype for array in inputs} == {np.dtype(np.int32)}


def test_an_empty_response_in_regions():
    inputs = one_row([8, 9], [[], [7]], 128, 4, Layout(2, 2, 2))
    assert list(np.flatnonzero(inputs.segment_ids + 1)) == [0, 1, 126]
    assert list(inputs.labels) == [0, 0, 7, 0] and list(inputs.response_ids) == [2, 2, 1, 2]
    assert list(inputs.logit_positions) == [0, 0, 1, 0] and list(inputs.reward_positions) == [
        1,
        126,
    ]


@pytest.mark.parametrize(
    ("layout", "start", "length"),
    [((48, 40, 2), 48, 128), ((50, 40, 2), 176, 256), ((1024, 512, 2), 1024, 2048)],
)
def test_a_layout_fills_up_to_the_lanes(layout, start, length):
    layout = Layout(*layout)
    sizes = layout.start, layout.length, layout.num_labels
    assert sizes == (start, length, layout.response * 2)
    inputs, indices = packed(layout), np.arange(length)
    assert inputs.tokens.shape == (4, length) and inputs.labels.shape == (4, layout.num_labels)
    assert layout_of(inputs).region(indices).tolist() == layout.region(indices).tolist()


def hidden_states(inputs, vocab_size=50, width=12):
    """One layer of attention under the mask, over tokens and positions; and the output layer."""
    shapes = [(vocab_size, width), (99, width), *[(width, width)] * 3]
    keys = jax.random.split(jax.random.key(0), 5)
    table, place, q, k, v = (
        jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    )
    x = table[inputs.tokens] + place[inputs.positions]
    mask = attention_mask(inputs.segment_ids)
    scores = jnp.where(mask, (x @ q) @ jnp.swapaxes(x @ k, 1, 2), -1e30)
    return x + jax.nn.softmax(scores) @ (x @ v), table


def test_log_probs_and_rewards_are_those_of_the_compact_layout():
    layouts = (None, Layout(7, 6, 2))
    compact, regions = (jax.tree.map(jnp.asarray, packed(layout)) for layout in layouts)
    assert compact.tokens.shape[1] == 16 and regions.tokens.shape[1] == 128

    @jax.jit
    def outputs(inputs):
        hidden, table = hidden_states(inputs)
        head = jnp.arange(12.0)
        return response_logps(hidden, table, inputs), response_rewards(hidden, head, inputs)

    for value, expected in zip(outputs(regions), outputs(compact), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(4, 62, 2), r"Layout\(.*\): a prompt of 5 tokens does not fit its region of 4"),
        (Layout(9, 4, 2), r"Layout\(.*\): a response of 5 tokens does not fit its region of 4"),
        (Layout(9, 9, 3), r"Layout\(.*\): has 3 responses, the rows have 2"),
    ],
)
def test_what_does_not_fit_a_layout_is_an_error(layout, message):
    with pytest.raises(InputError, match=message):
        packed(layout)


# ---- limits


@pytest.mark.parametrize("overlong", ["drop", "error"])
@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (None, [11, 12, 13, 14, 15, ASSISTANT]),
        ("right", [11, 12, ASSISTANT]),
        ("left", [14, 15, ASSISTANT]),
    ],
)
def test_a_long_prompt(overlong, side, expected):
    limits = Limits(3, 9, side, overlong)
    assert truncate([11, 12, 13, 14, 15, ASSISTANT], limits) == expected
    assert truncate([14, 15, ASSISTANT], limits) == [14, 15, ASSISTANT]


def test_what_opens_the_response_must_fit():
    limits = Limits(2, 9, "right")
    assert truncate([11, 12, 13, ASSISTANT], limits, 2) == [13, ASSISTANT]
    message = r"--limits.prompt 2: the 3 tokens that open a response do not fit"
    with pytest.raises(InputError, match=message):
        truncate([11, 12, 13, ASSISTANT], limits, 3)


ROWS = [
    {"prompt": "11 12", "chosen": "21 22", "rejected": "31"},
    {"prompt": "11 12 13 14", "chosen": "21", "rejected": "31"},  # 5 tokens
    {"prompt": "13", "chosen": "21 22 23 24", "rejected": "31"},  # 5 tokens
    {"prompt": "14", "chosen": "23 24 25", "rejected": "33"},
]
SIDES = ["chosen", "rejected"]


def dataset_of(rows, limits, fields=SIDES, source="", tokenizer=None):
    """The dataset, and what was printed."""
    with console.capture() as printed:
        dataset = make_dataset(tokenizer or Words(), rows, fields, limits, source)
    return dataset, " ".join(printed.get().split())


def packed(layout):
    """ROWS, packed with a layout."""
    words = Words()
    pairs = [
        (words.prompt_ids(r["prompt"]), [words.response_ids(r[f]) for f in SIDES]) for r in ROWS
    ]
    rows = tokenized_rows(pairs)
    return pack(rows, layout.shape(4) if layout else smallest_shape(rows.lengths, 4), layout)


def test_regions_are_those_of_the_limits_and_fit_what_was_sampled():
    dataset = make_dataset(Words(), ROWS, SIDES, Limits(9, 9), with_layout=True)
    assert layout_of(dataset.all.inputs) == Layout(128 - 18, 9, 2)
    assert [*dataset.kept] == [0, 1, 2, 3]
    long = [row | {"ref_sample": " ".join(["22"] * 20)} for row in ROWS]
    sampled = make_dataset(Words(), long, [*SIDES, "ref_sample"], Limits(9, 9), with_layout=True)
    assert layout_of(sampled.all.inputs).response == 21


def prompts_of(dataset):
    inputs = dataset.all.inputs
    rows = zip(inputs.tokens, inputs.segment_ids, strict=True)
    return [list(map(int, tokens[segments == 0])) for tokens, segments in rows]


def test_what_does_not_fit_is_dropped_and_counted():
    dataset, printed = dataset_of(ROWS, Limits(4, 4), source="rows.jsonl")
    assert [*dataset.kept] == [0, 3] and dataset.select(ROWS) == [ROWS[0], ROWS[3]]
    assert prompts_of(dataset) == [[11, 12, 4], [14, 4]]
    expected = "rows.jsonl: 2 of 4 rows over 4 prompt + 4 response tokens dropped"
    assert printed == expected


@pytest.mark.parametrize(
    ("side", "prompt"), [("right", [11, 12, 13, 4]), ("left", [12, 13, 14, 4])]
)
def test_cut_prompts_are_counted_and_responses_are_never_cut(side, prompt):
    dataset, printed = dataset_of(ROWS, Limits(4, 4, side), source="rows.jsonl")
    assert [*dataset.kept] == [0, 1, 3] and prompts_of(dataset)[1] == prompt
    assert "1 of 4 rows" in printed and printed.endswith(f"1 prompts cut on the {side}")
    assert list(dataset.all.inputs.labels[2][:6]) == [23, 24, 25, 1, 33, 1]


def test_nothing_is_printed_where_all_fits_or_no_file_is_named():
    assert dataset_of(ROWS, Limits(9, 9), source="rows.jsonl")[1] == ""
    assert dataset_of(ROWS, Limits(4, 4))[1] == ""


def test_pairs_of_equal_tokens_are_dropped_and_counted():
    """Texts that differ in white space alone, which this tokenizer does not read."""
    rows = [*ROWS, {"prompt": "11", "chosen": "21 22", "rejected": " 21  22"}]
    dataset, printed = dataset_of(rows, Limits(9, 9), source="rows.jsonl")
    assert [*dataset.kept] == [0, 1, 2, 3]
    assert "1 pairs of equal tokens dropped" in printed
    with pytest.raises(InputError, match=r"rows\.jsonl: the responses of each pair have the same"):
        dataset_of(rows[4:], Limits(9, 9), source="rows.jsonl")


def test_texts_that_spell_special_tokens_are_counted():
    tokenizer = train_tokenizer(["the cat"], 261)
    rows = [{"prompt": "the cat", "chosen": "a", "rejected": text} for text in ("b", "<|eos|>")]
    _, printed = dataset_of(rows, Limits(32, 32), source="rows.jsonl", tokenizer=tokenizer)
    assert "1 of 2 rows spell special tokens, the first at rows.jsonl:2" in printed


def test_the_error_policy_names_file_and_row():
    with pytest.raises(InputError, match=r"^rows\.jsonl:2: longer than 4 \+ 9 tokens$"):
        dataset_of(ROWS, Limits(4, 9, overlong="error"), source="rows.jsonl")
    with pytest.raises(InputError, match=r"rows\.jsonl:3"):
        dataset_of(ROWS, Limits(9, 4, overlong="error"), source="rows.jsonl")


def test_the_error_policy_takes_prompts_that_were_cut_and_refuses_long_responses():
    dataset, _ = dataset_of(ROWS, Limits(4, 9, "left", "error"))
    assert [*dataset.kept] == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"^rows\.jsonl:3: longer than 4 \+ 4 tokens$"):
        dataset_of(ROWS, Limits(4, 4, "left", "error"), source="rows.jsonl")


def test_a_file_of_which_nothing_fits_is_an_error():
    with pytest.raises(InputError, match=r"rows\.jsonl: all 4 rows"):
        dataset_of(ROWS, Limits(9, 1), source="rows.jsonl")


def test_a_source_with_brackets_is_printed_as_it_is():
    """Not read as markup of the console."""
    _, printed = dataset_of(ROWS, Limits(4, 4), source="rows[a].jsonl")
    assert printed.startswith("rows[a].jsonl: 2 of 4")


def test_a_response_cut_short_has_no_end():
    rows = [{"prompt": "11", "chosen": "21", "rejected": "31", "rejected_complete": False}]
    inputs = dataset_of(rows, Limits(9, 9))[0].all.inputs
    assert list(inputs.labels[0][:3]) == [21, 1, 31]
    assert list(inputs.response_ids[0][:4]) == [0, 0, 1, 2]


def test_shapes_are_rounded_up_to_8():
    inputs = dataset_of(ROWS, Limits(9, 9))[0].all.inputs
    assert inputs.tokens.shape == (4, 16) and inputs.labels.shape == (4, 8)
    long = [{"prompt": " ".join(["11"] * 16), "chosen": "21", "rejected": "22"}]
    assert dataset_of(long, Limits(99, 9))[0].all.inputs.tokens.shape == (1, 24)


# ---- targets


def test_columns():
    columns = {
        "score_chosen": [1.0, 2.0],
        "score_rejected": [3.0, 4.0],
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
        "ref_sample_logps": -3.0,
        "ref_sample": "41",
    }
    other = {"ref_chosen_logps": -9.0, "score_rejected": [5.0, 6.0]}
    rows = [ROWS[0] | columns, ROWS[3] | columns | other]
    targets = dataset_of(rows, Limits(9, 9), [*SIDES, "ref_sample"])[0].all.targets
    np.testing.assert_array_equal(targets.ref_logps, [[-1, -2, -3], [-9, -2, -3]])
    np.testing.assert_array_equal(targets.rewards, [[[1, 2], [3, 4]], [[1, 2], [5, 6]]])
    assert targets.ref_logps.dtype == targets.rewards.dtype == np.float32
    targets = dataset_of(rows, Limits(9, 9))[0].all.targets
    np.testing.assert_array_equal(targets.ref_logps, [[-1, -2], [-9, -2]])
    row = ROWS[0] | {"score_chosen": 1.5, "score_rejected": -1.0}
    targets = dataset_of([row], Limits(9, 9))[0].all.targets
    np.testing.assert_array_equal(targets.rewards, [[[1.5], [-1.0]]])


def test_columns_that_are_not_there():
    targets = dataset_of(ROWS[:1], Limits(9, 9))[0].all.targets
    assert targets.ref_logps.shape == (1, 0) and targets.rewards.shape == (1, 2, 0)


# ---- the batch of a step


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, size, seed):
    """Whatever the batch size: the run of all batches, cut into parts of n, is permutations."""
    num_steps = -(-3 * n // size)
    run = np.concatenate([batch_indices(n, size, seed, step) for step in range(num_steps)])
    for epoch in range(3):
        assert sorted(run[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_differ_by_seed_and_epoch_and_not_by_history():
    epochs = [tuple(batch_indices(20, 20, seed, step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(epochs)) == 4
    dataset_module.permutation.cache_clear()
    assert tuple(batch_indices(20, 20, 1, 1)) == epochs[3]


def test_a_window_spans_epochs():
    run = [*batch_indices(5, 5, 3, 0), *batch_indices(5, 5, 3, 1), *batch_indices(5, 5, 3, 2)]
    assert [*batch_indices(5, 7, 3, 0), *batch_indices(5, 7, 3, 1)] == run[:14]
    assert list(batch_indices(5, 12, 3, 0)) == run[:12]


def numbered_batch(n):
    """A batch of n rows whose arrays hold the numbers of the rows."""
    ref_logps, rewards = np.arange(n, dtype=np.float32)[:, None], np.zeros((n, 2, 1), np.float32)
    return Batch(Inputs(*[np.arange(n)[:, None]] * 7), Targets(ref_logps, rewards))


def test_take():
    part = take(numbered_batch(6), np.asarray([4, 1]))
    assert all(array.shape[0] == 2 for array in jax.tree.leaves(part))
    assert list(part.inputs.tokens[:, 0]) == list(part.targets.ref_logps[:, 0]) == [4, 1]


def test_a_dataset_of_the_real_tokenizer():
    tokenizer = train_tokenizer(["some words to learn"], 270)
    rows = [{"prompt": "words", "completion": "to learn"}]
    dataset, _ = dataset_of(rows, Limits(9, 9), ["completion"], tokenizer=tokenizer)
    tokens, segments = dataset.all.inputs.tokens[0], dataset.all.inputs.segment_ids[0]
    assert tokens[segments == 0][-1] == ROLE_IDS["assistant"] and tokens[segments == 1][-1] == EOS
    assert tokenizer.decode(tokens[segments == 0].tolist()) == "words"
