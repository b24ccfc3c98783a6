"""Log-probabilities and rewards of responses, from the hidden states of a language model.

This is the plain version, which holds all logits at once. `scale/model/fused_logps.py` computes the
same numbers in chunks and is tested against it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minipref.batch import Inputs
from minipref.objectives import sequence_logp


def token_logps(
    hidden: Float[Array, "N D"], unembedding: Float[Array, "V D"], labels: Int[Array, " N"]
) -> Float[Array, " N"]:
    """The log-probability of the label of each position under the softmax over the vocabulary.

    log softmax(hidden_n . unembedding')[label_n]

    Args:
        hidden: Hidden states [N, D].
        unembedding: [V, D].
        labels: Token ids [N], in 0..V-1.

    Returns:
        [N], nats, in float32 at least.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("nd,vd->nv", hidden, unembedding, preferred_element_type=dtype)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def response_logps(
    hidden: Float[Array, "R W D"], unembedding: Float[Array, "V D"], inputs: Inputs
) -> Float[Array, "B n"]:
    """The log-probability of each response: the sum over its tokens, the end of sequence included.

    log pi(y_i | x) = sum_t log pi(y_it | x, y_i<t)

    Args:
        hidden: Final hidden states along the packed sequences [R, W, D].
        unembedding: [V, D].
        inputs: The packed sequences.

    Returns:
        [B, n], nats, in float32 at least. A response without tokens has log-probability 0.
    """
    at_labels = gather(hidden, inputs.logit_positions)
    logps = jax.vmap(token_logps, in_axes=(0, None, 0))(at_labels, unembedding, inputs.labels)
    return sum_by_response(logps, inputs)


def response_rewards(
    hidden: Float[Array, "R W D"], head: Float[Array, " D"], inputs: Inputs
) -> Float[Array, "B n"]:
    """The reward of each response: a linear function of the hidden state at its last token.

    r(x, y_i) = head . hidden_last(i)

    Args:
        hidden: Final hidden states along the packed sequences [R, W, D].
        head: [D].
        inputs: The packed sequences.

    Returns:
        [B, n], in float32 at least.
    """
    positions = inputs.reward_positions.reshape(len(hidden), -1)
    states = gather(hidden, positions).astype(jnp.float32)
    return (states @ head).reshape(inputs.reward_positions.shape)


def sum_by_response(logps: Float[Array, "R L"], inputs: Inputs) -> Float[Array, "B n"]:
    """The sum of the label log-probabilities [R, L] of each response; padding is not read."""
    responses = jnp.arange(inputs.reward_positions.size // len(inputs.response_ids))
    masks = inputs.response_ids[:, None, :] == responses[None, :, None]
    sums = jax.vmap(jax.vmap(sequence_logp, in_axes=(None, 0)))(logps, masks)
    return sums.reshape(inputs.reward_positions.shape)


def gather(hidden: Float[Array, "R W D"], indices: Int[Array, "R L"]) -> Float[Array, "R L D"]:
    """The hidden states at some indices of each packed sequence."""
    return jnp.take_along_axis(hidden, indices[:, :, None], axis=1)
