from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minipref.batch import Batch
from minipref.methods import METHODS
from minipref.training import (
    Hyper,
    TrainState,
    init_state,
    learning_rate,
    loss_of,
    preference_loss,
    progress,
    reward_loss,
    sft_loss,
    train_step,
)
from reference.methods import METHODS as REFERENCE
from reference.methods import method_loss as reference_loss

LN = np.log
compiled_loss = eqx.filter_jit(preference_loss)


def loss_at(method, logps, batch, hyper, fraction):
    """`preference_loss`, compiled once a method."""
    return compiled_loss(method, logps, batch, hyper, jnp.float32(fraction))


def hyper(strength=0.5, gamma=(0.0, 0.0), rate=0.1, warmup=0.0, end_lr_ratio=1.0, steps=10.0) -> Hyper:
    return Hyper(*(jnp.asarray(v, jnp.float32) for v in (strength, gamma, rate, warmup, end_lr_ratio, steps)))


def batch_of(ref=((),), scores=None, response_ids=((0, 1),)) -> Batch:
    """A batch of which losses read only the columns and the response_ids."""
    ref = np.asarray(ref, np.float32)
    n = len(ref)
    scores = np.zeros((n, 2, 0)) if scores is None else np.asarray(scores)
    ints = jnp.zeros((n, 1), jnp.int32)
    return Batch(
        ints,
        ints,
        ints,
        ints,
        ints,
        jnp.asarray(response_ids, jnp.int32),
        ints,
        jnp.asarray(ref),
        jnp.asarray(scores, jnp.float32),
    )


# ---- the three losses, by hand


def test_sft_loss_is_nats_a_response_token():
    """Two rows, one response each: 3 and 2 tokens (the rest padding, owner 1), log-probs -4 and -1."""
    batch = batch_of(np.zeros((2, 0)), response_ids=[[0, 0, 0, 1], [0, 0, 1, 1]])
    loss, metrics = sft_loss(jnp.asarray([[-4.0], [-1.0]]), batch, hyper(), 0.0)
    assert loss == 1.0 and metrics == {}


def test_reward_loss_by_hand():
    """Margins ln 3 and 0: -log sigmoid is ln(4/3) and ln 2; only a strictly higher reward counts as right."""
    loss, metrics = reward_loss(jnp.asarray([[LN(3) + 1, 1.0], [2.0, 2.0]], jnp.float32), batch_of(), hyper(), 0.0)
    assert loss == pytest.approx((LN(4 / 3) + LN(2)) / 2)
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/margins"] == pytest.approx(LN(3) / 2)


# Two pairs with margins h = (-1 + 3) - (-4 + 2) = 4 and (-2 + 2) - (-1 + 2) = -1, and two samples with KL 1.5 and 0.5;
# beta is 1/2, so beta h is 2 and -1/2. Rewards' margins: 3 and 1/2 by the first model, 2 and 0 by the second.
LOGPS = jnp.asarray([[-1.0, -4.0, -5.5], [-2.0, -1.0, -3.5]])
REF = [[-3.0, -2.0, -4.0], [-2.0, -2.0, -3.0]]
SCORES = [[[4.0, 1.0], [1.0, -1.0]], [[0.0, 7.0], [-0.5, 7.0]]]
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


def inputs(method: str):
    """LOGPS and the batch as the method takes them: samples where it has a KL, as many rewards as it reads."""
    n = 3 if METHODS[method].gamma != (0, 0) else 2
    k = {"none": 0, "single": 1, "ensemble": 2}[METHODS[method].rewards]
    return LOGPS[:, :n], batch_of(np.asarray(REF)[:, :n], np.asarray(SCORES)[:, :, :k])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("fraction", "gamma"), [(0.0, 0.25), (0.5, 0.5), (1.0, 0.75)])
