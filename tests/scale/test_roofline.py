"""MFU against PaLM's published figures, and rooflines that a pencil can check."""

from dataclasses import replace

import pytest

from scale.errors import InputError
from scale.model.config import ModelConfig
from scale.model.flops import model_flops
from scale.parallel.chips import CHIPS, Chip, chip_of
from scale.plan.hlo import Counts
from scale.plan.roofline import bound

PALM = ModelConfig(
    vocab_size=256_000, num_layers=118, d_model=18_432, num_heads=48, head_dim=256, d_ff=73_728
)
PALM_PARAMS = 540_356_474_880
"""By hand: 256000 d + 118 (d 12288 + 2 d 256 + 3 d 73728 + 12288 d + d) + d, where d = 18432."""
CHIP = Chip(flops=100.0, hbm_bytes=1, hbm_bandwidth=10.0, link_bandwidth=5.0, dcn_bandwidth=2.0)


def test_palm_540b_as_published():
    """238.3K tokens/s on 6144 chips: MFU 46.2%; 45.7% without attention; hardware's FLOPs 57.83%.

    PaLM computes three quarters of the forward products and attention's again: 7.5 N + 16 L H Q T
    a token.
    """
    percent = 100 * 238_300 / (6144 * CHIPS["v4"].flops)
    mfu, without = (percent * model_flops(PALM, PALM_PARAMS, length) for length in (2048, 0))
    assert mfu == pytest.approx(46.23, abs=0.005) and without == pytest.approx(45.73, abs=0.005)
    attention = PALM.num_layers * PALM.num_heads * PALM.head_dim * 2048
    recomputation = (7.5 * PALM_PARAMS + 16 * attention) / (6 * PALM_PARAMS + 12 * attention)
    assert mfu * recomputation == pytest.approx(57.83, abs=0.005)


def test_model_flops_by_hand():
    config = ModelConfig(num_layers=2, num_heads=3, head_dim=4)
    assert model_flops(config, params=100, row_length=5) == 600 + 12 * 2 * 3 * 4 * 5
    few = replace(config, vocab_size=3, d_model=2)  # the vocabulary's 6 x 6 at 2 of 5 positions
    assert model_flops(few, 100, 5, 2) == pytest.approx(600 + 12 * 2 * 3 * 4 * 5 - 36 * 3 / 5)


def test_chips_by_topology():
    assert chip_of("v3:4x8").devices == 2
    assert chip_of("v4:12x16x16").flops == 275e12
    message = "topology 'v9:2x2': unknown TPU generation; known are v3, v4"
    with pytest.raises(InputError, match=message):
        chip_of("v9:2x2")


def test_published_network_totals():
    """Two-way bytes/s of all links of a chip, as Google's pages give them."""
    links = {"v5e": 4, "v5p": 6, "v6e": 4}
    totals = {name: 2 * number * CHIPS[name].link_bandwidth for name, number in links.items()}
    assert totals == {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9}


@pytest.mark.parametrize(
    ("counts", "binding", "seconds"),
    [
        (Counts(flops=500.0, hbm_bytes=40.0), "compute", 5.0),
        (Counts(flops=500.0, hbm_bytes=60.0), "memory", 6.0),
        (Counts(500.0, 40.0, {"fsdp": 70.0, "tensor": 60.0}), "network fsdp", 7.0),
        (Counts(500.0, 40.0, {"data": 16.0, "fsdp": 70.0}), "network data", 8.0),
    ],
)
def test_the_slowest_part_binds(counts, binding, seconds):
    mesh = {"data": 2, "fsdp": 3, "tensor": 4}
    limit = bound(counts, CHIP, mesh, flops=1200.0, torus={}, slow="data")
    assert (limit.binding, limit.step_seconds) == (binding, seconds)
    assert limit.mfu == pytest.approx(1200 / (24 * 100 * seconds))


def test_an_axis_over_two_torus_dimensions_has_twice_the_links():
    counts = Counts(collective_bytes={"fsdp": 80.0})
    limit = bound(counts, CHIP, {"fsdp": 4}, 1.0, torus={"fsdp": 2}, slow="")
    assert limit.seconds["network fsdp"] == 4.0


def test_traffic_over_two_axes_shares_their_links():
    """30 bytes over 10 + 20 bytes/s are a second of both; `tensor` has 20 more of its own."""
    counts = Counts(collective_bytes={"fsdp+tensor": 30.0, "tensor": 20.0})
    limit = bound(counts, CHIP, {"fsdp": 4, "tensor": 2}, 1.0, torus={"tensor": 2}, slow="")
    assert (limit.seconds["network fsdp"], limit.seconds["network tensor"]) == (1.0, 2.0)


def test_traffic_that_crosses_slices_waits_for_the_slow_network():
    counts = Counts(collective_bytes={"data+fsdp": 6.0})
    limit = bound(counts, CHIP, {"data": 2, "fsdp": 4}, 1.0, {}, slow="data")
    assert limit.seconds == {"compute": 0.0, "memory": 0.0, "network data": 3.0}


def test_two_devices_share_their_chip():
    """Half of everything: each part takes twice as long for the same work a device."""
    counts = Counts(flops=500.0, hbm_bytes=60.0, collective_bytes={"fsdp": 50.0})
    twin = Chip(100.0, 1, 10.0, 5.0, 2.0, devices=2)
    one, two = (bound(counts, chip, {"fsdp": 4}, 1000.0, {}, slow="") for chip in (CHIP, twin))
    assert two.seconds == {name: 2 * value for name, value in one.seconds.items()}
    assert two.mfu == one.mfu
