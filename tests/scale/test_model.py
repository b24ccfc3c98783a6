"""The decoder against a second one in NumPy float64, and what may depend on what, by gradients that
are exactly 0."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Inputs
from minipref.logps import response_logps as plain_response_logps
from scale.data.layout import BatchShape
from scale.data.packing import pack, tokenized_rows
from scale.model.config import ModelConfig
from scale.model.inference import jitted_logps
from scale.model.layers import apply_rope, rope_frequencies, rope_rotation
from scale.model.transformer import UNROLLED, Transformer
from scale.parallel.mesh import Runtime

CONFIG = ModelConfig(
    vocab_size=24, num_layers=2, d_model=16, num_heads=2, head_dim=8, d_ff=24, rope_base=100.0
)
# Nats: sums of up to 4 token log-probabilities near 3, each with some ten float32 roundings.
FLOAT32 = 2e-5



@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights from NumPy: nothing to compile."""
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0))
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, jnp.float32), like)
    ones = (jnp.ones((2, 16)), jnp.ones(16))
    return eqx.tree_at(lambda m: (m.blocks.norm, m.norm), drawn, ones)


def inputs_of(rows, length=16, num_labels=16) -> Inputs:
    """Rows of (prompt, [responses]), one in each sequence."""
    shape = BatchShape(len(rows), length, num_labels, length)
    return jax.tree.map(jnp.asarray, pack(tokenized_rows(rows), shape))


# ---- the second decoder: one sequence, loops over heads and positions, float64


def np_norm(x, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale


def np_rope(vector, position, base):
    """Coordinates i and i + size/2 are a point, turned by position x base^(-2i/size)."""
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
            out[t] += (
                sum(w * v for w, v in zip(weights, values, strict=False)) @ b["attention_out"][head]
            )
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
    return (
        np_norm(x, np.asarray(model.norm, np.float64)) @ embedding.T / np.sqrt(embedding.shape[1])
    )


def np_logp(model: Transformer, prompt, response) -> float:
    """log pi(response | prompt): token i of the sequence is predicted at token i - 1."""
    logits = np_logits(model, [*prompt, *response])
    indices = range(len(prompt), len(prompt) + len(response))
    tokens = [*prompt, *response]
    return sum(np.log(np_softmax(logits[i - 1]))[tokens[i]] for i in indices)


ROWS = [([5, 6, 7], [[8, 9, 10, 1], [11, 1]]), ([12, 13, 14, 15, 16], [[17], [18, 19, 1]])]


@pytest.fixture(scope="module")
def uneven(model) -> Transformer:
    """The model with norms that are not all ones, so that leaving one out shows."""
    rng = np.random.default_rng(7)
    ones = model.norm, model.blocks.norm
    norms = [jnp.asarray(rng.normal(1, 0.5, n.shape), jnp.float32) for n in ones]
    return eqx.tree_at(lambda m: (m.norm, m.blocks.norm), model, norms)


def test_log_probs_are_those_of_the_numpy_decoder(uneven):
    expected = [[np_logp(uneven, p, r) for r in rs] for p, rs in ROWS]
    np.testing.assert_allclose(
        jitted_logps(uneven, inputs_of(ROWS)), expected, rtol=0, atol=FLOAT32
    )


def test_a_row_of_n_responses_is_n_rows(uneven):
    prompt, responses = [5, 6, 7], [[8, 9, 10, 1], [11, 1], [12, 20, 21]]
    shared = jitted_logps(uneven, inputs_of([(prompt, responses)]))
    alone = jitted_logps(uneven, inputs_of([(prompt, [r]) for r in responses]))
    np.testing.assert_allclose(shared[0], alone[:, 0], rtol=0, atol=FLOAT32)


def test_the_order_of_responses_does_not_matter(uneven):
    swapped = jitted_logps(uneven, inputs_of([(p, rs[::-1]) for p, rs in ROWS]))
    expected = jitted_logps(uneven, inputs_of(ROWS))
    np.testing.assert_allclose(swapped[:, ::-1], expected, rtol=0, atol=FLOAT32)


def test_the_first_token_of_every_response_is_predicted_by_the_last_prompt_position(model):
    first = np.log(np_softmax(np_logits(model, [5, 6, 7])[-1]))
    rows = [([5, 6, 7], [[8], [11]]), ([5, 6, 7], [[11], [8]])]
    logps = jitted_logps(model, inputs_of(rows))
    np.testing.assert_allclose(logps, [first[[8, 11]], first[[11, 8]]], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_log_probs_and_gradients_under_rematerialisation(uneven, remat):
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0), Runtime(remat=remat))
    again = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(uneven))
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: jitted_logps(m, inputs_of(ROWS)).sum()))
    leaves = map(jax.tree.leaves, (gradient(again), gradient(uneven)))
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def products(jaxpr) -> int:
    params = [e.params for e in jaxpr.eqns]
    inner = jax.tree.leaves(params, is_leaf=lambda value: hasattr(value, "eqns"))
    here = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
    return here + sum(products(value) for value in inner if hasattr(value, "eqns"))