def test_preference_losses_by_hand(method, fraction, gamma):
    """gamma goes from 1/4 to 3/4; the hull's nearest point is the second model: residuals (1, 1) and (0, 1/2)."""
    logps, batch = inputs(method)
    loss, metrics = loss_at(method, logps, batch, hyper(gamma=(0.25, 0.75)), fraction)
    has_kl = METHODS[method].gamma != (0, 0)
    assert loss == pytest.approx(HAND[method] + gamma * KL * has_kl, rel=1e-5)
    assert ("kl" in metrics) == has_kl and metrics.get("kl", KL) == KL
    assert ("ensemble/weights" in metrics) == (method in WEIGHTS)
    if method in WEIGHTS:
        np.testing.assert_allclose(metrics["ensemble/weights"], WEIGHTS[method], atol=1e-4)


def test_hull_weights_inside_the_simplex():
    """Residuals +1 and -3 of one pair cancel at weights 3/4 and 1/4, where e-dpo can only take the first: 1."""
    batch = batch_of([[0.0, 0.0, 0.0]], [[[1.0, -3.0], [0.0, 0.0]]])
    logps = jnp.zeros((1, 3))
    loss, metrics = loss_at("hull", logps, batch, hyper(), 0.0)
    np.testing.assert_allclose(metrics["ensemble/weights"], [0.75, 0.25], atol=1e-3)
    assert loss == pytest.approx(0, abs=1e-5)
    loss, metrics = loss_at("e-dpo", logps, batch, hyper(), 0.0)
    assert loss == 1 and list(metrics["ensemble/weights"]) == [1, 0]


def test_what_is_nearest_to_each_pair_is_logged_beside_what_is_nearest_to_the_batch():
    """At h = 0 the residuals are the rewards, 0 and 2 against 1 and 1: losses 2 and 1, and a pair each."""
    batch = batch_of(jnp.zeros((2, 3)), [[[0.0, 1.0], [0.0, 0.0]], [[2.0, 1.0], [0.0, 0.0]]])
    _, metrics = loss_at("e-dpo", jnp.zeros((2, 3)), batch, hyper(), 0.0)
    assert list(metrics["ensemble/weights"]) == [0, 1] and list(metrics["ensemble/nearest"]) == [0.5, 0.5]


def test_preference_metrics_by_hand():
    logps, batch = inputs("dpo")
    _, metrics = loss_at("dpo", logps, batch, hyper(), 0.0)
    assert metrics == {
        "logps/chosen": -1.5,
        "logps/rejected": -2.5,
        "rewards/chosen": 0.5 * (2 + 0) / 2,
        "rewards/rejected": 0.5 * (-2 + 1) / 2,
        "rewards/margins": 0.5 * (4 - 1) / 2,
        "rewards/accuracies": 0.5,
    }


def test_a_tied_margin_is_not_a_right_one():
    batch = batch_of([[-1.0, -1.0]])
    assert loss_at("dpo", jnp.asarray([[-2.0, -2.0]]), batch, hyper(), 0.0)[1]["rewards/accuracies"] == 0


def test_a_kl_method_without_samples_is_refused():
    with pytest.raises(ValueError, match="KL"):
        loss_at("p-dpo", *inputs("dpo"), hyper(), 0.0)


def test_loss_of_names_the_row():
    logps, batch = inputs("ipo")
    assert loss_of("ipo")(logps, batch, hyper(), 0.0)[0] == IPO


@pytest.mark.parametrize("method", ["p-dpo", "dp-dpo", "e-dpo"])
def test_the_kls_gradient_does_not_read_the_references_own_log_prob(method):
    """KL = log pi_ref(y) - log pi(y): the first term moves the loss, and not the policy, by a single bit."""
    logps, batch = inputs(method)
    other = batch._replace(ref_logps=batch.ref_logps.at[:, 2].add(-8.0))

    def loss(logps, batch):
        return loss_at(method, logps, batch, hyper(gamma=(0.5, 0.5)), 0.0)[0]

    assert loss(logps, other) == pytest.approx(float(loss(logps, batch)) - 4, rel=1e-6)
    np.testing.assert_array_equal(jax.grad(loss)(logps, other), jax.grad(loss)(logps, batch))


