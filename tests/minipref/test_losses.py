"""Losses by hand and against the reference; what `preference_loss` refuses; loops around it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import minipref as mp
from minipref.methods import METHODS
from reference.methods import METHODS as REFERENCE
from reference.methods import method_loss as reference_loss

LN = np.log


# ---- supervised fine-tuning, reward models, z-loss


def test_sft_loss_is_nats_a_response_token():
    """Two responses of 3 and 2 tokens with log-probabilities -4 and -1."""
    loss, metrics = mp.sft_loss(jnp.asarray([[-4.0], [-1.0]]), 5)
    assert loss == 1.0 and metrics == {}


def test_reward_loss_by_hand():
    """Margins ln 3 and 0 cost ln(4/3) and ln 2; only a strictly higher reward is right."""
    loss, metrics = mp.reward_loss(jnp.asarray([[LN(3) + 1, 1.0], [2.0, 2.0]], jnp.float32))
    assert loss == pytest.approx((LN(4 / 3) + LN(2)) / 2)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == pytest.approx(LN(3) / 2)


def test_a_reward_loss_reads_the_first_two_responses_alone():
    slope = jax.grad(lambda rewards: mp.reward_loss(rewards)[0])(jnp.asarray([[1.0, 2.0, 3.0]]))
    assert slope[0, 2] == 0 and slope[0, 0] == -slope[0, 1] != 0


@pytest.mark.parametrize("shape", [(3, 1), (0, 2)])
def test_a_reward_loss_of_no_pair_is_refused(shape):
    """An index beyond a JAX array is the last one's: the margin of one response would be 0."""
    with pytest.raises(ValueError, match=r"rewards has shape .*: pass \[B, n\]"):
        mp.reward_loss(jnp.zeros(shape))


def test_half_precision_is_summed_in_float32():
    loss, _ = mp.sft_loss(jnp.full(50_000, -2, jnp.float16), 50_000)
    assert loss == 2 and loss.dtype == jnp.float32
    loss, _ = mp.reward_loss(jnp.asarray([[-6e4, 6e4]], jnp.float16))
    assert loss == pytest.approx(1.2e5, rel=1e-3)


def test_z_loss_by_hand():
    """log Z of 3 and -1 count, 100 is masked: (9 + 1) / 2."""
    mask = jnp.asarray([[True, True, False]])
    assert mp.z_loss(jnp.asarray([[3.0, -1.0, 100.0]]), mask) == 5


# ---- preference losses. Two pairs with margins h = (-1 + 3) - (-4 + 2) = 4 and
# (-2 + 2) - (-1 + 2) = -1, and two samples with KL 1.5 and 0.5; beta is 1/2, so beta h is 2 and
# -1/2. The margins of the rewards: 3 and 1/2 by the first model, 2 and 0 by the second.

LOGPS = jnp.asarray([[-1.0, -4.0, -5.5], [-2.0, -1.0, -3.5]])
REF = jnp.asarray([[-3.0, -2.0, -4.0], [-2.0, -2.0, -3.0]])
REWARDS = jnp.asarray([[[4.0, 1.0], [0.0, -0.5]], [[1.0, -1.0], [7.0, 7.0]]])
DPO = (np.log1p(np.exp(-2)) + np.log1p(np.exp(0.5))) / 2
IPO = ((4 - 2) ** 2 + (-1 - 2) ** 2) / 2  # tau 1/2: the target is 2
FIRST = ((3 - 2) ** 2 + (0.5 + 0.5) ** 2) / 2  # 1
SECOND = ((2 - 2) ** 2 + (0 + 0.5) ** 2) / 2  # 1/8
MEAN = ((2.5 - 2) ** 2 + (0.25 + 0.5) ** 2) / 2
KL = 1.0
HAND = {
    "dpo": DPO,
    "ipo": IPO,
    "d-dpo": FIRST,
    "p-dpo": DPO,
    "dp-dpo": FIRST,
    "e-dpo": SECOND,
    "hull": SECOND,
    "mean": MEAN,
}
WEIGHTS = {"d-dpo": [1], "dp-dpo": [1], "e-dpo": [0, 1], "hull": [0, 1], "mean": [0.5, 0.5]}
PESSIMISTIC = [name for name in HAND if METHODS[name].gamma is not None]
DISTILLED = [name for name in HAND if METHODS[name].rewards != "none"]


