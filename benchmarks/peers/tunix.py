"""Tunix as a client: `python -m reference.conformance --adapter benchmarks.peers.tunix:adapter`.

The text of a complete response ends with the end-of-sequence token, because Tunix adds none.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import common
from tunix.sft.dpo.dpo_trainer import TrainExample, compute_logps, dpo_loss_fn, process_dpo_record

from benchmarks.peers.inputs import POLICY, REFERENCE, SIDES, Values, lowered
from benchmarks.peers.table import Table

LOGGED = {
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/margin": "rewards/margins",
    "rewards/accuracy": "rewards/accuracies",
}


class LogitsModel(nnx.Module):
    """A language model of these logits [B, T, V]."""

    def __init__(self, logits: Any):
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, tokens: Any, **_: Any) -> tuple[jax.Array, None]:
        return self.logits[...], None


class OneToken(nnx.Module):
    """A language model of two positions and two tokens; token 0 has these log-probabilities [B]."""

    def __init__(self, logps: Any):
        self.logps = nnx.Param(jnp.asarray(logps, jnp.float32))

    def __call__(self, tokens: Any, **_: Any) -> tuple[jax.Array, None]:
        logits = jnp.stack([self.logps[...], jnp.log(-jnp.expm1(self.logps[...]))], 1)
        return jnp.stack([logits, logits], 1), None


def dpo(params: Values, inputs: Values) -> Values:
    """Rows of a prompt of one token and a response of one, token 0."""
    lower = lowered(inputs)
    model = OneToken(np.concatenate([lower[name] for name in POLICY]))
    ones = jnp.ones((len(model.logps[...]), 2), int)
    ref = [jnp.asarray(lower[name], jnp.float32) for name in REFERENCE]
    masks = {"completion_mask": ones[:, 1:], "logits_to_keep": 1}
    example = TrainExample(0 * ones, *positions_and_mask(ones), *ref, **masks)
    options = {"beta": params["beta"], "label_smoothing": params.get("label_smoothing", 0.0)}

    def loss_fn(model: OneToken) -> Any:
        return dpo_loss_fn(model, example, **options)

    (loss, logged), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    slopes = np.split(np.asarray(grads.logps[...]), [len(lower[POLICY[0]])])
    metrics = {ours: logged[theirs] for theirs, ours in LOGGED.items()}
    return {"loss": loss, "grads": dict(zip(POLICY, slopes, strict=True)), "metrics": metrics}


def sequences(params: Values, inputs: Values) -> Values:
    """The halves of the batch are Tunix's chosen and rejected responses."""
    ids, mask = jnp.asarray(inputs["input_ids"]), jnp.asarray(inputs["completion_mask"])[:, 1:]
    attention = positions_and_mask(jnp.asarray(inputs["attention_mask"]))

    def total(model: LogitsModel) -> tuple[jax.Array, jax.Array]:
        logps = jnp.concatenate(compute_logps(model, ids, *attention, ids.shape[1] - 1, mask))
        return logps.sum(), logps

    grads, logps = nnx.grad(total, has_aux=True)(LogitsModel(inputs["logits"]))
    return {"logps": logps, "grads": {"logits": grads.logits[...]}}


def positions_and_mask(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions, and the mask of attention, as Tunix makes them."""
    return common.build_positions_from_mask(mask), common.make_causal_attn_mask(mask)


class Characters:
    """A tokenizer whose token i is the character i.

    It has no beginning-of-sequence token, because the cases have none.
    """

    def __init__(self, pad_id: int):
        self.pad_id = lambda: pad_id
        self.bos_id = lambda: None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def dedup_bos_ids(self, ids: list[int]) -> list[int]:
        return ids


def tokens(params: Values, inputs: Values) -> Values:
    """The token ids that Tunix makes, without padding."""
    record = {"prompts": text(inputs["prompt_ids"])}
    for side in SIDES:
        end = [params["eos_id"]] * inputs[f"{side}_complete"]
        record[f"{side}_responses"] = text(inputs[f"{side}_ids"] + end)
    tokenizer, longest = Characters(params["pad_id"]), params["max_prompt_length"]
    example = process_dpo_record(record, tokenizer, longest, 8)
    return {f"{name}_ids": masked_ids(example, name) for name in ("prompt", *SIDES)}


def masked_ids(example: Any, name: str) -> np.ndarray:
    """The token ids that the mask keeps."""
    ids, mask = (np.asarray(getattr(example, f"{name}_{field}")) for field in ("ids", "mask"))
    return ids[mask == 1]


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


adapter = Table(
    {
        ("dpo", "plain"): dpo,
        ("dpo", "conservative"): dpo,
        ("logps", "sum"): sequences,
        ("data", "tokens-keep-start"): tokens,
    }
)
