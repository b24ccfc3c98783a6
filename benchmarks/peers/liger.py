"""Liger Kernel's DPO loss as a client of the conformance kit.

    python -m reference.conformance --adapter benchmarks.peers.liger:adapter

The unembedding of `LigerFusedLinearDPOLoss` is the identity here, so that its hidden states are
logits. `sigmoid` with `label_smoothing` answers `dpo/conservative`, because the documentation lists
cDPO beside `robust`.
"""

from functools import partial

import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

from benchmarks.peers.inputs import Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import (
    differentiable,
    gradients,
    labelled,
    means,
    rows_of,
    scored,
)


def dpo(loss_type: str, params: Values, inputs: Values) -> Values:
    rows, smoothing = rows_of(inputs), params.get("label_smoothing", 0.0)
    loss_fn = LigerFusedLinearDPOLoss(
        beta=params["beta"], compiled=False, loss_type=loss_type, label_smoothing=smoothing
    )
    head, targets = torch.eye(2), torch.where(rows.completion_mask[:, 1:] == 1, 0, -100)
    reference = {"ref_input": rows.ref_logits[:, :-1], "ref_weight": head}
    loss, aux = loss_fn(head, rows.logits[:, :-1], targets, **reference)
    metrics = means(chosen=aux[-2], rejected=aux[-1])
    return {"loss": loss.item(), "grads": gradients(loss, rows.leaves), "metrics": metrics}


def sequences(average: bool, params: Values, inputs: Values) -> Values:
    """The part of the fused loss that scores a chunk of rows; its caller shifts the labels."""
    leaves = differentiable(inputs, ("logits",))
    lowest = torch.finfo(torch.float32).min
    hidden = leaves["logits"].clamp_min(lowest)[:, :-1]  # a matrix product takes no infinities
    head, labels = torch.eye(hidden.shape[-1]), labelled(inputs)[:, 1:]
    options = {"compute_nll_loss": False, "average_log_prob": average}
    outputs = LigerFusedLinearPreferenceBase.chunk_forward(hidden, head, labels, **options)
    return scored(torch.cat(outputs[:2]), leaves)


adapter = Table(
    {
        ("dpo", "plain"): partial(dpo, "sigmoid"),
        ("dpo", "conservative"): partial(dpo, "sigmoid"),
        ("dpo", "robust"): partial(dpo, "robust"),
        ("logps", "sum"): partial(sequences, False),
        ("logps", "mean"): partial(sequences, True),
    }
)