def arguments(method, gamma=(0.25, 0.75)):
    """What a method takes: samples where it has a KL term, as many rewards as it reads."""
    row = METHODS[method]
    n = 2 if row.gamma is None else 3
    options = {"beta": 0.5}
    if row.rewards != "none":
        options["rewards"] = REWARDS[: {"single": 1, "ensemble": 2}[row.rewards]]
    if row.gamma is not None:
        options["gamma"] = gamma
    return (method, LOGPS[:, :n], REF[:, :n]), options


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("method", HAND)
@pytest.mark.parametrize(("progress", "gamma"), [(0.0, 0.25), (0.5, 0.5), (1.0, 0.75)])
def test_preference_losses_by_hand(method, progress, gamma, jit):
    """gamma goes from 1/4 to 3/4; the nearest mixture is the second model alone."""
    args, options = arguments(method)
    compute = eqx.filter_jit(mp.preference_loss) if jit else mp.preference_loss
    loss, metrics = compute(*args, **options, progress=jnp.float32(progress))
    pessimistic = method in PESSIMISTIC
    assert loss == pytest.approx(HAND[method] + gamma * KL * pessimistic, rel=1e-5)
    assert ("kl" in metrics) == pessimistic and metrics.get("kl", KL) == KL
    assert ("ensemble/weights" in metrics) == (method in WEIGHTS)
    if method in WEIGHTS:
        np.testing.assert_allclose(metrics["ensemble/weights"], WEIGHTS[method], atol=1e-4)


@pytest.mark.parametrize("method", PESSIMISTIC)
def test_a_single_gamma_stays_and_the_rows_own_is_annealed(method):
    args, options = arguments(method, gamma=0.5)
    for progress in (0.0, 1.0):
        loss, _ = mp.preference_loss(*args, **options, progress=progress)
        assert loss == pytest.approx(HAND[method] + 0.5, rel=1e-6)
    del options["gamma"]
    losses = [mp.preference_loss(*args, **options, progress=p)[0] for p in (0.0, 0.5, 1.0)]
    weights = np.array([1e-4, 5.05e-3, 1e-2])  # section 6.1
    np.testing.assert_allclose(losses, HAND[method] + weights, rtol=1e-6)


def test_beta_is_the_rows_by_default():
    """log-ratio margin 10, beta 0.1: beta h = 1."""
    loss, _ = mp.preference_loss("dpo", jnp.asarray([[10.0, 0.0]]), jnp.zeros((1, 2)))
    assert loss == pytest.approx(np.log1p(np.exp(-1)))


def test_samples_are_monitored_where_a_method_has_no_kl_term():
    loss, metrics = mp.preference_loss("dpo", LOGPS, REF, beta=0.5)
    assert metrics["kl"] == KL and loss == pytest.approx(DPO)


def test_hull_weights_inside_the_simplex():
    """One pair's residuals 1 and -3 cancel at weights 3/4, 1/4; e-dpo can only take the first."""
    rewards, logps = jnp.asarray([[[1.0, 0.0]], [[-3.0, 0.0]]]), jnp.zeros((1, 3))
    loss, metrics = mp.preference_loss("hull", logps, logps, rewards=rewards)
    np.testing.assert_allclose(metrics["ensemble/weights"], [0.75, 0.25], atol=1e-3)
    assert loss == pytest.approx(0, abs=1e-5)
    loss, metrics = mp.preference_loss("e-dpo", logps, logps, rewards=rewards)
    assert loss == 1 and list(metrics["ensemble/weights"]) == [1, 0]