def test_which_products_the_backward_pass_computes_again():
    """Of a parallel block four products with weights (queries, keys and values, gate, up) and two
    of attention."""

    def of_gradient(layers, remat):
        config = replace(CONFIG, num_layers=layers)
        model = eqx.filter_eval_shape(Transformer, config, jax.random.key(0), Runtime(remat=remat))
        gradient = jax.grad(lambda m: jitted_logps(m, inputs_of(ROWS)).sum())
        return products(jax.make_jaxpr(gradient)(model))

    most = UNROLLED["cpu"]
    nothing = of_gradient(most, "none")
    assert of_gradient(most, "dots") == nothing + 2
    assert of_gradient(most, "full") == nothing + 2 + 4
    assert of_gradient(most, "auto") == nothing
    assert of_gradient(most + 1, "auto") == nothing + 2


def test_padding_changes_nothing(uneven):
    narrow = jitted_logps(uneven, inputs_of(ROWS))
    wide = jitted_logps(uneven, inputs_of(ROWS, 32, 32))
    np.testing.assert_allclose(wide, narrow, rtol=0, atol=FLOAT32)


def test_what_padding_holds_changes_not_a_bit(uneven):
    inputs = inputs_of(ROWS)
    padding, padded_labels = inputs.segment_ids < 0, inputs.response_ids == 2
    scribbled = inputs._replace(
        tokens=jnp.where(padding, 23, inputs.tokens),
        positions=jnp.where(padding, 9, inputs.positions),
        labels=jnp.where(padded_labels, 22, inputs.labels),
        logit_positions=jnp.where(padded_labels, 15, inputs.logit_positions),
    )
    assert not np.array_equal(scribbled.tokens, inputs.tokens)
    assert not np.array_equal(scribbled.labels, inputs.labels)
    logps = jitted_logps(uneven, scribbled), jitted_logps(uneven, inputs)
    np.testing.assert_array_equal(*logps)


# ---- dependence, by gradient. Every index holds a token of its own, so a row of the embedding's
# gradient is that of an index.

PROMPT, CHOSEN, REJECTED = [3, 4, 5], [6, 7, 8], [9, 10]
TOKENS = [*PROMPT, *CHOSEN, *REJECTED]
PROBED = inputs_of([(PROMPT, [CHOSEN, REJECTED])], length=10)


def test_a_hidden_state_depends_on_exactly_the_tokens_it_sees(model):
    # not ones: the output of a layer norm sums to 0
    direction = np.random.default_rng(1).normal(size=CONFIG.d_model)

    @jax.jit
    def jacobian(embedding):
        def values(e):
            return eqx.tree_at(lambda m: m.embedding, model, e)(PROBED)[0] @ direction

        return jax.jacrev(values)(embedding)

    moved = np.asarray(jacobian(model.embedding))[:8][:, TOKENS].any(-1)
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
    """Through the hidden states alone: the tied softmax, in which every token takes part, is held
    fixed."""

    @jax.jit
    def jacobian(embedding):
        def values(e):
            hidden = eqx.tree_at(lambda m: m.embedding, model, e)(PROBED)
            return plain_response_logps(hidden, embedding, PROBED)[0]

        return jax.jacrev(values)(embedding)

    moved = np.asarray(jacobian(model.embedding))[:, TOKENS].any(-1)
    np.testing.assert_array_equal(
        moved.astype(int),
        [
            [1, 1, 1, 1, 1, 0, 0, 0],  # a response's last token predicts nothing
            [1, 1, 1, 0, 0, 0, 1, 0],
        ],
    )


# ---- parts


