"""Level 2: writes and checks the vectors of tokens.

They go from logits, labels and masks to sequence log-probabilities.
"""

import random

import mpmath as mp
import numpy as np
import pytest

from tests.conformance.vectors import DIGITS, case, dyadic, exact, nearest, vector_file

TOLERANCE = {
    "float64": {"values": (1e-12, 1e-12), "grads": (1e-12, 1e-12)},
    "float32": {"values": (2e-6, 2e-6), "grads": (1e-5, 1e-6)},
    "bfloat16": {"values": (2e-6, 2e-6), "grads": (2**-7, 1e-6)},
}
"""The logits, multiples of 1/8, are exact in bfloat16: only softmax and sum round, in float32."""


def log_softmax(logits):
    total = mp.log(mp.fsum(mp.exp(value) for value in logits))
    return [value - total for value in logits]


def scored(inputs, weights, predictor):
    """Sums of weight(b, t) log p(id_t) by name.

    With them comes d(sum of all)/d(logits) = weight (onehot - softmax).
    """
    logits, ids = exact(inputs["logits"]), inputs["input_ids"].tolist()
    grads = [[[mp.mpf(0)] * len(row) for row in rows] for rows in logits]
    sums = {name: [mp.mpf(0)] * len(ids) for name in weights}
    for name, weight in weights.items():
        for b, row in enumerate(ids):
            for t, w in ((t, mp.mpf(weight(b, t))) for t in range(1, len(row)) if weight(b, t)):
                at = predictor(b, t)
                logs = log_softmax(logits[b][at])
                sums[name][b] += w * logs[row[t]]
                grads[b][at] = [
                    g + w * ((v == row[t]) - mp.exp(log))
                    for v, (g, log) in enumerate(zip(grads[b][at], logs, strict=True))
                ]
    return {name: nearest(values) for name, values in sums.items()} | {
        "grads": {"logits": nearest(grads)}
    }


def summed(inputs):
    mask = inputs["completion_mask"]
    return scored(inputs, {"logps": lambda b, t: int(mask[b, t])}, lambda b, t: t - 1)


def averaged(inputs):
    mask = inputs["completion_mask"]

    def weight(b, t):
        return mp.mpf(int(mask[b, t])) / int(mask[b, 1:].sum()) if mask[b, t] else 0

    return scored(inputs, {"logps": weight}, lambda b, t: t - 1)


def shared_prefix(inputs):
    segments = inputs["segments"].tolist()

    def predictor(b, t):
        return t - 1 if segments[b][t] == segments[b][t - 1] else segments[b].count(0) - 1

    weights = {
        f"{name}_logps": (lambda b, t, own=own: segments[b][t] == own)
        for own, name in ((1, "chosen"), (2, "rejected"))
    }
    return scored(inputs, weights, predictor)


def rows(seed, *spans, width=8, vocab_size=6, low=-7.0, high=7.0, left=0):
    """One row a span (first response token, end); tokens from 2 up, so that 0 pads and 1 ends."""
    rng = random.Random(seed)
    ids = 2 + np.array(
        [[int((vocab_size - 2) * rng.random()) for _ in range(width)] for _ in spans]
    )
    slots = np.arange(width)
    inside = np.array([(slots >= first) & (slots < end) for first, end in spans])
    present = np.array([(slots >= left) & (slots < end) for _, end in spans])
    ends = np.array([[t == end - 1 and end < width for t in slots] for _, end in spans])
    ids = np.where(ends, 1, np.where(present, ids, 0))
    return {
        "logits": dyadic(rng, low, high, (len(spans), width, vocab_size), unit=8),
        "input_ids": ids,
        "attention_mask": present.astype(int),
        "completion_mask": inside.astype(int),
    }


def same_pad_and_eos(inputs):
    """Padding of the end-of-sequence token's id, 1."""
    return inputs | {"input_ids": np.where(inputs["input_ids"] == 0, 1, inputs["input_ids"])}


def emptied(inputs, row):
    mask = inputs["completion_mask"].copy()
    mask[row] = 0
    return inputs | {"completion_mask": mask}


def banned(inputs):
    """A token that no label is has a logit of -inf everywhere."""
    logits = inputs["logits"].copy()
    logits[:, :, 0] = -np.inf
    return inputs | {"logits": logits}


def banned_in_the_prompt(inputs):
    """Token 0, and the prompt's own second token, have a logit of -inf behind its first token."""
    logits = inputs["logits"].copy()
    logits[:, 0, 0] = -np.inf
    logits[:, 0, inputs["input_ids"][0, 1]] = -np.inf
    return inputs | {"logits": logits}


def scaled(inputs, factor):
    """Whole logits, which bfloat16 holds up to 256."""
    return inputs | {"logits": np.round(inputs["logits"]) * factor}


PAD = {"pad_id": 0, "eos_id": 1}
SAME = {"pad_id": 1, "eos_id": 1}


