"""What a run logs, where, and how fast it says it trained. TensorBoard's and W&B's files are read
back."""

import itertools
import json
import struct
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minipref.batch import Batch, Inputs, Targets
from minipref.losses import preference_loss
from minipref.training import Hyperparameters, init_state
from scale.errors import InputError
from scale.train import metrics as metrics_module
from scale.train.metrics import WALL_CLOCK, open_log, scalars
from scale.train.optimizer import OptimizerConfig, Schedule, make_optimizer
from scale.train.steps import update
from scale.train.throughput import Throughput

BOTH = ("tensorboard", "wandb")


def record(step, scale=1.0):
    """Values that float32, TensorBoard's type, holds exactly."""
    weights = np.array([0.25, 0.75], np.float32) * scale
    return {
        "step": step,
        "loss": np.float32(step * scale),
        "rewards/margins": -0.5,
        "ensemble/weights": weights,
    }


def named(step, scale=1.0):
    """By hand: the same record under one name a number."""
    return {
        "loss": step * scale,
        "rewards/margins": -0.5,
        "ensemble/weights/0": 0.25 * scale,
        "ensemble/weights/1": 0.75 * scale,
    }


def write(folder, step, records, loggers=()):
    with open_log(folder, step, loggers) as log:
        log.write(records)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- metrics.jsonl


def test_a_record_is_a_line_and_an_array_a_list(tmp_path):
    with open_log(tmp_path, 0) as log:
        log.write([record(1), record(2)])
        log.write([record(3, 2.0)])
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "loss": 1.0, "rewards/margins": -0.5, "ensemble/weights": [0.25, 0.75]}',
        '{"step": 2, "loss": 2.0, "rewards/margins": -0.5, "ensemble/weights": [0.25, 0.75]}',
        '{"step": 3, "loss": 6.0, "rewards/margins": -0.5, "ensemble/weights": [0.5, 1.5]}',
    ]
    assert files(tmp_path) == ["metrics.jsonl"]


def test_a_resume_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path):
    write(tmp_path, 0, [record(step) for step in range(5)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    write(tmp_path, 2, [record(3, 2.0)])
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 6)]


def test_without_a_checkpoint_the_log_begins_anew(tmp_path):
    write(tmp_path, 0, [record(0), record(1)])
    write(tmp_path, 0, [record(0, 2.0)])
    assert [r["ensemble/weights"] for r in lines(tmp_path)] == [[0.5, 1.5]]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    write(tmp_path, 0, [record(1), record(2)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for step in (0, 1):
        write(tmp_path, step, [record(3)])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert files(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("logger", BOTH)
def test_a_missing_package_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, logger, process
):
    """In every process, so that none waits for the others."""
    write(tmp_path, 0, [record(1), record(2)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(
        metrics_module, "find_spec", lambda name: None if name == logger else "found"
    )
    monkeypatch.setattr(jax, "process_index", lambda: process)
    message = f"^--log {logger}: needs pip install -e '\\.\\[logging\\]'$"
    with pytest.raises(InputError, match=message):
        write(tmp_path, 1, [], (logger,))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert files(tmp_path) == ["metrics.jsonl"]


def test_an_arrays_numbers_have_a_name_each():
    record = {"step": 3, "a": np.float32(1.5), "b/c": np.arange(2), "d": [[1, 2], [3, 4]]}
    vectors, matrix = {"b/c/0": 0, "b/c/1": 1}, {"d/0/0": 1, "d/0/1": 2, "d/1/0": 3, "d/1/1": 4}
    numbers = scalars(record)
    assert numbers == {"a": 1.5} | vectors | matrix
    assert {type(value) for value in numbers.values()} == {float}


# ---- TensorBoard


@pytest.fixture
def events(monkeypatch):
    """TensorBoard's own reader. Each file of events is a second younger: it reads them in the order
    of their names."""
    pytest.importorskip("tensorboard", reason="needs minipref[logging]")
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.summary.writer import event_file_writer

    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))

    def read(folder):
        reader = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
        reader.Reload()
        tags = reader.Tags()["scalars"]
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}

    return read


def test_tensorboard_shows_every_name_and_step(tmp_path, events):
    write(tmp_path, 0, [record(0), record(1), record(2, 2.0)], ("tensorboard",))
    by_step = [named(0), named(1), named(2, 2.0)]
    expected = {name: [(i, r[name]) for i, r in enumerate(by_step)] for name in named(0)}
    assert events(tmp_path) == expected


def test_tensorboard_has_what_was_written_even_if_the_machine_goes_away(tmp_path, events):
    """Nothing waits in a queue once `write` returns: the checkpoint that follows may be the last
    act
    of the run."""
    with open_log(tmp_path, 0, ("tensorboard",)) as log:
        for interval in range(20):
            log.write([record(2 * interval + 1), record(2 * interval + 2)])
            assert [step for step, _ in events(tmp_path)["loss"]] == list(
                range(1, 2 * interval + 3)
            )


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path, events):
    write(tmp_path, 0, [record(step) for step in range(5)], ("tensorboard",))
    write(tmp_path, 2, [record(3, 2.0), record(4, 2.0)], ("tensorboard",))
    write(tmp_path, 3, [record(4, 4.0), record(5, 4.0)], ("tensorboard",))
    assert events(tmp_path)["loss"] == [(0, 0), (1, 1), (2, 2), (3, 6), (4, 16), (5, 20)]


