"""What `benchmarks.inference` computes of its passes, by hand."""

import numpy as np
import pytest

from benchmarks.inference import Options, Pass, flops, page, random_rows, summary
from scale.data.dataset import Limits
from scale.model.config import ModelConfig

CONFIG = ModelConfig(10, 2, 4, 2, 3, 5, num_kv_heads=1)


def test_flops_are_those_of_the_products_with_weights():
    """A layer: queries 4x6, keys and values 4x6, output 6x4, and three of 4x5; unembedding 10x4."""
    layer = 24 + 24 + 24 + 60
    assert flops(CONFIG, tokens=7, labels=3) == 2 * (2 * layer * 7 + 40 * 3)


def test_summary_has_median_speeds_and_their_ratio():
    rows = [([1, 2], [3], [4])] * 6
    rounds = [
        {"logps": (Pass(None, a), Pass(None, 6.0)), "sample": (Pass(12, a), Pass(6, 3.0))}
        for a in (1.0, 2.0, 3.0)
    ]
    found = summary(rows, rounds, rate=1e9)
    assert found["logps"]["minipref"] == [3.0, 2.0, 6.0]
    assert found["logps"]["ratio"] == [3.0, 2.0, 6.0]
    assert found["sample"]["transformers"] == [2.0, 2.0, 2.0]
    assert found["sample"]["ratio"] == [3.0, 2.0, 6.0]
    # 106,168,320 weights in SmolLM2's layers, 49,152 x 576 in its unembedding
    needed = 2 * (106_168_320 * 24 + 28_311_552 * 12) / 1e9
    assert found["logps"]["share of the floor"] == pytest.approx(needed / 2)
    needed = 2 * (106_168_320 * 24 + 28_311_552 * 12) / 1e9  # 12 of prompts and 12 sampled
    assert found["sample"]["share of the floor"] == pytest.approx(needed / 2)
    text = page(Options(), found | {"batch": {"logps": 4, "sample": 8}, "GFLOP/s": 90.0})
    assert "| log-probabilities, rows/s | 3 [2, 6] |" in text


def test_random_rows_are_within_the_limits():
    rows = random_rows(Options(rows=200, limits=Limits(100, 50)))
    lengths = np.array([[len(part) for part in row] for row in rows])
    assert (lengths <= [100, 50, 50]).all() and (lengths >= 8).all()
    assert 50 < np.median(lengths[:, 0]) < 70 and random_rows(Options(rows=200)) != rows