def sequence_cases(oracle, mean):
    asked = [
        (
            "one-row",
            "shift unshifted-denominator sum-mean",
            "no padding: five response tokens",
            PAD,
            rows(1, (3, 8)),
        ),
        (
            "padded",
            "shift mask-dropped unshifted-denominator sum-mean",
            "three rows, padded at the right",
            PAD,
            rows(2, (2, 8), (4, 7), (3, 5)),
        ),
        (
            "left-padded",
            "shift mask-dropped",
            "the prompt is padded at the left",
            PAD,
            rows(3, (5, 8), left=3),
        ),
        ("prompt", "mask-dropped", "a long prompt before one token", PAD, rows(4, (6, 7))),
        ("eos", "eos-lost", "the end-of-sequence token is scored", PAD, rows(5, (2, 5), (2, 4))),
        (
            "pad-is-eos",
            "pad-is-eos eos-lost",
            "padding and the end of the response are one id: masks tell them apart",
            SAME,
            same_pad_and_eos(rows(6, (2, 5), (3, 7))),
        ),
        (
            "truncated",
            "eos-lost pad-is-eos",
            "a response that fills its row has no end-of-sequence token",
            SAME,
            same_pad_and_eos(rows(7, (2, 8))),
        ),
        (
            "all-masked",
            "nan-all-masked",
            "one of two rows has nothing to score: 0, and no gradient",
            PAD,
            emptied(rows(8, (2, 6), (3, 7)), 1),
        ),
        (
            "nothing",
            "nan-all-masked",
            "no row has anything to score",
            PAD,
            emptied(rows(9, (2, 6)), 0),
        ),
        (
            "long",
            "half-precision-sums",
            "160 tokens and some -400 nats",
            PAD,
            rows(10, (8, 168), width=168, vocab_size=4, low=-4.0, high=4.0),
        ),
        (
            "banned-token",
            "zero-probability",
            "a logit of -inf is a probability of 0",
            PAD,
            banned(rows(11, (2, 8), (2, 8))),
        ),
        (
            "banned-in-prompt",
            "zero-probability",
            "what is not scored has probability 0",
            PAD,
            banned_in_the_prompt(rows(16, (3, 8))),
        ),
        (
            "large-logits",
            "overflow",
            "logits of up to 120, whose exponentials float32 does not hold",
            PAD,
            scaled(rows(14, (3, 8), (2, 6)), 17),
        ),
        (
            "first-token",
            "shift" + " mask-dropped" * mean,
            "a mask on slot 0: nothing predicts it, so it is not scored",
            PAD,
            rows(12, (0, 8)),
        ),
    ]
    made = [
        case(name, flags, comment, params, inputs, oracle(inputs))
        for name, flags, comment, params, inputs in asked
    ]
    broken = rows(13, (2, 8), (3, 8))
    broken["completion_mask"] = broken["completion_mask"][:, :-1]
    return [
        *made,
        case(
            "mismatch",
            "broadcast",
            "a mask that is shorter than its row",
            PAD,
            broken,
            result="reject",
        ),
    ]


def packed(seed, *spans, width=10, vocab_size=6, low=-7.0, high=7.0):
    """Rows of (prompt, chosen, rejected) lengths, then padding."""
    rng = random.Random(seed)
    segments = np.array(
        [[*[0] * p, *[1] * c, *[2] * r, *[-1] * (width - p - c - r)] for p, c, r in spans]
    )
    ids = 2 + np.array(
        [[int((vocab_size - 2) * rng.random()) for _ in range(width)] for _ in spans]
    )
    return {
        "logits": dyadic(rng, low, high, (len(spans), width, vocab_size), unit=8),
        "input_ids": np.where(segments < 0, 0, ids),
        "segments": segments,
    }


def shared_cases():
    asked = [
        (
            "one-row",
            "first-rejected-token shift unshifted-denominator",
            "two tokens each after a prompt of four",
            packed(1, (4, 2, 2), width=8),
        ),
        (
            "rows",
            "first-rejected-token mask-dropped",
            "three rows of other lengths, padded",
            packed(2, (2, 3, 4), (5, 1, 2), (1, 4, 1)),
        ),
        (
            "one-token",
            "first-rejected-token",
            "responses of one token: both are predicted by the prompt's last slot",
            packed(3, (3, 1, 1)),
        ),
        (
            "empty-rejected",
            "nan-all-masked",
            "a rejected response without tokens",
            packed(4, (3, 2, 0)),
        ),
        (
            "long",
            "half-precision-sums",
            "70 and 80 tokens",
            packed(5, (8, 70, 80), width=160, vocab_size=4, low=-4.0, high=4.0),
        ),
    ]
    return [
        case(name, flags, comment, PAD, inputs, shared_prefix(inputs))
        for name, flags, comment, inputs in asked
    ]


EQUATION = "sum_t mask_t log softmax(logits_{t-1})[id_t]"
FILES = {
    "logps/sum": lambda: vector_file(
        "logps", "sum", EQUATION, "section 3.1", sequence_cases(summed, False), TOLERANCE
    ),
    "logps/mean": lambda: vector_file(
        "logps",
        "mean",
        f"{EQUATION} / sum_t mask_t; 0 where no token is marked",
        "TRL and LLaMA-Factory for IPO; SimPO",
        sequence_cases(averaged, True),
        TOLERANCE,
    ),
    "logps/shared-prefix": lambda: vector_file(
        "logps",
        "shared-prefix",
        "sum_{t of segment i} log softmax(logits_{before t})[id_t]; before the first "
        "token of BOTH responses is the prompt's last slot",
        "minipref/sequences.py",
        shared_cases(),
        TOLERANCE,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_vectors(name, check_vectors):
    with mp.workdps(DIGITS):
        check_vectors(FILES[name]())
