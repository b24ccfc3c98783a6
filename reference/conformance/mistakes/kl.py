"""Mistakes in the KL of pessimistic losses, on samples or on whole distributions."""

from collections.abc import Callable
from functools import partial

import numpy as np

from reference.conformance.mistakes.mistake import (
    ANY,
    Function,
    Mistake,
    Values,
    at,
    beta_and,
    size,
    step,
    then,
)
from reference.objectives import forward_kl

KINDS = ("sample", "distribution")


def another(kl_of: Callable, slope_of: Callable) -> Callable[[Function], Function]:
    """Another KL of (ref, policy), with its slope in policy; its mean over prompts or samples."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made, gamma = function(params, inputs), params["gamma"]
            name = next(name for name in made["grads"] if name.split("_")[1] in KINDS)
            ref, policy = inputs[name.replace("policy", "ref")], inputs[name]
            values = kl_of(ref, policy)
            kl, slope = np.mean(values), slope_of(ref, policy) / np.size(values)
            of_pairs = function(params, inputs | {name: ref})["loss"]  # its KL is 0
            grads = made["grads"] | {name: gamma * slope}
            return {"loss": of_pairs + gamma * kl, "grads": grads, "metrics": {"kl": kl}}

        return mistaken

    return change


def summed(values: Callable) -> Callable:
    """A KL of distributions from its terms, where the reference allows an outcome."""
    return lambda ref, policy: np.sum(np.where(np.exp(ref) > 0, values(ref, policy), 0.0), axis=-1)


def reversed_terms(ref: np.ndarray, policy: np.ndarray) -> np.ndarray:
    return np.exp(policy) * (policy - ref)


def reversed_slopes(ref: np.ndarray, policy: np.ndarray) -> np.ndarray:
    return np.exp(policy) * (policy - ref + 1)


def negated(function: Function) -> Function:
    """The KL has the other sign, in the loss and where it is reported."""

    def mistaken(params: Values, inputs: Values) -> Values:
        made = function(params | {"gamma": -params["gamma"]}, inputs)
        return made | {"metrics": {"kl": -made["metrics"]["kl"]}}

    return mistaken


def added(number_of: Callable[[Values], float]) -> Callable[[Function], Function]:
    """The KLs of prompts or samples are added, and divided by another number."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            names = ("ref_sample_logps", "ref_distribution_logps")
            number = next(len(inputs[name]) for name in names if name in inputs)
            share = number / number_of(inputs)
            made = function(params | {"gamma": share * params["gamma"]}, inputs)
            return made | {"metrics": {"kl": share * made["metrics"]["kl"]}}

        return mistaken

    return change


def scaled(factor: Callable[[Values], float]) -> Callable[[Function], Function]:
    """gamma times a factor of the other parameters."""

    def change(function: Function) -> Function:
        return lambda p, x: function(p | {"gamma": p["gamma"] * factor(p)}, x)

    return change


def detached(made: Values, params: Values, inputs: Values) -> Values:
    """The KL has no gradient."""
    grads = made["grads"]
    return {"grads": grads | {n: 0 * grads[n] for n in grads if n.split("_")[1] in KINDS}}


def of_sides(*sides: str) -> Callable[[Function], Function]:
    """The mean log-ratio of the pairs' responses in place of the KL."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            names = [name for name in inputs if name.split("_")[1] in KINDS]
            refs = {name: inputs[name.replace("policy", "ref")] for name in names}
            made = function(params, inputs | refs)
            kl, grads = 0.0, made["grads"] | {n: 0 * inputs[n] for n in made["grads"] if n in refs}
            for side in sides:
                ref, policy = (inputs[f"{who}_{side}_logps"] for who in ("ref", "policy"))
                kl += np.mean(ref - policy) / len(sides)
                slope = params["gamma"] / len(ref) / len(sides)
                grads[f"policy_{side}_logps"] = grads[f"policy_{side}_logps"] - slope
            loss = made["loss"] + params["gamma"] * kl
            return {"loss": loss, "grads": grads, "metrics": {"kl": kl}}

        return mistaken

    return change


def mixed(loss: Callable, kl: Callable) -> Callable[[Function], Function]:
    """The loss of pairs and the KL times factors of gamma."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            gamma = params["gamma"]
            alone, made = function(params | {"gamma": 0.0}, inputs), function(params, inputs)
            both = function(params | {"gamma": 1.0}, inputs)
            only = both["loss"] - alone["loss"]
            grads = {
                n: loss(gamma) * g + kl(gamma) * (both["grads"][n] - g)
                for n, g in alone["grads"].items()
            }
            total = loss(gamma) * alone["loss"] + kl(gamma) * only
            return {"loss": total, "grads": grads, "metrics": made["metrics"]}

        return mistaken

    return change


