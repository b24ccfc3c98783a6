"""Seeded bugs of an implementation, and the names that the kit gives them.

A fault is one edit of the source of `reference/`, whose modules are then read anew.
"""

import os
import sys
import types
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16 by its name
import numpy as np
from scipy.optimize import nnls

import reference

ROOT = Path(reference.__file__).parent
MODULES = (
    "simplex",
    "weights",
    "objectives",
    "conformance.tokens",
    "conformance.pairs",
    "conformance.data",
    "conformance.training",
    "conformance.dialects",
)


class Fault(NamedTuple):
    """`dtype` says how exact the implementation is held to be."""

    flag: str
    module: str
    before: str
    after: str
    dtype: str = "float64"


def faults_of(module):
    return lambda flag, *edit: Fault(flag, module, *edit)


simplex, weights, objectives, tokens, pairs, data, training, dialects = map(faults_of, MODULES)


def half(expression, dtype):
    return f'np.asarray({expression}).astype("{dtype}").astype(float)'


def running(expression, dtype):
    """The last of the running sums, each in `dtype`."""
    return f'float(np.add.accumulate(np.asarray({expression}).astype("{dtype}"))[-1])'


MARGIN = "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)"
DPO = "bradley_terry(beta * margin)"
LOGISTIC = "np.logaddexp(0.0, -reward_margin)"
SQUARE = "(reward_margin - beta * margin) ** 2"
IPO = "partial(pairs.summed_ipo, 0.5)"
TARGET = "(margin - 1.0 / tau) ** 2"
CLIPPED = "np.maximum(weights, 0.0) / np.sum(np.maximum(weights, 0.0))"
CONE = "lambda h, rho, beta: nnls(rho.T, beta * h)[0]"
KL = "np.exp(ref) * (ref - policy)"
SAMPLED = "return ref_logp - policy_logp"
PESSIMISM = "loss + gamma * kl"

LOSS = '"loss": np.mean(losses), "per_example": np.array(losses), "grads": grads'
GRADS = "(slopes, -slopes, 0 * slopes, 0 * slopes)"
LOGPS = "arrays = [inputs[name] for name in names]"
MEAN, NEAREST_MEMBER, HULL = (
    f"pairs.distil_ensemble, {name}_weights" for name in ("mean", "ensemble", "hull")
)
SCORES = "return chosen - rejected"
HALVES = f"return {half('chosen', 'DTYPE')} - {half('rejected', 'DTYPE')}"
REWARD_LOSS = '"loss": np.mean(losses),\n        "per_example": np.array(losses),'
MIXTURE = "weigh(margins, rewards, beta) @ rewards"
PER_PAIR = "np.array([weigh(margins[[b]], rewards[:, [b]], beta) @ rewards[:, b] for b in range(len(margins))])"
NEAREST = "nearest = residuals[choose(residuals**2, axis=0), np.arange(len(margins))]"

MASK = 'mask = inputs["completion_mask"][:, 1:]'
BEFORE = "np.arange(mask.shape[1]) + ahead, mask.shape"
LOG_Z = "np.logaddexp.reduce(logits, axis=-1, keepdims=True)"
DOT, TERMS = "add(w, np.where(w, t, 0.0))", "w * np.where(w, t, 0.0)"
COUNT = "np.maximum(mask.sum(axis=1, keepdims=True), 1)"
FOUND = "np.take_along_axis(logps, ids[..., None], axis=-1)[..., 0]"
STARTS = "starts = segments[:, 1:] != segments[:, :-1]"
CHOSEN, REJECTED = "segments[:, 1:] == 1", "segments[:, 1:] == 2"

POLICY_LOGPS = "policy = _pair_logps(table, inputs)"
STEP = 'params["learning_rate"] * grad'
TOKENS = 'inputs["chosen_mask"][rows, 1:].sum()'
SFT_LOSS = 'losses.append(-_logps(table, inputs, "chosen")[rows].sum() / count)'
MICRO = 'inputs["chosen_mask"][rows, 1:].reshape(inputs["batches"].shape[1], -1).sum(axis=1)'

ENDED = 'inputs[f"{name}_ids"] + [params["eos_id"]] * inputs[f"{name}_complete"]'
CUT = "prompt[-limit:] if keep_end else prompt[:limit]"
DIFFER = 'chosen[:-1] != rejected[:-1] or opening != [inputs.get("prompt", *opening)]'
PARTED = """text.rpartition(ASSISTANT)
    if not mark or HUMAN in response or HUMAN not in head:"""
ANSWER = "return DIALECTS[objective, dialect](params, inputs)"
LIKELIHOOD = (
    "lambda p, x: {'loss': -np.mean(x['policy_chosen_logps']), 'per_example': -x['policy_chosen_logps'], 'grads': "
    "{'policy_chosen_logps': np.full(len(x['policy_chosen_logps']), -1 / len(x['policy_chosen_logps'])), "
    "'policy_rejected_logps': 0 * x['policy_rejected_logps']}}"
)
UNCHECKED = """
        named = [name for name in inputs if "chosen" in name or "rejected" in name or name == "margins"]
        if objective not in ("data", "logps", "training"):
            size = min(inputs[name].shape[-1] for name in named)
            inputs = inputs | {name: inputs[name][..., :size] for name in named}
        return DIALECTS[objective, dialect](params, inputs)"""
RESPONSES = f"""{ANSWER.replace("return", "made =")}
        names = [name for name in ("chosen", "rejected") if name in made]
        shared = len(os.path.commonprefix([made[name] for name in names]))
        return made | {{name: made[name]%s for name in names}}"""


