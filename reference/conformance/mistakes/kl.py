"""Mistakes in the KL of pessimistic losses, on samples or on whole distributions."""

from collections.abc import Callable

import numpy as np

from reference.conformance.mistakes.mistake import Function, Mistake, Values, at
from reference.objectives import forward_kl

KINDS = ("sample", "distribution")


def another(kl_of: Callable, slope_of: Callable) -> Callable[[Function], Function]:
    """Another KL of (ref, policy), with its slope in policy; its mean over prompts or samples."""

    def change(function: Function) -> Function:
        def mistaken(params: Values, inputs: Values) -> Values:
            made, gamma = function(params, inputs), params["gamma"]
            name = next(name for name in made["grads"] if name.split("_")[1] in KINDS)
            ref, policy = inputs[name.replace("policy", "ref")], inputs[name]
            kl, slope = np.mean(kl_of(ref, policy)), slope_of(ref, policy) / len(ref)
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


def added(function: Function) -> Function:
    """The KLs of prompts or samples are added, not averaged."""

    def mistaken(params: Values, inputs: Values) -> Values:
        names = ("ref_sample_logps", "ref_distribution_logps")
        number = next(len(inputs[name]) for name in names if name in inputs)
        made = function(params | {"gamma": number * params["gamma"]}, inputs)
        return made | {"metrics": {"kl": number * made["metrics"]["kl"]}}

    return mistaken


def scaled(factor: Callable[[Values], float]) -> Callable[[Function], Function]:
    """gamma times a factor of the other parameters."""

    def change(function: Function) -> Function:
        return lambda p, x: function(p | {"gamma": p["gamma"] * factor(p)}, x)

    return change


def weighted(ref: np.ndarray, policy: np.ndarray) -> np.ndarray:
    return np.exp(policy - ref) * (policy - ref)


# fmt: off
KL = (
    Mistake("with the KL subtracted", "kl-sign", at(gamma=lambda g: -g)),
    Mistake("with the KL negated", "kl-sign", negated),
    Mistake("with the KL's estimates clipped at 0", "kl-sign", another(
        lambda r, p: np.maximum(r - p, 0.0), lambda r, p: -1.0 * (r > p))),
    Mistake("at gamma 1: gamma is dropped", "gamma-dropped", at(gamma=lambda g: 1.0)),
    Mistake("without the KL", "gamma-dropped", another(lambda r, p: 0.0, lambda r, p: 0 * r)),
    Mistake("at gamma squared", "gamma-dropped", at(gamma=lambda g: g * g)),
    Mistake("at 1 / gamma", "gamma-dropped", at(gamma=lambda g: 1 / g)),
    Mistake("at 1 - gamma", "gamma-dropped", at(gamma=lambda g: 1 - g)),
    Mistake("at gamma beta", "gamma-dropped", scaled(lambda p: p["beta"])),
    Mistake("at gamma / beta", "gamma-dropped", scaled(lambda p: 1 / p["beta"])),
    Mistake("at {c} gamma", "gamma-dropped", lambda f, c: at(gamma=lambda g: c * g)(f)),
    Mistake("at gamma {c}, whatever the case says", "gamma-dropped",
        lambda f, c: at(gamma=lambda g: c)(f)),
    Mistake("with the KL added over prompts or samples", "batch-sum", added),
    Mistake("with the KL reversed", "kl-reversed", another(
        lambda r, p: forward_kl(p, r), reversed_slopes)),
    Mistake("with the KL reversed where the reference allows it", "kl-reversed", another(
        summed(reversed_terms), reversed_slopes)),
    Mistake("with the KL reversed by importance weights", "kl-reversed", another(
        weighted, lambda r, p: np.exp(p - r) * (p - r + 1))),
    Mistake("with half of the squared log-ratio for the KL", "kl-sign", another(
        lambda r, p: (r - p) ** 2 / 2, lambda r, p: p - r)),
    Mistake("with pi/pi_ref - 1 - log(pi/pi_ref) for the KL", "kl-sign", another(
        lambda r, p: np.expm1(p - r) - (p - r), lambda r, p: np.expm1(p - r))),
    Mistake("with |log-ratio| for the KL", "kl-sign", another(
        lambda r, p: np.abs(r - p), lambda r, p: np.sign(p - r))),
    Mistake("with the KL averaged over outcomes", "kl-sign", another(
        lambda r, p: forward_kl(r, p) / r.shape[-1], lambda r, p: -np.exp(r) / r.shape[-1])),
    Mistake("with 0 log 0 as NaN", "zero-probability", another(
        lambda r, p: np.sum(np.exp(r) * (r - p), axis=-1), lambda r, p: -np.exp(r))),
)
# fmt: on
