"""Liger Kernel's DPO loss as a client: `python -m reference.conformance --adapter benchmarks.peers.liger:adapter`.

`LigerFusedLinearDPOLoss` is given hidden states under an unembedding of the identity, so that they are logits.
`sigmoid` with `label_smoothing` is put to `dpo/conservative`, as the documentation lists cDPO beside `robust`.
"""

from functools import partial

import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

from benchmarks.peers.given import Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import gradients, labelled, leaves, means, rows_of, scored


def dpo(loss_type: str, params: Values, inputs: Values) -> Values:
    rows, smoothing = rows_of(inputs), params.get("label_smoothing", 0.0)
    loss_fn = LigerFusedLinearDPOLoss(beta=params["beta"], compiled=False, loss_type=loss_type,
                                      label_smoothing=smoothing)
    head, targets = torch.eye(2), torch.zeros(len(rows.logits), 1, dtype=torch.long)
    loss, aux = loss_fn(head, rows.logits[:, :1], targets, ref_input=rows.ref_logits[:, :1], ref_weight=head)
    metrics = means(chosen=aux[-2], rejected=aux[-1])
    return {"loss": loss.item(), "grads": gradients(loss, rows.given), "metrics": metrics}


def sequences(average: bool, params: Values, inputs: Values) -> Values:
    """The part of the fused loss that scores a chunk of rows. The caller shifts the labels."""
    given = leaves(inputs, ("logits",))
    hidden = given["logits"].clamp_min(torch.finfo(torch.float32).min)[:, :-1]  # no matrix product takes infinities
    head, options = torch.eye(hidden.shape[-1]), {"compute_nll_loss": False, "average_log_prob": average}
    made = LigerFusedLinearPreferenceBase.chunk_forward(hidden, head, labelled(inputs)[:, 1:], **options)
    return scored(torch.cat(made[:2]), given)


adapter = Table({
    ("dpo", "plain"): partial(dpo, "sigmoid"),
    ("dpo", "conservative"): partial(dpo, "sigmoid"),
    ("dpo", "robust"): partial(dpo, "robust"),
    ("logps", "sum"): partial(sequences, False),
    ("logps", "mean"): partial(sequences, True),
})
