"""The decoder against a second one in NumPy float64, and what may depend on what, by gradients that are exactly 0."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Batch, response_logps
from scale.data.packing import pack, tokenized_rows
from scale.model.config import ModelConfig
from scale.model.layers import angles, frequencies, rotate
from scale.model.response_logps import logps
from scale.model.transformer import UNROLLED, Transformer
from scale.parallel.mesh import Runtime

CONFIG = ModelConfig(vocab_size=24, num_layers=2, d_model=16, num_heads=2, head_dim=8, d_ff=24, rope_base=100.0)
FLOAT32 = 2e-5  # nats: sums of up to 4 token log-probabilities near 3, each with some ten float32 roundings behind it

jitted_logps = eqx.filter_jit(logps)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights from NumPy: nothing to compile."""
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0))
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32), like)
    ones = (jnp.ones((2, 16)), jnp.ones(16))
    return eqx.tree_at(lambda m: (m.blocks.norm, m.norm), drawn, ones)


def batch_of(rows, width=16, labels=16) -> Batch:
    """Shared-prefix rows of (prompt, [responses])."""
    arrays = pack(tokenized_rows(rows), Shape(len(rows), width, labels, width))
    return Batch(*map(jnp.asarray, arrays), jnp.zeros((len(rows), 0)), jnp.zeros((len(rows), 2, 0)))


# ---- the second decoder: one sequence, loops over heads and slots, float64


def np_norm(x, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale


def np_rope(vector, position, base):
    """Coordinate i and coordinate i + size/2 are a point of the plane, turned by position x base^(-2i/size)."""
    size = len(vector)
    turned = np.empty(size)
    for i in range(size // 2):
        angle = position * base ** (-2 * i / size)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        turned[[i, i + size // 2]] = turn @ vector[[i, i + size // 2]]
    return turned


def np_softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def np_block(x, b, base):
    """Parallel attention and MLP of causal self-attention over x [T, D]."""
    h = np_norm(x, b["norm"])
    keys = [np_rope(h[s] @ b["key_value"][:, 0, 0], s, base) for s in range(len(x))]
    values = [h[s] @ b["key_value"][:, 1, 0] for s in range(len(x))]
    out = x.copy()
    for t in range(len(x)):
        for head in range(b["query"].shape[1]):
            q = np_rope(h[t] @ b["query"][:, head], t, base)
            weights = np_softmax(np.array([q @ keys[s] for s in range(t + 1)]) / np.sqrt(len(q)))
            out[t] += sum(w * v for w, v in zip(weights, values, strict=False)) @ b["attention_out"][head]
        gate, up = h[t] @ b["gate_up"][:, 0], h[t] @ b["gate_up"][:, 1]
        out[t] += (gate / (1 + np.exp(-gate)) * up) @ b["mlp_out"]
    return out


def np_logits(model: Transformer, tokens) -> np.ndarray:
    """[T, V] of one plain sequence."""
    embedding = np.asarray(model.embedding, np.float64)
    x = embedding[list(tokens)]
    names = ("norm", "query", "key_value", "gate_up", "attention_out", "mlp_out")
    for layer in range(len(model.blocks.norm)):
        block = {n: np.asarray(getattr(model.blocks, n)[layer], np.float64) for n in names}
        x = np_block(x, block, model.config.rope_base)
    return np_norm(x, np.asarray(model.norm, np.float64)) @ embedding.T / np.sqrt(embedding.shape[1])


def np_logp(model: Transformer, prompt, response) -> float:
    """log pi(response | prompt): token i of the sequence is predicted at token i - 1."""
    logits = np_logits(model, [*prompt, *response])
    at = range(len(prompt), len(prompt) + len(response))
    tokens = [*prompt, *response]
    return sum(np.log(np_softmax(logits[i - 1]))[tokens[i]] for i in at)


ROWS = [([5, 6, 7], [[8, 9, 10, 1], [11, 1]]), ([12, 13, 14, 15, 16], [[17], [18, 19, 1]])]


@pytest.fixture(scope="module")
def uneven(model) -> Transformer:
    """The model with norms that are not all ones, so that leaving one out shows."""
    rng = np.random.default_rng(7)
    norms = [jnp.asarray(rng.normal(1, 0.5, n.shape), jnp.float32) for n in (model.norm, model.blocks.norm)]
    return eqx.tree_at(lambda m: (m.norm, m.blocks.norm), model, norms)


def test_log_probs_are_those_of_the_numpy_decoder(uneven):
    expected = [[np_logp(uneven, p, r) for r in rs] for p, rs in ROWS]
    np.testing.assert_allclose(jitted_logps(uneven, batch_of(ROWS)), expected, rtol=0, atol=FLOAT32)


def test_a_row_of_n_responses_is_n_rows(uneven):
    prompt, responses = [5, 6, 7], [[8, 9, 10, 1], [11, 1], [12, 20, 21]]
    shared = jitted_logps(uneven, batch_of([(prompt, responses)]))
    alone = jitted_logps(uneven, batch_of([(prompt, [r]) for r in responses]))
    np.testing.assert_allclose(shared[0], alone[:, 0], rtol=0, atol=FLOAT32)


def test_the_order_of_responses_does_not_matter(uneven):
    swapped = jitted_logps(uneven, batch_of([(p, rs[::-1]) for p, rs in ROWS]))
    np.testing.assert_allclose(swapped[:, ::-1], jitted_logps(uneven, batch_of(ROWS)), rtol=0, atol=FLOAT32)


def test_the_first_token_of_every_response_is_predicted_by_the_last_prompt_position(model):
    first = np.log(np_softmax(np_logits(model, [5, 6, 7])[-1]))
    found = jitted_logps(model, batch_of([([5, 6, 7], [[8], [11]]), ([5, 6, 7], [[11], [8]])]))
    np.testing.assert_allclose(found, [first[[8, 11]], first[[11, 8]]], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_log_probs_and_gradients_under_rematerialisation(uneven, remat):
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0), Runtime(remat=remat))
    again = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(uneven))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: logps(m, batch_of(ROWS)).sum()))
    found, plain = gradient(again), gradient(uneven)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def products(jaxpr) -> int:
    inner = jax.tree.leaves([e.params for e in jaxpr.eqns], is_leaf=lambda value: hasattr(value, "eqns"))
    here = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
    return here + sum(products(value) for value in inner if hasattr(value, "eqns"))