@pytest.mark.parametrize(
    ("num_layers", "num_heads", "d_model", "d_ff", "billions"),
    [(32, 16, 4096, 16384, 8.63), (64, 32, 8192, 32768, 62.50), (118, 48, 18432, 73728, 540.35)],
)
def test_parameter_counts_are_palms(num_layers, num_heads, d_model, d_ff, billions):
    """Table 1 of arXiv 2204.02311, which cuts 540.356 off rather than rounding it."""
    config = ModelConfig(256_000, num_layers, d_model, num_heads, 256, d_ff)
    shapes = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape")]
    count = sum(int(np.prod(leaf.shape, dtype=object)) for leaf in leaves)
    assert 0 <= count / 1e9 - billions < 0.01 or round(count / 1e9, 2) == billions


def test_parameter_count_by_hand(model):
    one_block = 16 + 16 * 2 * 8 + 16 * 2 * 8 + 16 * 2 * 24 + 2 * 8 * 16 + 24 * 16
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert sum(array.size for array in arrays) == 24 * 16 + 2 * one_block + 16


def turn(head_dim, base):
    return rope_frequencies(ModelConfig(head_dim=head_dim, rope_base=base))


def turned(x, position, base=100.0):
    rotation = rope_rotation(jnp.asarray([[position]]), turn(len(x), base))
    return np.asarray(apply_rope(jnp.asarray(x, jnp.float32)[None, None], rotation))[0, 0]


def test_rope_by_hand():
    # angles 3 x 100^0 and 3 x 100^(-1/2)
    c, s, c1, s1 = np.cos(3.0), np.sin(3.0), np.cos(0.3), np.sin(0.3)
    turned_units = [[c, 0, s, 0], [0, c1, 0, s1], [-s, 0, c, 0], [0, -s1, 0, c1]]
    for unit, expected in zip(np.eye(4), turned_units, strict=True):
        np.testing.assert_allclose(turned(unit, 3), expected, atol=1e-6)
    np.testing.assert_array_equal(turned([1, 2, 3, 4], 0), [1, 2, 3, 4])


def test_rope_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 8))
    near = [turned(q, m + 5) @ turned(k, m) for m in (0, 1, 17, 40)]
    np.testing.assert_allclose(near, near[0], atol=1e-4)  # float32 angles of some 40 radians
    assert abs(turned(q, 6) @ turned(k, 0) - near[0]) > 1e-2


def test_rope_turns_every_head_alike():
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    rotation = rope_rotation(jnp.asarray([[0, 4, 9]]), turn(8, 100.0))
    both = apply_rope(jnp.asarray(x), rotation)
    for head in range(2):
        alone = apply_rope(jnp.asarray(x[:, :, head]), rotation)
        np.testing.assert_array_equal(both[:, :, head], alone)


def test_hidden_states_have_unit_length_so_logits_have_unit_variance(model):
    """LayerNorm gives length sqrt(d); divided by sqrt(d), a logit is the product of a unit vector
    and N(0, I)."""
    hidden = np.asarray(eqx.filter_jit(Transformer.__call__)(model, inputs_of(ROWS)))
    np.testing.assert_allclose(np.linalg.norm(hidden, axis=-1), 1, atol=1e-4)


def test_initial_weights():
    """Kernels N(0, 1/fan_in), the embedding N(0, 1), norms 1, and no two layers alike."""
    config = ModelConfig(
        vocab_size=64, num_layers=2, d_model=128, num_heads=4, head_dim=16, d_ff=256
    )
    model = eqx.filter_jit(Transformer)(config, jax.random.key(0, impl="rbg"))  # compiles sooner
    # 8192 draws or more: a standard error below 0.008
    assert abs(np.std(model.embedding) - 1) < 0.05
    fans = {"query": 128, "key_value": 128, "gate_up": 128, "attention_out": 64, "mlp_out": 256}
    for name, fan in fans.items():
        weights = np.asarray(getattr(model.blocks, name))
        assert abs(weights.std() * np.sqrt(fan) - 1) < 0.05, name
        assert abs(np.corrcoef(weights[0].ravel(), weights[1].ravel())[0, 1]) < 0.1, name
    assert np.all(np.asarray(model.norm) == 1) and np.all(np.asarray(model.blocks.norm) == 1)


def test_bfloat16_weights_still_give_float32_log_probs(uneven):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, uneven)
    logps = jitted_logps(half, inputs_of(ROWS))
    assert logps.dtype == jnp.float32
    expected = np.asarray([[np_logp(half, p, r) for r in rs] for p, rs in ROWS])
    # the same rounded weights; activations have 8 bits
    np.testing.assert_allclose(logps, expected, rtol=0.02)
