"""The compiled bandit study agrees with `reference/` on the same worlds."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference.section6 as ref
from minipref import section6
from minipref.methods import METHODS
from reference.methods import METHODS as REF_METHODS
from reference.worlds import Settings, draw_world, stacked

SMALL = Settings(prompts=6, responses=4, qualities=2, pairs=40)
BETAS = [0.1, 1.0]


@cache
def worlds():
    """One world at each of three rhos, stacked."""
    return stacked([draw_world(i, rho, SMALL) for i, rho in enumerate((0.2, 0.5, 0.8))])


@cache
def ref_rewards():
    """The reference's reward models of each world."""
    each = zip(*worlds(), strict=True)
    return np.stack([ref.reward_models(ref.World(*arrays)) for arrays in each])


def test_reward_models_agree():
    """In float64 to rounding: Newton's steps converge, so the order of sums does not matter."""
    with jax.enable_x64(True):
        ours = jax.vmap(section6.reward_models)(section6.World(*map(jnp.asarray, worlds())))
        np.testing.assert_allclose(ours, ref_rewards(), rtol=0, atol=1e-12)


@cache
def worlds_without_balance():
    """The same worlds with pairs in which no response wins as often as it loses.

    At each prompt, by a rotated order: 0 beats 1, 2 and 3; 1 beats 2 twice; 2 beats 3.
    """
    order = np.array([[0, 1], [0, 2], [0, 3], [1, 2], [1, 2], [2, 3]])
    pairs = np.array([[x, *(pair + x) % 4] for x in range(6) for pair in order])
    pairs = np.broadcast_to(pairs, (3, 36, 3))
    return worlds()._replace(pairs=pairs, subsets=worlds().subsets[..., :36])


def outcomes(worlds, name, dtype):
    """The study of one method, by minipref and by the reference."""
    theirs = ref.study(worlds, ref_rewards(), REF_METHODS[name], BETAS)
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(a, dtype if a.dtype.kind == "f" else None) for a in worlds]
        rewards, betas = jnp.asarray(ref_rewards(), dtype), jnp.array(BETAS, dtype)
        return section6.study(section6.World(*arrays), rewards, METHODS[name], betas), theirs


@pytest.mark.parametrize("name", METHODS)
def test_studies_agree_in_float64(name):
    """Every field of the outcome, at each rho and beta.

    50 steps of at most .3 nats, with rounding errors of 1e-16 in the slopes that Adam divides by
    slopes of 1e-3 and more: 1e-11 is expected, and 1e-9 leaves room.
    """
    ours, theirs = outcomes(worlds_without_balance(), name, "float64")
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_studies_agree_on_balanced_responses_up_to_what_adam_makes_of_rounding(name):
    """Where a response wins as often as it loses, the slopes of dpo and ipo at pi_ref sum to 0.

    Adam divides what rounding leaves of it by its own size, so the logit wanders by up to a few
    steps of .3. Such responses are few: it is 3e-3 of the advantage here.
    """
    ours, theirs = outcomes(worlds(), name, "float64")
    np.testing.assert_allclose(ours.advantage, theirs.advantage, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["dpo", "d-dpo", "mean"])
def test_studies_agree_in_float32(name):
    """The precision of the benchmark, for losses that are smooth in the policy.

    A minimum over reward models may select another one after a rounding error; it is compared in
    float64 alone. Rounding errors of 1e-7 divided by slopes of 1e-3, over 50 steps: 2e-3.
    """
    ours, theirs = outcomes(worlds_without_balance(), name, "float32")
    np.testing.assert_allclose(ours.advantage, theirs.advantage, rtol=0, atol=2e-3)


def test_a_study_in_batches_is_the_worlds_one_by_one():
    """More worlds than a batch holds, and not a multiple of it."""
    narrow = [jnp.asarray(a, "float32" if a.dtype.kind == "f" else None) for a in worlds()]
    many = section6.World(*(jnp.tile(a, (8,) + (1,) * (a.ndim - 1)) for a in narrow))
    rewards = jnp.tile(jnp.asarray(ref_rewards(), "float32"), (8, 1, 1, 1))
    together = section6.study(many, rewards, METHODS["d-dpo"], jnp.array(BETAS))
    assert together.advantage.shape == (24, 2) and section6.BATCH < 24
    for start in range(3, 24, 3):
        np.testing.assert_allclose(
            together.advantage[start : start + 3], together.advantage[:3], atol=1e-4
        )
