import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Batch
from scale.model import inference


def counted(n):
    return Batch(*[np.arange(n)[:, None]] * 7, np.arange(n, dtype=np.float32)[:, None], np.zeros((n, 2, 1), np.float32))


@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 4), (3, 4), (4, 4), (5, 4), (9, 4), (7, 1)])
def test_over_batches_gives_each_row_once_and_in_order(monkeypatch, n, size):
    monkeypatch.setattr(inference, "BATCH", size)
    shapes = []

    def function(model, batch):
        shapes.append(batch.tokens.shape)
        return jnp.asarray(model * batch.tokens)

    found = inference.over_batches(function, 10, counted(n))
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, 10 * np.arange(n)[:, None])
    assert shapes == [(size, 1)] * -(-n // size)
