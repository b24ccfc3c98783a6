"""Bugs that were written when the search for names was done, in sets, with JAX's gradients.

Of each: what is claimed, the function, what the kit said at first, and words of what it says now.
"""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, log_softmax, sigmoid, softmax

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
SCORES = ("score_chosen", "score_rejected")
TRAINED = (*POLICY, "policy_sample_logps", "policy_distribution_logps", "logits")


class Bug(NamedTuple):
    claimed: str
    function: object
    first: str
    now: str


def client(function):
    """Its gradients are those of the loss, or of the sum of log-probabilities."""

    def evaluate(objective, dialect, params, inputs):
        pairs = [n for n in inputs if "sample" not in n and "distribution" not in n]
        columns = {inputs[n].shape[-1] for n in pairs if n.endswith("_logps") or n in SCORES}
        if len(columns) > 1 or ("logits" in inputs and mismatched(inputs)):
            raise ValueError("shapes differ")
        names = [n for n in TRAINED if n in inputs] or list(SCORES)
        with jax.enable_x64(True):
            x = {name: jnp.asarray(value) for name, value in inputs.items()}

            def total(part):
                made = function(params, x | part)
                return made["loss"] if "loss" in made else jnp.sum(made["logps"]), made

            grads, made = jax.grad(total, has_aux=True)({n: x[n] for n in names})
            return jax.tree.map(np.asarray, made | {"grads": grads})

    return SimpleNamespace(dtype="float64", supports=lambda o, d: True, evaluate=evaluate)


def mismatched(inputs):
    return inputs["completion_mask"].shape != inputs["input_ids"].shape


def ratios(x):
    return tuple(x[f"policy_{s}_logps"] - x[f"ref_{s}_logps"] for s in ("chosen", "rejected"))


def h(x):
    chosen, rejected = ratios(x)
    return chosen - rejected


def rho(x):
    return x["score_chosen"] - x["score_rejected"]


def lengths(x):
    return [x.get(f"{side}_lengths", 1.0) for side in ("chosen", "rejected")]


def loss(value):
    """A loss of each pair, `value(params, inputs)`."""

    def function(p, x):
        losses = value(p, x)
        return {"loss": losses.mean(), "per_example": losses}

    return function


def of_batch(value):
    return lambda p, x: {"loss": value(p, x)}


def pessimistic(kl):
    def function(p, x):
        return {"loss": dpo(p, x).mean() + p["gamma"] * kl(x), "metrics": {"kl": kl(x)}}

    return function


def dpo(p, x):
    return -log_sigmoid(p["beta"] * h(x))


def smoothed(right, wrong):
    """Weights of both sides, as functions of the label smoothing."""

    def value(p, x):
        e, a = p["label_smoothing"], p["beta"] * h(x)
        return -right(e) * log_sigmoid(a) - wrong(e) * log_sigmoid(-a)

    return loss(value)


def both(value):
    """A function of the implicit rewards of chosen and rejected."""
    return loss(lambda p, x: value(*(p["beta"] * ratio for ratio in ratios(x))))


def tokens(scores, reduce=lambda scored, mask: scored.sum(axis=1)):
    """Token scores [B, T - 1, V] of logits; `reduce(scored, mask)`."""

    def function(p, x):
        ids, mask = x["input_ids"][:, 1:, None], x["completion_mask"][:, 1:]
        labels = jnp.take_along_axis(scores(x["logits"][:, :-1]), ids, axis=-1)[..., 0]
        return {"logps": reduce(jnp.where(mask == 1, labels, 0.0), mask)}

    return function


def rolled(p, x):
    ids, mask = x["input_ids"][:, 1:, None], x["completion_mask"][:, 1:]
    labels = jnp.take_along_axis(log_softmax(x["logits"][:, :-1]), ids, axis=-1)[..., 0]
    return {"logps": jnp.where(mask == 1, jnp.roll(labels, 1, axis=1), 0.0).sum(axis=1)}


def interleaved(p, x):
    ref = jnp.concatenate([x["ref_chosen_logps"], x["ref_rejected_logps"]])
    return dpo(p, x | {"ref_chosen_logps": ref[0::2], "ref_rejected_logps": ref[1::2]})


def in_halves(p, x):
    ref = jnp.stack([x["ref_chosen_logps"], x["ref_rejected_logps"]], axis=1).ravel()
    halves = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), jnp.split(ref, 2), strict=True))
    return dpo(p, x | halves)


def in_a_circle(p, x):
    ids, mask = (jnp.roll(x[name], -1, axis=1) for name in ("input_ids", "completion_mask"))
    labels = jnp.take_along_axis(log_softmax(x["logits"]), ids[..., None], axis=-1)[..., 0]
    return {"logps": jnp.where(mask == 1, labels, 0.0).sum(axis=1)}


def ref_margin(x):
    return x["ref_chosen_logps"] - x["ref_rejected_logps"]


def undivided(p, x):
    """rDPO's loss before it is divided by 1 - 2 e."""
    e, a = p["label_smoothing"], p["beta"] * h(x)
    return -(1 - e) * log_sigmoid(a) + e * log_sigmoid(-a)


def conservative_with(values):
    """cDPO with `values(params)` as beta and the label smoothing, in its metrics too."""

    def function(p, x):
        beta, e = values(p)
        p = {"beta": beta, "label_smoothing": e}
        made = smoothed(lambda e: 1 - e, lambda e: e)(p, x)
        return made | {"metrics": rewards_of(p, x, 1.0)}

    return function


def beyond(metrics):
    """Llama 2's loss, with metrics of the rewards' differences and the margins."""
    return lambda p, x: loss(lambda p, x: -log_sigmoid(rho(x) - x["margins"]))(p, x) | {
        "metrics": metrics(rho(x), x["margins"])
    }


def other_slope(a):
    """0, whose slope turns that of -log sigmoid(a), -sigmoid(-a), into -sigmoid(a)."""
    term = log_sigmoid(-a) - log_sigmoid(a)  # -a, whose slope is -1
    return term * jax.lax.stop_gradient(sigmoid(a) - sigmoid(-a)) - jax.lax.stop_gradient(
        term * (sigmoid(a) - sigmoid(-a))
    )


