"""x-transformers' DPO as a client of the conformance kit.

    python -m reference.conformance --adapter benchmarks.peers.x_transformers:adapter

`DPO.forward` runs on models that return the logits of the case.
"""

from typing import Any

import torch
from x_transformers.dpo import DPO, log_prob_from_model_and_seq, masked_mean

from benchmarks.peers.inputs import Values
from benchmarks.peers.table import Table
from benchmarks.peers.torch_common import Turns, differentiable, gradients, rows_of, scored


def dpo(params: Values, inputs: Values) -> Values:
    rows = rows_of(inputs)
    masks = (rows.completion_mask == 1).chunk(2)
    ids = torch.zeros_like(rows.completion_mask).chunk(2)
    fake: Any = DPO.__new__(DPO)
    torch.nn.Module.__init__(fake)
    fake.policy_model, fake.ref_model = (
        Turns(*logits.chunk(2)) for logits in (rows.logits, rows.ref_logits)
    )
    fake.beta, fake.pad_id = params["beta"], None
    prompt = torch.zeros_like(masks[0])
    prompt[:, 0] = True
    valid = {"preferred_seq_mask": masks[0], "unpreferred_seq_mask": masks[1]}
    loss = fake(*ids, prompt_mask=prompt, **valid)
    return {"loss": loss.item(), "grads": gradients(loss, rows.leaves)}


def sequences(params: Values, inputs: Values) -> Values:
    """The mean as `DPO.forward` forms it, of a mask as long as the sequences."""
    leaves, ids = differentiable(inputs, ("logits",)), torch.tensor(inputs["input_ids"])
    mask = torch.tensor(inputs["completion_mask"]) == 1
    if mask.shape != ids.shape:
        raise ValueError("a mask that is not as long as its row")
    tokens = log_prob_from_model_and_seq(Turns(leaves["logits"]), ids)
    return scored(masked_mean(tokens, mask), leaves)


adapter = Table({("dpo", "plain"): dpo, ("logps", "mean"): sequences})
