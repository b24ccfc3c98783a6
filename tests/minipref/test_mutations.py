"""The hand values notice mistakes: each deliberate one in an objective fails one of them."""

import re
import runpy
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from minipref import objectives, simplex, weights

SOURCE = "\n".join(
    re.sub(r"^from minipref.*\n", "", Path(module.__file__).read_text(), flags=re.MULTILINE)
    for module in (simplex, weights, objectives)
)
HAND = runpy.run_path(str(Path(__file__).parents[1] / "reference" / "test_objectives.py"))["HAND"]
QUICK_FIRST = sorted(HAND, key=lambda hand: hand.name.startswith("hull"))

MUTATIONS = {
    "margin's sign flipped": (
        "(policy_chosen - ref_chosen) - (",
        "-(policy_chosen - ref_chosen) + (",
    ),
    "chosen and rejected swapped": (
        "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        "(policy_rejected - ref_rejected) - (policy_chosen - ref_chosen)",
    ),
    "reference ignored": ("(policy_chosen - ref_chosen)", "(policy_chosen)"),
    "references swapped": (
        "(policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
        "(policy_chosen - ref_rejected) - (policy_rejected - ref_chosen)",
    ),
    "preference's sign flipped": ("log_sigmoid(reward_margin)", "log_sigmoid(-reward_margin)"),
    "DPO without beta": ("bradley_terry(beta * margin)", "bradley_terry(margin)"),
    "distillation without beta": ("(reward_margin - beta * margin)", "(reward_margin - margin)"),
    "distillation with the margin's sign flipped": (
        "(reward_margin - beta * margin)",
        "(reward_margin + beta * margin)",
    ),
    "beta on the wrong side": (
        "(reward_margin - beta * margin)",
        "(beta * reward_margin - margin)",
    ),
    "distillation not squared": (
        "(reward_margin - beta * margin) ** 2",
        "abs(reward_margin - beta * margin)",
    ),
    "tau for 1/tau": ("(margin - 1.0 / tau)", "(margin - tau)"),
    "IPO's own tau": ("(margin - 1.0 / tau)", "(margin - 0.5 / tau)"),
    "mean over tokens": ("jnp.sum(jnp.where(mask", "jnp.mean(jnp.where(mask"),
    "mask ignored": ("jnp.where(mask, token_logps, 0.0)", "token_logps"),
    "mean over the ensemble": ("jnp.min(_model_losses", "jnp.mean(_model_losses"),
    "max over the ensemble": ("jnp.min(_model_losses", "jnp.max(_model_losses"),
    "farthest model": ("jnp.argmin(losses)", "jnp.argmax(losses)"),
    "sum over the batch": ("jnp.mean(jax.vmap(distillation", "jnp.sum(jax.vmap(distillation"),
    "minimum over pairs": ("jnp.mean(jax.vmap(distillation", "jnp.min(jax.vmap(distillation"),
    "hull's residuals without beta": (
        "return reward_margins - beta * margins",
        "return reward_margins - margins",
    ),
    "hull stuck at a corner": ("~(jnp.max(descent) > 4 * ridge)", "jnp.array(True)"),
    "KL reversed": ("jnp.exp(ref) * (ref - policy)", "jnp.exp(policy) * (policy - ref)"),
    "KL negated": ("jnp.exp(ref) * (ref - policy)", "jnp.exp(ref) * (policy - ref)"),
    "KL's zeros ignored": (
        "possible = jnp.exp(ref_logps) > 0",
        "possible = jnp.full(ref_logps.shape, True)",
    ),
    "sampled KL reversed": ("return ref_logp - policy_logp", "return policy_logp - ref_logp"),
    "gamma dropped": ("loss + gamma * kl", "loss + kl"),
    "KL dropped": ("loss + gamma * kl", "loss"),
    "pessimism's sign flipped": ("loss + gamma * kl", "loss - gamma * kl"),
    "RLHF with the forward KL": (
        "reverse_kl = forward_kl(policy_logps, ref_logps)",
        "reverse_kl = forward_kl(ref_logps, policy_logps)",
    ),
    "RLHF without beta": ("- beta * reverse_kl", "- reverse_kl"),
    "best reward model": ("jnp.min(jnp.mean(advantages", "jnp.max(jnp.mean(advantages"),
    "minimum inside the mean": (
        "jnp.min(jnp.mean(advantages, axis=-1))",
        "jnp.mean(jnp.min(advantages, axis=0))",
    ),
    "no baseline": ("rewards, beta) - reference", "rewards, beta)"),
}


def module(source):
    """The source as a module of its own."""
    fresh = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), vars(fresh))
    return fresh


def agrees(functions, hand):
    value = getattr(functions, hand.name)(*(jnp.asarray(arg) for arg in hand.args))
    return np.shape(value) == np.shape(hand.value) and np.allclose(
        value, hand.value, rtol=1e-5, atol=1e-6
    )


def test_the_source_itself_passes():
    assert all(agrees(module(SOURCE), hand) for hand in HAND)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_noticed(mutation):
    before, after = MUTATIONS[mutation]
    assert SOURCE.count(before) == 1
    mutant = module(SOURCE.replace(before, after))
    assert not all(agrees(mutant, hand) for hand in QUICK_FIRST)