def test_which_products_the_backward_pass_computes_again():
    """Of a parallel block four products with weights (queries, keys and values, gate, up) and two of attention."""
    def of_gradient(layers, remat):
        config = replace(CONFIG, num_layers=layers)
        model = eqx.filter_eval_shape(Transformer, config, jax.random.key(0), Runtime(remat=remat))
        return products(jax.make_jaxpr(jax.grad(lambda m: logps(m, batch_of(ROWS)).sum()))(model))

    most = UNROLLED["cpu"]
    nothing = of_gradient(most, "none")
    assert of_gradient(most, "dots") == nothing + 2 and of_gradient(most, "full") == nothing + 2 + 4
    assert of_gradient(most, "auto") == nothing and of_gradient(most + 1, "auto") == nothing + 2


def test_padding_changes_nothing(uneven):
    narrow = jitted_logps(uneven, batch_of(ROWS))
    np.testing.assert_allclose(jitted_logps(uneven, batch_of(ROWS, 32, 32)), narrow, rtol=0, atol=FLOAT32)


def test_what_padding_holds_changes_not_a_bit(uneven):
    batch = batch_of(ROWS)
    scribbled = batch._replace(
        tokens=jnp.where(batch.segment_ids < 0, 23, batch.tokens),
        positions=jnp.where(batch.segment_ids < 0, 9, batch.positions),
        labels=jnp.where(batch.response_ids == 2, 22, batch.labels),
        logit_positions=jnp.where(batch.response_ids == 2, 15, batch.logit_positions),
    )
    assert not np.array_equal(scribbled.tokens, batch.tokens) and not np.array_equal(scribbled.labels, batch.labels)
    np.testing.assert_array_equal(jitted_logps(uneven, scribbled), jitted_logps(uneven, batch))


# ---- dependence, by gradient. Every slot has a token of its own, so a row of the embedding's gradient is a slot's.

PROMPT, CHOSEN, REJECTED = [3, 4, 5], [6, 7, 8], [9, 10]
SLOTS = [*PROMPT, *CHOSEN, *REJECTED]
PROBED = batch_of([(PROMPT, [CHOSEN, REJECTED])], width=10)


def test_a_slot_depends_on_exactly_the_slots_it_sees(model):
    direction = np.random.default_rng(1).normal(size=CONFIG.d_model)  # not ones: a layer norm's output sums to 0

    @jax.jit
    def jacobian(embedding):
        return jax.jacrev(lambda e: eqx.tree_at(lambda m: m.embedding, model, e)(PROBED)[0] @ direction)(embedding)

    moved = np.asarray(jacobian(model.embedding))[:8][:, SLOTS].any(-1)
    np.testing.assert_array_equal(
        moved.astype(int),
        [
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 0, 1, 0],
            [1, 1, 1, 0, 0, 0, 1, 1],
        ],
    )


