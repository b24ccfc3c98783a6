"""The side-by-side benchmark: the libraries do the same work, and its arithmetic."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers.shapes import SHAPES, random_rows, save
from benchmarks.peers.work import load
from scale.data.packing import TokenizedRows
from scale.data.tokenizer import SMALLEST, train_tokenizer

pytestmark = pytest.mark.slow

TINY = replace(
    SHAPES["miniature"],
    model=replace(SHAPES["miniature"].model, num_layers=1, vocab_size=SMALLEST + 40),
    batch=2,
    rows=("short",),
)
RATIOS = ("pairs_per_second", "tokens_per_second", "peak_memory")


def passes(*rounds, memory):
    """Two passes of warm-up, which do not count, and then these seconds."""
    return [
        {"seconds": s, "memory": memory, "losses": [1.0], "device": "cpu"}
        for s in (99.0, 99.0, *rounds)
    ]


def test_ratios_by_hand():
    """Rounds of 6 / 2, 8 / 4 and 5 / 1 seconds: 3, 2 and 5 times as fast, in 3 of 12 GiB."""
    found = peers.ratios(
        {"trl": passes(6.0, 8.0, 5.0, memory=12.0), "minipref": passes(2.0, 4.0, 1.0, memory=3.0)}
    )
    assert found == {
        "trl": {
            "pairs_per_second": 3.0,
            "pairs_per_second_range": [2.0, 5.0],
            "tokens_per_second": 3.0,
            "tokens_per_second_range": [2.0, 5.0],
            "peak_memory": 0.25,
        }
    }


def test_speeds_by_hand():
    """24 pairs of 600 tokens in a median of 4 seconds."""
    found = peers.summary(passes(2.0, 4.0, 8.0, memory=3.0), pairs=24, tokens=600)
    assert (found["pairs_per_second"], found["tokens_per_second"], found["peak_memory_gib"]) == (
        6.0,
        150.0,
        3.0,
    )
    assert (found["warm_up_seconds"], found["seconds"]) == ([99.0, 99.0], [2.0, 4.0, 8.0])


def test_disagreement_names_both_losses():
    with pytest.raises(ValueError, match=r"0\.5 in tunix and 0\.6002 in trl"):
        peers.require_agreement(
            {"trl": [0.6002, 0.0], "tunix": [0.5, 0.0], "minipref": [0.6, 0.0]}, 1e-4
        )
    peers.require_agreement({"trl": [0.60005, 9.0], "tunix": [0.6, 0.0]}, 1e-4)


def test_work_is_read_as_written(tmp_path):
    tokens = TokenizedRows(np.arange(28, dtype=np.int32), np.cumsum([3, 2, 2] * 4).reshape(4, 3))
    save(tmp_path, TINY, train_tokenizer([], SMALLEST), tokens, "float32")
    work = load(tmp_path)
    prompts, chosen, rejected = work.parts
    np.testing.assert_array_equal(
        np.concatenate([prompts[1], chosen[1], rejected[1]]), tokens.ids[7:14]
    )
    assert [len(side) for side in (prompts[3], chosen[3], rejected[3])] == [3, 2, 2]
    np.testing.assert_allclose(work.ref_logps, -2 * np.log(TINY.model.vocab_size), rtol=1e-6)
    assert (work.steps, work.dtype) == (2, "float32")


def test_random_rows_are_a_quarter_as_long_up_to_as_long():
    lengths = random_rows(300, (8, 3), 500).lengths
    assert (lengths.min(0).tolist(), lengths.max(0).tolist()) == ([2, 1, 1], [8, 3, 3])


def test_all_three_do_the_same_work(monkeypatch, capsys):
    """Four pairs of unequal lengths, two a step.

    The libraries run in processes of their own: they warn when they are imported.
    """
    missing = [name for name in ("trl", "tunix") if not find_spec(name)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; see benchmarks/README.md")
    monkeypatch.setitem(peers.SHAPES, "miniature", TINY)
    monkeypatch.setattr(peers, "rows_of", lambda *_: (train_tokenizer([], SMALLEST), uneven()))
    peers.main(peers.Options(shapes=("miniature",), pairs=4, rounds=1, json=True))
    found = json.loads(capsys.readouterr().out)
    losses = list(found["losses"]["miniature short"].values())
    np.testing.assert_allclose(losses, losses[:1] * 3, atol=1e-4)
    assert min(abs(loss - np.log(2)) for loss in losses[0]) > 1e-2  # or any weights would do
    assert set(found) == {"ratios", "shapes", "losses", "rounds", "dtype", "machine", "versions"}
    assert found["ratios"] == found["shapes"]["miniature short"]["ratios"]
    assert all(found["ratios"][peer][name] > 0 for peer in ("trl", "tunix") for name in RATIOS)
    assert peers.table(found).count("\n| miniature short |") == 3


def uneven():
    rng = np.random.default_rng(1)
    ends = np.cumsum(rng.integers(3, 20, (4, 3)))
    return TokenizedRows(
        rng.integers(SMALLEST, TINY.model.vocab_size, ends[-1]).astype(np.int32), ends.reshape(4, 3)
    )


def test_options_that_do_not_go_together():
    with pytest.raises(peers.InputError, match="not a multiple of 49m's batch of 4"):
        peers.main(peers.Options(pairs=6))
    with pytest.raises(peers.InputError, match="Tunix has no float32 weights"):
        peers.main(peers.Options(dtype="bfloat16"))
