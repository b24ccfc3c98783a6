"""`scale` as a client of a conformance kit: its files, layouts, scoring and sharded training step on given models.

    python -m reference.conformance --adapter benchmarks.adapters.scale:adapter

`adapter` uses all devices that there are; `bfloat16` lets the model compute in bfloat16; `sharded` is a mesh 2 x 2 x 2.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tokenizers import Tokenizer, models

from minipref.batch import Batch
from minipref.training import TrainState, init_state, loss_of, sft_loss, train_step
from scale.data.dataset import Limits, fit_prompt, pack
from scale.data.layout import round_up
from scale.data.packing import Pieces
from scale.data.rows import read
from scale.data.tokenizer import Codec
from scale.errors import InputError
from scale.model.inference import sequence_logps
from scale.model.response_logps import logps
from scale.parallel.mesh import Runtime, RuntimeConfig, make_runtime
from scale.parallel.processes import shard_batch, to_host
from scale.parallel.sharding import constrain, initialise, runtime_of
from scale.train.loop import Training, hyper

Values = dict[str, Any]


PAIR = ("chosen", "rejected", "ref_sample")


@dataclass(frozen=True)
class Adapter:
    """NumPy in and out."""

    runtime: RuntimeConfig

    @property
    def dtype(self) -> str:
        return self.runtime.dtype

    def supports(self, objective: str, dialect: str) -> bool:
        return (objective, dialect) in self.dialects

    def evaluate(self, objective: str, dialect: str, params: Values, inputs: Values) -> Values:
        return self.dialects[objective, dialect](params, inputs)

    @cached_property
    def dialects(self) -> dict[tuple[str, str], Callable[[Values, Values], Values]]:
        runtime = make_runtime(self.runtime)
        return {
            **{("data", name): split for name in ("explicit", "conversations", "hh-text")},
            ("data", "tokens-keep-end"): partial(tokens, "keep-end"),
            ("data", "tokens-keep-start"): partial(tokens, "keep-start"),
            ("logps", "sum"): partial(sequences, runtime),
            ("logps", "shared-prefix"): partial(shared_prefix, runtime),
            ("training", "sft"): partial(training, runtime, sft_loss, ("chosen",)),
            **{("training", name): partial(training, runtime, loss_of(name), PAIR) for name in ("dpo", "d-dpo", "e-dpo")},
        }


adapter = Adapter(RuntimeConfig())


bfloat16 = Adapter(RuntimeConfig(dtype="bfloat16"))


sharded = Adapter(RuntimeConfig(data=2, fsdp=2, tensor=2))


class Given(eqx.Module):
    """A language model whose logits after token v are row v."""

    table: Float[Array, "V E"]
    runtime: Runtime = eqx.field(static=True)

    def __call__(self, batch: Batch) -> Float[Array, "B T E"]:
        return self.table.astype(self.runtime.dtype)[batch.tokens]

    @property
    def unembedding(self) -> Float[Array, "E E"]:
        return jnp.eye(self.table.shape[1])


def split(params: Values, inputs: Values) -> Values:
    """A row as a file holds it, read."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(inputs))
        row = read(path)[0]
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


