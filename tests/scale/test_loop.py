"""The loop: exact resume, what the log holds, what stops a run; and models as folders of files."""

import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minipref.batch import Batch
from minipref.reward_models import RewardModel, stack
from minipref.training import init_state, reward_loss, train_step
from scale.data.dataset import batch_indices, take
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.files import fingerprint, read_json
from scale.io import model_folder
from scale.io.model_folder import load_policy, load_rewards, save
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime
from scale.train.loop import TrainingConfig, hyper, train
from scale.train.metrics import WALL_CLOCK
from scale.train.optimizer import ADAM

STEPS = 7
SETTINGS = TrainingConfig(steps=STEPS, batch=4, learning_rate=0.05, warmup=2, end_lr_ratio=0.1, seed=3)


class Linear(eqx.Module):
    weights: jax.Array


def outputs(model, batch):
    """Two responses' rewards, linear in ten features a row."""
    return batch.ref_logps.reshape(-1, 2, 10) @ model.weights


FEATURES = np.random.default_rng(0).normal(size=(11, 20)).astype(np.float32)
DATA = Batch(*[np.zeros((11, 1), np.int32)] * 7, FEATURES, np.zeros((11, 2, 0), np.float32))
one_step = eqx.filter_jit(partial(train_step, outputs, reward_loss, ADAM))
two_steps = eqx.filter_jit(
    lambda states, batch: eqx.filter_vmap(
        partial(train_step, outputs, reward_loss, ADAM), in_axes=(eqx.if_array(0), None)
    )(states, batch)
)


def start(num_reward_models=0):
    weights = jnp.linspace(-1, 1, 10)
    if not num_reward_models:
        return init_state(Linear(weights), ADAM, hyper(SETTINGS))
    states = [init_state(Linear(weights * (k + 1)), ADAM, hyper(SETTINGS)) for k in range(num_reward_models)]
    return jax.tree.map(lambda *a: jnp.stack(a), *states)


def batch_at(i):
    return take(DATA, batch_indices(11, SETTINGS.batch_size, SETTINGS.seed, i))


class Stopped(Exception):
    """As if the machine went away."""


def stopping(at):
    def batch_or_stop(i):
        if i == at:
            raise Stopped
        return batch_at(i)

    return batch_or_stop


def run(folder, batches=batch_at, num_reward_models=0, every=2, eval_fn=None, step=None):
    step = step or (two_steps if num_reward_models else one_step)
    return train(step, start(num_reward_models), batches, STEPS, folder, "test", eval_fn, every)


def records(folder):
    """Without what the clock decides."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name not in WALL_CLOCK} for record in found]


def eval_fn(model, step):
    return {"norm": float(jnp.abs(model.weights).sum()), "at": step}


@pytest.mark.parametrize("num_reward_models", [0, 2])
@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, num_reward_models, at):
    """Stopped before step `at`, in the middle of an interval or just after a checkpoint."""
    whole = run(tmp_path / "whole", num_reward_models=num_reward_models, eval_fn=eval_fn)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping(at), num_reward_models, eval_fn=eval_fn)
    drawn = []
    resumed = run(tmp_path / "cut", lambda i: drawn.append(i) or batch_at(i), num_reward_models, eval_fn=eval_fn)
    assert drawn == list(range(at // 2 * 2, STEPS))  # from the checkpoint on, no step twice
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 2, 5, 6])
def test_sigterm_saves_the_step_under_way(tmp_path, at):
    """A preemption notice during a step, on a checkpoint's step or between, or at the last: nothing is lost."""

    def noticed_step(state, batch):
        if state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(state, batch)

    whole = run(tmp_path / "whole", eval_fn=eval_fn)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", step=noticed_step, eval_fn=eval_fn)
    assert [record["step"] for record in records(tmp_path / "cut")][-1] == at + 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    drawn = []
    resumed = run(tmp_path / "cut", lambda i: drawn.append(i) or batch_at(i), eval_fn=eval_fn)
    assert drawn == list(range(at + 1, STEPS))
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_a_resumed_run_and_the_next_one_take_the_program_that_is_there(tmp_path):
    step = eqx.filter_jit(partial(train_step, outputs, reward_loss, ADAM))
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping(5), step=step)
    for name in ("cut", "next"):
        run(tmp_path / name, step=step)
        assert read_json(tmp_path / name / "timing.json")["programs"] == 0