def with_epsilon(epsilon, p, x):
    """cDPO of probabilities, with an epsilon in both logarithms."""
    e, right = p["label_smoothing"], sigmoid(p["beta"] * h(x))
    return -(1 - e) * jnp.log(right + epsilon) - e * jnp.log(1 - right + epsilon)


def clamped(p, x):
    """rDPO of probabilities that are no lower than a millionth."""
    e, a = p["label_smoothing"], p["beta"] * h(x)
    sides = (jnp.log(jnp.maximum(sigmoid(side), 1e-6)) for side in (a, -a))
    won, lost = sides
    return (-(1 - e) * won + e * lost) / (1 - 2 * e)


def pooled(x):
    return jnp.std(jnp.concatenate([x[s] for s in SCORES]), ddof=1)


def straight(values):
    """Rounded to bfloat16, with the gradient of what is not rounded."""
    return values + jax.lax.stop_gradient(values.astype(jnp.bfloat16).astype(float) - values)


def clipped_weights(p, x):
    """The mixture whose weights, constant to the gradient, are those of least squares, clipped."""
    due = p["beta"] * h(x)
    found = jnp.maximum(jnp.linalg.lstsq(rho(x).T, due)[0], 0.0)
    total = found.sum()
    weights = jnp.where(total > 0, found / jnp.where(total > 0, total, 1.0), 1 / len(found))
    return ((jax.lax.stop_gradient(weights) @ rho(x) - due) ** 2).mean()


def rewards_of(p, x, times):
    """Metrics where the reference is subtracted so many times."""
    won, lost = (
        p["beta"] * (x[f"policy_{s}_logps"] - times * x[f"ref_{s}_logps"])
        for s in ("chosen", "rejected")
    )
    return {
        "rewards/chosen": won.mean(),
        "rewards/rejected": lost.mean(),
        "rewards/margins": (won - lost).mean(),
        "rewards/accuracies": (won > lost).sum() / len(won),
    }


def with_metrics(metrics):
    """DPO, whose metrics are the right ones but for these."""
    return lambda p, x: loss(dpo)(p, x) | {"metrics": rewards_of(p, x, 1.0) | metrics(p, x)}


def halves(logits):
    split = jnp.array_split(logits, 2, axis=-1)
    return jnp.concatenate([log_softmax(half) for half in split], axis=-1)


def one_reference(p, x):
    """The reference's log-probability of chosen is subtracted from both policy's."""
    x = x | {"ref_rejected_logps": x["ref_chosen_logps"]}
    chosen, rejected = (p["beta"] * ratio.mean() for ratio in ratios(x))
    metrics = {"rewards/chosen": chosen, "rewards/rejected": rejected}
    return {"loss": dpo(p, x).mean(), "per_example": dpo(p, x), "metrics": metrics}


def in_half(x, kind):
    names = ("ref_chosen_logps", "ref_rejected_logps")
    return {name: x[name].astype(kind).astype(float) for name in names}


def of_token_means(p, x, policy, reference):
    """IPO's loss, of sums or of means of each."""
    n = dict(zip(("chosen", "rejected"), lengths(x), strict=True))
    w, l = (  # noqa: E741
        x[f"policy_{s}_logps"] / n[s] ** policy - x[f"ref_{s}_logps"] / n[s] ** reference for s in n
    )
    return (w - l - 0.5 / p["beta"]) ** 2


def over_deviation(freedom, more, p, x):
    scale = jnp.concatenate([x[name] for name in SCORES]).std(ddof=freedom) + more
    return (rho(x) / scale - p["beta"] * h(x)) ** 2


def kto(p, x):
    w, l = (p["beta"] * ratio for ratio in ratios(x))  # noqa: E741
    a, b = w - jnp.maximum(l.mean(), 0.0), jnp.maximum(w.mean(), 0.0) - l
    return jnp.concatenate([sigmoid(-a), sigmoid(-b)]).mean()


def contrasted(p, x):
    w, l = (p["beta"] * ratio for ratio in ratios(x))  # noqa: E741
    return jax.nn.logsumexp(jnp.concatenate([w, l])) - w


def dynamic(p, x):
    return -log_sigmoid(p["beta"] * (1 + 0.6 * jax.lax.stop_gradient(h(x)).mean()) * h(x))


def simpo(p, x):
    w, l = (x[name] / n for name, n in zip(POLICY, lengths(x), strict=True))  # noqa: E741
    return -log_sigmoid(p["beta"] * (w - l - 0.5))


def wpo(p, x):
    means = sum(x[name] / n for name, n in zip(POLICY, lengths(x), strict=True))
    return jax.lax.stop_gradient(jnp.exp(means)) * dpo(p, x)


def by_softmax(p, x):
    losses = ((rho(x) - p["beta"] * h(x)) ** 2).mean(axis=1)
    return (softmax(-losses) * losses).sum()


def worst(p, x):
    least = rho(x)[jnp.argmin(rho(x).mean(axis=1))]
    return ((least - p["beta"] * h(x)) ** 2).mean()


def log_ratio(x):
    return x["ref_sample_logps"] - x["policy_sample_logps"]


def exact_sum(x):
    ref, policy = x["ref_distribution_logps"], x["policy_distribution_logps"]
    possible = jnp.exp(ref) > 0
    return jnp.where(possible, jnp.exp(ref) * (jnp.where(possible, ref, 0.0) - policy), 0.0).sum()


# fmt: off
def sums_in_bfloat16(p, x):
    """IPO of token means, whose reference was stored as sums in half precision."""
    ref = {n: x[n].astype(jnp.bfloat16).astype(x[n].dtype) for n in x if n.startswith("ref_")}
    w, l = (r / n for r, n in zip(ratios(x | ref), lengths(x), strict=True))  # noqa: E741
    return (w - l - 0.5 / p["beta"]) ** 2


