"""torchtune as a client of the conformance kit.

python -m reference.conformance --adapter benchmarks.peers.torchtune:adapter
"""

from functools import partial

from torchtune.rlhf import get_batch_log_probs
from torchtune.rlhf.loss import DPOLoss

from benchmarks.peers.inputs import POLICY, REFERENCE, Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import (
    constants,
    differentiable,
    gradients,
    labelled,
    means,
    scored,
)


def dpo(params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, POLICY)
    loss_fn = DPOLoss(params["beta"], params.get("label_smoothing", 0.0))
    losses, chosen, rejected = loss_fn(*leaves.values(), *constants(inputs, REFERENCE))
    loss, metrics = losses.mean(), means(chosen=chosen, rejected=rejected)
    grads = gradients(loss, leaves)
    return {
        "loss": loss.item(),
        "per_example": losses.detach().numpy(),
        "grads": grads,
        "metrics": metrics,
    }


def sequences(average: bool, params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, ("logits",))
    options = {"return_average_logprobs": average}
    logps = get_batch_log_probs(leaves["logits"], labelled(inputs), **options)
    return scored(logps, leaves)


adapter = Table(
    {
        ("dpo", "plain"): dpo,
        ("dpo", "conservative"): dpo,
        ("logps", "sum"): partial(sequences, False),
        ("logps", "mean"): partial(sequences, True),
    }
)
