"""Level 4: writes and checks the vectors of ten steps of gradient descent on a tiny given model."""

import random
from functools import lru_cache

import mpmath as mp
import numpy as np
import pytest

from tests.conformance.test_pairs import batch_min, dpo, mean, squares
from tests.conformance.vectors import case, dyadic, exact, nearest, slopes, vector_file

DIGITS = 30
VOCAB, PAIRS, STEPS, BATCH = 8, 16, 10, 8
TOLERANCE = {
    "float64": {"values": (1e-9, 1e-12)},
    "float32": {"values": (2e-5, 2e-6)},
    "bfloat16": {"values": (2**-5, 2**-6)},
}
"""In bfloat16 the parameters are kept in float32 and rounded on their way into the model.

They are rounded to 8 bits, ten times over.
"""


def tokens(rng, name):
    """Prompts of two tokens and responses of 1 to 4 with their end, token 1; padded with 0."""
    lengths = [1 + int(4 * rng.random()) for _ in range(PAIRS)]
    rows = [[2 + int((VOCAB - 2) * rng.random()) for _ in range(1 + n)] + [1] for n in lengths]
    mask = [[0, 0] + [1] * n for n in lengths]
    return {
        f"{name}_ids": np.array([row + [0] * (6 - len(row)) for row in rows]),
        f"{name}_mask": np.array([row + [0] * (6 - len(row)) for row in mask]),
    }


