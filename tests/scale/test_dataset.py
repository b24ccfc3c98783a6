import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minipref.batch import Batch, attention_mask, response_logps, response_rewards
from scale.console import console
from scale.data import dataset as batches
from scale.data.dataset import Limits, batch_indices, encode, fit_prompt, pack, take
from scale.data.layout import Layout, layout_of
from scale.data.packing import pack, tokenized_rows
from scale.data.tokenizer import EOS, ROLES, Tokenizer, train_tokenizer
from scale.errors import InputError

ASSISTANT = 4


class Words(Tokenizer):
    """A codec of one token a word, the number that it spells, so that lengths are seen in the text."""

    def __init__(self):
        """No tokenizer."""

    def prompt_ids(self, prompt):
        return [*map(int, prompt.split()), ASSISTANT]

    def response_ids(self, text, complete=True):
        return [*map(int, text.split()), *[1] * complete]


def row(prompt, responses, width, labels, layout=None):
    """The arrays of one row."""
    return [array[0] for array in pack(tokenized_rows([(prompt, responses)]), Shape(1, width, labels, width), layout)]


def test_a_row_is_the_picture_in_sequences():
    p, a, b, c, eos = 9, 5, 6, 7, 1
    found = row([p, p, p], [[a, b, eos], [c, eos]], 9, 6)
    expected = {
        "tokens": [p, p, p, a, b, eos, c, eos, 0],
        "positions": [0, 1, 2, 3, 4, 5, 3, 4, 0],
        "segments": [0, 0, 0, 1, 1, 1, 2, 2, -1],
        "labels": [a, b, eos, c, eos, 0],
        "logit_positions": [2, 3, 4, 2, 6, 0],
        "response_ids": [0, 0, 0, 1, 1, 2],
        "last": [5, 7],
    }
    assert dict(zip(Batch._fields, map(list, found), strict=False)) == expected
    assert {array.dtype for array in found} == {np.dtype(np.int32)}


def test_a_row_without_responses():
    found = row([8, 9], [], 4, 0)
    assert [list(a) for a in found] == [[8, 9, 0, 0], [0, 1, 0, 0], [0, 0, -1, -1], [], [], [], []]


def test_an_empty_response_is_read_at_the_prompts_end():
    """It has no slot of its own; another response's slot would give it that one's reward."""
    _, _, segments, _, logit_positions, response_ids, last = row([8, 9], [[], [7], []], 4, 2)
    assert list(response_ids) == [1, 3] and list(logit_positions) == [1, 0] and list(segments) == [0, 0, 2, -1]
    assert list(last) == [1, 2, 1]


# ---- rows in regions


def test_a_row_in_regions():
    """The picture in sequences again: regions of 122 and twice 3 slots."""
    p, a, b, c, eos = 9, 5, 6, 7, 1
    laid = row([p, p, p], [[a, b, eos], [c, eos]], 128, 6, Layout(4, 3, 2))
    found = dict(zip(Batch._fields, laid, strict=False))
    between = [0] * 119
    expected = {
        "tokens": [p, p, p, *between, a, b, eos, c, eos, 0],
        "positions": [0, 1, 2, *between, 3, 4, 5, 3, 4, 0],
        "segments": [0, 0, 0, *[-1] * 119, 1, 1, 1, 2, 2, -1],
        "labels": [a, b, eos, c, eos, 0],
        "logit_positions": [2, 122, 123, 2, 125, 0],
        "response_ids": [0, 0, 0, 1, 1, 2],
        "last": [124, 126],
    }
    assert {name: list(array) for name, array in found.items()} == expected
    assert {array.dtype for array in found.values()} == {np.dtype(np.int32)}


def test_an_empty_response_in_regions():
    _, _, segments, labels, logit_positions, response_ids, last = row([8, 9], [[], [7]], 128, 4, Layout(2, 2, 2))
    assert list(np.flatnonzero(segments + 1)) == [0, 1, 126] and list(labels) == [0, 0, 7, 0]
    assert list(response_ids) == [2, 2, 1, 2] and list(logit_positions) == [0, 0, 1, 0] and list(last) == [1, 126]


@pytest.mark.parametrize(
    ("layout", "start", "width"), [((48, 40, 2), 48, 128), ((50, 40, 2), 176, 256), ((1024, 512, 2), 1024, 2048)]
)
def test_a_layout_fills_up_to_the_lanes(layout, start, width):
    layout = Layout(*layout)
    assert (layout.start, layout.width, layout.labels) == (start, width, layout.response * 2)
    data = packed(layout)
    assert data.tokens.shape == (4, width) and data.labels.shape == (4, layout.labels)
    assert layout_of(data).region(np.arange(width)).tolist() == layout.region(np.arange(width)).tolist()


