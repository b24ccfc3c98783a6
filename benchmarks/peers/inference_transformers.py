"""Log-probabilities and samples by `transformers`, in batches of rows of similar length.

A response's log-probability takes a forward pass over its prompt and itself, padded to the longest
of the batch; only positions that predict a response token have logits. Samples are `generate`'s.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.inference import Rows

STATE: dict[str, Any] = {}


def prepare(folder: Path, threads: int) -> None:
    """Load the model, once for this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    STATE["model"] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logps(rows: Rows, batch: int) -> np.ndarray:
    """log pi of both responses of each row [N, 2]."""
    texts = [(row[0], response) for row in rows for response in row[1:]]
    order = sorted(range(len(texts)), key=lambda i: -sum(map(len, texts[i])))
    values = np.zeros(len(texts))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        values[part] = logps_of([texts[i] for i in part])
    return values.reshape(len(rows), -1)


def logps_of(texts: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """The log-probabilities of the responses of one batch."""
    width = max(len(prompt) + len(response) for prompt, response in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    is_label = torch.zeros(ids.shape, dtype=torch.bool)
    mask = torch.zeros(ids.shape, dtype=torch.long)
    for i, (prompt, response) in enumerate(texts):
        length = len(prompt) + len(response)
        ids[i, :length] = torch.tensor([*prompt, *response])
        mask[i, :length], is_label[i, len(prompt) : length] = 1, True
    model = STATE["model"]
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][is_label[:, 1:]])
    token_logps = logits.log_softmax(-1).gather(1, ids[is_label][:, None])[:, 0]
    sums = torch.zeros(len(texts)).index_add(0, is_label.nonzero()[:, 0], token_logps)
    return sums.numpy()


@torch.inference_mode()
def sample(rows: Rows, batch: int, max_new: int, stops: tuple[int, ...]) -> int:
    """One sample for each prompt; returns their tokens."""
    prompts = sorted((row[0] for row in rows), key=len, reverse=True)
    tokens = 0
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(map(len, part))
        ids = torch.tensor([[stops[0]] * (width - len(p)) + list(p) for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = STATE["model"].generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=max_new, eos_token_id=list(stops), pad_token_id=stops[0],
        )[:, width:]  # fmt: skip
        ended = torch.isin(out, torch.tensor(stops)).cumsum(1)
        tokens += int((ended - torch.isin(out, torch.tensor(stops)).long() == 0).sum())
    return tokens
