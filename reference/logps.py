"""Token log-probabilities from the hidden states of a language model."""

import numpy as np


def token_logps(hidden, unembedding, labels):
    """The log-probability of each position's label under the softmax over the vocabulary.

    log softmax(hidden_n . unembedding')[label_n]

    `minipref.logps.token_logps` also takes `chunk`, which bounds its memory and must not change its result;
    here it would be an argument without effect.

    Shapes: hidden [N, D], unembedding [V, D], labels [N] in 0..V-1 -> float32 [N], nats.
    """
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    logps = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return np.take_along_axis(logps, np.asarray(labels)[:, None], axis=-1)[:, 0].astype(np.float32)
