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