def test_stopped_twice(tmp_path):
    whole = run(tmp_path / "whole")
    for at in (3, 5):
        with pytest.raises(Stopped):
            run(tmp_path / "cut", stopping(at))
    np.testing.assert_array_equal(run(tmp_path / "cut").weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_of_a_complete_run_whose_model_was_not_saved_only_the_last_steps_are_run_again(tmp_path):
    first = run(tmp_path)
    log = records(tmp_path)
    again = run(tmp_path, stopping(5))
    np.testing.assert_array_equal(again.weights, first.weights)
    assert records(tmp_path) == log


def test_a_run_whose_record_differs_from_its_checkpoints_is_refused_and_its_log_kept(tmp_path):
    def begun(record):
        return train(one_step, start(), batch_at, STEPS, tmp_path, "test", every=2, record=record)

    first = begun({"options": {"seed": 1}, "inputs": ["ab"]})
    log = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=f"{tmp_path}/checkpoints: begun with other inputs;"):
        begun({"options": {"seed": 1}, "inputs": ["cd"]})
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    np.testing.assert_array_equal(begun({"options": {"seed": 1}, "inputs": ["ab"]}).weights, first.weights)


def test_a_log_cut_in_the_middle_of_a_line_does_not_stop_a_resume(tmp_path):
    """A full disk or a lost machine leaves half a line after the last checkpoint."""
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping(3))
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    np.testing.assert_array_equal(run(tmp_path / "cut").weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_the_log_has_a_line_a_step_and_the_probes_where_checkpoints_are(tmp_path):
    run(tmp_path, eval_fn=eval_fn)
    found = records(tmp_path)
    assert [r["step"] for r in found] == [0, *range(1, STEPS + 1)]
    assert [r["step"] for r in found if "norm" in r] == [0, 2, 4, 6, 7] == [r["at"] for r in found if "at" in r]
    assert found[0]["norm"] == pytest.approx(np.abs(np.linspace(-1, 1, 10)).sum())
    assert found[1]["learning_rate"] == pytest.approx(0.05 / 2) and found[-1]["learning_rate"] == pytest.approx(0.005)
    first = one_step(start(), batch_at(0))[1]
    assert found[1]["loss"] == pytest.approx(float(first["loss"]))


def test_an_old_log_without_a_checkpoint_is_begun_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n')
    run(tmp_path)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, STEPS + 1))


# ---- batches made ahead


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_batches_are_made_in_order_two_ahead_of_the_step_and_no_further(tmp_path):
    """When step i begins, i + 2 has been begun at most; and it is, without the loop's asking."""
    drawn, third = [], threading.Event()

    def noted(i):
        drawn.append(i)
        if i == 2:
            third.set()
        return batch_at(i)

    def step(state, batch):
        assert third.wait(60)
        assert len(drawn) <= int(state.step) + 3
        return one_step(state, batch)

    run(tmp_path, noted, step=step)
    assert drawn == list(range(STEPS)) and not threads()


@pytest.mark.parametrize("error", [InputError("a bad row"), KeyboardInterrupt()])
def test_what_the_thread_raises_is_raised_where_its_batch_is_due(tmp_path, error):
    def failing(i):
        if i == 5:
            raise error
        return batch_at(i)

    with pytest.raises(type(error)):
        run(tmp_path, failing, every=1)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5] and not threads()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_thread_ends_when_the_loop_does(tmp_path, error):
    def step(state, batch):
        raise error

    with pytest.raises(error):
        run(tmp_path, step=step)
    assert not threads()


def test_where_the_time_went_is_in_the_folder_but_in_no_hash_of_it(tmp_path):
    run(tmp_path)
    before = fingerprint(tmp_path)
    found = read_json(tmp_path / "timing.json")
    assert found["steps"] == STEPS and found["programs"] in (0, 1)  # 0: an earlier test compiled it
    parts = [found[part] for part in ("in the step", "waiting for batches", "compiling", "log and checkpoints")]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(found["seconds"])
    (tmp_path / "timing.json").unlink()
    assert fingerprint(tmp_path) == before


def poisoned(i):
    return batch_at(i)._replace(ref_logps=np.full((4, 20), np.nan if i >= 4 else 1.0, np.float32))


@pytest.mark.parametrize("num_reward_models", [0, 2])
def test_a_loss_that_is_not_finite_names_folder_and_step(tmp_path, num_reward_models):
    with pytest.raises(FloatingPointError, match=f"{tmp_path}: .*at step 5"):
        run(tmp_path, poisoned, num_reward_models)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]  # and the checkpoint is of step 4
    resumed = run(tmp_path, lambda i: batch_at(i), num_reward_models)
    assert np.all(np.isfinite(resumed.weights))


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    """The last step's loss is finite, its gradient is not: sqrt at 0."""

    def broken(state, batch):
        state, metrics = one_step(state, batch)
        bad = state.step == STEPS
        return state._replace(model=Linear(jnp.where(bad, jnp.nan, state.model.weights))), metrics

    with pytest.raises(FloatingPointError):
        run(tmp_path, step=broken)


