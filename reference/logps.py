"""Token log-probabilities from the hidden states of a language model."""

import numpy as np


def token_logps(hidden, unembedding, labels):
    """The log-probability of each position's label under the softmax over the vocabulary.

    log softmax(hidden_n . unembedding')[label_n]

    Args:
        hidden: hidden states [N, D].
        unembedding: the vocabulary's output vectors [V, D].
        labels: token ids [N], in 0..V-1.

    Returns:
        Log-probabilities [N], float32, in nats.
    Source: pi(y_t | x, y_<t) of section 3.1.
    """
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    logps = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return np.take_along_axis(logps, np.asarray(labels)[:, None], axis=-1)[:, 0].astype(np.float32)