# fmt: off
FAULTS = {
    # the margin and the reference
    "margin's sign": objectives("sign", MARGIN, f"-({MARGIN})"),
    "preference's sign": objectives("sign", LOGISTIC, "np.logaddexp(0.0, reward_margin)"),
    "distillation's sign": objectives("sign", SQUARE, "(reward_margin + beta * margin) ** 2"),
    "ensemble's sign": pairs("sign", MIXTURE + " - beta * margins", MIXTURE + " + beta * margins"),
    "example-min's sign": pairs("sign", "residuals = rewards - beta * margins", "residuals = rewards + beta * margins"),
    "IPO's sign": objectives("sign", TARGET, "(margin + 1.0 / tau) ** 2"),
    "gradient's sign": pairs("sign", GRADS, "(-slopes, slopes, 0 * slopes, 0 * slopes)"),
    "references swapped": objectives(
        "swapped-reference", MARGIN, "(policy_chosen - ref_rejected) - (policy_rejected - ref_chosen)"),
    "no reference": objectives("swapped-reference", MARGIN, "policy_chosen - policy_rejected"),
    "gradients into the reference": pairs("reference-gradient", GRADS, "(slopes, -slopes, -slopes, slopes)"),
    "accuracy of ties": pairs("accuracy-tie", "np.mean(margins > 0)", "np.mean(margins >= 0)"),
    "accuracy of equal rewards": pairs("accuracy-tie", "np.mean(differences > 0)", "np.mean(differences >= 0)"),
    "half a point for ties": pairs(
        "accuracy-tie", "np.mean(margins > 0)", "np.mean((np.sign(margins) + 1) / 2)"),
    "accuracy of the mean": pairs("accuracy-of-means", "np.mean(margins > 0)", "float(np.mean(margins) > 0)"),
    # beta
    "DPO without beta": objectives("beta-dropped", DPO, "bradley_terry(margin)"),
    "DPO's slope without beta": pairs("beta-dropped", "slopes = beta * (wrong", "slopes = (wrong"),
    "distillation without beta": objectives("beta-dropped", SQUARE, "(reward_margin - margin) ** 2"),
    "distillation's slope without beta": pairs("beta-dropped", "-2 * beta * (rewards", "-2 * (rewards"),
    "ensemble without beta": pairs("beta-dropped", MIXTURE + " - beta * margins", MIXTURE + " - margins"),
    "ensemble's slope without beta": pairs("beta-dropped", "-2 * beta * residuals", "-2 * residuals"),
    "example-min without beta": pairs(
        "beta-dropped", "residuals = rewards - beta * margins", "residuals = rewards - margins"),
    "IPO without beta": pairs("beta-dropped", 'params["beta"] / target', "1 / target"),
    "rewards without beta": pairs("beta-dropped", "beta * np.mean(", "np.mean("),
    "DPO at twice beta": objectives("beta-changed", DPO, "bradley_terry(2 * beta * margin)"),
    "IPO at beta squared": pairs("beta-changed", 'params["beta"] / target', 'params["beta"] ** 2 / target'),
    "distillation at half of beta": objectives("beta-changed", SQUARE, "(reward_margin - 0.5 * beta * margin) ** 2"),
    "ensembles at twice beta": pairs(
        "beta-changed", 'beta, margins, rewards = params["beta"]', 'beta, margins, rewards = 2 * params["beta"]'),
    "rejected detached": pairs("gradient-lost", GRADS, "(slopes, 0 * slopes, 0 * slopes, 0 * slopes)"),
    # reductions over the batch
    "pairs added": pairs("batch-sum", LOSS, LOSS.replace("np.mean", "np.sum")),
    "gradients not divided": pairs("batch-sum", "slopes = slopes / len(slopes)", "slopes = 1 * slopes"),
    "reward's pairs added": pairs("batch-sum", REWARD_LOSS, REWARD_LOSS.replace("np.mean", "np.sum")),
    "reward's gradients not divided": pairs("batch-sum", "-sigmoid(-shifted) / len(shifted)", "-sigmoid(-shifted)"),
    "metrics added": pairs("batch-sum", "beta * np.mean(", "beta * np.sum("),
    "prompts' KL added": pairs("batch-sum", "np.mean(forward_kl", "np.sum(forward_kl"),
    "samples' KL added": pairs("batch-sum", "np.mean([sampled", "np.sum([sampled"),
    "pairs reversed": pairs("per-example", "np.array(losses), ", "np.array(losses[::-1]), "),
    "pairs sorted": pairs("per-example", "np.array(losses), ", "np.sort(losses), "),
    "mean for each pair": pairs("per-example", "np.array(losses), ", "np.full(len(losses), np.mean(losses)), "),
    "reward's pairs reversed": pairs("per-example", "np.array(losses),\n", "np.array(losses[::-1]),\n"),
    "one repeated for all": pairs("broadcast", "if len({array.shape for array in arrays}) > 1:", "if False:"),
    "lengths cut to the shortest": dialects("broadcast", ANSWER, UNCHECKED.strip()),
    "mask padded": tokens(
        "broadcast", MASK, 'mask = inputs["completion_mask"]; mask = np.pad(mask, ((0, 0), '
        '(0, inputs["input_ids"].shape[1] - mask.shape[1])))[:, 1:]'),
    # label smoothing
    "cDPO's label smoothing ignored": pairs("label-smoothing-ignored", "1 - e, e)", "1.0, 0.0)"),
    "robust DPO's label smoothing ignored": pairs(
        "label-smoothing-ignored", "(1 - e) / (1 - 2 * e), -e / (1 - 2 * e))", "1.0, 0.0)"),
    "robust DPO for cDPO": pairs("label-smoothing-misused", "1 - e, e)", "(1 - e) / (1 - 2 * e), -e / (1 - 2 * e))"),
    "cDPO for robust DPO": pairs("label-smoothing-misused", "(1 - e) / (1 - 2 * e), -e / (1 - 2 * e))", "1 - e, e)"),
    "robust DPO not normalised": pairs(
        "label-smoothing-misused", "(1 - e) / (1 - 2 * e), -e / (1 - 2 * e))", "1 - e, -e)"),
    "cDPO's label smoothing on the other side": pairs("label-smoothing-misused", "1 - e, e)", "e, 1 - e)"),
    "robust DPO's label smoothing doubled": pairs(
        "label-smoothing-misused", "(1 - e) / (1 - 2 * e), -e / (1 - 2 * e))", "(1 - 2 * e) / (1 - 4 * e), -2 * e / (1 - 4 * e))"),
    # IPO
    "half of the paper's target": dialects("target", "pairs.summed_ipo, 1.0", "pairs.summed_ipo, 0.5"),
    "twice IPO's target": dialects("target", '"sum"):                  partial(pairs.summed_ipo, 0.5', '"sum"): partial(pairs.summed_ipo, 1.0'),
    "twice IPO's target per token": dialects(
        "target", "pairs.per_token, partial(pairs.summed_ipo, 0.5)", "pairs.per_token, partial(pairs.summed_ipo, 1.0)"),
    "beta for 1/beta": pairs("target", 'params["beta"] / target', '1 / (params["beta"] * target)'),
    "IPO not squared": objectives("squared", TARGET, "np.abs(margin - 1.0 / tau)"),
    "half of IPO's square": objectives("squared", TARGET, "0.5 * (margin - 1.0 / tau) ** 2"),
    "half of IPO's slope": pairs("squared", "2 * (margins - 1 / tau)", "(margins - 1 / tau)"),
    "token means for DPO's sums": dialects("sum-mean", "pairs.plain_dpo,\n", "partial(pairs.per_token, pairs.plain_dpo),\n"),
    "token means for cDPO's sums": dialects("sum-mean", "pairs.conservative_dpo,", "partial(pairs.per_token, pairs.conservative_dpo),"),
    "token means for robust DPO's sums": dialects("sum-mean", "pairs.robust_dpo,", "partial(pairs.per_token, pairs.robust_dpo),"),
    "sums for token means": dialects("sum-mean", f"partial(pairs.per_token, {IPO})", IPO),
    "token means for sums": dialects("sum-mean", f'"sum"):                  {IPO}', f'"sum"): partial(pairs.per_token, {IPO})'),
    "token means for the paper's sums": dialects(
        "sum-mean", "partial(pairs.summed_ipo, 1.0)",
        "partial(pairs.per_token, partial(pairs.summed_ipo, 1.0))"),
    "token means' slopes of the means": pairs("sum-mean", "grad / lengths[name]", "grad"),
    # rewards
    "rewards swapped": pairs("reward-sign", SCORES, "return rejected - chosen"),
    "rewards reported swapped": pairs("reward-sign", '"rewards/chosen": chosen,', '"rewards/chosen": rejected,'),
    "distillation not squared": objectives("squared", SQUARE, "np.abs(reward_margin - beta * margin)"),
    "half of the square": objectives("squared", SQUARE, f"0.5 * {SQUARE}"),
    "half of distillation's slope": pairs("squared", "-2 * beta * (rewards", "-beta * (rewards"),
    "ensemble not squared": pairs("squared", "residuals**2, -2", "np.abs(residuals), -2"),
    "example-min not squared": pairs("squared", "nearest**2, -2", "np.abs(nearest), -2"),
    "REBEL for distillation": dialects(
        "scale", '"d-dpo"):       pairs.distil,', '"d-dpo"): partial(pairs.over_beta_squared, pairs.distil),'),
    "distillation for REBEL": dialects("scale", "partial(pairs.over_beta_squared, pairs.distil)", "pairs.distil"),
    "REBEL's slope": pairs("scale", "{name: scale * grad for", "{name: grad for"),
    "reward scale ignored": pairs("scale", 'params["reward_scale"]', "1.0"),
    "ensemble's scale": pairs("scale", "residuals**2, -2", "residuals**2 / beta**2, -2"),
    "example-min's scale": pairs("scale", "nearest**2, -2", "nearest**2 / beta**2, -2"),
    "reward margin ignored": pairs("margin-dropped", 'inputs["margins"]', "0.0"),
    "reward margin added": pairs("margin-dropped", 'differences - inputs["margins"]', 'differences + inputs["margins"]'),
    # ensembles
    "E-DPO of the mean": dialects("min-mean", NEAREST_MEMBER, MEAN),
    "farthest member": weights("min-mean", "np.argmin(np.mean", "np.argmax(np.mean"),
    "mean by the nearest": dialects("min-mean", MEAN, NEAREST_MEMBER),
    "hull's centre": dialects("min-mean", HULL, MEAN),
    "farthest for each pair": pairs("min-mean", "one_per_pair(np.argmin", "one_per_pair(np.argmax"),
    "mean for the nearest of each pair": pairs("min-mean", NEAREST, "nearest = np.mean(residuals, axis=0)"),
    "batch-min inside the mean": dialects("example-min", f"partial({NEAREST_MEMBER})", "pairs.nearest_per_pair"),
    "example-min outside the mean": dialects("example-min", "pairs.nearest_per_pair", "E_DPO"),
    "weights of each pair": pairs("example-min", MIXTURE, PER_PAIR),
    "hull at the best corner": dialects("hull-at-a-corner", HULL, NEAREST_MEMBER),
    "hull's corners": simplex("hull-at-a-corner", "range(1, len(vertices) + 1)", "range(1, 2)"),
    "hull's edges": simplex("hull-at-a-corner", "range(1, len(vertices) + 1)", "range(1, 3)"),
    "hull's plane": simplex("hull-at-a-corner", CLIPPED, "weights"),
    "hull's cone": dialects("hull-at-a-corner", HULL, f"pairs.distil_ensemble, {CONE}"),
    # the KL
    "KL reversed": objectives("kl-reversed", KL, "np.exp(policy) * (policy - ref)"),
    "KL's arguments swapped": pairs("kl-reversed", "forward_kl(ref, policy)", "forward_kl(policy, ref)"),
    "sampled KL reversed": objectives(
        "kl-reversed", SAMPLED, "return np.exp(policy_logp - ref_logp) * (policy_logp - ref_logp)"),
    "KL subtracted": objectives("kl-sign", PESSIMISM, "loss - gamma * kl"),
    "KL's estimate negated": objectives("kl-sign", SAMPLED, "return policy_logp - ref_logp"),
    "KL's estimate clipped": objectives("kl-sign", SAMPLED, "return np.maximum(ref_logp - policy_logp, 0.0)"),
    "KL negated": objectives("kl-sign", KL, "np.exp(ref) * (policy - ref)"),
    "KL's slope negated": pairs("kl-sign", 'slope = -params["gamma"]', 'slope = params["gamma"]'),
    "sampled KL's slope negated": pairs("kl-sign", 'len(policy), -params["gamma"]', 'len(policy), params["gamma"]'),
    "gamma 1": objectives("gamma-dropped", PESSIMISM, "loss + kl"),
    "gamma 0": objectives("gamma-dropped", PESSIMISM, "loss"),
    "KL's slope without gamma": pairs("gamma-dropped", 'slope = -params["gamma"] * ', "slope = -"),
    "KL of what the reference never says": objectives(
        "zero-probability", "possible = np.exp(ref_logps) > 0", "possible = np.full(np.shape(ref_logps), True)"),
    # precision
    "sigmoid, then log": objectives(
        "overflow", LOGISTIC, "-np.log(1 / (1 + np.exp(np.float32(-reward_margin))))", "float32"),
    "log of a sum of exponentials": objectives(
        "overflow", LOGISTIC, "np.log(np.exp(np.float32(reward_margin)) + 1) - np.float32(reward_margin)", "float32"),
    "sigmoid of exponentials": pairs(
        "overflow", "np.exp(-np.logaddexp(0.0, -x))", "np.exp(np.float32(x)) / (1 + np.exp(np.float32(x)))", "float32"),
    "softmax of exponentials": tokens(
        "overflow", LOG_Z, "np.log(np.sum(np.exp(np.float32(logits)), axis=-1, keepdims=True))", "float32"),
    "log-probabilities in bfloat16": pairs(
        "half-precision-sums", LOGPS, LOGPS.replace("inputs[name]", half("inputs[name]", "bfloat16")), "bfloat16"),
    "log-probabilities in float16": pairs(
        "half-precision-sums", LOGPS, LOGPS.replace("inputs[name]", half("inputs[name]", "float16")), "bfloat16"),
    "rewards in bfloat16": pairs("half-precision-sums", SCORES, HALVES.replace("DTYPE", "bfloat16"), "bfloat16"),
    "rewards in float16": pairs("half-precision-sums", SCORES, HALVES.replace("DTYPE", "float16"), "bfloat16"),
    "token sums in bfloat16": tokens("half-precision-sums", DOT, running(TERMS, "bfloat16"), "bfloat16"),
    "token sums in float16": tokens("half-precision-sums", DOT, running(TERMS, "float16"), "bfloat16"),
    "token sums rounded to bfloat16": tokens("half-precision-sums", DOT, half(DOT, "bfloat16"), "bfloat16"),
    "token sums rounded to float16": tokens("half-precision-sums", DOT, half(DOT, "float16"), "bfloat16"),
    # tokens
    "labels not shifted": tokens("shift", BEFORE, "np.arange(mask.shape[1]) + 1, mask.shape"),
    "labels shifted by two": tokens("shift", BEFORE, "np.arange(mask.shape[1]) - 1, mask.shape"),
    "denominator not shifted": tokens(
        "unshifted-denominator", LOG_Z, 'np.logaddexp.reduce(inputs["logits"][:, 1:], axis=-1, keepdims=True)'),
    "mean for sum": dialects("sum-mean", "tokens.summed,", "tokens.averaged,"),
    "sum for mean": dialects("sum-mean", "tokens.averaged,", "tokens.summed,"),
    "mask ignored": tokens("mask-dropped", MASK, 'mask = np.ones_like(inputs["completion_mask"])[:, 1:]'),
    "prompt scored": tokens(
        "mask-dropped", MASK, f"{MASK}; mask = np.maximum.accumulate(mask[:, ::-1], axis=1)[:, ::-1]"),
    "padding scored": tokens("mask-dropped", MASK, f"{MASK}; mask = np.maximum.accumulate(mask, axis=1)"),
    "padding counted": tokens("mask-dropped", COUNT, "len(mask[0])"),
    "position 0 counted": tokens(
        "mask-dropped", COUNT, COUNT.replace("mask", 'inputs["completion_mask"]')),
    "prompt scored as chosen": tokens("mask-dropped", CHOSEN, "(segments[:, 1:] == 0) | (segments[:, 1:] == 1)"),
    "padding scored as rejected": tokens("mask-dropped", REJECTED, "(segments[:, 1:] == -1) | (segments[:, 1:] == 2)"),
    "end-of-sequence not scored": tokens("eos-lost", MASK, MASK + ' * (inputs["input_ids"][:, 1:] != 1)'),
    "last token not scored": tokens("eos-lost", MASK, MASK + "; mask = mask * np.pad(mask[:, 1:], ((0, 0), (0, 1)))"),
    "padding by its id": tokens(
        "pad-is-eos", MASK, MASK + ' * (inputs["input_ids"][:, 1:] != params.get("pad_id", 0))'),
    "length by the first padding": tokens(
        "pad-is-eos", MASK, MASK + '; mask = mask * (np.arange(mask.shape[1]) < np.argmax('
        'inputs["input_ids"][:, 1:] == params.get("pad_id", 0), axis=1, keepdims=True))'),
    "mean of nothing": tokens("nan-all-masked", COUNT, "mask.sum(axis=1, keepdims=True)"),
    "mean of nothing, times 0": tokens("nan-all-masked", DOT, f"{DOT} / w.sum() * w.sum()"),
    "labels by multiplication": tokens("zero-probability", FOUND, "np.sum(labels * logps, axis=-1)"),
    "mask as a factor": tokens("zero-probability", "add(w, np.where(w, t, 0.0))", "np.dot(w, t)"),
    "first rejected token after the chosen response": tokens(
        "first-rejected-token", STARTS, f"{STARTS}; starts = starts & ({CHOSEN})"),
    # data
    "shared beginning of the responses cut": dialects("character-split", ANSWER, RESPONSES % "[shared:]"),
    "mark anywhere": data("character-split", '"\\n\\nAssistant:"', '"Assistant:"'),
    "responses stripped": dialects("white-space", ANSWER, RESPONSES % ".strip()"),
    "contexts not compared": data("last-turn", DIFFER, 'opening != [inputs.get("prompt", *opening)]'),
    "prompt not compared": data("last-turn", DIFFER, "chosen[:-1] != rejected[:-1]"),
    "texts' contexts not compared": data("last-turn", "if chosen[0] != rejected[0]", "if False"),
    "any role's last turn": data("last-turn", ' or value[0]["role"] != "assistant"', ""),
    "reply of several turns": data("last-turn", "len(value) != 1 or ", ""),
    "human's last turn": data("last-turn", "HUMAN in response or ", ""),
    "cut at the first mark": data("last-turn", PARTED, "text.partition(ASSISTANT)\n    if not mark:"),
    "last user turn alone": data("last-turn", '"prompt": chosen[:-1]', '"prompt": chosen[-2:-1]'),
    "rejected response missing": data(
        "missing-field", '_reply(inputs["rejected"])', '_reply(inputs.get("rejected", ""))'),
    "chosen response missing": data(
        "missing-field", '_reply(inputs["chosen"])', '_reply(inputs.get("chosen", ""))'),
    "prompt missing": data("missing-field", '"prompt": inputs["prompt"]', '"prompt": inputs.get("prompt", "")'),
    "rejected conversation missing": data(
        "missing-field", 'inputs["chosen"], inputs["rejected"]',
        'inputs["chosen"], inputs.get("rejected", inputs["chosen"])'),
    "text without human turns": data("missing-field", " or HUMAN not in head", ""),
    "text without marks": data(
        "missing-field", "not mark or HUMAN in response or HUMAN not in head", "HUMAN in response"),
    "other end of the prompt": data("truncation-side", CUT, "prompt[:limit] if keep_end else prompt[-limit:]"),
    "one token of the prompt too few": data(
        "truncation-side", CUT, "prompt[1:][-limit:] if keep_end else prompt[:-1][:limit]"),
    "no end-of-sequence": data("eos-lost", ENDED, 'inputs[f"{name}_ids"]'),
    "no end of the empty response": data("eos-lost", ENDED, ENDED + ' * bool(inputs[f"{name}_ids"])'),
    "two ends": data("eos-doubled", ENDED, ENDED + " * 2"),
    "truncated responses end": data("eos-on-truncated", ENDED, 'inputs[f"{name}_ids"] + [params["eos_id"]]'),
    "padding removed by its id": data("pad-is-eos", ENDED, f'[i for i in {ENDED} if i != params["pad_id"]]'),
    # training
    "reference is the policy": training("reference-moves", POLICY_LOGPS, f"{POLICY_LOGPS}; ref = policy"),
    "reference follows a step behind": training("reference-moves", 'made["loss"])', 'made["loss"]); ref = policy'),
    "reference is where training starts": training(
        "reference-moves", '_pair_logps(inputs["ref_table"]', '_pair_logps(inputs["table"]'),
    "micro-batches added": training("accumulation-scale", STEP, STEP + ' * inputs["batches"].shape[1]'),
    "micro-batches divided twice": training("accumulation-scale", STEP, STEP + ' / inputs["batches"].shape[1]'),
    "mean of micro-batches' token means": training(
        "mean-of-means", f"count = {TOKENS}\n        {SFT_LOSS}",
        f'count = np.repeat({MICRO} * inputs["batches"].shape[1], inputs["batches"].shape[2])\n        '
        'losses.append(np.sum(-_logps(table, inputs, "chosen")[rows] / count))'),
    "mean of rows' token means": training(
        "mean-of-means", f"count = {TOKENS}\n        {SFT_LOSS}",
        'count = inputs["chosen_mask"][rows, 1:].sum(axis=1) * len(rows)\n        '
        'losses.append(np.sum(-_logps(table, inputs, "chosen")[rows] / count))'),
    "tokens added": training("batch-sum", f"count = {TOKENS}", "count = 1"),
    "rows averaged": training("sum-mean", f"count = {TOKENS}", "count = len(rows)"),
    "reference of other pairs": training(
        "order", "values[name][which]", 'values[name][rows if who == "policy" else np.arange(len(rows))]'),
    "gradients clipped": training("optimizer", STEP, f"{STEP} / max(np.linalg.norm(grad), 1.0)"),
    # bugs that users of other libraries reported; written when the search was done
    "likelihood of the chosen response alone": dialects("sign", "pairs.plain_dpo,\n", f"{LIKELIHOOD},\n"),
    "rejected response left out": objectives("sign", MARGIN, "policy_chosen - ref_chosen"),
    "mask inverted, over all positions": tokens(
        "mask-dropped", "weights = {\"logps\": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)}",
        'weights = {"logps": (1 - mask) / mask.shape[1]}'),
    "IPO's setting ignored": dialects("target", f'"sum"):                  {IPO}', '"sum"): pairs.plain_dpo'),
    "reward margins against all pairs": pairs(
        "margin-dropped", "losses, slopes = [bradley_terry(d) for d in shifted], -sigmoid(-shifted) / len(shifted)",
        'square = differences[:, None] - np.reshape(inputs["margins"], (1, -1)); losses = np.mean(bradley_terry(square), 1); '
        "slopes = -np.mean(sigmoid(-square), 1) / len(shifted)"),
    "pairs of equal rewards skipped": pairs(
        "accuracy-tie", "losses, slopes = [bradley_terry(d) for d in shifted], -sigmoid(-shifted) / len(shifted)",
        "losses = bradley_terry(shifted) * (differences != 0); slopes = -sigmoid(-shifted) / len(shifted) * (differences != 0)"),
    "first response token not scored": tokens("mask-dropped", MASK, f"{MASK}; mask = mask * np.pad(mask[:, :-1], ((0, 0), (1, 0)))"),
    "means over the tokens of both responses": pairs(
        "sum-mean", "logps = dict(zip(names, _alike(inputs, names), strict=True))",
        'both = inputs["chosen_lengths"] + inputs["rejected_lengths"]; lengths = dict.fromkeys(names, both); '
        "logps = dict(zip(names, _alike(inputs, names), strict=True))"),
    "reference moved when training resumes": training(
        "reference-moves", 'made["loss"])', 'made["loss"]); ref = _pair_logps(table, inputs) if len(losses) == 5 else ref'),
    "mask not shifted with the labels": tokens("mask-dropped", MASK, 'mask = inputs["completion_mask"][:, :-1]'),
}
# fmt: on