class Numbers(Codec):
    """A tokenizer of numbers, the end-of-sequence token being 1."""

    def text_ids(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    @property
    def eos(self) -> int:
        return 1


def tokens(overlong: Any, params: Values, inputs: Values) -> Values:
    codec = Numbers(Tokenizer(models.BPE()))
    made = {"prompt_ids": fit_prompt(inputs["prompt_ids"], Limits(params["max_prompt_length"], 32, overlong), 0)}
    for name in ("chosen", "rejected"):
        text = " ".join(map(str, inputs[f"{name}_ids"]))
        made[f"{name}_ids"] = codec.response_ids(text, inputs[f"{name}_complete"])
    return made


def sequences(runtime: Runtime, params: Values, inputs: Values) -> Values:
    """Slot 0 is always the prompt's: nothing predicts it."""
    response = inputs["completion_mask"].astype(bool)
    response[:, 0] = False
    prompt = inputs["attention_mask"].astype(bool) & ~response
    prompt[:, 0] |= ~prompt.any(1)
    scored = _scored(runtime, inputs, prompt, [response])
    return {"logps": scored["logps"][:, 0], "grads": scored["grads"]}


def shared_prefix(runtime: Runtime, params: Values, inputs: Values) -> Values:
    segments = inputs["segments"]
    scored = _scored(runtime, inputs, segments == 0, [segments == 1, segments == 2])
    chosen, rejected = scored["logps"].T
    return {"chosen_logps": chosen, "rejected_logps": rejected, "grads": scored["grads"]}


def training(runtime: Runtime, loss: Any, fields: tuple[str, ...], params: Values, inputs: Values) -> Values:
    """Ten steps of gradient descent, each on all of its pairs at once."""
    data = _training_rows(runtime, fields, inputs)
    run = Training(len(inputs["batches"]), 8, params["learning_rate"], warmup=0, end_lr_ratio=1.0)
    start = partial(init_state, optimizer=optax.identity(), hyper=hyper(run, params.get("beta", 0.0)))
    state, losses = initialise(start, _given(inputs["table"], runtime)), []
    step = jax.jit(partial(_descend, loss))
    for rows in inputs["batches"].reshape(run.steps, -1):
        state, metrics = step(state, shard_batch(data, rows, runtime))
        losses.append(metrics["loss"])
    return {"losses": np.asarray(to_host(losses)), "parameters": to_host(state.model.table)}


def _descend(loss: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Values]:
    return constrain(train_step(logps, loss, optax.identity(), state, batch), runtime_of(state.model))


def _training_rows(runtime: Runtime, fields: tuple[str, ...], inputs: Values) -> Batch:
    """Packed rows with the columns that `score` adds; a sample without tokens has no KL."""
    masks = {name: inputs[f"{name}_mask"].astype(bool) for name in ("chosen", "rejected")}
    prompts = (inputs["chosen_ids"] > 1) & ~masks["chosen"]
    pieces = [(inputs["chosen_ids"][i][prompts[i]].tolist(),
               [inputs[f"{name}_ids"][i][masks[name][i]].tolist() if name in masks else [] for name in fields])
              for i in range(len(prompts))]
    names = [name for name in inputs if name.startswith("score")]
    rows = [{name: inputs[name][..., i] for name in names} for i in range(len(prompts))]
    data = pack(pieces, rows, fields)
    return data._replace(ref_logps=sequence_logps(_given(inputs["ref_table"], runtime), data))  # type: ignore[arg-type]


def _scored(runtime: Runtime, inputs: Values, prompt: np.ndarray, responses: list[np.ndarray]) -> Values:
    """Log-probabilities of the marked responses, by a model whose every slot is a token of its own."""
    shape = inputs["logits"].shape
    if any(mask.shape != shape[:2] for mask in (prompt, *responses)):
        raise InputError("the masks do not have the shape of the rows")
    slots = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    fields = [""] * len(responses)
    data = pack(_pieces(inputs["input_ids"], prompt, responses), [{}] * len(slots), fields)
    data = data._replace(tokens=pack(_pieces(slots, prompt, responses), [{}] * len(slots), fields).tokens)
    batch = shard_batch(data, np.arange(round_up(len(slots), runtime.batch_shards)) % len(slots), runtime)

    @partial(jax.grad, has_aux=True)
    def total(model: Given) -> tuple[Array, Array]:
        found = logps(model, batch)[: len(slots)]  # type: ignore[arg-type]
        return found.sum(), found

    finite = np.maximum(inputs["logits"].reshape(-1, shape[2]), float(jnp.finfo(runtime.dtype).min))
    grads, found = jax.jit(total)(_given(finite, runtime))
    return {"logps": to_host(found), "grads": {"logits": to_host(grads.table)[: slots.size].reshape(shape)}}


def _pieces(ids: np.ndarray, prompt: np.ndarray, responses: list[np.ndarray]) -> Pieces:
    return [(row[prompt[i]].tolist(), [row[mask[i]].tolist() for mask in responses]) for i, row in enumerate(ids)]


def _given(table: np.ndarray, runtime: Runtime) -> Given:
    """Sharded by the rules that every model is; rows are filled up to what the mesh divides."""
    rows = round_up(len(table), runtime.sizes.get("fsdp", 1))
    filled = np.zeros((rows, table.shape[1]), np.float32)
    filled[: len(table)] = table
    return initialise(lambda table: Given(table, runtime), jnp.asarray(filled))