def one_alone(index: int) -> Callable[[Function], Function]:
    """The KL of one prompt or sample."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            names = [name for name in inputs if name.split("_")[1] in KINDS]
            made = function(params, inputs | {name: inputs[name][[index]] for name in names})
            grads = dict(made["grads"])
            for name in grads.keys() & set(names):
                whole = np.zeros(inputs[name].shape)
                whole[index] = grads[name][0]
                grads[name] = whole
            return made | {"grads": grads}

        return mistaken

    return change


def clipped(above: bool, function: Function, constant: float) -> Function:
    """No estimate is higher, or lower, than a constant."""
    sign = 1.0 if above else -1.0
    return another(
        lambda r, p: sign * np.minimum(sign * (r - p), sign * constant),
        lambda r, p: -1.0 * (sign * (r - p) < sign * constant),
    )(function)


def of_whole(value: Callable, slope: Callable) -> Callable[[Function], Function]:
    """A function of the batch's KL in its place."""

    def outputs(made: Values, params: Values, inputs: Values) -> Values:
        kl = made["metrics"]["kl"]
        now, by = value(kl), slope(kl)
        grads = {
            name: np.where(np.isfinite(by), np.nan_to_num(by) * grad, ANY)
            for name, grad in made["grads"].items()
            if name.split("_")[1] in KINDS
        }
        loss = made["loss"] + params["gamma"] * (now - kl)
        return {"loss": loss, "grads": made["grads"] | grads, "metrics": {"kl": now}}

    return then(outputs)


def bounded(lowest: bool, function: Function, constant: float = 0.0) -> Function:
    """The KL of the whole batch is no lower, or no higher, than a constant."""
    if lowest:
        change = of_whole(lambda kl: np.maximum(kl, constant), lambda kl: step(kl - constant))
    else:
        change = of_whole(lambda kl: np.minimum(kl, constant), lambda kl: step(constant - kl))
    return change(function)


def inside(function: Function) -> Function:
    """-log sigmoid(beta h - gamma KL)."""

    def mistaken(params: Values, inputs: Values) -> Values:
        beta, gamma = params["beta"], params["gamma"]
        right, without = (function(params | {"gamma": g}, inputs) for g in (1.0, 0.0))
        kl = right["metrics"]["kl"]
        lower = {"policy_chosen_logps": inputs["policy_chosen_logps"] - gamma * kl / beta}
        made = function(params | {"gamma": 0.0}, inputs | lower)
        slope = -gamma / beta * np.sum(made["grads"]["policy_chosen_logps"])
        grads = {
            name: grad + slope * (right["grads"][name] - without["grads"][name])
            for name, grad in made["grads"].items()
        }
        return right | {"loss": made["loss"], "grads": grads}

    return mistaken


