"""Sampling with a cache against the model without one, and its frequencies against the softmax."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from minipref.batch import Inputs
from scale.data.layout import BatchShape
from scale.data.packing import pack, tokenized_rows
from scale.model import sampling
from scale.model.config import ModelConfig
from scale.model.inference import jitted_logps
from scale.model.sampling import Samples, sample
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime

V, EOS, PAD, NEW = 8, 1, 0, 6
PROMPTS = [[5, 6], [7, 2, 3, 4, 6], [3, 3, 7]]
# Nats: two orders of summing the float32 products of 8 positions, through 2 layers, and up to 6
# tokens.
FLOAT32 = 5e-5

jitted_hidden = eqx.filter_jit(Transformer.__call__)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Large weights, so that the blocks and not a token's own embedding decide what follows it."""
    rng = np.random.default_rng(3)
    config = ModelConfig(
        vocab_size=V, num_layers=2, d_model=16, num_heads=2, head_dim=8, d_ff=16, rope_base=50.0
    )
    like = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    drawn = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), like)
    return eqx.tree_at(lambda m: (m.embedding, m.norm), drawn, (drawn.embedding * 2, jnp.ones(16)))


def drawn(model, prompts=PROMPTS, width=5, seed=0, filler=PAD, length=0, **options) -> Samples:
    """Samples after prompts each in a sequence of `width` tokens, or end to end in one of
    `length`."""
    options = {"n": 4, "max_new": NEW, "temperature": 1.0} | options
    shape = BatchShape(*((1, length) if length else (len(prompts), width)), 0, width)
    inputs = pack(tokenized_rows([(prompt, []) for prompt in prompts]), shape, pad=filler)
    inputs = jax.tree.map(jnp.asarray, inputs)
    return sample(model, inputs, jax.random.key(seed), stops=(EOS,), pad=PAD, **options)


def inputs_of(rows) -> Inputs:
    """A sequence for each (prompt, responses)."""
    inputs = pack(tokenized_rows(rows), BatchShape(len(rows), 32, 32, 32))
    return jax.tree.map(jnp.asarray, inputs)


def test_sampling_ends_when_all_samples_have(model, monkeypatch):
    steps, draw = [], sampling.draw_tokens

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return draw(*args)

    monkeypatch.setattr(sampling, "draw_tokens", counted)
    samples = drawn(model, max_new=300)
    longest = max(len(response(*one)) for row in zip(samples.tokens, samples.complete, strict=True)
                  for one in zip(*row, strict=True))  # fmt: skip
    assert samples.complete.all() and len(steps) == longest < 300


def response(tokens, complete) -> list[int]:
    """What was sampled, up to and with the end of sequence."""
    tokens = np.asarray(tokens).tolist()
    return tokens[: tokens.index(EOS) + 1] if complete else tokens


@pytest.fixture(scope="module")
def samples(model) -> Samples:
    return drawn(model)


def test_log_probs_are_the_models_own_of_what_was_sampled(model, samples):
    rows = [
        (p, [response(t, c) for t, c in zip(ts, cs, strict=True)])
        for p, ts, cs in zip(PROMPTS, samples.tokens, samples.complete, strict=True)
    ]
    expected = jitted_logps(model, inputs_of(rows))
    np.testing.assert_allclose(samples.logps, expected, rtol=0, atol=FLOAT32)


def test_a_response_ends_with_one_eos_and_then_padding(samples):
    complete = np.asarray(samples.complete)
    assert complete.any() and not complete.all()  # the seed shows both
    rows = np.asarray(samples.tokens).reshape(-1, NEW)
    for tokens, ended in zip(rows, complete.ravel(), strict=True):
        ends = np.flatnonzero(tokens == EOS)
        assert len(ends) == ended
        assert not ended or np.all(tokens[ends[0] + 1 :] == PAD)


def test_ending_with_the_last_token_is_complete(model):
    """With room for one token, a response is complete exactly where that token is the end."""
    samples = drawn(model, max_new=1, n=64)
    np.testing.assert_array_equal(samples.complete, samples.tokens[..., 0] == EOS)
    assert samples.complete.any() and not samples.complete.all()


def test_samples_of_a_prompt_differ_and_a_seed_repeats_them(model, samples):
    assert all(len({tuple(t) for t in np.asarray(row).tolist()}) > 1 for row in samples.tokens)
    np.testing.assert_array_equal(drawn(model).tokens, samples.tokens)
    assert not np.array_equal(drawn(model, seed=1).tokens, samples.tokens)


@pytest.fixture(scope="module")
def greedy(model) -> Samples:
    return drawn(model, temperature=0.0, n=2)


