"""minipref as a client of a conformance kit: dictionaries of NumPy arrays in, losses and gradients out.

    python -m reference.conformance --adapter benchmarks.adapters.minipref:adapter

`adapter` computes in float32, `bfloat16` with a model in bfloat16, whose losses are float32 (house rule 8).
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

from minipref.batch import Batch, response_logps
from minipref.methods import METHODS, method_loss
from minipref.objectives import forward_kl, log_ratio_margin, sampled_forward_kl
from minipref.training import Hyper, init_state, loss_of, preference_metrics, reward_loss, sft_loss, train_step

Values = dict[str, Any]


POLICY = ("policy_chosen_logps", "policy_rejected_logps")


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


SCORES = ("score_chosen", "score_rejected")


BOTH = ("chosen", "rejected")


TRAINED = ("dpo", "d-dpo", "e-dpo")


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
"""A dialect's method, and the method's strength over beta."""


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
        ("training", "sft"): partial(training, dtype, sft_loss, ("chosen",)),
        **{("training", name): partial(training, dtype, loss_of(name), BOTH) for name in TRAINED},
    }
    return {name: jax.jit(function) for name, function in table.items()}


adapter = Adapter()


bfloat16 = Adapter("bfloat16")


def preferences(method: str, scale: float, params: Values, inputs: Values) -> Values:
    """Loss, values of single pairs, gradients and metrics of one row of METHODS."""
    wanted = {name: inputs[name] for name in inputs if name.startswith("policy")}

    def loss(policy: Values, inputs: Values) -> tuple[Any, Any]:
        inputs = inputs | policy
        margins = jax.vmap(log_ratio_margin)(*(inputs[name] for name in POLICY + REFERENCE))
        rho = jnp.atleast_2d(inputs[SCORES[0]] - inputs[SCORES[1]]) if SCORES[0] in inputs else jnp.zeros((0, 1))
        row = METHODS[method]._replace(gamma=(params.get("gamma", 0.0),) * 2)
        kls = divergences(inputs)
        return method_loss(row, margins, rho, kls, scale * params["beta"], 0.0), (margins, kls)

    (value, (margins, kls)), grads = jax.value_and_grad(loss, has_aux=True)(wanted, inputs)
    logps, ref = (jnp.stack([inputs[name] for name in names], 1) for names in (POLICY, REFERENCE))
    metrics = preference_metrics(logps, margins, _columns(ref), _hyper(params))
    metrics = {name: metrics[name] for name in metrics if name.startswith("rewards")}
    single = jax.vmap(partial(_alone, loss))(_pairs(inputs))
    return {"loss": value, "per_example": single, "grads": grads, "metrics": metrics | {"kl": kls.mean()}}


def divergences(inputs: Values) -> Float[Array, " S"]:
    """KL(pi_ref || pi) at each sample or prompt that the inputs have; 0 where they have none."""
    if "ref_sample_logps" in inputs:
        return jax.vmap(sampled_forward_kl)(inputs["ref_sample_logps"], inputs["policy_sample_logps"])
    if "ref_distribution_logps" in inputs:
        return forward_kl(inputs["ref_distribution_logps"], inputs["policy_distribution_logps"])
    return jnp.zeros(1)


def rewards(params: Values, inputs: Values) -> Values:
    def loss(scores: Values) -> tuple[Any, Any]:
        outputs = jnp.stack([scores[name] for name in SCORES], 1)
        return reward_loss(outputs, _columns(outputs), _hyper(params), 0.0)

    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
    single = jax.vmap(lambda pair: loss({name: pair[name][None] for name in pair})[0])(inputs)
    return {"loss": value, "per_example": single, "grads": grads, "metrics": metrics}


def sequences(dtype: str, params: Values, inputs: Values) -> Values:
    """One response a row, marked by `completion_mask`."""
    ids, response_mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
    logit_positions = jnp.broadcast_to(jnp.arange(ids.shape[1] - 1), response_mask.shape)
    scored = _scored(dtype, inputs["logits"], _tokens(ids, ids[:, 1:], logit_positions, jnp.where(response_mask, 0, 1), 1))
    return scored | {"logps": scored["logps"][:, 0]}


def shared_prefix(dtype: str, params: Values, inputs: Values) -> Values:
    """Two responses a row, as `minipref.batch` has them."""
    ids, segments = inputs["input_ids"], inputs["segments"]
    last = (segments == 0).sum(1, keepdims=True) - 1
    before = jnp.arange(ids.shape[1] - 1)
    logit_positions = jnp.where(segments[:, 1:] != segments[:, :-1], last, before)
    response_ids = jnp.where(segments[:, 1:] > 0, segments[:, 1:] - 1, 2)
    scored = _scored(dtype, inputs["logits"], _tokens(ids, ids[:, 1:], logit_positions, response_ids, 2))
    return {"chosen_logps": scored["logps"][:, 0], "rejected_logps": scored["logps"][:, 1], "grads": scored["grads"]}


class Table(eqx.Module):
    """A language model whose logits after token v are row v."""

    logits: Float[Array, "V V"]


def training(dtype: str, loss: Any, names: tuple[str, ...], params: Values, inputs: Values) -> Values:
    """Ten steps by `train_step`, each on all of its pairs at once."""

    def forward(model: Table, batch: Batch) -> Float[Array, "B n"]:
        hidden = model.logits.astype(dtype)[batch.tokens]
        return response_logps(hidden, jnp.eye(len(model.logits), dtype=dtype), batch)

    rows = _training_rows(inputs, names)
    rows = rows._replace(ref_logps=forward(Table(inputs["ref_table"]), rows))
    state = init_state(Table(inputs["table"]), optax.identity(), _hyper(params))
    step, losses = jax.jit(partial(train_step, forward, loss, optax.identity())), []
    for indices in inputs["batches"].reshape(len(inputs["batches"]), -1):
        state, metrics = step(state, jax.tree.map(lambda column, indices=indices: column[indices], rows))
        losses.append(metrics["loss"])
    return {"losses": jnp.stack(losses), "parameters": state.model.logits}


def _training_rows(inputs: Values, names: tuple[str, ...]) -> Batch:
    """Responses side by side, each with its prompt, as the model sees one token alone; a pair with an empty sample."""
    ids = [inputs[f"{name}_ids"] for name in names]
    width = ids[0].shape[1]
    responses = 3 if names == BOTH else 1
    response_ids = [jnp.where(inputs[f"{name}_mask"][:, 1:], i, responses) for i, name in enumerate(names)]
    logit_positions = jnp.concatenate([i * width + jnp.arange(width - 1) for i in range(len(names))])
    logit_positions = jnp.broadcast_to(logit_positions, (len(ids[0]), len(logit_positions)))
    labels = jnp.concatenate([each[:, 1:] for each in ids], 1)
    rows = _tokens(jnp.concatenate(ids, 1), labels, logit_positions, jnp.concatenate(response_ids, 1), responses)
    scores = [jnp.atleast_2d(inputs[name]).T for name in SCORES if name in inputs]
    return rows._replace(scores=jnp.stack(scores, 1)) if scores else rows


def _scored(dtype: str, logits: Float[Array, "B T V"], batch: Batch) -> Values:
    """Log-probabilities by an unembedding of the identity, so that hidden states are logits. It takes no infinities."""
    def total(logits: Float[Array, "B T V"]) -> tuple[Any, Any]:
        logps = response_logps(logits, jnp.eye(logits.shape[-1], dtype=dtype), batch)
        return logps.sum(), logps

    finite = jnp.maximum(logits, jnp.finfo(dtype).min).astype(dtype)
    grads, logps = jax.grad(total, has_aux=True)(finite)
    return {"logps": logps, "grads": {"logits": grads}}


def _tokens(ids: Any, labels: Any, logit_positions: Any, response_ids: Any, responses: int) -> Batch:
    last, none = jnp.zeros((len(ids), responses), int), jnp.zeros((len(ids), 0))
    return Batch(ids, ids, jnp.zeros_like(ids), labels, logit_positions, response_ids, last, none, jnp.zeros((len(ids), 2, 0)))


def _columns(ref_logps: Float[Array, "B n"]) -> Batch:
    """A batch of which a loss reads the reference's log-probabilities alone."""
    nothing = jnp.zeros((len(ref_logps), 1), int)
    return _tokens(nothing, nothing, nothing, nothing, 2)._replace(ref_logps=ref_logps)


def _hyper(params: Values) -> Hyper:
    """A constant learning rate."""
    values = (params.get("beta", 0.0), (0.0, 0.0), params.get("learning_rate", 0.0), 0.0, 1.0, 1.0)
    return Hyper(*(jnp.asarray(value, jnp.float32) for value in values))


def _pairs(inputs: Values) -> Values:
    """What has one value a pair, pairs first."""
    names = [*POLICY, *REFERENCE, *(name for name in SCORES if name in inputs)]
    return {name: jnp.moveaxis(inputs[name], -1, 0) for name in names}


def _alone(loss: Any, pair: Values) -> Float[Array, ""]:
    """The loss of a batch of one pair."""
    return loss({}, {name: value[..., None] for name, value in pair.items()})[0]


def _narrow(array: np.ndarray) -> Array:
    return jnp.asarray(array, jnp.float32 if array.dtype == np.float64 else jnp.int32)
