"""`python -m benchmarks.figures` writes its four pictures."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

MAIN = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "figures.py"))["main"]


@pytest.mark.slow
def test_four_readable_pictures(tmp_path):
    MAIN(tmp_path)
    names = {"figure1.png", "bag_of_words.png", "figure_b2.png", "maximin.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        picture = imread(path)[..., :3]
        assert (
            min(picture.shape[:2]) > 500 and 0.02 < np.mean(picture < 0.9) < 0.6
        )  # ink, and paper