def filled_up(x):
    """The pairs, and where their number is odd the first one again."""
    names = [n for n in x if n.endswith("_logps") and len(x[n]) % 2]
    return x | {n: jnp.concatenate([x[n], x[n][:1]]) for n in names}


REPORTS = {
    "beta twice (AI-Hypercomputer/maxtext#1530)": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] ** 2 * h(x))),
        "named", "at beta squared"),
    "loss inverted (linkedin/Liger-Kernel#481)": Bug(
        "dpo/plain", loss(lambda p, x: -dpo(p, x)), "named", "negated"),
    "IPO of sums (huggingface/blog#1764)": Bug(
        "ipo/token-mean", loss(lambda p, x: (h(x) - 0.5 / p["beta"]) ** 2), "named", "ipo/sum"),
    "softmax over the batch (Joshua-Ren/Neural_Iterated_Learning#2)": Bug(
        "logps/sum", tokens(lambda logits: log_softmax(logits, axis=0)), "unknown", ""),
    "squared log-ratio as KL (one-covenant/grail#42)": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: (log_ratio(x) ** 2).mean()),
        "named", "with the squared log-ratio for the KL"),
    "DPO-positive's penalty outside (abacusai/smaug#2)": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x) + 50 * jnp.maximum(-ratios(x)[0], 0.0)),
        "unknown", "plus 50 times how far chosen is below its reference"),
    "label smoothing adds 1/n (TimDettmers/ConvE#55)": Bug(
        "dpo/conservative", smoothed(lambda e: 1.5 - e, lambda e: 0.5),
        "unknown", "with the loss"),
    "SimPO's gamma times beta (natolambert/rlhf-book#358)": Bug(
        "dpo/plain", loss(simpo), "unknown",
        "with -0.5 added to the margin and without the reference and averaged over tokens"),
    "SimPO of sums (princeton-nlp/SimPO#32)": Bug(
        "dpo/plain",
        loss(lambda p, x: -log_sigmoid(p["beta"] * (x[POLICY[0]] - x[POLICY[1]]) - 1.4)),
        "unknown", "with -1.4 added to beta times the margin and without the reference"),
    "KTO of pairs (huggingface/trl#1075)": Bug(
        "dpo/plain", of_batch(kto), "unknown", "with KTO's loss of pairs"),
    "beta by the batch's margin (junkangwu/beta-DPO#1)": Bug(
        "dpo/plain", loss(dynamic), "unknown", "at beta (1 + 0.6 times the batch's mean margin)"),
    "reference interleaved (NVIDIA/NeMo-Aligner#227)": Bug(
        "dpo/plain", loss(interleaved), "unknown",
        "with the reference's chosen and rejected in halves, read as alternating"),
    "chosen's mask for both (QwenAudio/CosyVoice#1449)": Bug(
        "ipo/token-mean", loss(lambda p, x: (h(x) / lengths(x)[0] - 0.5 / p["beta"]) ** 2),
        "named", "with the chosen response's tokens counted for both"),
    "token log-probabilities rolled (huggingface/trl#2733)": Bug(
        "logps/sum", rolled, "unknown", "with the log-probabilities of tokens rolled by one"),
    "KL maximised (Unakar/Logic-RL#58)": Bug(
        "pessimistic/sampled-kl", lambda p, x: {
            "loss": dpo(p, x).mean() - p["gamma"] * log_ratio(x).mean(),
            "metrics": {"kl": log_ratio(x).mean()}}, "named", "with the KL subtracted"),
    "k3 the other way (OpenRLHF/OpenRLHF#525)": Bug(
        "pessimistic/sampled-kl",
        pessimistic(lambda x: (jnp.exp(log_ratio(x)) - 1 - log_ratio(x)).mean()),
        "named", "with pi_ref/pi - 1 - log(pi_ref/pi), GRPO's k3, for the KL"),
    "beta outside": Bug(
        "dpo/plain", loss(lambda p, x: -p["beta"] * log_sigmoid(h(x))),
        "named", "with the loss beta L(h)"),
    "IPO's parentheses": Bug(
        "ipo/sum", loss(lambda p, x: ((h(x) - 1) / (2 * p["beta"])) ** 2),
        "unknown", "with the square of (h - 1) / (2 beta)"),
    "reward margin over its deviation": Bug(
        "distillation/d-dpo",
        loss(lambda p, x: (rho(x) / (rho(x).std() + 1e-8) - p["beta"] * h(x)) ** 2),
        "unknown", "with reward margins over their standard deviation"),
    "each response distilled by itself": Bug(
        "distillation/d-dpo", loss(lambda p, x: sum(
            (x[s] - p["beta"] * r) ** 2 for s, r in zip(SCORES, ratios(x), strict=True)) / 2),
        "unknown", "with the mean of both responses' squared differences"),
    "softmax over all rewards of the batch": Bug(
        "dpo/plain", loss(contrasted), "unknown",
        "with the softmax over all responses of the batch"),
    "reward margin as a factor": Bug(
        "reward/margin", loss(lambda p, x: -log_sigmoid(x["margins"] * rho(x))),
        "unknown", "-log sigmoid of the margin times the difference"),
    "cDPO's second sign": Bug(
        "dpo/conservative", smoothed(lambda e: 1 - e, lambda e: -e),
        "named",
        "with the loss the right loss - 2 label_smoothing L(-beta h)"),
}
SECOND = {
    "difference of log-sigmoids": Bug(
        "dpo/plain", both(lambda won, lost: log_sigmoid(lost) - log_sigmoid(won)),
        "unknown", "with the loss L(beta h_w) - L(beta h_l)"),
    "each response by itself": Bug(
        "dpo/plain", both(lambda won, lost: -log_sigmoid(won) - log_sigmoid(-lost)),
        "unknown", "with the loss L(beta h_w) + L(-beta h_l)"),
    "label smoothing on the margin": Bug(
        "dpo/conservative",
        loss(lambda p, x: -log_sigmoid((1 - 2 * p["label_smoothing"]) * p["beta"] * h(x))),
        "unknown", "at beta (1 - 2 label_smoothing), without label smoothing"),
    "softmax-weighted models": Bug(
        "ensemble/batch-min", of_batch(by_softmax), "unknown",
        "with models weighed by softmax(-loss / 1)"),
    "probabilities as weights of the sampled KL": Bug(
        "pessimistic/sampled-kl",
        pessimistic(lambda x: (jnp.exp(x["ref_sample_logps"]) * log_ratio(x)).mean()),
        "unknown", "with the KL's terms averaged over outcomes, not added"),
    "margin added to the loss": Bug(
        "reward/margin", loss(lambda p, x: -log_sigmoid(rho(x)) + x["margins"]),
        "unknown", "with the loss L(rho) + margin"),
    "rewards centred (TRL's coefficient)": Bug(
        "reward/bradley-terry",
        loss(lambda p, x: -log_sigmoid(rho(x)) + 0.01 * sum(x[s] for s in SCORES) ** 2),
        "unknown", "with the loss L(rho) + 0.01 (r_w + r_l)^2"),
    "length penalty (R-DPO)": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(
            p["beta"] * h(x) - 0.05 * (lengths(x)[0] - lengths(x)[1]))),
        "unknown", "less 0.05 for each token that chosen is longer"),
    "weights of WPO": Bug("dpo/plain", loss(wpo), "unknown", ""),
    "rewards clipped at 1": Bug(
        "distillation/d-dpo", loss(lambda p, x: (jnp.clip(x[SCORES[0]], -1, 1) - jnp.clip(
            x[SCORES[1]], -1, 1) - p["beta"] * h(x)) ** 2),
        "named", "with the rewards clipped at 1 and -1"),
    "model of the least mean reward margin": Bug(
        "ensemble/batch-min", of_batch(worst), "unknown",
        "with the model of the least mean reward margin"),
}
THIRD = {
    "focal weight of exponent 1": Bug(
        "dpo/plain", loss(lambda p, x: sigmoid(-p["beta"] * h(x)) * dpo(p, x)),
        "unknown", "with the loss sigmoid(-beta h) L(beta h)"),
    "the reference of chosen for both": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] * (x[POLICY[0]] - x[POLICY[1]]))),
        "named", "without the reference"),
    "anchor of chosen to its reference": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x) + 0.1 * ratios(x)[0] ** 2),
        "named", "with the loss L(beta h) + 0.1 h_w^2"),
    "half of the square with target 1/beta": Bug(
        "ipo/sum", loss(lambda p, x: 0.5 * (h(x) - 1 / p["beta"]) ** 2),
        "unknown", "ipo/paper times 0.5"),
    "soft labels of the reward": Bug(
        "distillation/d-dpo", loss(lambda p, x: -sigmoid(rho(x)) * log_sigmoid(p["beta"] * h(x))
            - sigmoid(-rho(x)) * log_sigmoid(-p["beta"] * h(x))),
        "named", "with the cross-entropy of sigmoid(rho) and sigmoid(beta h)"),
    "absolute difference": Bug(
        "distillation/d-dpo", loss(lambda p, x: jnp.abs(rho(x) - p["beta"] * h(x))),
        "named", "with "),
    "mean over models of the losses": Bug(
        "ensemble/mean", of_batch(lambda p, x: ((rho(x) - p["beta"] * h(x)) ** 2).mean()),
        "named", "with the models' losses averaged"),
    "KL on the chosen responses": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: -ratios(x)[0].mean()),
        "named", "with the KL on the chosen responses"),
    "Brier score of the reward": Bug(
        "reward/bradley-terry", loss(lambda p, x: sigmoid(-rho(x)) ** 2),
        "named", "with the square of sigmoid of -x"),
    "epsilon in the logarithm of probabilities": Bug(
        "logps/sum", tokens(lambda logits: jnp.log(softmax(logits) + 1e-3)),
        "named", "with 0.001 added to the probabilities of tokens"),
    "beta over the mean length": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] * h(x) * 2 / sum(lengths(x)))),
        "wrong", "averaged over tokens and with the mean length of both responses counted"),
    "sigmoid twice": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(sigmoid(p["beta"] * h(x)))),
        "named", "with the sigmoid of beta times the margin"),
}
FOURTH = {
    "temperature 2, and the loss times 2": Bug(
        "dpo/plain", loss(lambda p, x: -2 * log_sigmoid(p["beta"] * h(x) / 2)),
        "unknown", "with the loss 2 L(beta h/2)"),
    "likelihood per token added": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x) - x[POLICY[0]] / lengths(x)[0]),
        "named", "plus 1 times the chosen response's negative log-likelihood per token"),
    "half of the reference": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] * (
            h(x) + 0.5 * (x["ref_chosen_logps"] - x["ref_rejected_logps"])))),
        "named", "with 0.5 times the reference's log-probabilities"),
    "weights 1 and e": Bug(
        "dpo/conservative", smoothed(lambda e: 1.0, lambda e: e),
        "named", "with the loss L(beta h) + label_smoothing L(-beta h)"),
    "rDPO over 1 - e": Bug(
        "dpo/robust", smoothed(lambda e: 1.0, lambda e: -e / (1 - e)),
        "named", "over 1 - label_smoothing, not 1 - 2 label_smoothing"),
    "IPO with a target at beta squared": Bug(
        "ipo/paper", loss(lambda p, x: (h(x) - 0.5 / p["beta"] ** 2) ** 2),
        "named", "ipo/sum at beta squared"),
    "IPO with the rejected side added": Bug(
        "ipo/sum", loss(lambda p, x: (sum(ratios(x)) - 0.5 / p["beta"]) ** 2),
        "named", "with the rejected response's log-ratio negated"),
    "the loss added, not its pairs": Bug(
        "distillation/d-dpo", lambda p, x: {
            "loss": ((rho(x) - p["beta"] * h(x)) ** 2).sum(),
            "per_example": (rho(x) - p["beta"] * h(x)) ** 2},
        "named", "with the pairs added, not averaged"),
    "both sides over beta": Bug(
        "distillation/d-dpo", loss(lambda p, x: ((rho(x) - h(x)) / p["beta"]) ** 2),
        "named", "beta is dropped and over beta squared"),
    "greatest reward of each response": Bug(
        "ensemble/mean", of_batch(lambda p, x: (
            (x[SCORES[0]].max(0) - x[SCORES[1]].max(0) - p["beta"] * h(x)) ** 2).mean()),
        "named", "with the greatest reward of each response"),
    "KL of distributions added": Bug(
        "pessimistic/exact-kl", pessimistic(exact_sum),
        "named", "with the KL added over prompts or samples"),
    "sums over the root of the length": Bug(
        "logps/mean", tokens(log_softmax, lambda scored, mask: scored.sum(axis=1)
            / jnp.sqrt(jnp.maximum(mask.sum(axis=1), 1))),
        "named", "over the root of the number of tokens"),
}
FIFTH = {
    "one reference for both responses": Bug(
        "dpo/plain", one_reference, "unknown",
        "with the chosen response's reference subtracted from both"),
    "the loss of the mean margin": Bug(
        "dpo/plain", lambda p, x: {
            "loss": -log_sigmoid(p["beta"] * h(x).mean()), "per_example": dpo(p, x)},
        "unknown", "with the loss of the batch's mean margin"),
    "the square of the mean difference": Bug(
        "distillation/d-dpo", of_batch(lambda p, x: (rho(x).mean() - p["beta"] * h(x).mean()) ** 2),
        "unknown", "with the loss of the batch's mean margin"),
    "IPO with the margin times beta": Bug(
        "ipo/sum", loss(lambda p, x: (p["beta"] * h(x) - 0.5 / p["beta"]) ** 2),
        "named", "with the margin multiplied by beta before the loss"),
    "rewards over the deviation of all": Bug(
        "distillation/d-dpo", loss(partial(over_deviation, 1, 1e-8)),
        "unknown", "with all rewards over their standard deviation of a sample plus 1e-08"),
    "rewards over the deviation of all, without epsilon": Bug(
        "distillation/d-dpo", loss(partial(over_deviation, 0, 0.0)),
        "unknown", "with all rewards over their standard deviation"),
    "the batch's KL is not negative": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: jnp.maximum(log_ratio(x).mean(), 0.0)),
        "unknown", "with the batch's KL clipped at 0"),
    "the batch's KL is at most 1/2": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: jnp.minimum(log_ratio(x).mean(), 0.5)),
        "unknown", "with the batch's KL no higher than 0.5"),
    "a tiny epsilon in the logarithm of tokens' probabilities": Bug(
        "logps/sum", tokens(lambda logits: jnp.log(softmax(logits) + 1e-8)),
        "unknown", "with 1e-08 added to the probabilities of tokens"),
    "a tiny epsilon in the logarithm of the sigmoid": Bug(
        "dpo/plain", loss(lambda p, x: -jnp.log(sigmoid(p["beta"] * h(x)) + 1e-8)),
        "unknown", "with 1e-08 added to the probability in the logarithm"),
    "probabilities of tokens no lower than 1e-8": Bug(
        "logps/sum", tokens(lambda logits: jnp.log(jnp.maximum(softmax(logits), 1e-8))),
        "named", "no lower than -18.4207, the logarithm of 1e-08"),
    "label smoothing over both classes": Bug(
        "dpo/conservative", smoothed(lambda e: 1 - e / 2, lambda e: e / 2),
        "named", "at label_smoothing 0.5 e"),
}
SIXTH = {
    "the reference in bfloat16": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x | in_half(x, jnp.bfloat16))),
        "unknown", "with the reference's log-probabilities in bfloat16"),
    "the reference in float16": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x | in_half(x, jnp.float16))),
        "unknown", "with the reference's log-probabilities in float16"),
    "policy averaged, reference added": Bug(
        "ipo/token-mean", loss(lambda p, x: of_token_means(p, x, 1, 0)),
        "unknown", "with the reference's log-probabilities not divided by the number of tokens"),
    "policy added, reference averaged": Bug(
        "ipo/token-mean", loss(lambda p, x: of_token_means(p, x, 0, 1)),
        "unknown", "with the policy's log-probabilities not divided by the number of tokens"),
    "the KL of all samples over the pairs": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: log_ratio(x).sum() / len(h(x))),
        "unknown", "with the KL added over samples, over the number of pairs"),
    "the robust loss, its first term alone divided": Bug(
        "dpo/robust", smoothed(lambda e: (1 - e) / (1 - 2 * e), lambda e: -e),
        "wrong", "with the first term alone over 1 - 2 label_smoothing"),
    "the robust loss, its second term alone divided": Bug(
        "dpo/robust", smoothed(lambda e: 1 - e, lambda e: -e / (1 - 2 * e)),
        "unknown", "with the second term alone over 1 - 2 label_smoothing"),
    "a mean over all predicted tokens": Bug(
        "logps/mean", tokens(jax.nn.log_softmax, lambda s, mask: s.mean(axis=1)),
        "named", "divided by T - 1, all tokens of the row but one"),
    "each reward beside each margin": Bug(
        "distillation/d-dpo", of_batch(
            lambda p, x: ((rho(x)[:, None] - p["beta"] * h(x)) ** 2).mean()),
        "wrong", "with every pair's rewards against every pair's log-probabilities (B x B)"),
}
SEVENTH = {
    "beta on the policy alone, a bracket": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(
            p["beta"] * (x[POLICY[0]] - x[POLICY[1]]) - ref_margin(x))),
        "named", "with beta on the policy alone"),
    "the robust loss divided by 1, less 2 e": Bug(
        "dpo/robust", loss(lambda p, x: undivided(p, x) - 2 * p["label_smoothing"]),
        "unknown", "with / 1 - 2 label_smoothing in place of / (1 - 2 label_smoothing)"),
    "a second loss beside the robust one": Bug(
        "dpo/robust", loss(lambda p, x: (
            undivided(p, x) / (1 - 2 * p["label_smoothing"]) + 0.1 * h(x) ** 2)),
        "unknown", "with the loss the right loss + 0.1 h^2"),
    "the reference alternating, read in halves": Bug(
        "dpo/plain", loss(in_halves), "unknown",
        "with the reference's chosen and rejected alternating, read in halves"),
    "every log-ratio of the policy beside every one of the reference": Bug(
        "dpo/plain", of_batch(lambda p, x: -log_sigmoid(p["beta"] * (
            (x[POLICY[0]] - x[POLICY[1]])[:, None] - ref_margin(x))).mean()),
        "unknown", "with every policy's log-ratio against every reference's (B x B)"),
    "labels rolled, and the last position kept": Bug(
        "logps/sum", in_a_circle, "unknown",
        "with labels rolled, so that the last position predicts the first token"),
    "an epsilon in the logarithm, and token means": Bug(
        "logps/mean", tokens(lambda logits: jnp.log(softmax(logits) + 1e-8),
            lambda scored, mask: scored.sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)),
        "unknown", "with 1e-08 added to the probabilities of tokens"),
    "an epsilon of 1e-12 in the logarithm of the sigmoid": Bug(
        "dpo/plain", loss(lambda p, x: -jnp.log(sigmoid(p["beta"] * h(x)) + 1e-12)),
        "unknown", "with 1e-12 added to the probability in the logarithm"),
    "sums over the number of tokens of the row": Bug(
        "logps/mean", lambda p, x: {
            "logps": tokens(log_softmax)(p, x)["logps"] / x["attention_mask"].sum(axis=1)},
        "unknown", "over the tokens of the row but padding"),
    "one deviation for the margins of all reward models": Bug(
        "ensemble/batch-min", of_batch(lambda p, x: ((
            rho(x) / (rho(x).std() + 1e-8) - p["beta"] * h(x)) ** 2).mean(axis=1).min()),
        "unknown", "with reward margins of all models over their standard deviation"),
    "KL divergence with PyTorch's default mean": Bug(
        "pessimistic/exact-kl", pessimistic(lambda x: exact_sum(x) / x[TRAINED[3]].size),
        "named", "with the KL's terms averaged over outcomes, not added"),
}
EIGHTH = {
    "metrics subtract the reference twice": Bug(
        "dpo/plain", with_metrics(lambda p, x: rewards_of(p, x, 2.0)), "unknown",
        "with rewards/chosen = beta [log pi(y_w) - 2 log pi_ref(y_w)], rewards/rejected"),
    "margins of chosen and rejected added": Bug(
        "dpo/plain", with_metrics(lambda p, x: {
            "rewards/margins": p["beta"] * sum(r.mean() for r in ratios(x))}),
        "unknown",
        "= beta [log pi(y_w) + log pi(y_l) - log pi_ref(y_w) - log pi_ref(y_l)]"),
    "absolute margins": Bug(
        "dpo/plain", with_metrics(lambda p, x: {
            "rewards/margins": p["beta"] * jnp.abs(h(x)).mean()}),
        "unknown", "with the absolute margins reported"),
    "right pairs counted": Bug(
        "dpo/plain", with_metrics(lambda p, x: {"rewards/accuracies": (h(x) > 0).sum() * 1.0}),
        "unknown", "with right pairs counted, not averaged, as the accuracy"),
    "mean sign as accuracy": Bug(
        "dpo/plain", with_metrics(lambda p, x: {"rewards/accuracies": jnp.sign(h(x)).mean()}),
        "unknown", "with the mean sign of the margins as the accuracy"),
    "rewards as integers": Bug(
        "distillation/d-dpo", loss(lambda p, x: (
            jnp.trunc(x[SCORES[0]]) - jnp.trunc(x[SCORES[1]]) - p["beta"] * h(x)) ** 2),
        "unknown", "with the rewards truncated to integers"),
    "rewards rounded": Bug(
        "distillation/rebel", loss(lambda p, x: (
            (jnp.round(x[SCORES[0]]) - jnp.round(x[SCORES[1]])) / p["beta"] - h(x)) ** 2),
        "unknown", "with the rewards rounded to integers"),
    "rewards through softmax": Bug(
        "distillation/d-dpo", loss(lambda p, x: (
            softmax(jnp.stack([x[s] for s in SCORES]), axis=0).T @ jnp.array([1.0, -1.0])
            - p["beta"] * h(x)) ** 2),
        "unknown", "with the softmax over the pair in place of the reward margin"),
    "labels by the sign of the reward": Bug(
        "distillation/d-dpo", loss(
            lambda p, x: -log_sigmoid(jnp.sign(rho(x)) * p["beta"] * h(x))),
        "unknown", "with -log sigmoid(sign(rho) beta h) for the square"),
    "squares weighed by the reward": Bug(
        "distillation/d-dpo", loss(
            lambda p, x: jnp.abs(rho(x)) * (rho(x) - p["beta"] * h(x)) ** 2),
        "unknown", "with |rho| (rho - beta h)^2 for the square"),
    "beta times the reward": Bug(
        "distillation/d-dpo", loss(lambda p, x: (p["beta"] * rho(x) - h(x)) ** 2),
        "named", "distillation/rebel at 1 / beta"),
    "the batch's mean margin for each pair": Bug(
        "reward/margin", loss(lambda p, x: -log_sigmoid(rho(x) - x["margins"].mean())),
        "unknown", "with the batch's mean of the pairs' margins"),
    "softmax twice": Bug(
        "logps/sum", tokens(lambda logits: log_softmax(softmax(logits))),
        "unknown", "with softmax applied twice"),
    "sigmoid of each logit": Bug(
        "logps/sum", tokens(log_sigmoid),
        "unknown", "with the sigmoid of each logit, not softmax"),
    "the largest logit for the normaliser": Bug(
        "logps/sum", tokens(lambda logits: logits - logits.max(-1, keepdims=True)),
        "unknown", "with logits less the largest, not normalised"),
    "softmax over half of the vocabulary": Bug(
        "logps/sum", tokens(halves), "unknown",
        "with softmax over the label's half of the vocabulary"),
    "mean less half of the variance": Bug(
        "ensemble/mean", of_batch(lambda p, x: (
            (rho(x).mean(0) - 0.5 * rho(x).var(0) - p["beta"] * h(x)) ** 2).mean()),
        "unknown", "with the mean reward less 0.5 variances"),
    "root of the mean square": Bug(
        "ensemble/batch-min", of_batch(lambda p, x: jnp.sqrt(
            ((rho(x) - p["beta"] * h(x)) ** 2).mean(1)).min()),
        "unknown", "with the root of the batch's loss"),
    "importance ratio for the KL": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: jnp.exp(log_ratio(x)).mean()),
        "unknown", "with pi_ref/pi for the KL"),
    "beta for gamma": Bug(
        "pessimistic/sampled-kl", lambda p, x: {
            "loss": dpo(p, x).mean() + p["beta"] * log_ratio(x).mean(),
            "metrics": {"kl": log_ratio(x).mean()}},
        "unknown", "with beta in gamma's place"),
    "squared KL": Bug(
        "pessimistic/sampled-kl", pessimistic(lambda x: log_ratio(x).mean() ** 2),
        "unknown", "with the square of the batch's KL"),
    "KL within the sigmoid": Bug(
        "pessimistic/sampled-kl", lambda p, x: {
            "loss": -log_sigmoid(p["beta"] * h(x) - p["gamma"] * log_ratio(x).mean()).mean(),
            "metrics": {"kl": log_ratio(x).mean()}},
        "unknown", "with gamma times the KL inside the sigmoid, less than beta h"),
    "entropy for the KL": Bug(
        "pessimistic/exact-kl", pessimistic(lambda x: -(
            jnp.exp(x[TRAINED[3]]) * x[TRAINED[3]]).sum(-1).mean()),
        "unknown", "with the policy's entropy for the KL"),
    "ratios of log-probabilities": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] * (
            x[POLICY[0]] / x[POLICY[1]] - x["ref_chosen_logps"] / x["ref_rejected_logps"]))),
        "unknown", ""),
    "rewards as targets of 1 and 0": Bug(
        "reward/bradley-terry", loss(lambda p, x: (x[SCORES[0]] - 1) ** 2 + x[SCORES[1]] ** 2),
        "unknown", ""),
    "the reward margin over 1 + margin": Bug(
        "reward/margin", loss(lambda p, x: -log_sigmoid(rho(x) / (1 + x["margins"]))),
        "unknown", ""),
}
NINTH = {
    "beta and label smoothing exchanged": Bug(
        "dpo/conservative", conservative_with(lambda p: (p["label_smoothing"], p["beta"])),
        "unknown", "with beta and label_smoothing exchanged"),
    "alignment by optimal transport": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] * (
            jnp.sort(x[POLICY[0]] - x[POLICY[1]]) - jnp.sort(ref_margin(x))))),
        "unknown", "with the log-ratios of policy and reference sorted apart, as AOT does"),
    "paired alignment by optimal transport": Bug(
        "dpo/plain", loss(lambda p, x: -log_sigmoid(p["beta"] * (
            jnp.sort(ratios(x)[0]) - jnp.sort(ratios(x)[1])))),
        "unknown", "with the log-ratios of chosen and rejected sorted apart, as paired AOT does"),
    "attention mask as the mask of the response": Bug(
        "logps/sum", lambda p, x: tokens(log_softmax)(
            p, x | {"completion_mask": x["attention_mask"]}),
        "unknown", "with the attention mask in place of the completion mask"),
    "attention mask as the mask, the response's number of tokens": Bug(
        "logps/mean", lambda p, x: {"logps": tokens(log_softmax)(
            p, x | {"completion_mask": x["attention_mask"]})["logps"]
            / jnp.maximum(x["completion_mask"][:, 1:].sum(axis=1), 1)},
        "unknown", "with the attention mask in place of the completion mask, over the right"),
    "likelihood per token added (TRL's rpo_alpha)": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x) - 0.2 * x[POLICY[0]] / lengths(x)[0]),
        "named", "plus 0.2 times the chosen response's negative log-likelihood per token"),
    "NeMo's backward KL without its scale": Bug(
        "distillation/rpo-sq", loss(lambda p, x: sum(
            sigmoid(s * p["beta"] * h(x))
            * (log_sigmoid(s * p["beta"] * h(x)) - log_sigmoid(s * rho(x))) for s in (1, -1))),
        "unknown", "at reward_scale 1: it is dropped and with KL(sigmoid(beta h) || sigmoid(rho))"),
    "the mean over the padded length": Bug(
        "logps/mean", tokens(log_softmax, lambda scored, mask: scored.mean(axis=1)),
        "named", "divided by T - 1, all tokens of the row but one"),
}
TENTH = {
    "REBEL with eta beta": Bug(
        "distillation/rebel", loss(lambda p, x: (h(x) / p["beta"] - rho(x)) ** 2),
        "unknown", "distillation/d-dpo at 1 / beta"),
    "least squares, clipped at 0": Bug(
        "ensemble/hull", of_batch(clipped_weights), "unknown",
        "with weights of least squares, clipped at 0 and divided by their sum"),
    "logits of padding in the normaliser": Bug(
        "logps/sum", tokens(lambda logits: logits - jax.nn.logsumexp(
            jnp.concatenate([logits, jnp.zeros((*logits.shape[:-1], 3))], axis=-1),
            axis=-1, keepdims=True)),
        "unknown", "with 3 logits of 0 more in the normaliser"),
    "tokens in bfloat16, sums in float64": Bug(
        "logps/sum", tokens(lambda logits: straight(log_softmax(logits))),
        "unknown", "with token log-probabilities in bfloat16"),
    "the KL over prompts and outcomes": Bug(
        "pessimistic/exact-kl", pessimistic(lambda x: exact_sum(x) / x[TRAINED[3]].size),
        "named", "with the KL's terms averaged over outcomes, not added"),
    "the second term alone divided, by precedence": Bug(
        "dpo/robust", smoothed(lambda e: 1 - e, lambda e: -e / (1 - 2 * e)),
        "named", "with the second term alone over 1 - 2 label_smoothing"),
}
ELEVENTH = {
    "reward margins beyond the margin reported": Bug(
        "reward/margin", beyond(lambda d, m: {
            "rewards/margins": (d - m).mean(), "rewards/accuracies": (d > m).sum() / len(d)}),
        "wrong", "with rewards/margins = r_w - r_l - margin"),
    "accuracy beyond the margin": Bug(
        "reward/margin", beyond(lambda d, m: {"rewards/accuracies": (d > m).sum() / len(d)}),
        "wrong", "with the accuracy of the difference less the margin"),
    "reward of chosen reported as margin": Bug(
        "reward/bradley-terry", lambda p, x: loss(lambda p, x: -log_sigmoid(rho(x)))(p, x) | {
            "metrics": {"rewards/margins": x[SCORES[0]].mean()}},
        "named", "with rewards/margins = r_w"),
    "gradients weighed by the wrong sigmoid": Bug(
        "dpo/plain", loss(lambda p, x: dpo(p, x) + other_slope(p["beta"] * h(x))),
        "named", "with gradients weighed by sigmoid of x, not of -x"),
    "rDPO not divided": Bug(
        "dpo/robust", loss(undivided), "named", "times 1 - 2 label_smoothing"),
    "both responses' squares added": Bug(
        "distillation/d-dpo", loss(lambda p, x: sum(
            (x[s] - p["beta"] * r) ** 2 for s, r in zip(SCORES, ratios(x), strict=True))),
        "named", "with the loss (r_w - beta h_w)^2 + (r_l - beta h_l)^2"),
    "the models' mean loss, and the least of pairs": Bug(
        "ensemble/batch-min", of_batch(lambda p, x: (
            (rho(x) - p["beta"] * h(x)) ** 2).mean(0).min()),
        "named", "with the minimum over pairs of the models' mean loss"),
    "the mask of the position before": Bug(
        "logps/sum", lambda p, x: tokens(log_softmax)(p, x | {"completion_mask": jnp.pad(
            x["completion_mask"][:, :-1], ((0, 0), (1, 0)))}),
        "named", "with the mask not shifted"),
}
TWELFTH = {
    "an epsilon in both logarithms of cDPO": Bug(
        "dpo/conservative", loss(partial(with_epsilon, 1e-8)), "unknown",
        "with 1e-08 added to the probability in the logarithm"),
    "both probabilities of rDPO clamped": Bug(
        "dpo/robust", loss(clamped), "unknown",
        "with the probability in the logarithm no lower than 1e-06"),
    "Llama 2's loss with rewards centred": Bug(
        "reward/margin", loss(lambda p, x: -log_sigmoid(rho(x) - x["margins"])
            + 0.01 * sum(x[s] for s in SCORES) ** 2),
        "named", "with the loss L(rho - margin) + 0.01 (r_w + r_l)^2"),
    "margins without the reference": Bug(
        "dpo/plain", with_metrics(lambda p, x: {
            "rewards/margins": p["beta"] * (x[POLICY[0]] - x[POLICY[1]]).mean()}),
        "named", "with rewards/margins = beta [log pi(y_w) - log pi(y_l)]"),
    "IPO of beta h": Bug(
        "ipo/sum", loss(lambda p, x: (p["beta"] * h(x) - 0.5) ** 2),
        "named", "ipo/sum times beta squared"),
    "softmax over positions": Bug(
        "logps/sum", tokens(partial(log_softmax, axis=1)),
        "named", "with softmax over positions but the last"),
    "rewards over their pooled deviation": Bug(
        "distillation/rpo-sq", loss(lambda p, x: (
            p["reward_scale"] * rho(x) / (pooled(x) + 1e-8) - p["beta"] * h(x)) ** 2),
        "named", "with all rewards over their standard deviation of a sample plus 1e-08"),
}
THIRTEENTH = {
    "reference's sums in bfloat16, under token means": Bug(
        "ipo/token-mean", loss(sums_in_bfloat16), "unknown",
        "with the reference's log-probabilities in bfloat16"),
    "Keras's epsilon on both sides": Bug(
        "reward/margin", loss(lambda p, x: -jnp.log(jnp.clip(
            sigmoid(rho(x) - x["margins"]), 1e-7, 1 - 1e-7))), "unknown",
        "with the probability in the logarithm clipped to 1e-07 and 1 less that"),
    "Llama 2's argument clipped": Bug(
        "reward/margin", loss(lambda p, x: -log_sigmoid(jnp.clip(rho(x) - x["margins"], -20, 20))),
        "unknown", "with the reward margin less the pair's margin clipped at 20 and -20"),
    "metrics of odd batches for two processes": Bug(
        "dpo/plain", with_metrics(lambda p, x: rewards_of(p, filled_up(x), 1.0)), "unknown",
        "with the metrics of odd batches counting the first pair twice"),
    "labels masked with 0 before the mask is made": Bug(
        "logps/sum", lambda p, x: tokens(log_softmax)(p, x | {
            "input_ids": jnp.where(x["completion_mask"] == 1, x["input_ids"], 0),
            "completion_mask": jnp.ones_like(x["completion_mask"])}),
        "unknown", "with masked tokens scored as token 0"),
    "logits of a temperature of 0.7": Bug(
        "logps/mean", tokens(lambda logits: log_softmax(logits / 0.7), lambda t, m: (
            t.sum(1) / jnp.maximum(m.sum(1), 1))), "named",
        "with logits divided by 0.7, a temperature"),
}
# fmt: on
SETS = (
    *(REPORTS, SECOND, THIRD, FOURTH, FIFTH, SIXTH),
    *(SEVENTH, EIGHTH, NINTH, TENTH, ELEVENTH, TWELFTH, THIRTEENTH),
)