# fmt: off
NAMES: dict[str, tuple[str, ...]] = {
    "margin's sign": ("with chosen and rejected swapped and with the gradients negated", "with the gradients negated and with the rewards of chosen and rejected swapped",),
    "preference's sign": ("with chosen and rejected swapped", "at label_smoothing 1 - e", "with the rewards of chosen and rejected swapped", "with the pair's margin added and with the rewards of chosen and rejected swapped", "with the loss L(-(rho - margin))",),
    "distillation's sign": ("with chosen and rejected swapped", "with the rewards of chosen and rejected swapped",),
    "ensemble's sign": ("with chosen and rejected swapped and with the gradients negated", "with the gradients negated and with the rewards of chosen and rejected swapped"),
    "example-min's sign": ("with chosen and rejected swapped and with the gradients negated", "with the gradients negated and with the rewards of chosen and rejected swapped",),
    "IPO's sign": ("with chosen and rejected swapped",),
    "gradient's sign": ("with the gradients negated",),
    "references swapped": ("with the reference's chosen and rejected swapped",),
    "no reference": ("without the reference", "with the chosen response's reference subtracted from both", "with the rejected response's reference subtracted from both"),
    "gradients into the reference": ("with the reference not detached",),
    "accuracy of ties": ("with ties counted as accurate",),
    "accuracy of equal rewards": ("with ties counted as accurate",),
    "half a point for ties": ("with ties counted as half accurate",),
    "accuracy of the mean": ("with the accuracy of the mean margin",),
    "DPO without beta": ("at beta 1: beta is dropped",),
    "DPO's slope without beta": ("with the gradients' factor beta dropped",),
    "distillation without beta": ("at beta 1: beta is dropped",),
    "distillation's slope without beta": ("with the gradients' factor beta dropped",),
    "ensemble without beta": ("at beta 1: beta is dropped and with the gradients' factor beta twice",),
    "ensemble's slope without beta": ("with the gradients' factor beta dropped",),
    "example-min without beta": ("at beta 1: beta is dropped and with the gradients' factor beta twice",),
    "IPO without beta": ("at beta 1: beta is dropped",),
    "rewards without beta": ("at beta 1: beta is dropped",),
    "DPO at twice beta": ("at 2 beta",),
    "IPO at beta squared": ("at beta squared",),
    "distillation at half of beta": ("at 0.5 beta",),
    "ensembles at twice beta": ("at 2 beta",),
    "rejected detached": ("with rejected detached",),
    "pairs added": ("with the pairs added, not averaged",),
    "gradients not divided": ("with the pairs added, not averaged",),
    "reward's pairs added": ("with the pairs added, not averaged",),
    "reward's gradients not divided": ("with the pairs added, not averaged",),
    "metrics added": ("with the metrics of the pairs added, not averaged",),
    "prompts' KL added": ("with the KL added over prompts or samples",),
    "samples' KL added": ("with the KL added over prompts or samples",),
    "pairs reversed": ("with the values of the pairs in reverse order",),
    "pairs sorted": ("with the values of the pairs sorted",),
    "mean for each pair": ("with the mean as the value of each pair",),
    "reward's pairs reversed": ("with the values of the pairs in reverse order",),
    "one repeated for all": ("with a lone value repeated",),
    "lengths cut to the shortest": ("with arrays cut to the shortest",),
    "mask padded": ("with a short mask padded",),
    "cDPO's label smoothing ignored": ("dpo/plain",),
    "robust DPO's label smoothing ignored": ("dpo/plain",),
    "robust DPO for cDPO": ("dpo/robust",),
    "cDPO for robust DPO": ("dpo/conservative",),
    "robust DPO not normalised": ("times 1 - 2 label_smoothing",),
    "cDPO's label smoothing on the other side": ("at label_smoothing 1 - e",),
    "robust DPO's label smoothing doubled": ("at label_smoothing 2 e",),
    "half of the paper's target": ("ipo/sum",),
    "twice IPO's target": ("ipo/paper",),
    "twice IPO's target per token": ("at 0.5 beta", "with -0.5 added to beta times the margin"),
    "beta for 1/beta": ("at 1 / beta",),
    "IPO not squared": ("with absolute values, not squares",),
    "half of IPO's square": ("times 0.5",),
    "half of IPO's slope": ("with the gradients times 0.5",),
    "token means for DPO's sums": ("dpo/length-normalised",),
    "token means for cDPO's sums": ("with log-probabilities averaged over tokens",),
    "token means for robust DPO's sums": ("with log-probabilities averaged over tokens",),
    "sums for token means": ("ipo/sum",),
    "token means for sums": ("ipo/token-mean",),
    "token means for the paper's sums": ("with log-probabilities averaged over tokens",),
    "token means' slopes of the means": ("with gradients in token means",),
    "rewards swapped": ("with the rewards of chosen and rejected swapped", "with chosen and rejected swapped", "with the gradients negated and with the rewards of chosen and rejected swapped",),
    "rewards reported swapped": ("with chosen and rejected swapped",),
    "distillation not squared": ("with absolute values, not squares",),
    "half of the square": ("times 0.5",),
    "half of distillation's slope": ("with the gradients times 0.5",),
    "ensemble not squared": ("with absolute values, not squares",),
    "example-min not squared": ("with absolute values, not squares",),
    "REBEL for distillation": ("distillation/rebel",),
    "distillation for REBEL": ("distillation/d-dpo",),
    "REBEL's slope": ("distillation/d-dpo",),
    "reward scale ignored": ("distillation/d-dpo",),
    "ensemble's scale": ("over beta squared",),
    "example-min's scale": ("over beta squared",),
    "reward margin ignored": ("reward/bradley-terry",),
    "reward margin added": ("with the pair's margin added",),
    "E-DPO of the mean": ("ensemble/mean",),
    "farthest member": ("ensemble/batch-max",),
    "mean by the nearest": ("ensemble/batch-min",),
    "hull's centre": ("ensemble/mean",),
    "farthest for each pair": ("ensemble/example-max",),
    "mean for the nearest of each pair": ("ensemble/mean",),
    "batch-min inside the mean": ("ensemble/example-min",),
    "example-min outside the mean": ("ensemble/batch-min",),
    "weights of each pair": ("ensemble/example-min", "on each pair alone, then averaged",),
    "hull at the best corner": ("ensemble/batch-min",),
    "hull's corners": ("ensemble/batch-min",),
    "hull's edges": (),
    "hull's plane": ("ensemble/affine-hull",),
    "hull's cone": (),
    "KL reversed": ("with the KL reversed where the reference allows it",),
    "KL's arguments swapped": ("with the KL reversed",),
    "sampled KL reversed": ("with the KL reversed by importance weights",),
    "KL subtracted": ("with the KL subtracted", "with the KL negated",),
    "KL's estimate negated": ("with the KL negated",),
    "KL's estimate clipped": ("with the KL's estimates clipped at 0",),
    "KL negated": ("with the KL negated",),
    "KL's slope negated": ("with the KL subtracted", "with the KL negated",),
    "sampled KL's slope negated": ("with the KL subtracted", "with the KL negated",),
    "gamma 1": ("at gamma 1: gamma is dropped",),
    "gamma 0": ("without the KL",),
    "KL's slope without gamma": ("at gamma 1: gamma is dropped",),
    "KL of what the reference never says": ("with 0 log 0 as NaN",),
    "sigmoid, then log": ("with exp of a large margin of either sign overflowing", "with exp of a large negative margin overflowing",),
    "log of a sum of exponentials": ("with exp of a large margin of either sign overflowing", "with exp of a large positive margin overflowing",),
    "sigmoid of exponentials": ("with exp of a large margin of either sign overflowing in the gradients", "with exp of a large negative margin overflowing in the gradients",),
    "softmax of exponentials": ("with exp of large logits overflowing",),
    "log-probabilities in bfloat16": ("with log-probabilities in bfloat16", "with log-probabilities and rewards in bfloat16", "with rewards in bfloat16", "with rewards in float16",),
    "log-probabilities in float16": ("with log-probabilities in float16", "with rewards in bfloat16", "with rewards in float16", "with log-probabilities and rewards in float16",),
    "rewards in bfloat16": ("with rewards in bfloat16", "with rewards in float16",),
    "rewards in float16": ("with rewards in bfloat16", "with rewards in float16",),
    "token sums in bfloat16": ("with tokens added in bfloat16", "with tokens, over their number, added in bfloat16"),
    "token sums in float16": ("with tokens added in float16", "with tokens, over their number, added in float16"),
    "token sums rounded to bfloat16": ("with sums rounded to bfloat16",),
    "token sums rounded to float16": ("with sums rounded to float16",),
    "labels not shifted": ("with labels not shifted",),
    "labels shifted by two": ("with labels shifted by two",),
    "denominator not shifted": (),
    "mean for sum": ("logps/mean",),
    "sum for mean": ("logps/sum",),
    "mask ignored": ("with the mask ignored",),
    "prompt scored": ("with the prompt scored",),
    "padding scored": ("with the padding scored",),
    "padding counted": ("divided by T - 1, all tokens of the row but one",),
    "position 0 counted": ("over one token more where the mask has position 0",),
    "prompt scored as chosen": ("with the prompt scored as chosen",),
    "padding scored as rejected": ("with the padding scored as rejected",),
    "end-of-sequence not scored": ("with the end-of-sequence token not scored",),
    "last token not scored": ("with the last token not scored",),
    "padding by its id": ("with padding known by its id",),
    "length by the first padding": ("with a response that ends before the first padding id",),
    "mean of nothing": ("with NaN where no token is scored",),
    "mean of nothing, times 0": ("with NaN where no token is scored",),
    "labels by multiplication": ("with NaN where a token of probability 0 could be scored", "with NaN where a masked token 0 has probability 0",),
    "mask as a factor": ("with NaN where a masked token has probability 0",),
    "first rejected token after the chosen response": ("with a response's first token, too, predicted by the one before it in the row",),
    "shared beginning of the responses cut": ("with the common beginning of the responses cut",),
    "mark anywhere": ("with responses cut at `Assistant:` anywhere",),
    "responses stripped": ("with responses stripped", "with white space at the responses' beginning removed"),
    "contexts not compared": ("with contexts not compared",),
    "prompt not compared": ("with the prompt of its own not compared",),
    "texts' contexts not compared": ("with the contexts of texts not compared",),
    "any role's last turn": ("with any role's last turn as the response",),
    "reply of several turns": ("with the first of several turns as the response",),
    "human's last turn": ("with a human's last turn accepted",),
    "cut at the first mark": ("with responses cut at the first mark",),
    "last user turn alone": ("with the last user turn alone as the prompt",),
    "rejected response missing": ("with a missing rejected response as empty",),
    "chosen response missing": ("with a missing chosen response as empty",),
    "prompt missing": ("with a missing prompt as empty",),
    "rejected conversation missing": ("with the chosen response for a missing rejected one",),
    "text without human turns": ("with texts without human turns accepted",),
    "text without marks": ("with texts without marks accepted",),
    "other end of the prompt": ("data/tokens-keep-start", "data/tokens-keep-end",),
    "one token of the prompt too few": ("with the prompt's first token lost", "with the prompt's last token lost",),
    "no end-of-sequence": ("without the end-of-sequence token",),
    "no end of the empty response": ("without the end of an empty response",),
    "two ends": ("with the end-of-sequence token twice",),
    "truncated responses end": ("with truncated responses ended",),
    "padding removed by its id": ("with padding removed by its id",),
    "reference is the policy": ("with the policy as its own reference",),
    "reference follows a step behind": ("with a reference one step behind the policy",),
    "reference is where training starts": ("with the reference where training starts",),
    "micro-batches added": ("with micro-batches added, not averaged",),
    "micro-batches divided twice": ("with micro-batches divided by their number twice",),
    "mean of micro-batches' token means": ("with the mean of each micro-batch's token mean",),
    "mean of rows' token means": ("with the mean of each row's token mean",),
    "tokens added": ("with the tokens added, not averaged",),
    "rows averaged": ("with the tokens added, over the number of rows",),
    "reference of other pairs": ("with the reference of the pairs at the batch's own positions", "with the reference of the pairs at the micro-batch's own positions",),
    "gradients clipped": ("with gradients clipped to norm 1", "with the gradient of each micro-batch clipped to norm 1", "with the gradient so far, after each micro-batch, clipped to norm 1",),
    "likelihood of the chosen response alone": ("with the chosen response's likelihood alone",),
    "rejected response left out": ("with the policy's log-probability of rejected in place of the reference's log-probability of rejected",),
    "mask inverted, over all positions": ("divided by T - 1, all tokens of the row but one and with the mask inverted",),
    "IPO's setting ignored": ("dpo/plain",),
    "reward margins against all pairs": ("with every pair's rewards against every pair's margin (B x B)",),
    "pairs of equal rewards skipped": ("with pairs of margin 0 left out",),
    "first response token not scored": ("with the first token not scored",),
    "means over the tokens of both responses": ("with the tokens of both responses counted",),
    "reference moved when training resumes": ("with the reference replaced by the policy every 5 steps",),
    "mask not shifted with the labels": ("with the mask not shifted",),
}
# fmt: on
"""What the kit may say of each fault: names of other dialects, or of mistakes."""