def test_no_loss_reads_the_columns_of_another():
    """SFT and reward losses have the same gradients whatever the reference's and the rewards' columns hold."""
    with_columns = batch_of(REF, SCORES, response_ids=[[0, 1]] * 2)
    without = batch_of(np.full((2, 3), 9.0), np.full((2, 2, 2), 9.0), response_ids=[[0, 1]] * 2)
    for loss in (sft_loss, reward_loss):
        grads = [jax.grad(lambda x, b=b, f=loss: f(x, b, hyper(), 0.0)[0])(LOGPS) for b in (with_columns, without)]
        np.testing.assert_array_equal(*grads)
    assert not np.asarray(jax.grad(lambda x: reward_loss(x, with_columns, hyper(), 0.0)[0])(LOGPS))[:, 2].any()


def test_gradients_push_chosen_up_and_rejected_down():
    """d/d log pi of DPO: -/+ beta sigmoid(-beta h) / B; both references at the policy, so sigmoid is 1/2."""
    grad = jax.grad(lambda x: loss_at("dpo", x, batch_of([[-1.0, -2.0]] * 2), hyper(), 0.0)[0])
    np.testing.assert_allclose(grad(jnp.asarray([[-1.0, -2.0]] * 2)), [[-0.125, 0.125]] * 2, rtol=1e-6)


# ---- the step, on a model that is a row of outputs: its gradient is the loss's own


class Table(eqx.Module):
    outputs: jax.Array
    name: str = eqx.field(static=True, default="table")


def outputs_of(model: Table, batch: Batch):
    return model.outputs


def state_at(step, **options) -> TrainState:
    state = init_state(Table(LOGPS), optax.identity(), hyper(**options))
    return state._replace(step=jnp.asarray(step, jnp.int32))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.025), (1, 0.05), (3, 0.1), (4, 0.1), (10, 0.1)])
def test_warm_up_without_decay(step, expected):
    assert learning_rate(state_at(step, warmup=4, steps=11)) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (5, 0.06), (10, 0.02)])
def test_decay_is_linear_from_the_peak_to_the_floor_at_the_last_step(step, expected):
    assert learning_rate(state_at(step, end_lr_ratio=0.2, steps=11)) == pytest.approx(expected)


def test_warm_up_and_decay_multiply():
    assert learning_rate(state_at(1, warmup=4, end_lr_ratio=0.0, steps=5)) == pytest.approx(0.1 * 0.5 * 0.75)


