import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Inputs, attention_mask
from minipref.logps import response_logps, response_rewards
from minipref.reward_models import RewardModel, ensemble_rewards, stack


def inputs_of(**fields) -> Inputs:
    """Inputs of which a test states what it uses."""
    one = {
        "tokens": [[0]],
        "positions": [[0]],
        "segment_ids": [[0]],
        "labels": [[0]],
        "logit_positions": [[0]],
        "response_ids": [[0]],
        "reward_positions": [[0]],
    } | fields
    return Inputs(**{name: jnp.asarray(value, jnp.int32) for name, value in one.items()})


def test_attention_mask_of_the_docstrings_row():
    """`p p p | a b # | c # | pad`; rows are queries, columns keys."""
    found = attention_mask(jnp.asarray([[0, 0, 0, 1, 1, 1, 2, 2, -1]]))[0]
    np.testing.assert_array_equal(
        np.asarray(found).astype(int),
        [
            [1, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 1, 0, 0],
            [1, 1, 1, 0, 0, 0, 1, 1, 0],
            [1, 1, 1, 0, 0, 0, 0, 0, 0],  # padding may look, and nothing looks at it
        ],
    )


def test_attention_mask_is_each_rows_own():
    found = np.asarray(attention_mask(jnp.asarray([[0, 1, 2], [0, 0, -1]]))).astype(int)
    np.testing.assert_array_equal(
        found, [[[1, 0, 0], [1, 1, 0], [1, 0, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 0]]]
    )


# An unembedding of 3 tokens in 2 dimensions, and hidden states whose softmax is a fraction:
UNEMBEDDING = jnp.log(jnp.asarray([[1.0, 1.0], [2.0, 1.0], [5.0, 2.0]]))
UNIT = {(1, 0): (1 / 8, 2 / 8, 5 / 8), (0, 1): (1 / 4, 1 / 4, 2 / 4), (0, 0): (1 / 3, 1 / 3, 1 / 3)}


def test_response_logps_by_hand():
    """Three slots are hidden (1,0), (0,1), (0,0).

    Response 0 has tokens 2, 1 from slots 0, 1; response 1 has 2 from slot 0.
    """
    hidden = jnp.asarray([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    inputs = inputs_of(
        labels=[[2, 1, 2, 0]],
        logit_positions=[[0, 1, 0, 2]],
        response_ids=[[0, 0, 1, 2]],
        reward_positions=[[1, 2]],
    )
    found = response_logps(hidden, UNEMBEDDING, inputs)
    np.testing.assert_allclose(found, np.log([[5 / 8 * 1 / 4, 5 / 8]]), rtol=1e-6)


def test_responses_without_tokens_have_log_probability_0_and_no_gradient():
    hidden = jnp.full((1, 2, 2), 3.0)
    inputs = inputs_of(
        labels=[[2, 1]], logit_positions=[[0, 1]], response_ids=[[2, 2]], reward_positions=[[0, 0]]
    )
    value, gradient = jax.value_and_grad(lambda h: response_logps(h, UNEMBEDDING, inputs).sum())(
        hidden
    )
    assert value == 0 and response_logps(hidden, UNEMBEDDING, inputs).shape == (1, 2)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(hidden))


def test_padding_that_overflows_reaches_neither_the_value_nor_the_gradient():
    hidden = jnp.asarray([[[1.0, 0.0], [jnp.nan, jnp.inf]]])
    inputs = inputs_of(
        labels=[[2, 1]], logit_positions=[[0, 1]], response_ids=[[0, 1]], reward_positions=[[0]]
    )
    np.testing.assert_allclose(
        response_logps(hidden, UNEMBEDDING, inputs), [[np.log(5 / 8)]], rtol=1e-6
    )


def test_response_logps_of_no_responses():
    inputs = inputs_of(
        labels=np.zeros((1, 0)),
        logit_positions=np.zeros((1, 0)),
        response_ids=np.zeros((1, 0)),
        reward_positions=np.zeros((1, 0)),
    )
    assert response_logps(jnp.ones((1, 2, 2)), UNEMBEDDING, inputs).shape == (1, 0)


HIDDEN = jnp.asarray(
    [[[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], [[4.0, 40.0], [5.0, 50.0], [6.0, 60.0]]]
)


def test_rewards_read_the_last_slot_of_each_response():
    inputs = inputs_of(tokens=[[0] * 3] * 2, reward_positions=[[1, 2], [0, 1]])
    found = response_rewards(HIDDEN, jnp.asarray([1.0, 0.5]), inputs)
    np.testing.assert_array_equal(found, [[2 + 10, 3 + 15], [4 + 20, 5 + 25]])
    moved = jax.grad(lambda h: response_rewards(h, jnp.asarray([1.0, 0.5]), inputs)[0, 0])(HIDDEN)
    np.testing.assert_array_equal(np.argwhere(np.asarray(moved).any(-1)), [[0, 1]])


def test_rewards_of_bfloat16_states_are_float32():
    """257 = 256 + 1 is no bfloat16, so a sum in bfloat16 would give 256."""
    inputs = inputs_of(tokens=[[0]], reward_positions=[[0]])
    found = response_rewards(
        jnp.asarray([[[256.0, 1.0]]], jnp.bfloat16), jnp.ones(2, jnp.float32), inputs
    )
    assert found.dtype == jnp.float32 and found[0, 0] == 257


def table_trunk(inputs: Inputs):
    return HIDDEN


@pytest.mark.parametrize("k", [1, 3])
def test_an_ensemble_is_its_members(k):
    """The members' axis is the last one."""
    inputs = inputs_of(tokens=[[0] * 3] * 2, reward_positions=[[1, 2], [0, 1]])
    members = [RewardModel(table_trunk, 2, key) for key in jax.random.split(jax.random.key(0), k)]
    found = ensemble_rewards(stack(members), inputs)
    assert found.shape == (2, 2, k)
    for i, member in enumerate(members):
        last = np.asarray([[[2, 20], [3, 30]], [[4, 40], [5, 50]]])
        np.testing.assert_allclose(found[..., i], last @ np.asarray(member.head, float), rtol=1e-5)
