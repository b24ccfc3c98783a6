"""Signs that a run goes wrong: each is provoked, and each stays away where nothing is wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale.health import (
    LEAST_DIVERSITY,
    MOST_MARGIN,
    diversities,
    policy_signs,
    repetition,
    reward_signs,
    sample_signs,
    spike_signs,
)


def held_out(step, **metrics):
    return {"step": step} | {f"validation/{k.replace('_', '/')}": v for k, v in metrics.items()}


def test_a_run_without_signs():
    records = [held_out(0, logps_chosen=-100.0, kl=0.0, rewards_margins=0.0)]
    records += [{"step": 1, "rewards/margins": 9.0, "kl": 99.0, "logps/chosen": -300.0}]
    records += [held_out(2, logps_chosen=-109.0, kl=49.0, rewards_margins=4.9)]
    assert policy_signs(records, beta=0.1) == {}  # held-out rows count before the batches


@pytest.mark.parametrize(
    ("last", "beta", "sign"),
    [
        ({"rewards_margins": 5.1}, 0.1, "margins"),
        ({"kl": 50.1}, 0.1, "kl"),
        ({"kl": 10.1}, 0.5, "kl"),
        ({"logps_chosen": -110.1}, 0.1, "chosen"),
    ],
)
def test_each_sign_of_a_policy(last, beta, sign):
    first = {"logps_chosen": -100.0, "kl": 0.0, "rewards_margins": 0.0}
    records = [held_out(0, **first), held_out(7, **first | last)]
    assert list(policy_signs(records, beta)) == [sign]


def test_without_held_out_rows_the_batches_means_over_a_window_count():
    start = [{"step": i, "rewards/margins": 0.0, "logps/chosen": -100.0} for i in range(1, 31)]
    noise = [{"step": 31, "rewards/margins": 60.0, "logps/chosen": -100.0}]
    assert policy_signs(start + noise, 0.1) == {}  # 60 / 20 steps
    end = [{"step": 31 + i, "rewards/margins": 6.0, "logps/chosen": -130.0} for i in range(20)]
    assert list(policy_signs(start + end, 0.1)) == ["margins", "chosen"]


def rising_and_falling(n):
    """Losses between 1 and 2, gradients of two models."""
    return [
        {"step": i, "loss": 1 + i % 2, "grad_norm": np.array([1.0, 1 + i % 2])} for i in range(n)
    ]


def test_a_spike_is_above_five_ranges_of_the_window():
    """Of values between 1 and 2 the bound is 2 + 5 (2 - 1) = 7."""
    records = rising_and_falling(30)
    assert spike_signs(records, 30) == {}
    for name, value in (("loss", 7.1), ("grad_norm", np.array([7.1, 0.0]))):
        spiked = [*records, {"step": 30} | records[-1] | {"step": 30, name: value}]
        [(sign, sentence)] = spike_signs(spiked, 1).items()
        assert (
            sign == f"{name} at 30" and "is 7.1 at step 30, at most 2 in the 20 steps" in sentence
        )
        assert spike_signs(spiked + records[:5], 5) == {}  # it was looked at before
        spiked[-1][name] = value - 0.2
        assert spike_signs(spiked, 1) == {}


def test_a_spike_needs_a_window_before_it():
    records = rising_and_falling(20)
    early = [*records[:19], records[19] | {"loss": 1e9}]
    assert spike_signs(early, 20) == {}
    constant = [{"step": i, "loss": 1.0} for i in range(20)] + [{"step": 20, "loss": 1.9}]
    assert spike_signs(constant, 21) == {}  # it has to be twice the largest too


@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    st.lists(st.floats(0, 1), min_size=6, max_size=6),
    st.floats(0.01, 10),
)
def test_the_policy_of_eq_1_is_never_further_than_the_limit(weights, rewards, beta):
    """KL(pi_ref || pi*) <= (max r - min r) / beta, in exact arithmetic of a small world."""
    ref = np.array(weights) / sum(weights)
    r = MOST_MARGIN * np.array(rewards[: len(ref)])
    best = np.log(ref) + r / beta
    best -= np.logaddexp.reduce(best)
    assert (ref * (np.log(ref) - best)).sum() <= np.ptp(r) / beta + 1e-9


def test_reward_models_no_better_than_the_longer_or_the_shorter_response():
    assert reward_signs([0.61, 0.7], 0.6, 100) == {}
    [text] = reward_signs([0.61, 0.6], 0.6, 100).values()
    assert "reward model 2: no better than picking the longer response (0.60;" in text
    assert "accuracies 0.61, 0.60 on 100 held-out pairs" in text
    [text] = reward_signs([0.69, 0.5], 0.3, 64).values()
    assert "reward models 1, 2: no better than picking the shorter response (0.70;" in text


def test_repetition_and_diversity_by_hand():
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4, 5]]) == pytest.approx(1 / 6)
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0  # in the same sample alone
    assert repetition([[1, 2]]) == 0.0
    # (1,2) (2,3) | (1,2) (2,3) against (1,2) (2,1) (1,2) (2,5): the first four of each
    assert diversities([[1, 2, 3], [1, 2, 3]], [[1, 2, 1, 2, 5, 6, 7]]) == [0.5, 0.75]


def test_samples_that_repeat_themselves_or_each_other():
    rng = np.random.default_rng(0)
    varied = rng.integers(1000, size=(20, 30)).tolist()
    assert sample_signs("policy", varied, varied[::-1]) == {}
    stuck = [[*row[:10], *[row[0], row[1]] * 10] for row in varied]
    assert list(sample_signs("policy", stuck, varied)) == ["repetition", "diversity"]
    same = [varied[0]] * 20
    [text] = sample_signs("policy", same, varied).values()
    assert "the samples of policy resemble each other" in text
    share = diversities(same, varied)
    assert share[0] < LEAST_DIVERSITY * share[1]
