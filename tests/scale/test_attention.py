import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from minipref.batch import attention_mask
from scale.data.layout import Layout, smallest_shape
from scale.data.packing import pack, tokenized_rows
from scale.errors import InputError
from scale.model.attention import attention, cudnn_fits, dot_product, masked, plain
from scale.model.config import ModelConfig
from scale.model.response_logps import response_logps
from scale.model.splash import SharedPrefixMask, block_sizes, splash
from scale.model.transformer import Transformer, saves_products
from scale.parallel.mesh import Runtime, RuntimeConfig, default_attention, make_runtime

ROOT = Path(__file__).parents[2]
# Regions of 136, 60 and 60 positions in blocks of 128: none ends where a block does.
LAYOUT = Layout(120, 60, 2)
LENGTHS = [(100, 60, 30), (120, 1, 60)]  # prompt and two responses of each row
SHAPES = [(4, 1, 64), (4, 2, 128), (2, 2, 256), (3, 3, 16)]  # H, G, head dimension


def segments_of(layout, lengths):
    """Packed by hand: each region holds the number of its segment, then -1."""
    rows = []
    for p, *responses in lengths:
        row = [0] * p + [-1] * (layout.start - p)
        for i, length in enumerate(responses, 1):
            row += [i] * length + [-1] * (layout.response - length)
        rows.append(row)
    return jnp.asarray(rows, jnp.int32)


SEGMENTS = segments_of(LAYOUT, LENGTHS)
ROWS = tokenized_rows([([7] * p, [[8] * a, [9] * b]) for p, a, b in LENGTHS])