def test_greedy_tokens_are_those_of_the_whole_forward_pass(model, greedy):
    """Each token is the largest logit of a forward pass, without a cache, over what precedes it."""
    np.testing.assert_array_equal(greedy.tokens[:, 0], greedy.tokens[:, 1])
    samples = zip(PROMPTS, greedy.tokens, greedy.complete, strict=True)
    inputs = inputs_of([(p, [response(ts[0], cs[0])]) for p, ts, cs in samples])
    logits = np.asarray(jitted_hidden(model, inputs) @ model.embedding.T)
    for row, prompt in enumerate(PROMPTS):
        tokens = response(greedy.tokens[row, 0], greedy.complete[row, 0])
        best = [logits[row, len(prompt) - 1 + i].argmax() for i in range(len(tokens))]
        assert tokens == best
    assert len({tuple(map(int, t)) for t in greedy.tokens[:, 0]}) == 3  # the prompts do matter


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_the_backward_pass_computes_again_does_not_matter(model, greedy, remat):
    like = eqx.filter_eval_shape(Transformer, model.config, jax.random.key(0), Runtime(remat=remat))
    again = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))
    np.testing.assert_array_equal(drawn(again, temperature=0.0, n=2).tokens, greedy.tokens)


@pytest.mark.parametrize("place", [{"width": 9}, {"length": 16}])
def test_where_the_prompts_stand_and_what_pads_them_does_not_matter(model, greedy, place):
    samples = drawn(model, filler=7, temperature=0.0, n=2, **place)
    np.testing.assert_array_equal(samples.tokens, greedy.tokens)
    np.testing.assert_allclose(samples.logps, greedy.logps, rtol=0, atol=FLOAT32)


DRAWS = 4096


def chi_square_p(counts, probabilities) -> float:
    """Of counts of independent draws; cells that expect fewer than 5 are one cell."""
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 5
    pool = [np.append(a[~rare], a[rare].sum()) for a in (counts, expected)]
    pool = [a[pool[1] > 0] for a in pool]
    return stats.chisquare(*pool).pvalue


@pytest.fixture(scope="module")
def many(model) -> Samples:
    return drawn(model, PROMPTS[:2], n=DRAWS, max_new=2)


def test_two_sampled_tokens_have_the_models_joint_distribution(model, many):
    """The exact probability of every two-token response, by teacher forcing, against 4096 draws.

    One fixed seed, so the outcome is fixed; a right sampler fails one seed in a thousand at this
    bound.
    """
    grid = [[a, b] for a in range(V) for b in range(V) if a != EOS]
    inputs = inputs_of([(PROMPTS[row], [r]) for row in range(2) for r in [[EOS], *grid]])
    logps = np.asarray(jitted_logps(model, inputs)[:, 0], np.float64)
    exact = np.exp(logps).reshape(2, -1)
    np.testing.assert_allclose(exact.sum(1), 1, atol=1e-5)
    for row in range(2):
        tokens = np.asarray(many.tokens[row])
        counts = np.array(
            [(tokens[:, 0] == EOS).sum(), *((tokens == r).all(1).sum() for r in grid)]
        )
        assert counts.sum() == DRAWS
        assert chi_square_p(counts, exact[row]) > 1e-3
        assert chi_square_p(counts, exact[1 - row]) < 1e-6  # the bound can tell


def test_temperature_sharpens_the_draws_and_log_probs_stay_the_models(model):
    samples = drawn(model, PROMPTS[:2], n=DRAWS, max_new=1, temperature=0.5)
    inputs = inputs_of([(PROMPTS[0], [[t]]) for t in range(V)])
    exact = np.asarray(jitted_logps(model, inputs)[:, 0], np.float64)
    first = np.asarray(samples.tokens[0, :, 0])
    np.testing.assert_allclose(samples.logps[0], exact[first], rtol=0, atol=FLOAT32)
    squared = np.exp(2 * exact)  # exp(logit / 0.5)
    counts = np.bincount(first, minlength=V)
    assert chi_square_p(counts, squared) > 1e-3
    assert chi_square_p(counts, np.exp(exact)) < 1e-6


@pytest.mark.parametrize("vocab", [1, 2, 7, 100, 1000])
def test_an_index_is_the_first_whose_cumulative_probability_exceeds_the_uniform_number(vocab):
    """By NumPy in float64, for 300 rows; a third of the probabilities are 0."""
    rng, key = np.random.default_rng(0), jax.random.key(5)
    weights = rng.random((300, vocab)) * (rng.random((300, vocab)) > 1 / 3) + 1e-9
    probabilities = np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
    cumulative = np.cumsum(probabilities, axis=1, dtype=np.float64)
    uniform = np.asarray(jax.random.uniform(key, (300, 1)), np.float64) * cumulative[:, -1:]
    found = np.asarray(sampling.invert_cdf(jnp.asarray(probabilities), key))
    expected = (cumulative > uniform).argmax(1)
    near = np.abs(cumulative - uniform).min(1) < 1e-6  # where float32 may decide otherwise
    np.testing.assert_array_equal(found[~near], expected[~near])
    assert near.sum() < 10 and (found >= 0).all() and (found < vocab).all()