def hidden_states(data, vocabulary=50, width=12):
    """One layer of attention under the row's mask, over tokens and positions; and the output layer."""
    shapes = [(vocabulary, width), (99, width), *[(width, width)] * 3]
    keys = jax.random.split(jax.random.key(0), 5)
    table, place, q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    x = table[data.tokens] + place[data.positions]
    scores = jnp.where(attention_mask(data.segment_ids), (x @ q) @ jnp.swapaxes(x @ k, 1, 2), -1e30)
    return x + jax.nn.softmax(scores) @ (x @ v), table


def test_log_probs_and_rewards_are_those_of_the_compact_layout():
    layouts = (None, Layout(7, 6, 2))
    compact, regions = (jax.tree.map(jnp.asarray, packed(layout)) for layout in layouts)
    assert compact.tokens.shape[1] == 16 and regions.tokens.shape[1] == 128
    np.testing.assert_allclose(response_logps(*hidden_states(regions), regions),
                               response_logps(*hidden_states(compact), compact), rtol=1e-5)
    head = jnp.arange(12.0)
    np.testing.assert_allclose(response_rewards(hidden_states(regions)[0], head, regions),
                               response_rewards(hidden_states(compact)[0], head, compact), rtol=1e-5)


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


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [("drop", None), ("error", None), ("keep-start", [11, 12, ASSISTANT]), ("keep-end", [14, 15, ASSISTANT])],
)
def test_an_overlong_prompt(overlong, expected):
    assert fit_prompt([11, 12, 13, 14, 15, ASSISTANT], Limits(3, 9, overlong)) == expected
    assert fit_prompt([14, 15, ASSISTANT], Limits(3, 9, overlong)) == [14, 15, ASSISTANT]


def test_what_opens_the_response_must_fit():
    assert fit_prompt([11, 12, 13, ASSISTANT], Limits(2, 9, "keep-start"), 2) == [13, ASSISTANT]
    with pytest.raises(InputError, match=r"--limits.prompt 2: the 3 tokens that open a response do not fit"):
        fit_prompt([11, 12, 13, ASSISTANT], Limits(2, 9, "keep-start"), 3)


ROWS = [
    {"prompt": "11 12", "chosen": "21 22", "rejected": "31"},
    {"prompt": "11 12 13 14", "chosen": "21", "rejected": "31"},  # 5 tokens
    {"prompt": "13", "chosen": "21 22 23 24", "rejected": "31"},  # 5 tokens
    {"prompt": "14", "chosen": "23 24 25", "rejected": "33"},
]
SIDES = ["chosen", "rejected"]


def dataset(rows, limits, fields=SIDES, source="", tokenizer=None):
    with console.capture() as printed:
        found = encode(tokenizer or Words(), rows, fields, limits, source)
    return found, " ".join(printed.get().split())


def packed(layout):
    """ROWS, laid in a layout."""
    words = Words()
    return pack([(words.prompt_ids(r["prompt"]), [words.response_ids(r[f]) for f in SIDES]) for r in ROWS], ROWS, SIDES,
                layout)


def test_regions_are_those_of_the_limits_and_fit_what_was_sampled():
    found = encode(Words(), ROWS, SIDES, Limits(9, 9), regions=True)
    assert layout_of(found.data) == Layout(128 - 18, 9, 2) and [*found.kept] == [0, 1, 2, 3]
    long = [row | {"ref_sample": " ".join(["22"] * 20)} for row in ROWS]
    assert layout_of(encode(Words(), long, [*SIDES, "ref_sample"], Limits(9, 9), regions=True).data).response == 21


def prompts_of(found):
    return [list(map(int, t[s == 0])) for t, s in zip(found.data.tokens, found.data.segment_ids, strict=True)]


def test_what_does_not_fit_is_dropped_and_counted():
    found, printed = dataset(ROWS, Limits(4, 4, "drop"), source="rows.jsonl")
    assert [*found.kept] == [0, 3] and found.rows(ROWS) == [ROWS[0], ROWS[3]]
    assert prompts_of(found) == [[11, 12, 4], [14, 4]]
    assert printed.startswith("rows.jsonl: 2 of 4 rows over 4 prompt + 4 response tokens dropped, 0 prompts cut")


@pytest.mark.parametrize(("overlong", "prompt"), [("keep-start", [11, 12, 13, 4]), ("keep-end", [12, 13, 14, 4])])
def test_cut_prompts_are_counted_and_responses_are_never_cut(overlong, prompt):
    found, printed = dataset(ROWS, Limits(4, 4, overlong), source="rows.jsonl")
    assert [*found.kept] == [0, 1, 3] and prompts_of(found)[1] == prompt
    assert "1 of 4 rows" in printed and "1 prompts cut" in printed
    assert list(found.data.labels[2][:6]) == [23, 24, 25, 1, 33, 1]


def test_nothing_is_printed_where_all_fits_or_no_file_is_named():
    assert dataset(ROWS, Limits(9, 9), source="rows.jsonl")[1] == ""
    assert dataset(ROWS, Limits(4, 4))[1] == ""


