"""`benchmarks.growth`: the arithmetic of its floor and of its allowance, and what it writes."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks import growth
from benchmarks.work import OPTIMIZER, SCHEDULE, Work, batch_for, first_state, matmul_work
from scale.model.config import ModelConfig
from scale.plan.hlo import count
from scale.train.steps import policy_step

pytestmark = pytest.mark.slow

LLAMA = ModelConfig(
    40, 3, 24, 6, 4, 56, num_kv_heads=2, block="sequential", norm="rms", scaled_logits=False
)
PALM = ModelConfig(40, 3, 24, 6, 4, 56)
GIB = 2**30


@pytest.mark.parametrize("model", [LLAMA, PALM])
@pytest.mark.parametrize(("method", "responses"), [("dpo", 2), ("e-dpo", 3)])
def test_flops_are_those_of_the_compiled_step(model, method, responses):
    work = Work(model, batch=2, prompt=16, response=8, num_reward_models=3)
    state = jax.eval_shape(lambda: first_state(work))
    batch = batch_for(method, work)
    compiled = policy_step.lower(method, OPTIMIZER, SCHEDULE, state, batch).compile()
    positions = 16 + 8 * responses
    # The column of ones of `scale.model.attention.plain`.
    ones = 3 * 2 * work.batch * model.num_layers * model.num_heads * positions**2
    norms = model.num_layers * (1 if model.block == "parallel" else 2) + 1
    # The sums of `scale.model.layers.times`.
    ones += 2 * work.batch * positions * model.d_model * norms
    assert matmul_work(work, responses) + ones == count(compiled.as_text(), {"data": 1}).flops


def test_flops_by_hand():
    """Multiply-adds of one row of 8 + 3 x 4 positions, with 12 labels.

    Projections, then attention over 20 x 20 positions, then the labels.
    """
    layer = 20 * (24 * 24 + 24 * 16 + 24 * 112 + 24 * 24 + 56 * 24) + 2 * 6 * 20 * 20 * 4
    assert matmul_work(Work(LLAMA, 5, 8, 4), 3) == 3 * 2 * 5 * (3 * layer + 12 * 24 * 40)


@pytest.mark.parametrize(("vocab_size", "positions"), [(40, 60), (2**20, 32)])
def test_allowance_by_hand(vocab_size, positions):
    """5 x 3 x 4 labels, or as many as have 2^25 logits."""
    block = 2 * 24 + 24 * 24 + 24 * 16 + 24 * 112 + 24 * 24 + 56 * 24
    params = vocab_size * 24 + 3 * block + 24
    work = Work(replace(LLAMA, vocab_size=vocab_size), 5, 8, 4)
    assert growth.allowance(work) * GIB == 4 * (4 * params + 2 * positions * vocab_size)


@pytest.mark.parametrize(("extra", "verdict"), [(0, "pass: 0 MiB"), (33, "FAIL: 33 MiB")])
def test_a_run_with_made_up_costs(tmp_path, monkeypatch, extra, verdict):
    """Each case reaches half of its best rate.

    Memory is the allowance, with `extra` MiB more at the largest vocabulary.
    """

    def made_up(measure, method, work):
        more = extra / 1024 if work.model.vocab_size == 2**18 else 0.0
        seconds = matmul_work(work, 2 if method == "dpo" else 3) / 50e9
        return growth.Cost(seconds, 1.0, 1.0 + growth.allowance(work) + more, 100e9)

    monkeypatch.setattr(growth, "in_new_process", made_up)
    growth.main(tmp_path)
    text = (tmp_path / "growth.md").read_text()
    assert verdict in text and text.count("| 50% |") == 5 + 5 + 6 + 5 + 5 + 2
    picture = imread(tmp_path / "growth.png")[..., :3]
    assert min(picture.shape[:2]) > 500 and 0.01 < np.mean(picture < 0.9) < 0.6  # ink, and paper
