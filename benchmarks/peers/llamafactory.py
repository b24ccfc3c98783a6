"""LLaMA-Factory as a client of the conformance kit.

    python -m reference.conformance --adapter benchmarks.peers.llamafactory:adapter

It needs a TRL of at most 0.24, which lies in a folder of its own.
"""

import importlib.machinery
import os
import sys
import types
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.peers.registry import TRL024

sys.path.insert(0, str(TRL024))
os.environ["DISABLE_VERSION_CHECK"] = "1"
AUDIO = types.ModuleType("torchaudio")  # LLaMA-Factory imports it; nothing here uses it
AUDIO.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", AUDIO)

import torch  # noqa: E402
from llamafactory.train.dpo.trainer import CustomDPOTrainer  # noqa: E402
from llamafactory.train.rm.trainer import PairwiseTrainer  # noqa: E402
from llamafactory.train.trainer_utils import get_batch_logps  # noqa: E402

from benchmarks.peers.inputs import SCORES, Values  # noqa: E402
from benchmarks.peers.table import Table  # noqa: E402
from benchmarks.peers.torch_common import differentiable, gradients, labelled, rows_of, scored  # noqa: E402


def model(logits: torch.Tensor) -> Any:
    return lambda **_: SimpleNamespace(logits=logits)


def trainer(params: Values, **attributes: Any) -> CustomDPOTrainer:
    """A trainer with the attributes that its loss method reads."""
    bare = object.__new__(CustomDPOTrainer)
    bare.__dict__.update(
        attributes,
        beta=params["beta"],
        label_smoothing=params.get("label_smoothing", 0.0),
        ftx_gamma=0.0,
        bco_gemma=0.0,
        ld_alpha=None,
        reference_free=False,
        f_divergence_type="reverse_kl",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        finetuning_args=SimpleNamespace(use_ref_model=True),
    )
    return bare


def preference(pref_loss: str, params: Values, inputs: Values) -> Values:
    rows = rows_of(inputs)
    labels = torch.where(rows.completion_mask == 1, 0, -100)
    ids = torch.zeros_like(labels)
    fake = trainer(params, loss_type=pref_loss, ref_model=model(rows.ref_logits))
    batch = {"input_ids": ids, "attention_mask": ids + 1, "labels": labels}
    loss, metrics = fake.get_batch_loss_metrics(model(rows.logits), batch)
    return {"loss": loss.item(), "grads": gradients(loss, rows.leaves), "metrics": metrics}


def reward(params: Values, inputs: Values) -> Values:
    """The loss of rows of one token, whose value is the score."""
    leaves = differentiable(inputs, SCORES)
    values = torch.cat(list(leaves.values()))[:, None]
    batch = {"input_ids": 0 * values.long(), "attention_mask": 0 * values.long() + 1}
    loss = PairwiseTrainer.compute_loss(None, lambda **_: (None, None, values), batch)
    return {"loss": loss.item(), "grads": gradients(loss, leaves)}


def sequences(params: Values, inputs: Values) -> Values:
    leaves = differentiable(inputs, ("logits",))
    return scored(get_batch_logps(leaves["logits"], labelled(inputs))[0], leaves)


adapter = Table(
    {
        ("dpo", "plain"): partial(preference, "sigmoid"),
        ("dpo", "conservative"): partial(preference, "sigmoid"),
        ("ipo", "token-mean"): partial(preference, "ipo"),
        ("reward", "bradley-terry"): reward,
        ("logps", "sum"): sequences,
    }
)