def test_progress_and_gamma_reach_both_ends():
    assert [float(progress(state_at(s, steps=5))) for s in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert progress(state_at(0, steps=1)) == 0
    logps, batch = inputs("p-dpo")
    state = init_state(Table(logps), optax.identity(), hyper(gamma=(0.25, 0.75), rate=0.0, steps=3))
    losses = []
    for _ in range(3):
        state, metrics = train_step(outputs_of, loss_of("p-dpo"), optax.identity(), state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, [DPO + 0.25, DPO + 0.5, DPO + 0.75], rtol=1e-6)


def test_one_step_of_gradient_descent_by_hand():
    """DPO at the reference: gradient -/+ 1/4 (beta 1/2, one pair), norm sqrt(2)/4, rate 0.1 x 1/2 of warm-up."""
    batch = batch_of([[-1.0, -2.0]])
    state = init_state(Table(jnp.asarray([[-1.0, -2.0]])), optax.identity(), hyper(warmup=2))
    new, metrics = train_step(outputs_of, loss_of("dpo"), optax.identity(), state, batch)
    np.testing.assert_allclose(new.model.outputs, [[-1 + 0.05 / 4, -2 - 0.05 / 4]], rtol=1e-6)
    assert metrics["loss"] == pytest.approx(LN(2))
    assert metrics["grad_norm"] == pytest.approx(2**0.5 / 4)
    assert metrics["learning_rate"] == pytest.approx(0.05)
    assert new.step == 1 and new.model.name == "table"


def test_an_update_keeps_the_weights_type():
    state = init_state(Table(LOGPS[:, :2].astype(jnp.bfloat16)), optax.identity(), hyper())

    def forward(model, batch):
        return model.outputs.astype(jnp.float32)

    new, _ = train_step(forward, loss_of("dpo"), optax.identity(), state, inputs("dpo")[1])
    assert new.model.outputs.dtype == jnp.bfloat16 and not np.array_equal(new.model.outputs, state.model.outputs)


ADAM = optax.scale_by_adam()


@pytest.mark.parametrize("method", METHODS)
def test_each_method_decreases_its_own_loss(method):
    """Gradient descent with a small step on one batch: loss_0 > loss_1 > ... while gamma stands still."""
    logps, batch = inputs(method)
    state = init_state(Table(logps), optax.identity(), hyper(gamma=(0.01, 0.01), rate=0.05, steps=100))
    step = eqx.filter_jit(partial(train_step, outputs_of, loss_of(method), optax.identity()))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.all(np.diff(losses) < 0), losses


def test_a_vmapped_sweep_is_each_value_alone():
    logps, batch = inputs("e-dpo")
    settings = [hyper(0.5, (0.0, 0.1), 0.1, 3.0, 0.5, 4.0), hyper(0.1, (0.3, 0.0), 0.02, 0.0, 1.0, 9.0)]
    step = eqx.filter_jit(partial(train_step, outputs_of, loss_of("e-dpo"), ADAM))
    alone = [init_state(Table(logps), ADAM, h) for h in settings]
    swept = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    for _ in range(3):
        swept, together = eqx.filter_vmap(step, in_axes=(eqx.if_array(0), None))(swept, batch)
        alone, one_by_one = zip(*(step(s, batch) for s in alone), strict=True)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(swept), jax.tree.leaves(alone[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)
        for name, value in one_by_one[i].items():
            np.testing.assert_allclose(together[name][i], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not np.allclose(swept.model.outputs[0], swept.model.outputs[1])


def test_an_ensemble_is_its_members_trained_alone():
    """Each member on its own batch, as `scale.stages.reward` trains them."""
    models = [Table(LOGPS[:, :2] * s) for s in (1.0, -0.5, 0.1)]
    batches = [batch_of(np.zeros((2, 0)))] * 3
    step = eqx.filter_jit(partial(train_step, outputs_of, reward_loss, ADAM))
    alone = [init_state(m, ADAM, hyper()) for m in models]
    ensemble = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
    for _ in range(3):
        ensemble, metrics = eqx.filter_vmap(step)(ensemble, stacked)
        alone = [step(s, b)[0] for s, b in zip(alone, batches, strict=True)]
    assert metrics["loss"].shape == (3,)
    for i, member in enumerate(alone):
        np.testing.assert_allclose(ensemble.model.outputs[i], member.model.outputs, rtol=1e-6)


def test_the_step_is_pure():
    logps, batch = inputs("dpo")
    state = init_state(Table(logps), ADAM, hyper())
    first, second = (train_step(outputs_of, loss_of("dpo"), ADAM, state, batch) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state.step == 0
    np.testing.assert_array_equal(state.model.outputs, logps)


@pytest.mark.parametrize("method", ["d-dpo", "mean", "e-dpo", "hull"])
def test_rewards_count_through_their_differences_alone(method):
    """A reward model may add anything to both responses of a prompt (section 3.1)."""
    logps, batch = inputs(method)
    shifted = batch._replace(scores=batch.scores + jnp.asarray([[[8.0]], [[-16.0]]]))
    for a, b in zip(*(loss_at(method, logps, b, hyper(), 0.0) for b in (batch, shifted)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", METHODS)
def test_the_pair_term_is_the_numpy_one(method):
    """Over 7 random pairs and 4 rewards, against `reference`, which is checked by hand elsewhere."""
    rng = np.random.default_rng(0)
    ref, logps = rng.normal(-9, 1, (2, 7, 3))
    scores = rng.normal(size=(7, 2, {"none": 0, "single": 1, "ensemble": 4}[METHODS[method].rewards]))
    h = (logps[:, 0] - ref[:, 0]) - (logps[:, 1] - ref[:, 1])
    row = REFERENCE[method]
    n = 3 if row.gamma != (0, 0) else 2
    expected = reference_loss(
        row._replace(gamma=(0.1, 0.3) if n == 3 else row.gamma),
        h,
        (scores[:, 0] - scores[:, 1]).T,
        (ref - logps)[:, 2:n].ravel(),
        0.3,
        0.25,
    )
    found, _ = loss_at(
        method, jnp.asarray(logps[:, :n], jnp.float32), batch_of(ref[:, :n], scores), hyper(0.3, (0.1, 0.3)), 0.25
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
