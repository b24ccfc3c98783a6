"""One batch: the packed sequences that a model reads, and the targets that a loss reads.

A pair is ONE sequence, `[prompt | chosen | rejected | samples]`. The prompt is encoded once. The
responses do not see each other, and the positions of each continue those of the prompt. The last
prompt position predicts the first token of EVERY response:

    index            0  1  2 | 3  4  5 | 6  7
    token            p  p  p | a  b  # | c  #        # ends a response
    segment_id       0  0  0 | 1  1  1 | 2  2        -1 where padded
    position         0  1  2 | 3  4  5 | 3  4
    label                    | a  b  # | c  #
    logit_position           | 2  3  4 | 2  6        the index whose logits predict the label
    response_id              | 0  0  0 | 1  1        the response that the label belongs to
    reward_position                 5       7        the last index of each response

Several examples can stand end to end in one packed sequence, so that short examples cost only what
they need. Attention alone sees each example in a row of its own:

    packed sequence  [ p p p a b # c # | p p a # b c d # | p p p p a # b # - - ]    [R, W]
    segment_ids      [ 0 0 0 1 1 1 2 2 ]                                            [B, T]
                     [ 0 0 1 1 2 2 2 2 ]
                     [ 0 0 0 0 1 1 2 2 ]

R packed sequences hold B / R examples each, in order. `logit_positions` and `reward_positions` are
indices into the packed sequence; `response_ids` count through the responses of all its examples.
With R = B and W = T, a packed sequence is one example.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Inputs(NamedTuple):
    """What a model reads: B examples of n responses, in R packed sequences of W tokens.

    Attributes:
        tokens: Token ids [R, W].
        positions: Positions for the model's position encoding [R, W].
        segment_ids: [B, T]; 0 in the prompt, i in response i, -1 in padding.
        labels: Token ids of the responses [R, L].
        logit_positions: [R, L]; the index in the packed sequence whose logits predict each label.
        response_ids: [R, L]; the response of each label, B n / R and above for padding.
        reward_positions: [B, n]; the index at which a reward model reads each response.
    """

    tokens: Int[Array, "R W"]
    positions: Int[Array, "R W"]
    segment_ids: Int[Array, "B T"]
    labels: Int[Array, "R L"]
    logit_positions: Int[Array, "R L"]
    response_ids: Int[Array, "R L"]
    reward_positions: Int[Array, "B n"]

    @property
    def response_mask(self) -> Bool[Array, "*M R L"]:
        """Whether a label is a token of a response and not padding; also of M stacked batches."""
        num_sequences = self.response_ids.size // self.response_ids.shape[-1]
        num_responses = self.reward_positions.size // num_sequences
        return jnp.less(self.response_ids, num_responses)


class Targets(NamedTuple):
    """What a loss reads of B examples besides the outputs of the model: precomputed columns.

    Attributes:
        ref_logps: log pi_ref of the n responses [B, n], nats.
        rewards: Rewards of the first two responses, chosen and rejected, by K models [B, 2, K].
    """

    ref_logps: Float[Array, "B n"]
    rewards: Float[Array, "B 2 K"]


class Batch(NamedTuple):
    """The inputs of the model and the targets of the loss."""

    inputs: Inputs
    targets: Targets


def attention_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """The keys that each query attends to: the prompt and its own response, up to itself.

    Args:
        segment_ids: [B, T]; 0 in the prompt, i in response i, -1 in padding.

    Returns:
        [B, T, T], queries first. No query attends to padding.
    """
    index = jnp.arange(segment_ids.shape[1])
    causal = index[:, None] >= index[None, :]
    keys = segment_ids[:, None, :]
    return causal & ((keys == 0) | (keys == segment_ids[:, :, None])) & (keys >= 0)
