"""Level 4: gradient descent on a tiny language model that is given.

The logits after token v are row v of a table. Each function takes the params and inputs of a case
and returns its outputs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.conformance.tokens import summed

Values = dict[str, Any]
ROWS = (
    "score_chosen",
    "score_rejected",
)  # what of the inputs has a row for each pair, besides tokens and masks


def train(loss: Callable[[Values, Values], Values], params: Values, inputs: Values) -> Values:
    """S steps of plain gradient descent on a preference loss of `pairs`.

    W <- W - learning_rate dL/dW

    `batches` [S, A, M] names the pairs of each step, whose loss L is the mean over all A M of them,
    however they are split. `ref_table` never changes. No case has `ref_batches`: it is for mistakes
    that read the reference of other pairs.
    """
    table, ref = inputs["table"], _pair_logps(inputs["ref_table"], inputs)
    losses = []
    batches = _by_step(inputs["batches"])
    of_ref = _by_step(inputs["ref_batches"]) if "ref_batches" in inputs else batches
    for rows, ref_rows in zip(batches, of_ref, strict=True):
        policy = _pair_logps(table, inputs)
        made = loss(params, _loss_inputs(policy, ref, inputs, rows, ref_rows))
        grad = sum(
            _table_grad(table, inputs, name, rows, made["grads"]) for name in ("chosen", "rejected")
        )
        table = table - params["learning_rate"] * grad
        losses.append(made["loss"])
    return {"losses": np.array(losses), "parameters": table}


def train_sft(params: Values, inputs: Values) -> Values:
    """S steps on the mean negative log-likelihood of the step's response TOKENS.

    The mean is over all tokens of the step, however its pairs are split.
    """
    table, losses = inputs["table"], []
    for rows in _by_step(inputs["batches"]):
        count = inputs["chosen_mask"][rows, 1:].sum()
        losses.append(-_logps(table, inputs, "chosen")[rows].sum() / count)
        weights = np.full(len(rows), -1 / count)
        grad = _table_grad(table, inputs, "chosen", rows, {"policy_chosen_logps": weights})
        table = table - params["learning_rate"] * grad
    return {"losses": np.array(losses), "parameters": table}


def _by_step(batches: np.ndarray) -> np.ndarray:
    """The rows of each step, whose micro-batches are one after another."""
    return batches.reshape(len(batches), -1)


def _pair_logps(table: np.ndarray, inputs: Values) -> Values:
    return {name: _logps(table, inputs, name) for name in ("chosen", "rejected")}


def _logps(table: np.ndarray, inputs: Values, name: str) -> np.ndarray:
    return summed({}, _token_inputs(table, inputs, name))["logps"]


def _token_inputs(table: np.ndarray, inputs: Values, name: str, rows: Any = slice(None)) -> Values:
    ids = inputs[f"{name}_ids"][rows]
    return {"logits": table[ids], "input_ids": ids, "completion_mask": inputs[f"{name}_mask"][rows]}


def _loss_inputs(
    policy: Values, ref: Values, inputs: Values, rows: np.ndarray, ref_rows: np.ndarray
) -> Values:
    scores = {name: inputs[name][..., rows] for name in ROWS if name in inputs}
    lengths = {
        f"{name}_lengths": inputs[f"{name}_mask"][rows, 1:].sum(axis=1)
        for name in ("chosen", "rejected")
    }
    logps = {
        f"{who}_{name}_logps": values[name][which]
        for who, values, which in (("policy", policy, rows), ("ref", ref, ref_rows))
        for name in ("chosen", "rejected")
    }
    return logps | scores | lengths


def _table_grad(
    table: np.ndarray, inputs: Values, name: str, rows: np.ndarray, grads: Values
) -> np.ndarray:
    """Chain rule: a gradient of the rows' log-probabilities to one of the table."""
    scored = _token_inputs(table, inputs, name, rows)
    slopes = summed({}, scored)["grads"]["logits"] * grads[f"policy_{name}_logps"][:, None, None]
    total = np.zeros_like(table)
    np.add.at(total, scored["input_ids"], slopes)
    return total
