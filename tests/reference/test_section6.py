"""The bandit study, against values by hand, closed forms and the definition of D_rho."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from reference import loglinear, section6, tabular, worlds
from reference.methods import METHODS
from reference.worlds import BIASES, Settings, World

SMALL = Settings(prompts=6, responses=4, qualities=2, pairs=40)
LN2, LN3 = math.log(2), math.log(3)


def world_of(ref_logps, rewards, pairs, subsets=None):
    """A world whose reward models see one column for each response."""
    ref_logps, pairs = np.asarray(ref_logps), np.asarray(pairs)
    features = np.eye(ref_logps.size).reshape(*ref_logps.shape, -1)
    subsets = np.ones((5, len(pairs))) if subsets is None else subsets
    return World(ref_logps, np.asarray(rewards), features, pairs, subsets)


# worlds


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_d_rho_and_its_subsets_have_exactly_their_length_biases(rho):
    world = worlds.draw_world(3, rho, SMALL)
    lengths = world.features[..., 2]
    longer = np.array([lengths[x, chosen] > lengths[x, other] for x, chosen, other in world.pairs])
    assert len(longer) == 40 and longer.sum() == round(40 * rho)
    for subset, bias in zip(world.subsets, BIASES, strict=True):
        kept = longer[subset == 1]
        # the largest subset: one kind of pair is used up
        assert kept.sum() == round(bias * len(kept))
        assert kept.sum() >= longer.sum() - 1 or (~kept).sum() >= (~longer).sum() - 1


def test_sizes_of_the_subsets_by_hand():
    """32 of 160 pairs are longer: at b .2 all, at b .8 the 32 and 8 others; sizes 160, .., 40."""
    world = worlds.draw_world(0, 0.2, Settings())
    assert world.subsets.sum(axis=1).tolist() == [160, 80, 64, 53, 40]


def test_worlds_of_one_seed_differ_in_d_rho_alone():
    low, high = (worlds.draw_world(5, rho, SMALL) for rho in (0.2, 0.8))
    other = worlds.draw_world(6, 0.2, SMALL)
    for i in range(3):
        np.testing.assert_array_equal(low[i], high[i])
        assert not np.array_equal(low[i], other[i])
    assert not np.array_equal(low.pairs, high.pairs)


def test_an_impossible_share_is_refused():
    longer = np.array([True, False, False, False])
    with pytest.raises(ValueError, match="1 prefer the longer"):
        worlds.biased_subset(np.random.default_rng(0), longer, 0.5, 4)


def test_a_reward_is_what_the_settings_say():
    """Without a part of its own it is linear in the features, with the weight of length last."""
    settings = SMALL._replace(idiosyncrasy=0.0, length_weight=2.0)
    world = worlds.draw_world(1, 0.5, settings)
    features = world.features.reshape(-1, 3)
    taste, residual, _, _ = np.linalg.lstsq(features, world.rewards.ravel())
    assert residual < 1e-20
    np.testing.assert_allclose([np.linalg.norm(taste[:2]), taste[2]], [1, 2], rtol=1e-12)


def test_pairs_follow_the_reference_and_bradley_terry():
    """Two prompts of three responses: frequencies of 200,000 draws, within 5 standard errors."""
    ref = np.log([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    rewards = np.array([[0.0, LN3, 0.0], [0.0, 0.0, -LN2]])
    pairs = worlds.draw_pairs(np.random.default_rng(0), ref, rewards, 200_000)
    assert not (pairs[:, 1] == pairs[:, 2]).any()
    # prompt 0: unordered pairs .15, .10, .06 of .31; response 1 beats response 0 with 3/4
    expected = {
        (0, 1, 0): 0.5 * 0.15 / 0.31 * 3 / 4,
        (0, 0, 2): 0.5 * 0.10 / 0.31 / 2,
        (1, 2, 0): 0.5 * 0.12 / 0.28 / 3,
    }
    for cell, share in expected.items():
        error = math.sqrt(share * (1 - share) / 200_000)
        assert abs((pairs == cell).all(axis=1).mean() - share) < 5 * error


# reward models


def test_a_reward_model_of_one_feature_against_a_root():
    """3 wins and 1 loss by 1 unit: 3 sigmoid(-t) - sigmoid(t) = ridge t."""
    differences = np.array([[1.0], [1.0], [1.0], [-1.0], [-7.0]])
    included = np.array([1.0, 1.0, 1.0, 1.0, 0.0])
    root = brentq(lambda t: 3 / (1 + math.exp(t)) - 1 / (1 + math.exp(-t)) - 0.3 * t, 0, 5)
    theta = section6.fit_reward_model(differences, included, ridge=0.3)
    np.testing.assert_allclose(theta, [root], rtol=1e-12)


def test_a_reward_model_without_a_prior_is_the_log_odds():
    """The closed form of the same pairs: theta = log(3 / 1)."""
    theta = section6.fit_reward_model(np.array([[1.0]] * 3 + [[-1.0]]), np.ones(4), ridge=1e-14)
    np.testing.assert_allclose(theta, [LN3], rtol=1e-12)


def test_a_reward_model_against_a_general_minimiser():
    rng = np.random.default_rng(2)
    differences, included = rng.normal(size=(50, 4)), (rng.random(50) < 0.6).astype(float)

    def loss(theta):
        return included @ np.logaddexp(0, -differences @ theta) + theta @ theta / 2

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(section6.fit_reward_model(differences, included), best, atol=1e-6)


def test_the_first_reward_model_reads_d_rho_and_the_others_their_subsets():
    """One prompt, two responses; all pairs but the first prefer response 1."""
    pairs = [[0, 0, 1], [0, 1, 0], [0, 1, 0]]
    subsets = np.zeros((5, 3))
    subsets[0, 0] = 1
    rewards = section6.reward_models(world_of(np.log([[0.5, 0.5]]), [[0.0, 0.0]], pairs, subsets))
    single, against, *nothing = rewards[:, 0, 0] - rewards[:, 0, 1]
    assert single < 0 < against and nothing == [0, 0, 0, 0]


# policies


def test_the_advantage_by_hand():
    """pi = (3/4, 1/4) where pi_ref is even, rewards (2, -1): 3/4 - 1/4 times 3, halved: 3/4."""
    world = world_of(np.log([[0.5, 0.5]]), [[2.0, -1.0]], [[0, 0, 1]])
    models = np.array([[[0.0, 0.0]], [[5.0, 0.0]], [[1.0, 0.0]], *[[[-1.0, 0.0]]] * 3])
    outcome = section6.evaluate(world, models, np.log([[0.75, 0.25]]), 1.0)  # h = ln 3
    values = [float(value) for value in outcome[:5]]
    forward, reverse = LN2 - LN3 / 2, 0.75 * LN3 - LN2
    np.testing.assert_allclose(values, [0.75, forward, reverse, LN3 - 2 * LN2, -2 * LN2], 1e-12)
    assert outcome.selected.tolist() == outcome.nearest.tolist() == [0, 1, 0, 0, 0]


def test_the_reference_has_no_advantage():
    world = worlds.draw_world(0, 0.5, SMALL)
    models = section6.reward_models(world)
    for method in METHODS.values():
        policy = section6.train(world, models, method, 0.3, steps=0)
        outcome = section6.evaluate(world, models, policy, 0.3)
        assert abs(outcome.advantage) < 1e-15 and abs(outcome.forward_kl) < 1e-15


@pytest.mark.parametrize("name", METHODS)
def test_the_first_step_of_adam_moves_each_logit_by_the_rate_against_the_loss(name):
    """Adam's first step is rate sign(slope); the slope is by central differences of the loss.

    A response that is in no pair stays where it is.
    """
    world = worlds.draw_world(0, 0.5, SMALL)
    models, method = section6.reward_models(world), METHODS[name]
    rewards = models[section6.MODELS[method.rewards]]
    problem = tabular.problem(world.ref_logps, world.pairs, rewards)
    units = 1e-6 * np.eye(24).reshape(24, 6, 4)

    def loss(point):
        return loglinear.loss(problem, method, point, 0.3, 0.0)

    slopes = [loss(world.ref_logps + u) - loss(world.ref_logps - u) for u in units]
    signs = np.sign(np.round(slopes, 11)).reshape(6, 4)
    policy = section6.train(world, models, method, 0.3, rate=0.1, steps=1)
    expected = loglinear.log_softmax(world.ref_logps - 0.1 * signs)
    np.testing.assert_allclose(policy, expected, atol=1e-5)


def test_long_training_of_d_dpo_reaches_the_optimal_policy():
    """Where pairs connect all responses, beta h = rho on each pair: Eq. 3 (Theorem 1)."""
    world = world_of(
        np.log([[0.5, 0.3, 0.2]]), [[0.0, 0.0, 0.0]], [[0, 0, 1], [0, 2, 1], [0, 1, 2]]
    )
    models = np.array([[[1.0, 0.2, -0.5]]])
    policy = section6.train(world, models, METHODS["d-dpo"], 0.5, rate=0.03, steps=3000)
    optimum = tabular.optimal_policy(world.ref_logps, models[0], 0.5)
    np.testing.assert_allclose(policy, optimum, atol=1e-6)


def test_gamma_pulls_the_policy_back():
    """dp-DPO of one pair, at the optimum: 2 beta (rho - beta h) = gamma (pi - pi_ref)."""
    world = world_of(np.log([[0.5, 0.5]]), [[0.0, 0.0]], [[0, 0, 1]])
    method = METHODS["dp-dpo"]._replace(gamma=(0.4, 0.4))
    models = np.array([[[1.0, 0.0]]])
    policy = section6.train(world, models, method, 0.5, rate=0.03, steps=3000)
    h = brentq(lambda h: (1 - 0.5 * h) - 0.4 * (1 / (1 + math.exp(-h)) - 0.5), 0, 2)
    np.testing.assert_allclose(policy[0, 0] - policy[0, 1], h, atol=1e-6)


def test_a_study_is_each_world_at_each_beta():
    both = [worlds.draw_world(seed, 0.2, SMALL) for seed in (0, 1)]
    models = np.stack(list(map(section6.reward_models, both)))
    method, betas = METHODS["e-dpo"], [0.1, 1.0, 3.0]
    outcome = section6.study(worlds.stacked(both), models, method, betas)
    assert outcome.advantage.shape == (2, 3) and outcome.nearest.shape == (2, 3, 5)
    policy = section6.train(both[1], models[1], method, 3.0)
    alone = section6.evaluate(both[1], models[1], policy, 3.0)
    for together, value in zip(outcome, alone, strict=True):
        np.testing.assert_array_equal(together[1, 2], value)


# the command


def test_help_explains_and_runs_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "reference.section6", "--help"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert "64 random worlds" in done.stdout and "DPO  " not in done.stdout


def test_the_table_has_every_method_at_every_rho(monkeypatch, capsys):
    """Of few worlds: the beta comes from the first half, the advantage from the second."""
    monkeypatch.setattr(section6, "TABLE_WORLDS", 4)
    monkeypatch.setattr(section6, "Settings", lambda: SMALL)
    assert section6.main([]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row[5:21].strip() for row in rows] == [m.label for m in METHODS.values()] * 3
    four = [worlds.draw_world(seed, 0.2, SMALL) for seed in range(4)]

    def advantages(seeds, beta):
        chosen = [four[seed] for seed in seeds]
        models = np.stack(list(map(section6.reward_models, chosen)))
        table = section6.study(worlds.stacked(chosen), models, METHODS["d-dpo"], [beta])
        return np.mean(table.advantage)

    beta = max((0.1, 0.3, 1.0), key=lambda beta: advantages((0, 1), beta))
    assert rows[2].split()[2:4] == [f"{beta:g}", f"{advantages((2, 3), beta):+.3f}"]