def test_tensorboard_forgets_a_run_that_is_begun_anew(tmp_path, events):
    write(tmp_path, 0, [record(0), record(1)], ("tensorboard",))
    write(tmp_path, 0, [record(0, 2.0)], ("tensorboard",))
    assert events(tmp_path)["ensemble/weights/0"] == [(0, 0.5)]


def test_the_metrics_of_a_method_reach_tensorboard_under_the_names_that_trl_uses(tmp_path, events):
    """One step of e-DPO with 2 rewards; the model is the log-probs of its responses."""

    def loss_fn(model, batch, hyperparameters, progress):
        ref_logps, rewards = batch.targets
        return preference_loss(
            "e-dpo",
            model,
            ref_logps,
            rewards=jnp.moveaxis(rewards, 2, 0),
            beta=hyperparameters.beta,
            gamma=hyperparameters.gamma,
            progress=progress,
        )

    rng = np.random.default_rng(0)
    targets = Targets(*(rng.normal(size=shape).astype("f") for shape in ((4, 3), (4, 2, 2))))
    inputs = Inputs(*[np.zeros((4, 1), np.int32)] * 6, np.zeros((4, 3), np.int32))
    model = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    schedule = Schedule(10, 0.1, 200)
    hyperparameters = Hyperparameters(jnp.asarray(0.1), jnp.ones(2))
    state = init_state(model, make_optimizer("adam", schedule, 1e-3), 200, hyperparameters)
    step = jax.jit(partial(update, loss_fn, OptimizerConfig(), schedule))
    write(tmp_path, 0, [{"step": 1} | step(state, Batch(inputs, targets))[1]], ("tensorboard",))
    names = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "loss",
        "grad_norm",
        "learning_rate",
        *(f"ensemble/{name}/{i}" for name in ("weights", "nearest") for i in (0, 1)),
    }
    shown, line = events(tmp_path), lines(tmp_path)[0]
    assert shown.keys() >= names
    assert shown["kl"] == [(1, line["kl"])]
    assert shown["ensemble/weights/1"] == [(1, line["ensemble/weights"][1])]


# ---- Weights & Biases


@pytest.fixture(scope="module")
def wandb():
    module = pytest.importorskip("wandb", reason="needs minipref[logging]")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODE", "offline"), ("SILENT", "true"), ("ERROR_REPORTING", "false")):
            patch.setenv(f"WANDB_{name}", value)
        yield module
        module.teardown()


def offline_run(path):
    """Id, history {step: values} and exit code of an offline run's file: a LevelDB log of protocol
    buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, history, entries = path.read_bytes(), 7, b"", {}, {}
    while position + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        position += (-position % 32768) * (-position % 32768 < 7)  # blocks split no header
        if kind in (1, 4):  # whole, or its last part
            entry, part = Record.FromString(part), b""
            entries[entry.WhichOneof("record_type")] = entry
            if entry.HasField("history"):
                items = entry.history.item
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                step = values.pop("_step")
                history[step] = {k: v for k, v in values.items() if k[0] != "_"}
    return entries["run"].run, history, entries["exit"].exit.exit_code


def offline_runs(wandb, folder):
    wandb.teardown()  # `finish` does not wait for W&B's own process to close the file
    return [offline_run(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def test_wandb_gets_every_name_and_step_and_a_resume_continues_the_run(tmp_path, wandb):
    write(tmp_path / "mine", 0, [record(0), record(1), record(2)], ("wandb",))
    write(tmp_path / "mine", 2, [record(3, 2.0)], ("wandb",))
    runs = offline_runs(wandb, tmp_path / "mine")
    assert sorted((history for _, history, _ in runs), key=len) == [
        {3: named(3, 2.0)},
        {0: named(0), 1: named(1), 2: named(2)},
    ]
    known = json.loads((tmp_path / "mine/wandb.json").read_text())["id"]
    facts = [(r.run_id, r.project, r.display_name, code) for r, _, code in runs]
    assert facts == [(known, "minipref", "mine", 0)] * 2


def test_a_run_begun_anew_is_another_one_in_wandb(tmp_path, wandb):
    """Under its old id W&B would refuse the steps that it has."""
    ids = []
    for _ in range(2):
        write(tmp_path, 0, [record(1)], ("wandb",))
        ids.append(json.loads((tmp_path / "wandb.json").read_text())["id"])
    assert ids[0] != ids[1]
    assert {run.run_id for run, _, _ in offline_runs(wandb, tmp_path)} == set(ids)


def test_training_that_fails_is_a_failed_run_in_wandb(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "other")
    with pytest.raises(FloatingPointError), open_log(tmp_path, 0, ("wandb",)) as log:
        log.write([record(1)])
        raise FloatingPointError
    ((run, history, code),) = offline_runs(wandb, tmp_path)
    assert (history, code, run.project) == ({1: named(1)}, 1, "other")


class OnlineRun(SimpleNamespace):
    """As W&B's server answers for a run that it has seen up to step 4: the next is 5."""

    def log(self, values, step, commit):
        assert commit  # else W&B holds the last step back until the next one
        self.logged.append((step, values))

    def finish(self, code):
        self.code = code


