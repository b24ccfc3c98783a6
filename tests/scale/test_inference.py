import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Inputs
from scale.model import inference


@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 4), (3, 4), (4, 4), (5, 4), (9, 4), (7, 1)])
def test_over_batches_gives_each_row_once_and_in_order(monkeypatch, n, size):
    monkeypatch.setattr(inference, "ROWS", size)
    shapes = []

    def function(model, inputs):
        shapes.append(inputs.tokens.shape)
        return jnp.asarray(model * inputs.tokens)

    numbered = Inputs(*[np.arange(n)[:, None]] * 7)
    outputs = inference.over_batches(function, 10, numbered)
    assert type(outputs) is np.ndarray
    np.testing.assert_array_equal(outputs, 10 * np.arange(n)[:, None])
    assert shapes == [(min(size, n), 1)] * -(-n // size)


def test_blocks_that_are_there_are_not_computed_again(tmp_path, monkeypatch):
    """Three blocks of two batches of two rows; the first and the third are there."""
    monkeypatch.setattr(inference, "ROWS", 2)
    monkeypatch.setattr(inference, "BLOCK", 4)
    rows, seen = [], []

    def function(model, inputs):
        rows.extend(np.asarray(inputs.tokens)[:, 0].tolist())
        return jnp.asarray(model * inputs.tokens)

    def counted(items, label, status):
        for item in items:
            yield item
            seen.append((item, status().split()[1]))

    monkeypatch.setattr(inference, "track", counted)
    numbered = Inputs(*[np.arange(11)[:, None]] * 7)
    whole = inference.over_batches(function, 10, numbered, "x", tmp_path)
    np.testing.assert_array_equal(whole, 10 * np.arange(11)[:, None])
    assert seen == [(i, "rows/s") for i in range(0, 11, 2)]
    (tmp_path / "x-4-4/values.npy").unlink()
    rows.clear()
    seen.clear()
    again = inference.over_batches(function, 10, numbered, "x", tmp_path)
    np.testing.assert_array_equal(again, whole)
    assert rows == [4, 5, 6, 7] and len(seen) == 6