def test_the_update_is_adams_on_clipped_gradients():
    """Two updates by hand: gradients of norm 5 and 1/2, clipped to 1; b1 = 0.9, b2 = 0.99, eps = 1e-8."""
    params = jnp.zeros(2)
    state, m, v = ADAM.init(params), np.zeros(2), np.zeros(2)
    for t, gradient in enumerate(([3.0, 4.0], [0.5, 0.0]), 1):
        update, state = ADAM.update(jnp.asarray(gradient), state, params)
        g = np.asarray(gradient) / max(1, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        expected = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    assert isinstance(ADAM, optax.GradientTransformation)


def test_hyper_takes_its_values_from_the_training():
    values = hyper(replace(SETTINGS, end_lr_ratio=0.25), 0.3, (0.1, 0.2))
    np.testing.assert_allclose(np.hstack([np.ravel(v) for v in values]), [0.3, 0.1, 0.2, 0.05, 2, 0.25, 7], rtol=1e-6)


# ---- folders

CONFIG = ModelConfig(vocab_size=270, num_layers=1, d_model=8, num_heads=2, head_dim=4, d_ff=8, rope_base=77.0)
CODEC = train_tokenizer(["a few words"], 270)


@pytest.fixture(scope="module")
def policy() -> Transformer:
    rng = np.random.default_rng(0)
    like = eqx.filter_eval_shape(Transformer, CONFIG, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), like)


@pytest.fixture(scope="module")
def rewards(policy) -> RewardModel:
    return stack([RewardModel(policy, 8, key) for key in jax.random.split(jax.random.key(1), 3)])


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_policy_comes_back_to_the_bit(tmp_path, policy):
    save(tmp_path / "p", policy, CONFIG, CODEC)
    found = load_policy(tmp_path / "p")
    same(found.model, policy)
    assert found.config == CONFIG and found.model.config.rope_base == 77.0
    assert found.tokenizer.text_ids("a few words") == CODEC.text_ids("a few words")


def test_an_ensemble_comes_back_to_the_bit(tmp_path, policy, rewards):
    save(tmp_path / "r", rewards, CONFIG, CODEC, 3)
    found = load_rewards(tmp_path / "r")
    same(found.model, rewards)
    assert found.model.head.shape == (3, 8)


def test_a_policy_is_no_reward_model_and_the_reverse(tmp_path, policy, rewards):
    save(tmp_path / "p", policy, CONFIG, CODEC)
    save(tmp_path / "r", rewards, CONFIG, CODEC, 3)
    with pytest.raises(InputError, match="p: holds a policy, not a reward model"):
        load_rewards(tmp_path / "p")
    with pytest.raises(InputError, match="r: holds a reward model, not a policy"):
        load_policy(tmp_path / "r")


def test_hashes_tell_models_and_tokenizers_apart(tmp_path, policy):
    other = eqx.tree_at(lambda m: m.norm, policy, policy.norm + 1e-6)
    save(tmp_path / "a", policy, CONFIG, CODEC)
    save(tmp_path / "b", policy, CONFIG, CODEC)
    save(tmp_path / "weights", other, CONFIG, CODEC)
    save(tmp_path / "config", policy, replace(CONFIG, rope_base=78.0), CODEC)
    save(tmp_path / "codec", policy, CONFIG, train_tokenizer(["other words, other pieces"], 270))
    a = load_policy(tmp_path / "a").hashes
    assert load_policy(tmp_path / "b").hashes == a
    differing = {
        n: {k for k, v in load_policy(tmp_path / n).hashes.items() if v != a[k]} for n in ("weights", "config", "codec")
    }
    assert differing == {"weights": {"model"}, "config": {"model"}, "codec": {"tokenizer"}}


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="no trained model here"):
        load_policy(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.safetensors", cut),
        ("config.json", cut),
        ("tokenizer.json", cut),
        ("config.json", lambda p: p.unlink()),
        ("tokenizer.json", lambda p: p.unlink()),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"d_model": 8', '"d_model": 16'))),
        ("config.json", lambda p: p.write_text(p.read_text().replace('"d_ff"', '"width"'))),
    ],
    ids=["half weights", "half config", "half tokenizer", "no config", "no tokenizer", "other width", "unknown option"],
)
def test_a_damaged_folder_is_a_data_error_that_names_it(tmp_path, policy, name, damage):
    """`InputError`, so that the command line says so in a line and not in a traceback."""
    save(tmp_path / "p", policy, CONFIG, CODEC)
    damage(tmp_path / "p" / name)
    with pytest.raises(InputError, match=str(tmp_path / "p")):
        load_policy(tmp_path / "p")


def test_the_skeleton_costs_no_arrays():
    like = eqx.filter_eval_shape(model_folder.skeleton, ModelConfig(vocab_size=256_000, d_model=4096), 0, Runtime())
    assert isinstance(like.embedding, jax.ShapeDtypeStruct)