def test_steps_that_wandb_has_are_not_sent_again(tmp_path, wandb, monkeypatch):
    """The checkpoint is of step 2, and W&B cannot take back 3 and 4, which are run again."""
    run, asked = OnlineRun(id="kept", step=5, logged=[]), {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or run)
    (tmp_path / "wandb.json").write_text('{"id": "kept"}')
    write(tmp_path, 2, [record(step) for step in (3, 4, 5, 6)], ("wandb",))
    assert run.logged == [(5, named(5)), (6, named(6))] and run.code == 0
    assert (asked["id"], asked["resume"], asked["dir"]) == ("kept", "allow", tmp_path)
    assert [r["step"] for r in lines(tmp_path)] == [3, 4, 5, 6]


def test_wandb_without_an_account_is_one_line_before_anything_is_written(
    tmp_path, wandb, monkeypatch
):
    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    write(tmp_path, 0, [record(1), record(2)])
    message = r"^--log wandb: No API key configured.; WANDB_MODE=offline needs no account$"
    with pytest.raises(InputError, match=message):
        write(tmp_path, 1, [], BOTH)
    assert [r["step"] for r in lines(tmp_path)] == [1, 2]
    assert files(tmp_path) == ["metrics.jsonl"]


# ---- throughput


def steps(*counts, first=1):
    return [{"step": first + i, "tokens": np.int32(count)} for i, count in enumerate(counts)]


def clocked(*seconds, **options):
    return partial(Throughput, clock=iter(seconds).__next__)(**options)


def test_tokens_a_second_and_mfu_by_hand():
    """Step 1 compiles, and ends at 100 s. Steps 2 and 3: 300 + 500 tokens in 4 s, so 200 a second,
    of 6 FLOPs each, 1200 FLOP/s of 4800. A checkpoint is saved from 104 to 110 s; then step 4: 90
    tokens in 3 s."""
    throughput = clocked(100.0, 104.0, 110.0, 113.0, flops_per_token=6.0, peak_flops=4800.0)
    throughput.begin(1)
    measured = throughput.measure(steps(700, 300, 500))
    assert measured == {"tokens_per_second": 200.0, "mfu": 0.25}
    throughput.begin(3)
    measured = throughput.measure(steps(90, first=4))
    assert measured == {"tokens_per_second": 30.0, "mfu": 180 / 4800}


def test_without_a_known_peak_there_is_no_mfu():
    throughput = clocked(0.0, 2.0, flops_per_token=6.0)
    throughput.begin(0)
    assert throughput.measure(steps(10)) == {"tokens_per_second": 5.0}


def test_an_interval_of_the_first_step_alone_has_no_throughput():
    throughput = clocked(0.0, 2.0, flops_per_token=6.0, peak_flops=1.0)
    throughput.begin(8)
    assert throughput.measure(steps(10, first=8)) == {}


def test_every_model_of_an_ensemble_reads_its_tokens():
    throughput = clocked(0.0, 2.0, flops_per_token=1.0, peak_flops=100.0)
    throughput.begin(0)
    records = [{"step": 1, "tokens": np.array([10, 10, 10])}]
    assert throughput.measure(records) == {"tokens_per_second": 15.0, "mfu": 0.15}


def test_the_published_mfu_of_palm_540b():
    """238.3K tokens/s on 6144 TPU v4 (275 TFLOP/s), 6 N + 12 L H Q T FLOPs a token: 46.2% (arXiv
    2204.02311)."""
    flops = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    throughput = clocked(0.0, 1.0, flops_per_token=flops, peak_flops=6144 * 275e12)
    throughput.begin(0)
    assert throughput.measure(steps(238_300))["mfu"] == pytest.approx(0.462, abs=5e-4)


def test_what_the_clock_decides_is_named():
    """Equal runs are compared without these."""
    throughput = clocked(0.0, 1.0, flops_per_token=1.0, peak_flops=1.0)
    throughput.begin(0)
    assert set(throughput.measure(steps(1))) == set(WALL_CLOCK)