def inputs_of(seed, moved, num_reward_models=None, accumulate=1):
    """`moved`: the policy begins elsewhere than the reference.

    `num_reward_models`: how many rewards; 0: one, with no axis; None: none.
    """
    rng = random.Random(seed)
    made = {"table": dyadic(rng, -1.5, 1.5, (VOCAB, VOCAB), unit=32)}
    made["ref_table"] = dyadic(rng, -1.5, 1.5, (VOCAB, VOCAB), unit=32) if moved else made["table"]
    made |= tokens(rng, "chosen") | tokens(rng, "rejected")
    made["rejected_ids"][:, :2] = made["chosen_ids"][:, :2]
    if num_reward_models is not None:
        shape = (num_reward_models, PAIRS) if num_reward_models else (PAIRS,)
        made |= {name: dyadic(rng, -2.0, 2.0, shape) for name in ("score_chosen", "score_rejected")}
    order = np.array([[(BATCH * step + i) % PAIRS for i in range(BATCH)] for step in range(STEPS)])
    return made | {"batches": order.reshape(STEPS, accumulate, BATCH // accumulate)}


def sequence_logps(table, ids, mask):
    log_z = [mp.log(mp.fsum(mp.exp(value) for value in row)) for row in table]
    return [
        mp.fsum(
            table[a][b] - log_z[a] for a, b, m in zip(row, row[1:], marks[1:], strict=False) if m
        )
        for row, marks in zip(ids, mask, strict=True)
    ]


def preference(loss):
    def step_loss(params, inputs, rows, table):
        def logps(of, name):
            return sequence_logps(
                of,
                [inputs[f"{name}_ids"][i] for i in rows],
                [inputs[f"{name}_mask"][i] for i in rows],
            )

        pairs = {
            f"{who}_{name}_logps": logps(of, name)
            for who, of in (("policy", table), ("ref", inputs["ref_table"]))
            for name in ("chosen", "rejected")
        }
        value = loss(
            params, pairs | {name: chosen(inputs[name], rows) for name in inputs if "score" in name}
        )
        return mean(value) if isinstance(value, list) else value

    return step_loss


def chosen(values, rows):
    return (
        [chosen(row, rows) for row in values]
        if isinstance(values[0], list)
        else [values[i] for i in rows]
    )


def sft(params, inputs, rows, table):
    ids, mask = ([inputs[f"chosen_{name}"][i] for i in rows] for name in ("ids", "mask"))
    return -mp.fsum(sequence_logps(table, ids, mask)) / sum(map(sum, mask))


def descend(loss, params, inputs):
    """Ten steps, every derivative a central difference."""
    p, x = (
        exact(params),
        {name: exact(v) if v.dtype == float else v.tolist() for name, v in inputs.items()},
    )
    table, losses = x["table"], []
    for rows in inputs["batches"].reshape(-1, BATCH).tolist():

        def at(values, rows=rows):
            return loss(p, x, rows, values["table"])

        losses.append(at({"table": table}))
        grad = slopes(at, {"table": table}, "table")
        table = [
            [w - p["learning_rate"] * g for w, g in zip(*row, strict=True)]
            for row in zip(table, grad, strict=True)
        ]
    return {"losses": nearest(losses), "parameters": nearest(table)}


def cases(loss, params, num_reward_models=None, flags="", splits=(1, 8), pairs=True):
    """`pairs`: the loss has a margin, over a reference."""
    first, then = (
        ("reference-moves sign", "reference-moves swapped-reference")
        if pairs
        else ("shift", "eos-lost")
    )
    asked = [
        ("from-reference", f"{first} {flags}", "training starts at the reference", 1, False),
        (
            "away-from-reference",
            f"{then} mask-dropped {flags}",
            "the policy starts elsewhere",
            2,
            True,
        ),
    ]
    made = []
    for name, own, comment, seed, moved in asked:
        expected = descend(loss, params, inputs_of(seed, moved, num_reward_models))
        for accumulate in splits:
            inputs = inputs_of(seed, moved, num_reward_models, accumulate)
            also = " accumulation-scale batch-sum" if accumulate > 1 else ""
            made.append(
                case(
                    f"{name}-{accumulate}x{BATCH // accumulate}",
                    own + also,
                    f"{comment}; {accumulate} x {BATCH // accumulate} pairs a step",
                    params,
                    inputs,
                    expected,
                )
            )
    return made


def steep(loss, params, inputs):
    """The gradient of each step has a norm above 1."""
    expected = descend(loss, params, inputs)
    split = inputs | {"batches": inputs["batches"].reshape(STEPS, BATCH, 1)}
    comment = "gradients of norms above 1, which trainers often clip"
    return [
        case("steep", "optimizer", comment, params, inputs, expected),
        case("steep-8x1", "optimizer", f"{comment}; 8 x 1 pairs a step", params, split, expected),
    ]


def shuffled(loss, params, num_reward_models=None):
    """Three steps of pairs that are not in the order of the data."""
    inputs = inputs_of(5, True, num_reward_models)
    order = [[[7 * (BATCH * step + i) % PAIRS for i in range(BATCH)]] for step in range(3)]
    inputs["batches"] = np.array(order)
    comment = "the pairs of a batch are not neighbours in the data; three steps"
    return case("shuffled", "order", comment, params, inputs, descend(loss, params, inputs))


def one_token():
    """Every response repeats one token, after which the model expects another."""
    made = inputs_of(4, True)
    made["chosen_ids"] = np.full((PAIRS, 6), 2)
    made["chosen_mask"] = np.array([[0, 0, 1, 1, 1, 1]] * PAIRS)
    made["table"][2] = np.where(np.arange(VOCAB) == 3, 4.0, 0.0)
    return made


@lru_cache
def e_dpo_cases():
    made = cases(preference(batch_min), RATE, 3, "beta-dropped min-mean optimizer", splits=(1,))
    split = inputs_of(1, False, 3, 8)
    comment = "footnote 5's minimum is over a minibatch: accumulated pair by pair it is another one"
    return [
        *made,
        case("accumulated", "", comment, RATE, split, result="unspecified"),
        shuffled(preference(batch_min), RATE, 3),
    ]


RATE = {"beta": 0.5, "learning_rate": 0.5}
STEEP = {"beta": 4.0, "learning_rate": 0.0625}
D_RATE = {"beta": 0.5, "learning_rate": 0.125}
EQUATION = (
    "W <- W - learning_rate dL/dW, L = {} over all pairs of a step; logits after token v are W[v]"
)
FILES = {
    "dpo": lambda: (
        EQUATION.format("mean -log sigmoid(beta h)"),
        "Eq. 6",
        [
            *cases(preference(dpo), RATE, flags="beta-dropped"),
            *steep(preference(dpo), STEEP, inputs_of(2, True)),
            shuffled(preference(dpo), RATE),
        ],
    ),
    "d-dpo": lambda: (
        EQUATION.format("mean (rho - beta h)^2"),
        "Eq. 7",
        [
            *cases(preference(squares), D_RATE, 0, "beta-dropped optimizer reward-sign"),
            shuffled(preference(squares), D_RATE, 0),
        ],
    ),
    "e-dpo": lambda: (
        EQUATION.format("min_k mean (rho_k - beta h)^2"),
        "Eq. 11, footnote 5",
        e_dpo_cases(),
    ),
    "sft": lambda: (
        EQUATION.format("-sum log pi(token) / tokens"),
        "section 6.1",
        [
            *cases(sft, RATE, flags="sum-mean mean-of-means", pairs=False),
            *steep(sft, STEEP, one_token()),
        ],
    ),
}


@pytest.mark.parametrize("dialect", FILES)
def test_vectors(dialect, check_vectors):
    with mp.workdps(DIGITS):
        equation, source, made = FILES[dialect]()
        check_vectors(vector_file("training", dialect, equation, source, made, TOLERANCE))