def test_log_probs_do_not_depend_on_the_other_response(model):
    """Through the hidden states alone: the tied softmax, in which every token takes part, is held fixed."""

    @jax.jit
    def jacobian(embedding):
        def values(e):
            return response_logps(eqx.tree_at(lambda m: m.embedding, model, e)(PROBED), embedding, PROBED)[0]

        return jax.jacrev(values)(embedding)

    moved = np.asarray(jacobian(model.embedding))[:, SLOTS].any(-1)
    np.testing.assert_array_equal(
        moved.astype(int),
        [
            [1, 1, 1, 1, 1, 0, 0, 0],  # a response's last token predicts nothing
            [1, 1, 1, 0, 0, 0, 1, 0],
        ],
    )


# ---- parts


@pytest.mark.parametrize(
    ("layers", "heads", "d", "ff", "billions"),
    [(32, 16, 4096, 16384, 8.63), (64, 32, 8192, 32768, 62.50), (118, 48, 18432, 73728, 540.35)],
)
def test_parameter_counts_are_palms(layers, heads, d, ff, billions):
    """Table 1 of arXiv 2204.02311, which cuts 540.356 off rather than rounding it."""
    config = ModelConfig(256_000, layers, d, heads, 256, ff)
    shapes = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    count = sum(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape"))
    assert 0 <= count / 1e9 - billions < 0.01 or round(count / 1e9, 2) == billions


def test_parameter_count_by_hand(model):
    one_block = 16 + 16 * 2 * 8 + 16 * 2 * 8 + 16 * 2 * 24 + 2 * 8 * 16 + 24 * 16
    assert sum(a.size for a in jax.tree.leaves(eqx.filter(model, eqx.is_array))) == 24 * 16 + 2 * one_block + 16


def turn(size, base):
    return frequencies(ModelConfig(head_dim=size, rope_base=base))


def turned(x, position, base=100.0):
    positions = jnp.asarray([[position]])
    return np.asarray(rotate(jnp.asarray(x, jnp.float32)[None, None], angles(positions, turn(len(x), base))))[0, 0]


def test_rope_by_hand():
    c, s, c1, s1 = np.cos(3.0), np.sin(3.0), np.cos(0.3), np.sin(0.3)  # angles 3 x 100^0 and 3 x 100^(-1/2)
    for unit, expected in zip(np.eye(4), [[c, 0, s, 0], [0, c1, 0, s1], [-s, 0, c, 0], [0, -s1, 0, c1]], strict=True):
        np.testing.assert_allclose(turned(unit, 3), expected, atol=1e-6)
    np.testing.assert_array_equal(turned([1, 2, 3, 4], 0), [1, 2, 3, 4])


def test_rope_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 8))
    near = [turned(q, m + 5) @ turned(k, m) for m in (0, 1, 17, 40)]
    np.testing.assert_allclose(near, near[0], atol=1e-4)  # float32 angles of some 40 radians
    assert abs(turned(q, 6) @ turned(k, 0) - near[0]) > 1e-2


def test_rope_turns_every_head_alike():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    rotation = angles(jnp.asarray([[0, 4, 9]]), turn(8, 100.0))
    both = rotate(jnp.asarray(x), rotation)
    for head in range(2):
        np.testing.assert_array_equal(both[:, :, head], rotate(jnp.asarray(x[:, :, head]), rotation))


def test_hidden_states_have_unit_length_so_logits_have_unit_variance(model):
    """LayerNorm gives length sqrt(d); divided by sqrt(d), a logit is the product of a unit vector and N(0, I)."""
    hidden = np.asarray(eqx.filter_jit(Transformer.__call__)(model, batch_of(ROWS)))
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), 1, atol=1e-4)


def test_initial_weights():
    """Kernels N(0, 1/fan_in), the embedding N(0, 1), norms 1, and no two layers alike."""
    config = ModelConfig(vocab_size=64, num_layers=2, d_model=128, num_heads=4, head_dim=16, d_ff=256)
    model = eqx.filter_jit(Transformer)(config, jax.random.key(0, impl="rbg"))  # compiles sooner
    assert abs(np.std(model.embedding) - 1) < 0.05  # 8192 draws or more: a standard error below 0.008
    fans = {"query": 128, "key_value": 128, "gate_up": 128, "attention_out": 64, "mlp_out": 256}
    for name, fan in fans.items():
        weights = np.asarray(getattr(model.blocks, name))
        assert abs(weights.std() * np.sqrt(fan) - 1) < 0.05, name
        assert abs(np.corrcoef(weights[0].ravel(), weights[1].ravel())[0, 1]) < 0.1, name
    assert np.all(np.asarray(model.norm) == 1) and np.all(np.asarray(model.blocks.norm) == 1)


def test_bfloat16_weights_still_give_float32_log_probs(uneven):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, uneven)
    found = jitted_logps(half, batch_of(ROWS))
    assert found.dtype == jnp.float32
    expected = np.asarray([[np_logp(half, p, r) for r in rs] for p, rs in ROWS])
    np.testing.assert_allclose(found, expected, rtol=0.02)  # the same rounded weights; activations have 8 bits
