"""mlx-lm-lora's DPO as a client of the conformance kit.

python -m reference.conformance --adapter benchmarks.peers.mlx_lm_lora:adapter
"""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm_lora.trainer.dpo_trainer import compute_score, dpo_loss, get_token_scores

from benchmarks.peers.inputs import POLICY, REFERENCE, SIDES, Values, lengths
from benchmarks.peers.table import Table

mx.set_default_device(mx.cpu)
LOGGED = {"rewards/margins": "margins", "rewards/accuracies": "accuracies"}


def preference(loss_type: str, params: Values, inputs: Values) -> Values:
    """Scores as `compute_score` makes them of rows of these lengths, after one prompt token."""
    sizes = [lengths(inputs, side) for side in SIDES]
    slots = np.arange(1 + max(int(size.max()) for size in sizes))
    masks = [mx.array((slots > 0) * (slots <= size[:, None]) * 1.0) for size in sizes]
    options = {"beta": params["beta"], "delta": 50.0, "loss_type": loss_type}

    def score(logps: mx.array, side: int) -> mx.array:
        tokens = logps[:, None] / mx.array(sizes[side])[:, None] * masks[side][:, 1:]
        return compute_score(tokens, masks[side], loss_type)

    def loss(policy: list[mx.array]) -> Any:
        ref = [mx.array(inputs[name], mx.float32) for name in REFERENCE]
        scores = [score(logps, i % 2) for i, logps in enumerate((*policy, *ref))]
        return dpo_loss(*scores, *masks, **options)

    policy = [mx.array(inputs[name], mx.float32) for name in POLICY]
    (value, rewards, _, logged), grads = mx.value_and_grad(loss)(policy)
    metrics = {ours: logged[theirs].item() for ours, theirs in LOGGED.items()}
    metrics |= {f"rewards/{side}": rewards[i].item() for i, side in enumerate(SIDES)}
    named = dict(zip(POLICY, map(np.array, grads), strict=True))
    return {"loss": value.item(), "grads": named, "metrics": metrics}


def sequences(params: Values, inputs: Values) -> Values:
    ids, mask = (mx.array(inputs[name]) for name in ("input_ids", "completion_mask"))

    def total(logits: mx.array) -> Any:
        tokens = get_token_scores(lambda tokens, cache: logits[:, : tokens.shape[1]], ids, mask)
        logps = compute_score(tokens, mask, "sigmoid")
        return logps.sum(), logps

    (_, logps), grads = mx.value_and_grad(total)(mx.array(inputs["logits"], mx.float32))
    return {"logps": np.array(logps), "grads": {"logits": np.array(grads)}}


adapter = Table(
    {
        ("dpo", "plain"): partial(preference, "sigmoid"),
        ("ipo", "token-mean"): partial(preference, "ipo"),
        ("logps", "sum"): sequences,
    }
)