def heads_of(b, t, num_heads, num_kv_heads, head_dim, seed=0):
    """Queries, keys, values, and weights of the outputs."""
    shapes = [
        (b, t, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    arrays = (np.random.default_rng((seed, i)).normal(size=s) for i, s in enumerate(shapes))
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def oracle(q, k, v, mask):
    """Float64, one query at a time over the keys that it sees."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen, group = np.flatnonzero(mask[b, t]), h * k.shape[2] // q.shape[2]
        scores = [q[b, t, h] @ k[b, s, group] / q.shape[3] ** 0.5 for s in seen]
        weights = np.exp(scores - np.max(scores))
        out[b, t, h] = sum(
            w * v[b, s, group] for w, s in zip(weights / weights.sum(), seen, strict=True)
        )
    return out


def random_mask(b, t, s):
    mask = np.random.default_rng(5).random((b, t, s)) < 0.5
    mask[:, np.arange(t), np.arange(t) % s] = True
    return mask


@pytest.mark.parametrize("attend", [plain, dot_product])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_against_the_oracle(attend, num_heads, num_kv_heads):
    q, k, v, _ = heads_of(2, 7, num_heads, num_kv_heads, 8)
    k, v, mask = k[:, :5], v[:, :5], random_mask(2, 7, 5)
    np.testing.assert_allclose(
        attend(q, k, v, jnp.asarray(mask)), oracle(q, k, v, mask), rtol=1e-5, atol=1e-6
    )


def test_half_precision_has_float32_scores():
    """Products near 300 are 2 apart in bfloat16: weights from such would be off by an eighth."""
    q, k, v, _ = heads_of(1, 6, 2, 1, 64)
    q, k, v = ((a + shift).astype(jnp.bfloat16) for a, shift in ((q, 1), (k, 4), (v, 0)))
    mask = random_mask(1, 6, 6)
    out = plain(q, k, v, jnp.asarray(mask))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), oracle(q, k, v, mask), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_query_that_sees_nothing_gets_the_average(num_kv_heads):
    q, k, v, _ = heads_of(1, 4, 2, num_kv_heads, 8)
    out = masked(jnp.zeros((1, 4, 4), bool))(q, k, v)
    average = np.broadcast_to(np.asarray(v).mean(1, keepdims=True), q.shape)
    np.testing.assert_allclose(out, average, rtol=1e-5, atol=1e-6)


# ---- all are equal


def outputs_and_gradients(attend, q, k, v, weight):
    """Output at positions with a token, and the gradients of a weighted sum of it."""

    def total(q, k, v):
        out = attend(q, k, v)
        return (out * weight).sum(), jnp.where(weight == 0, 0, out)

    gradients, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return dict(zip(("out", "q", "k", "v"), (out, *gradients), strict=True))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_all_give_the_same_output_and_gradients(num_heads, num_kv_heads, head_dim):
    q, k, v, weight = heads_of(2, LAYOUT.length, num_heads, num_kv_heads, head_dim)
    weight *= (SEGMENTS >= 0)[:, :, None, None]
    others = {
        "dot_product": attention("dot_product", SEGMENTS),
        "splash": lambda q, k, v: splash(q, k, v, SEGMENTS, LAYOUT, interpret=True),
    }
    expected = outputs_and_gradients(attention("plain", SEGMENTS), q, k, v, weight)
    assert min(np.abs(a).max() for a in expected.values()) > 0.5
    for kind, attend in others.items():
        for name, value in outputs_and_gradients(attend, q, k, v, weight).items():
            message = f"{kind} {name}"
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=2e-5, err_msg=message)


def test_splash_in_half_precision():
    q, k, v, _ = (a.astype(jnp.bfloat16) for a in heads_of(2, LAYOUT.length, 2, 1, 64))
    out = splash(q, k, v, SEGMENTS, LAYOUT, interpret=True)
    assert out.dtype == jnp.bfloat16
    expected = plain(*(a.astype(jnp.float32) for a in (q, k, v)), attention_mask(SEGMENTS))
    real = np.asarray(SEGMENTS >= 0)
    np.testing.assert_allclose(out.astype(jnp.float32)[real], expected[real], rtol=0.02, atol=0.02)


# Of row 0: a prompt of 100 at indices 0-135, responses of 60 and 30 from indices 136 and 196.
SEEN = {
    0: [*range(1)],
    57: [*range(58)],
    136: [*range(100), 136],
    140: [*range(100), *range(136, 141)],
    225: [*range(100), *range(196, 226)],
}


@pytest.mark.parametrize("kind", ["plain", "dot_product", "splash"])
def test_causality_by_gradient(kind):
    """The output at an index has a gradient in exactly the values that it may see."""
    q, k, v, weight = (a[:1] for a in heads_of(1, LAYOUT.length, 2, 1, 16))
    segments = SEGMENTS[:1]
    attend = (
        attention(kind, segments)
        if kind != "splash"
        else (lambda q, k, v: splash(q, k, v, segments, LAYOUT, interpret=True))
    )

    @jax.jit
    def gradient(index):
        return jax.grad(lambda v: (attend(q, k, v) * weight)[0, index].sum())(v)

    for index, seen in SEEN.items():
        assert list(np.flatnonzero(np.abs(gradient(index)[0]).max((1, 2)))) == seen


# ---- the static mask


def test_the_static_mask():
    """Of a layout whose prompt region grows to 124 of 128 positions: the end of the prompt, and
    the responses."""
    mask = SharedPrefixMask(Layout(3, 2, 2))
    rows = ["1......", "11.....", "111....", "1111...", "11111..", "111..1.", "111..11"]
    corner = mask[slice(121, 128), slice(121, 128)]
    assert mask.shape == (128, 128)
    assert ["".join(".1"[int(x)] for x in row) for row in corner] == rows
    whole = mask[slice(None), slice(None)]
    np.testing.assert_array_equal(whole[:124, :124], np.tri(124, dtype=bool))
    assert whole[124:, :124].all() and not whole[:124, 124:].any()
    np.testing.assert_array_equal(mask[slice(123, 126), slice(2, 128)], whole[123:126, 2:128])


def computed_blocks(mask, block):
    many = kernels.splash_attention_mask.MultiHeadMask([mask])
    info, _ = kernels.splash_attention_mask_info.process_mask(many, (block, block))
    return int(np.sum(np.asarray(info.block_mask) > 0))


@pytest.mark.parametrize(("block", "causal", "shared"), [(512, 10, 9), (128, 136, 120)])
def test_blocks_between_responses_are_skipped(block, causal, shared):
    """[1024 | 512 | 512] in 4 x 4 blocks of 512: causal skips 6, and the second response skips the
    first: 7."""
    layout = Layout(1024, 512, 2)
    assert computed_blocks(kernels.CausalMask((2048, 2048)), block) == causal
    assert computed_blocks(SharedPrefixMask(layout), block) == shared


@pytest.mark.parametrize(
    ("length", "block"), [(128, 128), (640, 128), (768, 384), (1280, 256), (2048, 512), (8192, 512)]
)
def test_block_sizes_divide_the_row(length, block):
    sizes = block_sizes(length)
    assert sizes.block_q == sizes.block_kv_dkv_compute == sizes.block_kv_dq == block
    assert sizes.has_backward_blocks


# ---- the choice


def test_kinds():
    kinds = [default_attention(platform) for platform in ("cpu", "gpu", "cuda", "rocm", "tpu")]
    assert kinds == ["plain", "dot_product", "dot_product", "dot_product", "splash"]


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "size", "length", "fits"),
    [
        ("NVIDIA H100", "9.0", jnp.bfloat16, 256, 8, True),
        ("NVIDIA B200", "10.0", jnp.float16, 256, 8, True),
        ("NVIDIA A100", "8.0", jnp.bfloat16, 128, 8, True),
        ("NVIDIA A100", "8.0", jnp.bfloat16, 256, 8, False),
        ("NVIDIA H100", "9.0", jnp.float32, 64, 8, False),
        ("NVIDIA H100", "9.0", jnp.bfloat16, 36, 8, False),
        ("NVIDIA H100", "9.0", jnp.bfloat16, 64, 7, False),
        ("AMD MI300", "gfx942", jnp.bfloat16, 64, 8, False),
    ],
)
def test_where_cudnn_fits(monkeypatch, kind, capability, dtype, size, length, fits):
    device = SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    q, k = jnp.zeros((1, length, 2, size), dtype), jnp.zeros((1, length, 1, size), dtype)
    assert cudnn_fits(q, k) is fits


def test_splash_is_refused_where_there_is_no_tpu():
    with pytest.raises(InputError, match=r"--runtime.attention splash: runs on TPUs, not on cpu"):
        make_runtime(RuntimeConfig(attention="splash"))


def test_splash_needs_a_layout():
    message = r"'splash': the rows are packed compactly; it needs rows packed with a Layout"
    with pytest.raises(InputError, match=message):
        attention("splash", SEGMENTS)


def test_splash_refuses_rows_of_another_length():
    q, k, v, _ = heads_of(2, LAYOUT.length, 2, 1, 8)
    with pytest.raises(
        InputError, match=r"rows of 256 tokens are not packed with Layout\(.*128.*\)"
    ):
        attention("splash", SEGMENTS, Layout(128, 128, 2))(q, k, v)


def test_rows_of_another_layout_are_not_silently_wrong():
    """Their shape may be that of the layout, as that of a compact row."""
    compact = pack(ROWS, LAYOUT.shape(2)).segment_ids
    q, k, v, _ = heads_of(2, LAYOUT.length, 2, 1, 8)
    out = splash(q, k, v, jnp.stack([SEGMENTS[0], compact[1]]), LAYOUT, interpret=True)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_the_layout_is_that_of_packed_rows():
    np.testing.assert_array_equal(pack(ROWS, LAYOUT.shape(2), LAYOUT).segment_ids, SEGMENTS)


@pytest.mark.slow
def test_a_models_log_probs_are_those_of_compact_rows(monkeypatch):
    monkeypatch.setattr("scale.model.attention.splash", partial(splash, interpret=True))
    rows = tokenized_rows(
        [(range(5, 5 + p), [range(3, 3 + a), range(9, 9 + b)]) for p, a, b in LENGTHS]
    )
    config = ModelConfig(
        vocab_size=130, num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16
    )
    logps = []
    for layout, kind in ((None, "plain"), (LAYOUT, "splash")):
        model = Transformer(config, jax.random.key(0), Runtime(attention=kind))
        shape = layout.shape(2) if layout else smallest_shape(rows.lengths, 2)
        inputs = jax.tree.map(jnp.asarray, pack(rows, shape, layout))
        logps.append(eqx.filter_jit(response_logps)(model, inputs).logps)
    np.testing.assert_allclose(*logps, rtol=1e-5)


# ---- many devices, in processes of their own: JAX reads their number when it starts

SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from scale.errors import InputError
from scale.model.attention import attention
from scale.model.splash import splash
from tests.scale.test_attention import LAYOUT, SEGMENTS, heads_of, outputs_and_gradients

mesh = jax.make_mesh((1, 2, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
for num_kv_heads in (1, 2, 8):
    q, k, v, weight = heads_of(2, LAYOUT.length, 8, num_kv_heads, 16)
    weight *= (SEGMENTS >= 0)[:, :, None, None]
    single = outputs_and_gradients(attention("plain", SEGMENTS), q, k, v, weight)
    q, k, v = (jax.device_put(a, NamedSharding(mesh, P(("data", "fsdp")))) for a in (q, k, v))
    attend = lambda q, k, v: splash(q, k, v, SEGMENTS, LAYOUT, mesh, True)
    many = outputs_and_gradients(attend, q, k, v, weight)
    expected = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    assert many["out"].sharding.is_equivalent_to(expected, 4), many["out"].sharding
    for name in single:
        message = f"{num_kv_heads} {name}"
        np.testing.assert_allclose(many[name], single[name], rtol=1e-4, atol=2e-5, err_msg=message)
cases = ((3, 8, "3 rows do not divide among 2"), (2, 6, "6 heads do not divide among 4"))
for rows, num_heads, expected in cases:
    q, k, v, _ = heads_of(rows, LAYOUT.length, num_heads, 1, 16)
    try:
        splash(q, k, v, SEGMENTS, LAYOUT, mesh, True)
    except InputError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(expected)
"""

COMPILED = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from scale.data.layout import Layout
from scale.model.splash import splash

LAYOUT = Layout(1024, 512, 2)
# heads, key/value heads, head dimension, tensor axis: PaLM 540B, SmolLM2-135M
SHAPES = [(48, 1, 256, 4), (9, 3, 64, 1)]


def compile(devices, num_heads, num_kv_heads, head_dim, tensor):
    mesh = Mesh(np.reshape(devices, (1, -1, tensor)), ("data", "fsdp", "tensor"))
    rows = mesh.shape["fsdp"]

    def array(*shape, spec, dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((rows, LAYOUT.length, *shape), dtype, sharding=sharding)

    def total(q, k, v, segments):
        return splash(q, k, v, segments, LAYOUT, mesh).astype(jnp.float32).sum()

    split = P(("data", "fsdp"))
    kv = array(num_kv_heads, head_dim, spec=split)
    query = array(num_heads, head_dim, spec=P(("data", "fsdp"), None, "tensor"))
    segments = array(spec=split, dtype=jnp.int32)
    return jax.jit(jax.grad(total, (0, 1, 2))).lower(query, kv, kv, segments).compile()


for name in ("v3:4x8", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    for shape in SHAPES:
        text = compile(devices, *shape).as_text()
        print(name, *shape, text.count('custom_call_target="tpu_custom_call"'))
"""

NO_TPU = {  # libtpu without a TPU, and while another process has loaded it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def python(code, **environment):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_sharded_splash_equals_plain_attention_on_one_device():
    python(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=8")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_splash_compiles_forward_and_backward_for_every_tpu():
    """By the TPU's own compiler: three kernels, of the output, of dq, and of dk and dv."""
    names = ("v3:4x8", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    expected = [f"{name} {shape} 3" for name in names for shape in ("48 1 256 4", "9 3 64 1")]
    assert python(COMPILED, **NO_TPU).splitlines() == expected


def test_remat_dots_keeps_what_the_kernel_gave():
    """Else the backward pass runs the forward kernel again, beside its own two."""
    q, k, v, w = heads_of(2, LAYOUT.length, 2, 1, 64)

    def calls(policy):
        run = partial(splash, segment_ids=SEGMENTS, layout=LAYOUT, interpret=True)
        gradient = jax.grad(lambda q: (jax.checkpoint(run, policy=policy)(q, k, v) * w).sum())
        return str(jax.make_jaxpr(gradient)(q)).count("pallas_call")

    assert calls(saves_products) == 3
    assert calls(jax.checkpoint_policies.dots_with_no_batch_dims_saveable) == 4
