"""The loop: exact resume, what the log holds, what stops a run."""

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

from minipref.batch import Batch, Inputs, Targets
from minipref.losses import reward_loss
from minipref.training import init_state
from scale.data.dataset import batch_indices, take
from scale.errors import InputError
from scale.files import fingerprint, read_json
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.stages.align import Align
from scale.train.loop import Monitor, TrainingConfig, train
from scale.train.metrics import WALL_CLOCK, Log
from scale.train.optimizer import OptimizerConfig, Schedule, make_optimizer
from scale.train.steps import update
from scale.train.throughput import Throughput
from scale.train.timing import Timing

STEPS = 7
TRAINING = TrainingConfig(
    steps=STEPS, batch_size=4, learning_rate=0.05, warmup=2, end_lr_ratio=0.1, seed=3
)
OPTIMIZER = make_optimizer("adam", TRAINING.schedule, TRAINING.learning_rate)


class Linear(eqx.Module):
    weights: jax.Array


def loss_fn(model, batch, hyperparameters, progress):
    """Rewards of two responses, linear in ten features of a row."""
    return reward_loss(batch.targets.ref_logps.reshape(-1, 2, 10) @ model.weights)


FEATURES = np.random.default_rng(0).normal(size=(11, 20)).astype(np.float32)
DATA = Batch(
    Inputs(*[np.zeros((11, 1), np.int32)] * 7),
    Targets(FEATURES, np.zeros((11, 2, 0), np.float32)),
)
loss_step = partial(update, loss_fn, OptimizerConfig(), TRAINING.schedule)
one_step = eqx.filter_jit(loss_step)
two_steps = eqx.filter_jit(eqx.filter_vmap(loss_step, in_axes=(eqx.if_array(0), None)))


def start(num_reward_models=0):
    weights = jnp.linspace(-1, 1, 10)
    if not num_reward_models:
        return init_state(Linear(weights), OPTIMIZER, STEPS)
    scales = range(1, num_reward_models + 1)
    states = [init_state(Linear(weights * scale), OPTIMIZER, STEPS) for scale in scales]
    return jax.tree.map(lambda *a: jnp.stack(a), *states)


def batch_at(i):
    return take(DATA, batch_indices(11, TRAINING.batch_size, TRAINING.seed, i))


class Stopped(Exception):
    """As if the machine went away."""


def stopping(stop):
    def batch_or_stop(i):
        if i == stop:
            raise Stopped
        return batch_at(i)

    return batch_or_stop


def noting(drawn):
    def batch_fn(i):
        drawn.append(i)
        return batch_at(i)

    return batch_fn


def run(folder, batch_fn=batch_at, num_reward_models=0, every=2, eval_fn=None, step_fn=None):
    step_fn = step_fn or (two_steps if num_reward_models else one_step)
    state = start(num_reward_models)
    return train(step_fn, state, batch_fn, STEPS, folder, "test", eval_fn=eval_fn, every=every)


