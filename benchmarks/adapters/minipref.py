"""minipref as a client of the conformance kit: NumPy arrays in, losses and gradients out.

    python -m reference.conformance --adapter benchmarks.adapters.minipref:adapter

`adapter` computes in float32. `bfloat16` has a model in bfloat16, whose losses are in float32.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import minipref as mp
from minipref.losses import pair_metrics
from minipref.methods import METHODS, method_loss
from minipref.objectives import forward_kl, log_ratio_margin, sampled_forward_kl

Values = dict[str, Any]

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SCORES = ("score_chosen", "score_rejected")
BOTH = ("chosen", "rejected")

METHOD = {
    ("dpo", "plain"): ("dpo", 1.0),
    ("ipo", "paper"): ("ipo", 1.0),
    ("ipo", "sum"): ("ipo", 2.0),  # the target 1/(2 beta): tau = 2 beta
    ("distillation", "d-dpo"): ("d-dpo", 1.0),
    ("ensemble", "batch-min"): ("e-dpo", 1.0),
    ("ensemble", "hull"): ("hull", 1.0),
    ("ensemble", "mean"): ("mean", 1.0),
    ("pessimistic", "sampled-kl"): ("p-dpo", 1.0),
    ("pessimistic", "exact-kl"): ("p-dpo", 1.0),
}
"""The method of a dialect, and the method's beta over the dialect's."""


@dataclass(frozen=True)
class Adapter:
    """NumPy in and out. `dtype` is what the model computes in."""

    dtype: str = "float32"

    def supports(self, objective: str, dialect: str) -> bool:
        return (objective, dialect) in dialects(self.dtype)

    def evaluate(self, objective: str, dialect: str, params: Values, inputs: Values) -> Values:
        narrow = {name: _narrow(value) for name, value in inputs.items()}
        answer = dialects(self.dtype)[objective, dialect](params, narrow)
        return jax.tree.map(lambda array: np.asarray(array, np.float64), answer)


@cache
def dialects(dtype: str) -> dict[tuple[str, str], Any]:
    """What is supported, compiled once a shape: (params, inputs) -> outputs."""
    table: dict[tuple[str, str], Any] = {
        **{name: partial(preferences, *method) for name, method in METHOD.items()},
        ("reward", "bradley-terry"): rewards,
        ("logps", "sum"): partial(sequences, dtype),
        ("logps", "shared-prefix"): partial(shared_prefix, dtype),
        ("training", "sft"): partial(training, dtype, "", ("chosen",)),
        **{("training", name): partial(training, dtype, name, BOTH) for name in TRAINED},
    }
    return {name: jax.jit(function) for name, function in table.items()}


TRAINED = ("dpo", "d-dpo", "e-dpo")
adapter = Adapter()
bfloat16 = Adapter("bfloat16")


def preferences(method: str, scale: float, params: Values, inputs: Values) -> Values:
    """Loss, losses of single pairs, gradients and metrics of one row of METHODS."""
    policy = {name: inputs[name] for name in inputs if name.startswith("policy")}
    row = METHODS[method]
    if row.gamma is not None:
        row = row._replace(gamma=(params.get("gamma", 0.0),) * 2)

    def loss(policy: Values, inputs: Values) -> tuple[Any, Any]:
        inputs = inputs | policy
        margins = jax.vmap(log_ratio_margin)(*(inputs[name] for name in POLICY + REFERENCE))
        kls = divergences(inputs)
        beta = scale * params["beta"]
        value = method_loss(row, margins, reward_margins(inputs), kls, beta, 0.0)
        return value, (margins, kls)

    (value, (margins, kls)), grads = jax.value_and_grad(loss, has_aux=True)(policy, inputs)
    logps, ref = (jnp.stack([inputs[name] for name in names], 1) for names in (POLICY, REFERENCE))
    metrics = pair_metrics(logps, ref, margins, jnp.asarray(params["beta"], jnp.float32))
    metrics = {name: metrics[name] for name in metrics if name.startswith("rewards")}
    single = jax.vmap(lambda pair: loss({}, add_batch_axis(pair))[0])(by_pair(inputs))
    metrics["kl"] = kls.mean()
    return {"loss": value, "per_example": single, "grads": grads, "metrics": metrics}


def reward_margins(inputs: Values) -> Float[Array, "K B"]:
    if SCORES[0] not in inputs:
        return jnp.zeros((0, 1))
    return jnp.atleast_2d(inputs[SCORES[0]] - inputs[SCORES[1]])


def divergences(inputs: Values) -> Float[Array, " S"]:
    """KL(pi_ref || pi) at each sample or prompt that the inputs have; 0 where they have none."""
    if "ref_sample_logps" in inputs:
        samples = inputs["ref_sample_logps"], inputs["policy_sample_logps"]
        return jax.vmap(sampled_forward_kl)(*samples)
    if "ref_distribution_logps" in inputs:
        return forward_kl(inputs["ref_distribution_logps"], inputs["policy_distribution_logps"])
    return jnp.zeros(1)


def by_pair(inputs: Values) -> Values:
    """The inputs that have one value a pair, with the pairs as the first axis."""
    names = [*POLICY, *REFERENCE, *(name for name in SCORES if name in inputs)]
    return {name: jnp.moveaxis(inputs[name], -1, 0) for name in names}


def add_batch_axis(pair: Values) -> Values:
    return {name: value[..., None] for name, value in pair.items()}


def rewards(params: Values, inputs: Values) -> Values:
    def loss(scores: Values) -> tuple[Any, Any]:
        return mp.reward_loss(jnp.stack([scores[name] for name in SCORES], axis=1))

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
    single = jax.vmap(lambda pair: loss(add_batch_axis(pair))[0])(inputs)
    return {"loss": value, "per_example": single, "grads": grads, "metrics": metrics}


def sequences(dtype: str, params: Values, inputs: Values) -> Values:
    """One response a row, marked by `completion_mask`."""
    ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
    logit_positions = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1), mask.shape)
    packed = model_inputs(ids, ids[:, 1:], logit_positions, jnp.where(mask, 0, 1), 1)
    scored = score(dtype, inputs["logits"], packed)
    return scored | {"logps": scored["logps"][:, 0]}


def shared_prefix(dtype: str, params: Values, inputs: Values) -> Values:
    """Two responses a row, as `minipref.batch` has them."""
    ids, segment_ids = inputs["input_ids"], inputs["segments"]
    last_of_prompt = (segment_ids == 0).sum(1, keepdims=True) - 1
    previous = jnp.arange(ids.shape[1] - 1)
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    response_ids = jnp.where(segment_ids[:, 1:] > 0, segment_ids[:, 1:] - 1, 2)
    logit_positions = jnp.where(begins, last_of_prompt, previous)
    packed = model_inputs(ids, ids[:, 1:], logit_positions, response_ids, 2)
    scored = score(dtype, inputs["logits"], packed)
    chosen, rejected = scored["logps"].T
    return {"chosen_logps": chosen, "rejected_logps": rejected, "grads": scored["grads"]}


def score(dtype: str, logits: Float[Array, "B T V"], inputs: mp.Inputs) -> Values:
    """Log-probabilities by an identity unembedding, so that hidden states are logits.

    It takes no infinities.
    """

    def total(logits: Float[Array, "B T V"]) -> tuple[Any, Any]:
        logps = mp.response_logps(logits, jnp.eye(logits.shape[-1], dtype=dtype), inputs)
        return logps.sum(), logps

    finite = jnp.maximum(logits, jnp.finfo(dtype).min).astype(dtype)
    grads, logps = jax.grad(total, has_aux=True)(finite)
    return {"logps": logps, "grads": {"logits": grads}}


class Table(eqx.Module):
    """A language model whose logits after token v are row v."""

    logits: Float[Array, "V V"]


def training(
    dtype: str, method: str, names: tuple[str, ...], params: Values, inputs: Values
) -> Values:
    """Ten steps of gradient descent by `train_step`, each on all of its pairs at once."""

    def logps_of(model: Table, inputs: mp.Inputs) -> Float[Array, "B n"]:
        hidden = model.logits.astype(dtype)[inputs.tokens]
        return mp.response_logps(hidden, jnp.eye(len(model.logits), dtype=dtype), inputs)

    def loss_fn(model: Table, batch: mp.Batch, beta: Any, progress: Any) -> tuple[Any, Values]:
        logps = logps_of(model, batch.inputs)
        if not method:
            return mp.sft_loss(logps, batch.inputs.response_mask.sum())
        row = METHODS[method]
        distilled = jnp.moveaxis(batch.targets.rewards, 2, 0) if row.weights else None
        gamma = None if row.gamma is None else 0.0
        ref = batch.targets.ref_logps
        return mp.preference_loss(
            method, logps, ref, rewards=distilled, beta=beta, gamma=gamma, progress=progress
        )

    packed = training_inputs(inputs, names)
    scores = [jnp.atleast_2d(inputs[name]).T for name in SCORES if name in inputs]
    size = len(packed.tokens)
    rewards = jnp.stack(scores, 1) if scores else jnp.zeros((size, 2, 0))
    batch = mp.Batch(packed, mp.Targets(logps_of(Table(inputs["ref_table"]), packed), rewards))
    steps = inputs["batches"].reshape(len(inputs["batches"]), -1)
    optimizer = optax.sgd(params.get("learning_rate", 0.0))
    beta = jnp.asarray(params.get("beta", 0.0), jnp.float32)
    state = mp.init_state(Table(inputs["table"]), optimizer, len(steps), beta)
    step, losses = jax.jit(partial(mp.train_step, loss_fn, optimizer)), []
    for rows in steps:
        state, metrics = step(state, jax.tree.map(lambda a, rows=rows: a[rows], batch))
        losses.append(metrics["loss"])
    return {"losses": jnp.stack(losses), "parameters": state.model.logits}


def training_inputs(inputs: Values, names: tuple[str, ...]) -> mp.Inputs:
    """Responses side by side, each with its prompt: the model sees one token at a time.

    A pair has an empty sample as its third response.
    """
    ids = [inputs[f"{name}_ids"] for name in names]
    width, num_responses = ids[0].shape[1], 3 if names == BOTH else 1
    masks = [inputs[f"{name}_mask"][:, 1:] for name in names]
    response_ids = [jnp.where(mask, i, num_responses) for i, mask in enumerate(masks)]
    positions = jnp.concatenate([i * width + jnp.arange(width - 1) for i in range(len(names))])
    logit_positions = jnp.broadcast_to(positions, (len(ids[0]), len(positions)))
    labels = jnp.concatenate([array[:, 1:] for array in ids], axis=1)
    tokens, label_responses = jnp.concatenate(ids, 1), jnp.concatenate(response_ids, 1)
    return model_inputs(tokens, labels, logit_positions, label_responses, num_responses)


def model_inputs(
    tokens: Any, labels: Any, logit_positions: Any, response_ids: Any, num_responses: int
) -> mp.Inputs:
    """Inputs for a model that reads tokens alone."""
    return mp.Inputs(
        tokens=tokens,
        positions=tokens,
        segment_ids=jnp.zeros_like(tokens),
        labels=labels,
        logit_positions=logit_positions,
        response_ids=response_ids,
        reward_positions=jnp.zeros((len(tokens), num_responses), int),
    )


def _narrow(array: np.ndarray) -> Array:
    return jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else jnp.int32)