def test_what_is_nearest_to_each_pair_is_logged_beside_what_is_nearest_to_the_batch():
    """At h = 0 the residuals are the rewards, (0, 2) and (1, 1): losses 2 and 1, a pair each."""
    rewards = jnp.asarray([[[0.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    zeros = jnp.zeros((2, 3))
    _, metrics = mp.preference_loss("e-dpo", zeros, zeros, rewards=rewards)
    assert list(metrics["ensemble/weights"]) == [0, 1]
    assert list(metrics["ensemble/nearest"]) == [0.5, 0.5]


def test_preference_metrics_by_hand():
    args, options = arguments("dpo")
    _, metrics = mp.preference_loss(*args, **options)
    assert metrics == {
        "logps/chosen": -1.5,
        "logps/rejected": -2.5,
        "rewards/chosen": 0.5 * (2 + 0) / 2,
        "rewards/rejected": 0.5 * (-2 + 1) / 2,
        "rewards/margins": 0.5 * (4 - 1) / 2,
        "rewards/accuracies": 0.5,
    }


def test_a_tied_margin_is_not_a_right_one():
    _, metrics = mp.preference_loss("dpo", jnp.full((1, 2), -2.0), jnp.full((1, 2), -1.0))
    assert metrics["rewards/accuracies"] == 0


@pytest.mark.parametrize("method", PESSIMISTIC)
def test_the_kls_gradient_does_not_read_the_references_own_log_prob(method):
    """KL = log pi_ref(y) - log pi(y): the first term moves the loss, not the policy's gradient."""
    (_, logps, ref), options = arguments(method, gamma=0.5)
    other = ref.at[:, 2].add(-8.0)

    def loss(logps, ref):
        return mp.preference_loss(method, logps, ref, **options)[0]

    assert loss(logps, other) == pytest.approx(float(loss(logps, ref)) - 4, rel=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(logps, other), jax.grad(loss)(logps, ref))


def test_gradients_push_chosen_up_and_rejected_down():
    """d/d log pi of DPO: -/+ beta sigmoid(-beta h) / B; at the reference sigmoid is 1/2."""
    logps = jnp.asarray([[-1.0, -2.0]] * 2)
    slope = jax.grad(lambda x: mp.preference_loss("dpo", x, logps, beta=0.5)[0])(logps)
    np.testing.assert_allclose(slope, [[-0.125, 0.125]] * 2, rtol=1e-6)


@pytest.mark.parametrize("method", DISTILLED)
def test_rewards_count_through_their_differences_alone(method):
    """A reward model may add anything to both responses of a prompt (section 3.1)."""
    args, options = arguments(method)
    shifted = options["rewards"] + jnp.asarray([[[8.0], [-16.0]]])
    values = (
        mp.preference_loss(*args, **options),
        mp.preference_loss(*args, **options | {"rewards": shifted}),
    )
    jax.tree.map(np.testing.assert_array_equal, *values)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_numpy_one(method):
    """7 random pairs and 4 rewards agree with `reference`, which is checked by hand elsewhere."""
    rng, row = np.random.default_rng(0), REFERENCE[method]
    n = 2 if row.gamma is None else 3
    ref, logps = rng.normal(-9, 1, (2, 7, n))
    rewards = rng.normal(size=({"none": 0, "single": 1, "ensemble": 4}[row.rewards], 7, 2))
    margins = (logps[:, 0] - ref[:, 0]) - (logps[:, 1] - ref[:, 1])
    kls, options = (ref - logps)[:, 2:].ravel(), {}
    if row.gamma is not None:
        row, options = row._replace(gamma=(0.1, 0.3)), {"gamma": (0.1, 0.3)}
    if len(rewards):
        options["rewards"] = rewards
    expected = reference_loss(row, margins, rewards[..., 0] - rewards[..., 1], kls, 0.3, 0.25)
    loss, _ = mp.preference_loss(method, logps, ref, beta=0.3, progress=0.25, **options)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_vmap_over_beta_gamma_and_progress_is_each_value_alone(method):
    args, options = arguments(method)
    betas, progress = jnp.asarray([0.1, 0.5, 2.0]), jnp.asarray([0.0, 0.3, 1.0])
    gammas = jnp.asarray([[0.0, 0.1], [0.3, 0.0], [0.2, 0.2]])

    def loss(beta, gamma, progress):
        values = options | {"beta": beta} | ({"gamma": gamma} if "gamma" in options else {})
        return mp.preference_loss(*args, **values, progress=progress)[0]

    together = jax.jit(jax.vmap(loss))(betas, gammas, progress)
    alone = [loss(*values) for values in zip(betas, gammas, progress, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    scalar = jax.vmap(loss)(betas, gammas[:, 0], progress)
    assert scalar.shape == (3,)


# ---- what it refuses

PAIR, SAMPLED = jnp.zeros((4, 2)), jnp.zeros((4, 3))
REFUSED = {
    "an unknown method": (("kto", PAIR, PAIR), {}, r"method 'kto': pass one of dpo, ipo"),
    "one response": (("dpo", PAIR[:, :1], PAIR[:, :1]), {}, r"policy_logps has shape \(4, 1\)"),
    "a vector": (
        ("dpo", PAIR[0], PAIR[0]),
        {},
        r"policy_logps has shape \(2,\): pass \[B, 2 \+ S\]",
    ),
    "another reference": (("dpo", PAIR, SAMPLED), {}, r"ref_logps has shape \(4, 3\).*\(4, 2\)"),
    "no rewards": (("mean", PAIR, PAIR), {}, r"mean distils rewards: pass rewards=\[K, B, 2\]"),
    "rewards for dpo": (
        ("dpo", PAIR, PAIR),
        {"rewards": jnp.zeros((1, 4, 2))},
        r"rewards: dpo reads",
    ),
    "two models for one": (
        ("d-dpo", PAIR, PAIR),
        {"rewards": jnp.zeros((2, 4, 2))},
        r"rewards are of 2 models: d-dpo distils one; pass \[1, B, 2\]",
    ),
    "swapped axes": (
        ("mean", PAIR, PAIR),
        {"rewards": jnp.zeros((4, 2, 3))},
        r"rewards has shape \(4, 2, 3\): pass \[K, B, 2\].*B = 4",
    ),
    "no axis of models": (
        ("d-dpo", PAIR, PAIR),
        {"rewards": jnp.zeros((4, 2))},
        r"rewards has shape",
    ),
    "no models": (("mean", PAIR, PAIR), {"rewards": jnp.zeros((0, 4, 2))}, r"rewards has shape"),
    "gamma for ipo": (("ipo", PAIR, PAIR), {"gamma": 0.1}, r"gamma: ipo has no KL term"),
    "no samples": (("p-dpo", PAIR, PAIR), {}, r"p-dpo has a KL term: pass .* S >= 1 samples"),
    "three gammas": (
        ("p-dpo", SAMPLED, SAMPLED),
        {"gamma": [0.1, 0.2, 0.3]},
        r"gamma has shape \(3,\)",
    ),
    "a negative gamma": (("p-dpo", SAMPLED, SAMPLED), {"gamma": -0.1}, r"gamma = .*at least 0"),
    "beta of 0": (("dpo", PAIR, PAIR), {"beta": 0.0}, r"beta = 0.0: pass a number above 0"),
    "progress of 2": (("dpo", PAIR, PAIR), {"progress": 2.0}, r"progress = 2.0: .* within 0 and 1"),
    "a vector of betas": (("dpo", PAIR, PAIR), {"beta": jnp.ones(4)}, r"beta has shape \(4,\)"),
    "a vector of progress": (
        ("dpo", PAIR, PAIR),
        {"progress": jnp.ones(4)},
        r"progress has shape \(4,\): pass a number",
    ),
    "no pairs": (("dpo", PAIR[:0], PAIR[:0]), {}, r"policy_logps has shape \(0, 2\)"),
    "progress below 0": (("dpo", PAIR, PAIR), {"progress": -0.1}, r"progress = -0.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_says_what_to_pass(case):
    args, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        mp.preference_loss(*args, **options)


@pytest.mark.parametrize("case", ["no rewards", "swapped axes", "gamma for ipo", "no samples"])
def test_shapes_are_refused_under_jit_too(case):
    args, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda *arrays: mp.preference_loss(args[0], *arrays, **options))(*args[1:])


def test_options_are_keywords_alone():
    with pytest.raises(TypeError, match="positional"):
        mp.preference_loss("dpo", PAIR, PAIR, None)


# ---- loops around it. A policy over 4 responses; the pair is (0, 1), the sample of pi_ref is 3.


RESPONSES = jnp.asarray([[0, 1, 3]])
REF_LOGITS = jnp.zeros(4)
PAIR_REWARDS = jnp.asarray([[[2.0, 0.0]], [[1.0, 0.0]]])


def loss_of_logits(logits):
    logps, ref = (jax.nn.log_softmax(x)[RESPONSES] for x in (logits, REF_LOGITS))
    return mp.preference_loss("e-dpo", logps, ref, rewards=PAIR_REWARDS, beta=1.0, gamma=1e-3)[0]


def descend(params, loss, steps=200):
    """Adam by hand; returns the last parameters."""
    optimizer = optax.adam(0.05)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


def close_to_the_second_model(logits):
    """beta (log pi(0) - log pi(1)) is 1, the margin of the nearest model; gamma moves it little."""
    assert logits[0] - logits[1] == pytest.approx(1.0, abs=0.01)


def test_a_loop_with_plain_arrays():
    close_to_the_second_model(descend(REF_LOGITS, loss_of_logits))


def test_a_loop_with_an_equinox_module():
    model = eqx.nn.Linear(1, 4, use_bias=False, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.weight, model, jnp.zeros((4, 1)))
    trained = descend(model, lambda m: loss_of_logits(m(jnp.ones(1))))
    close_to_the_second_model(trained(jnp.ones(1)))


def test_a_loop_with_a_flax_module():
    nnx = pytest.importorskip("flax.nnx", reason="extra 'test' is not installed")
    model = nnx.Linear(1, 4, use_bias=False, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    graph, params = nnx.split(model, nnx.Param)
    trained = descend(params, lambda p: loss_of_logits(nnx.merge(graph, p)(jnp.ones(1))))
    close_to_the_second_model(nnx.merge(graph, trained)(jnp.ones(1)))