def records(folder):
    """Without what the clock decides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in record.items() if k not in WALL_CLOCK} for record in lines]


def eval_fn(model, step):
    return {"norm": float(jnp.abs(model.weights).sum()), "evaluated": step}


@pytest.mark.parametrize("num_reward_models", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 5, 6])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, num_reward_models, stop):
    """Stopped before step `stop`, in the middle of an interval or just after a checkpoint."""
    whole = run(tmp_path / "whole", num_reward_models=num_reward_models, eval_fn=eval_fn)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping(stop), num_reward_models, eval_fn=eval_fn)
    drawn = []
    resumed = run(tmp_path / "cut", noting(drawn), num_reward_models, eval_fn=eval_fn)
    assert drawn == list(range(stop // 2 * 2, STEPS))  # from the checkpoint on, no step twice
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.parametrize("last", [1, 2, 5, 6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_under_way(tmp_path, last, number):
    """A preemption notice or Ctrl-C during a step, on a checkpoint's step or between, or at the
    last: nothing is lost."""

    def noticed_step(state, batch):
        if state.step == last:
            os.kill(os.getpid(), number)
        return one_step(state, batch)

    whole = run(tmp_path / "whole", eval_fn=eval_fn)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", step_fn=noticed_step, eval_fn=eval_fn)
    assert [record["step"] for record in records(tmp_path / "cut")][-1] == last + 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    drawn = []
    resumed = run(tmp_path / "cut", noting(drawn), eval_fn=eval_fn)
    assert drawn == list(range(last + 1, STEPS))
    np.testing.assert_array_equal(resumed.weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_it_is_evaluated_after_the_steps_that_are_asked_for_too(tmp_path):
    at = []
    train(
        one_step, start(), batch_at, STEPS, tmp_path, "test", every=4, also=(1, 4, 5),
        eval_fn=lambda _, step: at.append(step) or {},
    )  # fmt: skip
    assert at == [0, 1, 4, 5, STEPS]


def test_the_status_of_a_run_is_its_last_step_and_its_last_throughput(tmp_path):
    """Of two reward models the means."""
    monitor = Monitor(tmp_path, Log([]), None, Throughput(0.0), Timing())
    monitor.last = {"step": 2, "loss": 9.0, "tokens_per_second": 1234.5}
    assert monitor.status() == "loss 9, 1,234 tokens/s"
    monitor.add(3, {"loss": jnp.array([0.5, 0.25]), "kl": jnp.array([1.0, 2.0])}, first=False)
    assert monitor.status() == "loss 0.375, KL 1.5, 1,234 tokens/s"


def test_a_resumed_run_and_the_next_one_take_the_program_that_is_there(tmp_path):
    step_fn = eqx.filter_jit(loss_step)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping(5), step_fn=step_fn)
    for name in ("cut", "next"):
        run(tmp_path / name, step_fn=step_fn)
        assert read_json(tmp_path / name / "timing.json")["programs"] == 0


def test_stopped_twice(tmp_path):
    whole = run(tmp_path / "whole")
    for stop in (3, 5):
        with pytest.raises(Stopped):
            run(tmp_path / "cut", stopping(stop))
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
    again = begun({"options": {"seed": 1}, "inputs": ["ab"]})
    np.testing.assert_array_equal(again.weights, first.weights)


def test_a_log_cut_in_the_middle_of_a_line_does_not_stop_a_resume(tmp_path):
    """A full disk or a lost machine leaves half a line after the last checkpoint."""
    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stopping(3))
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    np.testing.assert_array_equal(run(tmp_path / "cut").weights, whole.weights)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_the_log_has_a_line_a_step_and_evaluations_where_checkpoints_are(tmp_path):
    run(tmp_path, eval_fn=eval_fn)
    log = records(tmp_path)
    assert [r["step"] for r in log] == [0, *range(1, STEPS + 1)]
    assert [r["step"] for r in log if "norm" in r] == [0, 2, 4, 6, 7]
    assert [r["evaluated"] for r in log if "evaluated" in r] == [0, 2, 4, 6, 7]
    assert log[0]["norm"] == pytest.approx(np.abs(np.linspace(-1, 1, 10)).sum())
    assert log[1]["learning_rate"] == pytest.approx(0.05 / 2)
    assert log[-1]["learning_rate"] == pytest.approx(0.005)
    first = one_step(start(), batch_at(0))[1]
    assert log[1]["loss"] == pytest.approx(float(first["loss"]))


def test_an_old_log_without_a_checkpoint_is_begun_anew(tmp_path):
    lines = '{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n'
    (tmp_path / "metrics.jsonl").write_text(lines)
    run(tmp_path)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, STEPS + 1))


# ---- batches made before their steps


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_batches_are_made_in_order_two_ahead_of_the_step_and_no_further(tmp_path):
    """When step i begins, i + 2 has been begun at most; and it is, without being asked for."""
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

    run(tmp_path, noted, step_fn=step)
    assert drawn == list(range(STEPS)) and not threads()


class Pending:
    """A result that the devices have not computed yet."""

    def __init__(self, step, waited):
        self.step, self.waited = step, waited

    def block_until_ready(self):
        self.waited.add(self.step)
        return self

    def __array__(self, *args, **options):
        return np.zeros(())


def test_the_devices_are_at_most_two_steps_behind(tmp_path):
    """Otherwise a signal, and the line that says how far the run is, would wait for all steps."""
    started, waited = [], set()

    def step_fn(state, batch):
        started.append(len(started) + 1)
        assert set(started[:-2]) <= waited
        state, metrics = one_step(state, batch)
        return state, metrics | {"pending": Pending(started[-1], waited)}

    train(step_fn, start(), batch_at, STEPS, tmp_path, "x")
    assert started == list(range(1, STEPS + 1))


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
        run(tmp_path, step_fn=step)
    assert not threads()


def test_where_the_time_went_is_in_the_folder_but_in_no_hash_of_it(tmp_path):
    run(tmp_path)
    before = fingerprint(tmp_path)
    timing = read_json(tmp_path / "timing.json")
    assert timing["steps"] == STEPS and timing["programs"] in (
        0,
        1,
    )  # 0: an earlier test compiled it
    names = ("in the step", "waiting for batches", "compiling", "log and checkpoints")
    parts = [timing[name] for name in names]
    assert min(parts) >= 0 and sum(parts) == pytest.approx(timing["seconds"])
    (tmp_path / "timing.json").unlink()
    assert fingerprint(tmp_path) == before


def poisoned(i):
    batch, value = batch_at(i), np.nan if i >= 4 else 1.0
    targets = batch.targets._replace(ref_logps=np.full((4, 20), value, np.float32))
    return batch._replace(targets=targets)


@pytest.mark.parametrize("num_reward_models", [0, 2])
def test_a_loss_that_is_not_finite_names_folder_and_step(tmp_path, num_reward_models):
    with pytest.raises(FloatingPointError, match=f"{tmp_path}: .*at step 5.*; .*step 4 stays"):
        run(tmp_path, poisoned, num_reward_models)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]  # and the checkpoint is of step 4
    resumed = run(tmp_path, batch_at, num_reward_models)
    assert np.all(np.isfinite(resumed.weights))


def rooted_loss(model, batch, hyperparameters, progress):
    """At rows of zeros it is finite, and its gradient is not: the slope of sqrt at 0."""
    loss, metrics = loss_fn(model, batch, hyperparameters, progress)
    return loss + jnp.sqrt(jnp.sum((batch.targets.ref_logps * model.weights[0]) ** 2)), metrics


def zeros_from_5(i):
    batch = batch_at(i)
    targets = batch.targets._replace(ref_logps=batch.targets.ref_logps * np.float32(i < 4))
    return batch._replace(targets=targets)


rooted_step = eqx.filter_jit(partial(update, rooted_loss, OptimizerConfig(), TRAINING.schedule))


def test_a_gradient_that_is_not_finite_names_its_step_and_rows(tmp_path):
    names = "the norm of the gradient is nan at step 5, of rows 7, 9; .*; .*step 4 stays"
    with pytest.raises(FloatingPointError, match=f"{tmp_path}: {names}"):
        train(
            rooted_step, start(), zeros_from_5, STEPS, tmp_path, "test", every=2,
            rows_fn=lambda i: [7, 9] if i == 4 else [],
        )  # fmt: skip
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]
    resumed = run(tmp_path, step_fn=rooted_step)
    assert np.all(np.isfinite(resumed.weights))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [5, 6, STEPS])
def test_weights_that_are_not_finite_are_not_kept(tmp_path, step, value):
    """Loss and gradient are finite, also those of the steps after it: the weight is not read."""

    def broken(state, batch):
        trained = state._replace(model=Linear(jnp.where(FIRST, 0.0, state.model.weights)))
        new, metrics = one_step(trained, batch)
        kept = jnp.where(FIRST & (state.step + 1 >= step), value, new.model.weights)
        return new._replace(model=Linear(kept)), metrics

    due = 6 if step < STEPS else STEPS
    said = f"{tmp_path}: a weight is not finite after step {due}; .*; the checkpoint of step"
    with pytest.raises(FloatingPointError, match=f"{said} {4 if due == 6 else 6} stays"):
        run(tmp_path, step_fn=broken)
    assert all(np.all(np.isfinite(record["loss"])) for record in records(tmp_path))
    assert np.all(np.isfinite(run(tmp_path).weights))


FIRST = jnp.arange(10) == 0


def test_a_metric_of_held_out_rows_that_is_not_finite_stops_the_run(tmp_path):
    def eval_fn(model, step):
        return {"validation/kl": np.inf if step == 4 else 0.5}

    said = f"{tmp_path}: validation/kl is inf at step 4; .*; the checkpoint of step 2 stays"
    with pytest.raises(FloatingPointError, match=said):
        run(tmp_path, eval_fn=eval_fn)
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 2]


def test_a_spike_is_a_warning_and_in_the_log(tmp_path, capsys):
    """One row that is a thousand times larger, at step 25 of 30."""

    def batch_fn(i):
        batch = batch_at(i)
        targets = batch.targets._replace(
            ref_logps=batch.targets.ref_logps * (1e3 if i == 24 else 1)
        )
        return batch._replace(targets=targets)

    train(one_step, start(), batch_fn, 30, tmp_path, "test", every=10)
    out = " ".join(capsys.readouterr().out.split())
    assert "warning: the norm of the gradient is" in out and "at step 25, at most" in out
    norms = {record["step"]: record["grad_norm"] for record in records(tmp_path)}
    assert max(norms, key=norms.get) == 25


def test_the_update_is_adams_on_clipped_gradients():
    """Two updates by hand: gradients of norm 5 and 1/2, clipped to 1; b1 = 0.9, b2 = 0.99,
    eps = 1e-8."""
    params, optimizer = jnp.zeros(2), make_optimizer("adam", Schedule(0, 1.0, 10), 1.0)
    state, m, v = optimizer.init(params), np.zeros(2), np.zeros(2)
    for t, gradient in enumerate(([3.0, 4.0], [0.5, 0.0]), 1):
        change, state = optimizer.update(jnp.asarray(gradient), state, params)
        g = np.asarray(gradient) / max(1, np.linalg.norm(gradient))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        expected = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        np.testing.assert_allclose(change, -expected, rtol=1e-5)
    assert isinstance(optimizer, optax.GradientTransformation)


def test_the_first_state_takes_its_values_from_the_options(tmp_path):
    training = replace(TRAINING, end_lr_ratio=0.25)
    assert training.schedule == Schedule(2, 0.25, STEPS)
    options = {"method": "p-dpo", "beta": 0.3, "gamma": (0.1, 0.2), "training": training}
    stage = Align(out=tmp_path, data=tmp_path, policy=tmp_path, **options)
    state = stage.start(Transformer(ModelConfig(d_model=8, d_ff=8), jax.random.key(0)))
    rate = state.opt_state.hyperparams["peak_lr"]
    values = [*state.hyperparameters, rate, state.step, state.num_steps]
    expected = [0.3, 0.1, 0.2, 0.05, 0, STEPS]
    np.testing.assert_allclose(np.hstack([np.ravel(v) for v in values]), expected, rtol=1e-6)