def test_the_error_policy_names_file_and_row():
    with pytest.raises(InputError, match=r"^rows\.jsonl: row 2: longer than 4 \+ 9 tokens$"):
        dataset(ROWS, Limits(4, 9, "error"), source="rows.jsonl")
    with pytest.raises(InputError, match="row 3"):
        dataset(ROWS, Limits(9, 4, "error"), source="rows.jsonl")


def test_a_file_of_which_nothing_fits_is_an_error():
    with pytest.raises(InputError, match=r"rows\.jsonl: all 4 rows"):
        dataset(ROWS, Limits(9, 1), source="rows.jsonl")


def test_a_source_with_brackets_is_printed_as_it_is():
    """Not read as markup of the console."""
    assert dataset(ROWS, Limits(4, 4), source="rows[a].jsonl")[1].startswith("rows[a].jsonl: 2 of 4")


def test_a_response_cut_short_has_no_end():
    rows = [{"prompt": "11", "chosen": "21", "rejected": "31", "rejected_complete": False}]
    found, _ = dataset(rows, Limits(9, 9))
    assert list(found.data.labels[0][:3]) == [21, 1, 31] and list(found.data.response_ids[0][:4]) == [0, 0, 1, 2]


def test_shapes_are_rounded_up_to_8():
    found, _ = dataset(ROWS, Limits(9, 9))
    assert found.data.tokens.shape == (4, 16) and found.data.labels.shape == (4, 8)
    long = [{"prompt": " ".join(["11"] * 16), "chosen": "21", "rejected": "22"}]
    assert dataset(long, Limits(99, 9))[0].data.tokens.shape == (1, 24)


def test_columns():
    columns = {
        "score_chosen": [1.0, 2.0],
        "score_rejected": [3.0, 4.0],
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
        "ref_sample_logps": -3.0,
        "ref_sample": "41",
    }
    rows = [ROWS[0] | columns, ROWS[3] | columns | {"ref_chosen_logps": -9.0, "score_rejected": [5.0, 6.0]}]
    data = dataset(rows, Limits(9, 9), [*SIDES, "ref_sample"])[0].data
    np.testing.assert_array_equal(data.ref_logps, [[-1, -2, -3], [-9, -2, -3]])
    np.testing.assert_array_equal(data.scores, [[[1, 2], [3, 4]], [[1, 2], [5, 6]]])
    assert data.ref_logps.dtype == data.scores.dtype == np.float32
    data = dataset(rows, Limits(9, 9))[0].data
    np.testing.assert_array_equal(data.ref_logps, [[-1, -2], [-9, -2]])
    single = dataset([ROWS[0] | {"score_chosen": 1.5, "score_rejected": -1.0}], Limits(9, 9))[0].data
    np.testing.assert_array_equal(single.scores, [[[1.5], [-1.0]]])


def test_columns_that_are_not_there():
    data = dataset(ROWS[:1], Limits(9, 9))[0].data
    assert data.ref_logps.shape == (1, 0) and data.scores.shape == (1, 2, 0)


# ---- the batch of a step


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, size, seed):
    """Whatever the batch size: the run of all batches, cut into pieces of n, is permutations."""
    run = np.concatenate([batch_indices(n, size, seed, step) for step in range(-(-3 * n // size))])
    for epoch in range(3):
        assert sorted(run[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_batches_differ_by_seed_and_epoch_and_not_by_history():
    epochs = [tuple(batch_indices(20, 20, seed, step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(epochs)) == 4
    batches.permutation.cache_clear()
    assert tuple(batch_indices(20, 20, 1, 1)) == epochs[3]


def test_a_window_spans_epochs():
    run = [*batch_indices(5, 5, 3, 0), *batch_indices(5, 5, 3, 1), *batch_indices(5, 5, 3, 2)]
    assert [*batch_indices(5, 7, 3, 0), *batch_indices(5, 7, 3, 1)] == run[:14]
    assert list(batch_indices(5, 12, 3, 0)) == run[:12]


def counted(n):
    return Batch(*[np.arange(n)[:, None]] * 7, np.arange(n, dtype=np.float32)[:, None], np.zeros((n, 2, 1), np.float32))


def test_take():
    part = take(counted(6), np.asarray([4, 1]))
    assert all(a.shape[0] == 2 for a in jax.tree.leaves(part)) and list(part.tokens[:, 0]) == [4, 1]


def test_encode_with_the_real_codec():
    tokenizer = train_tokenizer(["some words to learn"], 270)
    found, _ = dataset([{"prompt": "words", "completion": "to learn"}], Limits(9, 9), ["completion"], tokenizer=tokenizer)
    tokens, segments = found.data.tokens[0], found.data.segment_ids[0]
    assert tokens[segments == 0][-1] == ROLES["assistant"] and tokens[segments == 1][-1] == EOS
    assert tokenizer.decode(tokens[segments == 0].tolist()) == "words"
