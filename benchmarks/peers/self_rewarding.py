"""self-rewarding-lm-pytorch's DPO as a client of the conformance kit.

    python -m reference.conformance --adapter benchmarks.peers.self_rewarding:adapter

`DPO.forward` runs on models that return the logits of the case.
"""

from typing import Any

import torch
from self_rewarding_lm_pytorch.dpo import DPO, log_prob_from_model_and_seq, masked_mean

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
    prompt_length = torch.ones(len(ids[0]), dtype=torch.long)
    loss = fake(*ids, prompt_length, *masks)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return {"loss": loss.item(), "grads": gradients(loss, rows.leaves)}


def sequences(params: Values, inputs: Values) -> Values:
    """The mean as `DPO.forward` forms it."""
    leaves, ids = differentiable(inputs, ("logits",)), torch.tensor(inputs["input_ids"])
    mask = torch.tensor(inputs["completion_mask"]) == 1
    tokens = log_prob_from_model_and_seq(Turns(leaves["logits"]), ids)
    return scored(masked_mean(tokens, mask), leaves)


adapter = Table({("dpo", "plain"): dpo, ("logps", "mean"): sequences})