def middle(ref: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """log of the mean of both distributions."""
    return np.logaddexp(ref, policy) - np.log(2)


def shannon(ref: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """Jensen and Shannon's divergence."""
    mean = middle(ref, policy)
    return (forward_kl(ref, mean) + forward_kl(policy, mean)) / 2


def weighted(ref: np.ndarray, policy: np.ndarray) -> np.ndarray:
    return np.exp(policy - ref) * (policy - ref)


# fmt: off
KL = (
    Mistake("with the KL subtracted", "kl-sign", at(gamma=lambda g: -g)),
    Mistake("with the KL negated", "kl-sign", negated),
    Mistake("with the KL's estimates clipped at 0", "clipped", another(
        lambda r, p: np.maximum(r - p, 0.0), lambda r, p: -1.0 * (r > p))),
    Mistake("with the batch's KL clipped at 0", "clipped", partial(bounded, True)),
    Mistake("at gamma 1: gamma is dropped", "gamma-dropped", at(gamma=lambda g: 1.0)),
    Mistake("without the KL", "gamma-dropped", another(lambda r, p: 0.0, lambda r, p: 0 * r)),
    Mistake("at gamma squared", "gamma-dropped", at(gamma=lambda g: g * g)),
    Mistake("at 1 / gamma", "gamma-dropped", at(gamma=lambda g: 1 / g)),
    Mistake("at 1 - gamma", "gamma-dropped", at(gamma=lambda g: 1 - g)),
    Mistake("at gamma beta", "gamma-dropped", scaled(lambda p: p["beta"])),
    Mistake("at gamma / beta", "gamma-dropped", scaled(lambda p: 1 / p["beta"])),
    Mistake("with beta in gamma's place", "gamma-dropped",
        lambda f: lambda p, x: f(p | {"gamma": p["beta"]}, x)),
    Mistake("with beta and gamma exchanged", "gamma-dropped", partial(beta_and, "gamma")),
    Mistake("at {c} gamma", "gamma-dropped", lambda f, c: at(gamma=lambda g: c * g)(f)),
    Mistake("at gamma {c}, whatever the case says", "gamma-dropped",
        lambda f, c: at(gamma=lambda g: c)(f)),
    Mistake("with the KL added over prompts or samples", "batch-sum", added(lambda x: 1)),
    Mistake("with the KL added over samples, over the number of pairs", "kl-other", added(size)),
    Mistake("with the KL reversed", "kl-reversed", another(
        lambda r, p: forward_kl(p, r), reversed_slopes)),
    Mistake("with the KL reversed where the reference allows it", "kl-reversed", another(
        summed(reversed_terms), reversed_slopes)),
    Mistake("with the KL reversed by importance weights", "kl-reversed", another(
        weighted, lambda r, p: np.exp(p - r) * (p - r + 1))),
    Mistake("with half of the squared log-ratio, k2, for the KL",
        "kl-other", another(
        lambda r, p: (r - p) ** 2 / 2, lambda r, p: p - r)),
    Mistake("with pi/pi_ref - 1 - log(pi/pi_ref), k3 of the reference's samples, for the KL",
        "kl-other", another(
        lambda r, p: np.expm1(p - r) - (p - r), lambda r, p: np.expm1(p - r))),
    Mistake("with |log-ratio| for the KL", "kl-other", another(
        lambda r, p: np.abs(r - p), lambda r, p: np.sign(p - r))),
    Mistake("with the KL's terms averaged over outcomes, not added", "kl-other", another(
        lambda r, p: forward_kl(r, p) / r.shape[-1], lambda r, p: -np.exp(r) / r.shape[-1])),
    Mistake("with 0 log 0 as NaN", "zero-probability", another(
        lambda r, p: np.sum(np.exp(r) * (r - p), axis=-1), lambda r, p: -np.exp(r))),
)
ODD_KL = (
    Mistake("with the squared log-ratio for the KL", "kl-other", another(
        lambda r, p: (r - p) ** 2, lambda r, p: 2 * (p - r))),
    Mistake("with pi_ref/pi - 1 - log(pi_ref/pi), GRPO's k3, for the KL",
        "kl-other", another(
        lambda r, p: np.expm1(r - p) - (r - p), lambda r, p: 1 - np.exp(r - p))),
    Mistake("with pi_ref/pi for the KL", "kl-other", another(
        lambda r, p: np.exp(r - p), lambda r, p: -np.exp(r - p))),
    Mistake("with the policy's entropy for the KL", "kl-other", another(
        lambda r, p: -np.sum(np.exp(p) * p, axis=-1), lambda r, p: -np.exp(p) * (p + 1))),
    Mistake("with the square of the batch's KL", "kl-other",
        of_whole(np.square, lambda kl: 2 * kl)),
    Mistake("with the absolute value of the batch's KL", "kl-other", of_whole(np.abs, np.sign)),
    Mistake("with gamma times the KL inside the sigmoid, less than beta h", "kl-other", inside),
    Mistake("with pi/pi_ref - 1 for the KL", "kl-other", another(
        lambda r, p: np.expm1(p - r), lambda r, p: np.exp(p - r))),
    Mistake("with the mean of both KLs", "kl-reversed", another(
        lambda r, p: (forward_kl(r, p) + forward_kl(p, r)) / 2,
        lambda r, p: (reversed_slopes(r, p) - np.exp(r)) / 2)),
    Mistake("with Jensen and Shannon's divergence for the KL", "kl-other", another(
        shannon, lambda r, p: np.exp(p) * (p - middle(r, p)) / 2)),
    Mistake("with the total variation for the KL", "kl-other", another(
        lambda r, p: np.sum(np.abs(np.exp(p) - np.exp(r)), axis=-1) / 2,
        lambda r, p: np.sign(np.exp(p) - np.exp(r)) * np.exp(p) / 2)),
    Mistake("without the reference in the KL", "swapped-reference", another(
        lambda r, p: -p, lambda r, p: -1.0 + 0 * p)),
    Mistake("without the reference in the KL of distributions", "swapped-reference", another(
        summed(lambda r, p: -np.exp(r) * p), lambda r, p: -np.exp(r))),
    Mistake("with the log-ratios over outcomes, not weighed", "kl-other", another(
        lambda r, p: np.sum(r - p, axis=1), lambda r, p: -1.0 + 0 * p)),
    Mistake("with the mean log-ratio over outcomes, not weighed", "kl-other", another(
        lambda r, p: np.mean(r - p, axis=1), lambda r, p: -1.0 / p.shape[-1] + 0 * p)),
    Mistake("with the KL's estimates no higher than {c}", "clipped", partial(clipped, True)),
    Mistake("with the KL's estimates no lower than {c}", "clipped", partial(clipped, False)),
    Mistake("with the batch's KL no higher than {c}", "clipped", partial(bounded, False)),
    Mistake("with the batch's KL no lower than {c}", "clipped", partial(bounded, True)),
    Mistake("with the KL detached", "gradient-lost", then(detached)),
    Mistake("with the KL on the chosen responses", "kl-other", of_sides("chosen")),
    Mistake("with the KL on the rejected responses", "kl-other", of_sides("rejected")),
    Mistake("with the KL on the pairs' responses", "kl-other", of_sides("chosen", "rejected")),
    Mistake("with 1 - gamma times the loss of pairs", "gamma-dropped",
        mixed(lambda g: 1 - g, lambda g: g)),
    Mistake("with gamma on the loss of pairs, not on the KL", "gamma-dropped",
        mixed(lambda g: g, lambda g: 1.0)),
    Mistake("with gamma on both", "gamma-dropped", mixed(lambda g: g, lambda g: g)),
    Mistake("with the first prompt's or sample's KL alone", "batch-sum", one_alone(0)),
    Mistake("with the last prompt's or sample's KL alone", "batch-sum", one_alone(-1)),
    Mistake("with gamma times the KL reported", "scale", then(
        lambda made, p, x: {"metrics": {"kl": p["gamma"] * made["metrics"]["kl"]}})),
    Mistake("with {c} times the KL reported", "scale", lambda f, c: then(
        lambda made, p, x: {"metrics": {"kl": c * made["metrics"]["kl"]}})(f)),
)
"""Mistakes that do not come with another."""
# fmt: on