UNKNOWN = (
    "ensemble's sign",
    "ensemble without beta",
    "hull's edges",
    "hull's cone",
    "softmax of exponentials",
    "denominator not shifted",
    "log-probabilities in bfloat16",
    "log-probabilities in float16",
)
"""Faults that break some output in a way that no hypothesis has."""


LATER = {
    "likelihood of the chosen response alone": "locuslab/open-unlearning#30",
    "rejected response left out": "haozheji/exact-optimization#2",
    "mask inverted, over all positions": "QwenAudio/CosyVoice#1449",
    "IPO's setting ignored": "modelscope/ms-swift#10167",
    "reward margins against all pairs": "modelscope/ms-swift#9927",
    "pairs of equal rewards skipped": "pytorch/rl#3886",
    "first response token not scored": "jingyaogong/minimind#621",
    "means over the tokens of both responses": "modelscope/ms-swift#9925",
    "reference moved when training resumes": "Nerogar/OneTrainer#1403",
    "mask not shifted with the labels": "OpenRLHF/OpenRLHF#465",
}
"""Bugs that were written when the search for names was done, and where users reported each."""

ROUNDED = training(
    "", '"logits": table[ids]', '"logits": table[ids].astype("bfloat16").astype("float32")'
)


def read_anew(fault=None):
    """The modules of `reference/`, with one edit, as a package; they import each other and not those on disk."""
    package = types.ModuleType("reference.conformance")
    with patch.dict(sys.modules, {package.__name__: package}):
        for name in MODULES:
            source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
            if fault and name == fault.module:
                assert fault.before in source
                source = source.replace(fault.before, fault.after)
            fresh = types.ModuleType(f"reference.{name}")
            vars(fresh).update(os=os, nnls=nnls, np=np)
            exec(compile(source, fresh.__name__, "exec"), vars(fresh))
            sys.modules[fresh.__name__] = fresh
            setattr(package, name.split(".")[-1], fresh)
    return package
