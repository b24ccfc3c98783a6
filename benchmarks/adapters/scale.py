"""`scale` as a client of a conformance kit: files, layouts, scoring and the sharded training step.

    python -m reference.conformance --adapter benchmarks.adapters.scale:adapter

`adapter` uses all devices that there are. The model of `bfloat16` computes in bfloat16. `sharded`
has a mesh of 2 x 2 x 2.
"""

import json
from collections.abc import Callable, Sequence
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
import tokenizers
from jaxtyping import Array, Float

from minipref.batch import Batch, Inputs, Targets
from minipref.training import Hyperparameters, TrainState, init_state, train_step
from scale.data.dataset import Limits, read_targets, take, truncate
from scale.data.layout import round_up, smallest_shape
from scale.data.packing import TokenizedRows, pack, tokenized_rows
from scale.data.rows import read
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError
from scale.model.inference import jitted_logps
from scale.model.response_logps import response_logps
from scale.parallel.mesh import Runtime, RuntimeConfig, make_runtime
from scale.parallel.processes import shard_batch, to_host
from scale.parallel.sharding import constrain, initialise, runtime_of
from scale.train.steps import language_model_loss, policy_loss

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
            ("data", "tokens-keep-end"): partial(tokens, "left"),
            ("data", "tokens-keep-start"): partial(tokens, "right"),
            ("logps", "sum"): partial(sequences, runtime),
            ("logps", "shared-prefix"): partial(shared_prefix, runtime),
            ("training", "sft"): partial(training, runtime, SFT, ("chosen",)),
            **{
                ("training", name): partial(
                    training, runtime, partial(policy_loss, name, 0.0), PAIR
                )
                for name in ("dpo", "d-dpo", "e-dpo")
            },
        }


SFT = partial(language_model_loss, 0.0)
adapter = Adapter(RuntimeConfig())
bfloat16 = Adapter(RuntimeConfig(dtype="bfloat16"))
sharded = Adapter(RuntimeConfig(data=2, fsdp=2, tensor=2))


class TableModel(eqx.Module):
    """A language model whose logits after token v are row v."""

    table: Float[Array, "V E"]
    runtime: Runtime = eqx.field(static=True)

    def __call__(self, inputs: Inputs) -> Float[Array, "B T E"]:
        return self.table.astype(self.runtime.dtype)[inputs.tokens]

    @property
    def unembedding(self) -> Float[Array, "E E"]:
        return jnp.eye(self.table.shape[1])


def table_model(table: np.ndarray, runtime: Runtime) -> Any:
    """Sharded by the rules of every model; rows are filled up to what the mesh divides."""
    rows = round_up(len(table), runtime.sizes.get("fsdp", 1))
    filled = np.zeros((rows, table.shape[1]), np.float32)
    filled[: len(table)] = table
    return initialise(lambda table: TableModel(table, runtime), jnp.asarray(filled))


def split(params: Values, inputs: Values) -> Values:
    """A row as a file holds it, read."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text(json.dumps(inputs))
        row = read(path)[0]
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


class NumberTokenizer(Tokenizer):
    """A tokenizer of numbers, with 1 as the end-of-sequence token."""

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    @property
    def eos(self) -> int:
        return 1


def tokens(truncation_side: Any, params: Values, inputs: Values) -> Values:
    tokenizer = NumberTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    limits = Limits(params["max_prompt_length"], 32, truncation_side)
    outputs = {"prompt_ids": truncate(inputs["prompt_ids"], limits, 0)}
    for name in ("chosen", "rejected"):
        text = " ".join(map(str, inputs[f"{name}_ids"]))
        outputs[f"{name}_ids"] = tokenizer.response_ids(text, inputs[f"{name}_complete"])
    return outputs


def sequences(runtime: Runtime, params: Values, inputs: Values) -> Values:
    """Position 0 is always the prompt's: nothing predicts it."""
    response = inputs["completion_mask"].astype(bool)
    response[:, 0] = False
    prompt = inputs["attention_mask"].astype(bool) & ~response
    prompt[:, 0] |= ~prompt.any(1)
    scored = score(runtime, inputs, prompt, [response])
    return {"logps": scored["logps"][:, 0], "grads": scored["grads"]}


