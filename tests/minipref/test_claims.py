"""The reference's claims hold for `minipref`: its functions stand in for the reference's own.

This holds for every function that the two share. A claim's own arithmetic, and the exact solvers
that the reference alone has, stay in float64.
"""

import inspect
import sys
from functools import cache, partial
from types import FunctionType, ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref import bag_of_words, bandit, loglinear, methods, objectives, tabular
from reference import claims, errata
from reference.__main__ import CLAIMS
from reference.instances import draw

OURS = {
    f"reference.{each.__name__.split('.')[1]}": each
    for each in (bag_of_words, bandit, loglinear, objectives, tabular)
}
HOLD = list(dict.fromkeys(claim.function for claim in CLAIMS if claim.counterexample is None))
BY_DIFFERENCES = [  # of 1e-4, which float32 loses; `test_settings` has their derivatives in float32
    claims.gradients_are_slopes,
    claims.ipo_and_pessimistic_dpo_agree,
    claims.pessimistic_dpo_on_arms,
]
ONE_POLICY = {
    "problem",
    "all_pairs",
}  # of `tabular`; the rest of it, and the objectives, are of one example
ROUNDING = {
    "float32": 3e-5,
    "float64": 0.0,
}  # relative to 1 + the size of the values: 500 roundings
is_static = lambda leaf: isinstance(leaf, (int, methods.Method))  # noqa: E731


def narrow(dtype, leaf):
    """Floats become `dtype`; methods and Python's integers stay as they are: they are static."""
    if is_static(leaf):
        return leaf
    return np.asarray(leaf, dtype if np.asarray(leaf).dtype.kind == "f" else None)


def widen(leaf):
    return np.asarray(leaf, float if jnp.issubdtype(leaf.dtype, jnp.floating) else None)


def over_examples(function):
    """`function` over any leading axes of its arguments; jaxtyping's annotations name the rest."""
    signature = inspect.signature(function)
    annotations = [
        *(each.annotation for each in signature.parameters.values()),
        signature.return_annotation,
    ]
    axes = [
        "(" + getattr(each, "dim_str", "").replace("*batch", "").strip().replace(" ", ",") + ")"
        for each in annotations
    ]
    return jnp.vectorize(function, signature=f"{','.join(axes[:-1])}->{axes[-1]}")


@cache
def substitute(function, dtype):
    """minipref's function of the same module and name, if there is one, jitted: NumPy to NumPy."""
    module = OURS.get(function.__module__)
    found = getattr(module, function.__name__, None)
    if found is None:
        return function
    if module is objectives or (module is tabular and function.__name__ not in ONE_POLICY):
        found = over_examples(found)

    def call(*args):
        args = jax.tree.map(
            partial(narrow, dtype),
            [np.array(a) if isinstance(a, list) else a for a in args],
            is_leaf=is_static,
        )
        static = tuple(i for i, arg in enumerate(args) if is_static(arg))
        return jax.tree.map(widen, jax.jit(found, static_argnums=static)(*args))

    return call


def swapped(value, dtype):
    """A name of a claims' module: the reference's functions, and modules of such, replaced."""
    if isinstance(value, FunctionType):
        return substitute(value, dtype)
    if isinstance(value, ModuleType) and value.__name__ in OURS:
        return SimpleNamespace(
            **{name: swapped(each, dtype) for name, each in vars(value).items() if callable(each)}
        )
    return value


def about_minipref(monkeypatch, dtype):
    """`claims` and `errata` get minipref's functions and methods and allow the dtype's rounding."""
    identity, at_most = claims.identity, claims.at_most
    allowances = {
        "identity": lambda measured, expected, tolerance=1e-9: identity(
            measured, expected, max(tolerance, ROUNDING[dtype])
        ),
        "at_most": lambda measured, bound, slack=1e-9: at_most(
            measured, bound, max(slack, ROUNDING[dtype]) if slack >= 0 else slack
        ),
        "METHODS": methods.METHODS,
    }
    defined = {getattr(claims, name).__module__ for name in claims.__all__}
    for module in (*(sys.modules[name] for name in defined), errata):
        for name, value in list(vars(module).items()):
            monkeypatch.setattr(module, name, allowances.get(name, swapped(value, dtype)))


@pytest.mark.parametrize("claim", HOLD, ids=lambda claim: claim.__name__)
def test_claim_holds(claim, monkeypatch):
    dtype = "float64" if claim in BY_DIFFERENCES else "float32"
    about_minipref(monkeypatch, dtype)
    with jax.enable_x64(dtype == "float64"):
        for seed in range(3):
            evidence = claim(**draw(claim, np.random.default_rng(seed)))
            assert evidence.margin >= 0, (seed, evidence)


@pytest.mark.parametrize("erratum", errata.ERRATA, ids=lambda erratum: erratum.printed.__name__)
def test_counterexample_refutes(erratum, monkeypatch):
    """In float64, where no rounding is allowed that could pass for a refutation or hide one."""
    about_minipref(monkeypatch, "float64")
    with jax.enable_x64():
        assert erratum.printed(**erratum.counterexample).margin < 0


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 3.0), (1.0, 1.5), (30.0, 100.0)])
def test_ipo_and_pessimistic_dpo_agree(beta, alpha):
    """In float32, at IPO's 0, h = 1 / tau = log(alpha - 1) / beta, DPO has slope -beta / alpha."""
    h = np.log(alpha - 1) / beta
    assert float(jax.grad(objectives.dpo)(h, beta)) == pytest.approx(-beta / alpha, rel=1e-5)
    assert float(objectives.ipo(h, 1 / h)) == pytest.approx(0, abs=1e-10)