def shared_prefix(runtime: Runtime, params: Values, inputs: Values) -> Values:
    segments = inputs["segments"]
    scored = score(runtime, inputs, segments == 0, [segments == 1, segments == 2])
    chosen, rejected = scored["logps"].T
    return {"chosen_logps": chosen, "rejected_logps": rejected, "grads": scored["grads"]}


def score(
    runtime: Runtime, inputs: Values, prompt: np.ndarray, responses: list[np.ndarray]
) -> Values:
    """Log-probabilities of the marked responses, by a model with one token for each position."""
    shape = inputs["logits"].shape
    if any(mask.shape != shape[:2] for mask in (prompt, *responses)):
        raise InputError("the masks do not have the shape of the rows")
    positions = np.arange(shape[0] * shape[1]).reshape(shape[:2])
    packed = pack_alone(marked(inputs["input_ids"], prompt, responses))
    packed = packed._replace(tokens=pack_alone(marked(positions, prompt, responses)).tokens)
    rows = np.arange(round_up(shape[0], runtime.batch_shards)) % shape[0]
    batch = shard_batch(take(packed, rows), runtime)

    @partial(jax.grad, has_aux=True)
    def total(model: Any) -> tuple[Array, Array]:
        logps = response_logps(model, batch).logps[: shape[0]]
        return logps.sum(), logps

    lowest = float(jnp.finfo(runtime.dtype).min)
    finite = np.maximum(inputs["logits"].reshape(-1, shape[2]), lowest)
    grads, logps = jax.jit(total)(table_model(finite, runtime))
    by_logits = to_host(grads.table)[: positions.size].reshape(shape)
    return {"logps": to_host(logps), "grads": {"logits": by_logits}}


def marked(ids: np.ndarray, prompt: np.ndarray, responses: list[np.ndarray]) -> TokenizedRows:
    rows = [(row[prompt[i]], [row[mask[i]] for mask in responses]) for i, row in enumerate(ids)]
    return tokenized_rows(rows)


def pack_alone(rows: TokenizedRows) -> Inputs:
    """One row in each packed sequence."""
    return pack(rows, smallest_shape(rows.lengths, len(rows.lengths)))


def training(
    runtime: Runtime, loss_fn: Any, fields: tuple[str, ...], params: Values, inputs: Values
) -> Values:
    """Ten steps of gradient descent, each on all of its pairs at once."""
    batch = training_rows(runtime, fields, inputs)
    steps = inputs["batches"].reshape(len(inputs["batches"]), -1)
    optimizer = optax.sgd(params["learning_rate"])
    beta = jnp.asarray(params.get("beta", 0.0), jnp.float32)
    start = partial(
        init_state,
        optimizer=optimizer,
        num_steps=len(steps),
        hyperparameters=Hyperparameters(beta, jnp.zeros(2)),
    )
    state, losses = initialise(start, table_model(inputs["table"], runtime)), []

    @jax.jit
    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Values]:
        return constrain(train_step(loss_fn, optimizer, state, batch), runtime_of(state.model))

    for rows in steps:
        state, metrics = step(state, shard_batch(take(batch, rows), runtime))
        losses.append(metrics["loss"])
    return {"losses": np.asarray(to_host(losses)), "parameters": to_host(state.model.table)}


def training_rows(runtime: Runtime, fields: tuple[str, ...], inputs: Values) -> Batch:
    """Packed rows with the columns that `score` adds; a sample without tokens has no KL."""
    masks = {name: inputs[f"{name}_mask"].astype(bool) for name in ("chosen", "rejected")}
    ids, prompts = inputs["chosen_ids"], (inputs["chosen_ids"] > 1) & ~masks["chosen"]
    rows = []
    for i, prompt in enumerate(prompts):
        responses = [inputs[f"{f}_ids"][i][masks[f][i]] if f in masks else [] for f in fields]
        rows.append((ids[i][prompt], responses))
    scores = [name for name in inputs if name.startswith("score")]
    columns = [{name: inputs[name][..., i] for name in scores} for i in range(len(prompts))]
    packed = pack_alone(tokenized_rows(rows))
    model = table_model(inputs["ref_table"], runtime)
    filled = np.arange(round_up(len(rows), runtime.batch_shards)) % len(rows)
    logps = to_host(jitted_logps(model, shard_batch(take(packed, filled), runtime)))[: len(rows)]
    rewards = read_targets(columns, fields).rewards
    return Batch(packed, Targets(logps, rewards))  # type: ignore[arg-type]  # NumPy arrays
