"""Checkpoints: what is restored, on which devices, after which deaths. Run as a script, this file
is the trainee."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from minipref.training import Hyperparameters, TrainState
from scale.errors import InputError
from scale.train.checkpoints import Checkpoints
from scale.train.loop import train

SPECS = {
    "matrix": PartitionSpec("fsdp", "tensor"),
    "vector": PartitionSpec(("data", "fsdp")),
    "half": PartitionSpec(),
}


def begin(size: int = 8, shardings: Any = None) -> TrainState:
    """Every number of the model and of the optimizer is a small integer, exact in every dtype."""
    row = np.arange(8, dtype=np.float32)
    model = {
        "matrix": row + 8 * np.arange(size, dtype=np.float32)[:, None],
        "vector": -row,
        "half": row.astype(jnp.bfloat16),
    }
    zeros = {name: np.zeros_like(array) for name, array in model.items()}
    hyperparameters = Hyperparameters(np.float32(1e-3), np.zeros(2, np.float32))
    step, num_steps = np.zeros((), np.int32), np.full((), 200, np.int32)
    state = TrainState(model, (zeros, None), hyperparameters, step, num_steps)
    return jax.device_put(state, shardings)


@partial(jax.jit, donate_argnums=0)
def count(state: TrainState, batch) -> tuple[TrainState, dict]:
    """Adds 1 to every number of the model and 2 to the optimizer's: after s steps, s and 2 s have
    been added."""
    model = jax.tree.map(lambda a: a + 1, state.model)
    moments = jax.tree.map(lambda a: a + 2, state.opt_state)
    metrics = {"loss": model["vector"][0] + batch}
    return state._replace(model=model, opt_state=moments, step=state.step + 1), metrics


def require_counted(state: TrainState, steps: int) -> None:
    start = begin(len(state.model["matrix"]))
    assert int(state.step) == steps and int(state.num_steps) == 200
    of_model = state.model, start.model, steps
    of_optimizer = state.opt_state, start.opt_state, 2 * steps
    for tree, first, added in (of_model, of_optimizer):
        assert jax.tree.structure(tree) == jax.tree.structure(first)
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(first), strict=True):
            assert a.dtype == b.dtype
            expected = np.asarray(b, np.float64) + added
            np.testing.assert_array_equal(np.asarray(a, np.float64), expected)
    assert float(state.hyperparameters.beta) == np.float32(1e-3)


def counted(steps: int, size: int = 8) -> TrainState:
    state = begin(size)
    for _ in range(steps):
        state, _ = count(state, 0)
    return state


def saved(folder: Path, record: dict, *steps: int) -> Path:
    checkpoints = Checkpoints(folder, record)
    for step in steps:
        checkpoints.save(step, counted(step))
    checkpoints.close()
    return folder


def restored(folder: Path, record: dict, state: TrainState) -> TrainState:
    checkpoints = Checkpoints(folder, record)
    try:
        return checkpoints.restore(state)
    finally:
        checkpoints.close()


def test_the_latest_of_several_is_kept_and_comes_back(tmp_path):
    saved(tmp_path / "c", {"seed": 1}, 3, 5, 6)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["6"]
    require_counted(restored(tmp_path / "c", {"seed": 1}, begin()), 6)


def test_without_a_checkpoint_the_state_stays_and_no_folder_appears(tmp_path):
    state = begin()
    assert restored(tmp_path / "c", {}, state) is state
    assert not (tmp_path / "c").exists()


def test_what_is_saved_is_the_state_of_its_step_though_the_next_steps_overwrite_it(tmp_path):
    """The step donates its state: its buffers are reused at once, while the save of 64 MB is under
    way."""
    checkpoints, state = Checkpoints(tmp_path / "c", {}), begin(2**20)
    for step in range(1, 61):
        state, _ = count(state, 0)
        if step == 20:
            checkpoints.save(step, state)
    require_counted(state, 60)
    checkpoints.close()
    require_counted(restored(tmp_path / "c", {}, begin(2**20)), 20)


OTHERS = [{"seed": 2, "inputs": ["a"]}, {"inputs": ["a"]}, {"seed": 1, "inputs": ["a"], "x": 0}]


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, other):
    saved(tmp_path / "c", {"seed": 1, "inputs": ["a"]}, 2)
    with pytest.raises(InputError, match=f"{tmp_path}/c: begun with other (seed|x);"):
        restored(tmp_path / "c", other, begin())


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("half", None, r"unexpected leaf \.model\['half'\]"),
        ("bias", 2, r"missing leaf \.model\['bias'\]"),
        ("vector", 9, r"leaf \.model\['vector'\] is float32\[8\], expected float32\[9\]"),
        ("half", 8, r"leaf \.model\['half'\] is bfloat16\[8\], expected float32\[8\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_leaf(tmp_path, name, shape, message):
    saved(tmp_path / "c", {}, 2)
    model = begin().model
    model.pop(name, None)
    model |= {name: jnp.zeros(shape)} if shape else {}
    with pytest.raises(InputError, match=message):
        restored(tmp_path / "c", {}, begin()._replace(model=model))


@pytest.mark.parametrize("victim", ["state/_METADATA", "record/metadata"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, victim):
    path = saved(tmp_path / "c", {}, 2) / "2" / victim
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"{tmp_path}/c/2: cannot be read"):
        restored(tmp_path / "c", {}, begin())


def test_a_save_that_fails_is_raised(tmp_path):
    (tmp_path / "c").write_text("a file where the folder should be")
    with pytest.raises((OSError, ValueError), match="c"):
        saved(tmp_path / "c", {}, 1)


# ---- trainees: other processes


@pytest.fixture
def trainee() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts this file as a script: `trainee(role, *arguments, **environment)`. None outlives its
    test."""
    started = []
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(role: str, *arguments: object, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-W", "error", __file__, role, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        variables = os.environ | fixed | environment
        started.append(subprocess.Popen(command, env=variables, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        with process:
            pass


def succeed(process: subprocess.Popen, separator: str | None = None) -> list[str]:
    """The words that it prints, or the lines; nothing else, such as a library's warnings, may reach
    the console."""
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    return out.strip().split(separator)


def on_mesh(*shape: int) -> TrainState:
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    whole = NamedSharding(mesh, PartitionSpec())
    return begin(8, TrainState(shardings, (shardings, None), whole, whole, whole))


def resharded(folder: str) -> None:
    """Save on one mesh, restore on others."""
    state = on_mesh(1, 8, 1)
    for _ in range(5):
        state, _ = count(state, 0)
    checkpoints = Checkpoints(Path(folder), {})
    checkpoints.save(5, state)
    checkpoints.close()
    for like in (on_mesh(1, 8, 1), on_mesh(2, 2, 2), on_mesh(8, 1, 1), begin()):
        state = restored(Path(folder), {}, like)
        require_counted(state, 5)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert a.sharding == b.sharding
    shards = restored(Path(folder), {}, on_mesh(2, 2, 2)).model["matrix"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(4, 4)}
    print("done")


def test_a_checkpoint_of_one_mesh_is_restored_on_others_and_on_one_device(tmp_path, trainee):
    flags = "--xla_force_host_platform_device_count=8"
    process = trainee("resharded", tmp_path / "c", XLA_FLAGS=flags)
    assert succeed(process) == ["done"]
    require_counted(restored(tmp_path / "c", {}, begin()), 5)


def short(folder: str) -> None:
    train(count, begin(), lambda i: 0, 50, Path(folder), "short", every=50)
    print("orbax" in sys.modules)


def test_a_run_too_short_for_a_checkpoint_does_not_import_orbax(tmp_path, trainee):
    assert succeed(trainee("short", tmp_path))[-1] == "False"
    assert not (tmp_path / "checkpoints").exists()


def crowded(folder: str) -> None:
    """The file system takes no file of more than 20 kB: a checkpoint meets that, no metrics do."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        train(count, begin(4096), lambda i: 0.0, 60, Path(folder), "crowded", every=5)
    except OSError as error:
        print(error)


def test_a_checkpoint_that_cannot_be_written_is_one_error(tmp_path, trainee):
    [*_, line] = succeed(trainee("crowded", tmp_path, JAX_ENABLE_COMPILATION_CACHE="0"), "\n")
    assert line.startswith(f"{tmp_path}/checkpoints: cannot be written: ")


def member(folder: str, port: str, index: str) -> None:
    """One of two processes, a device each. Prints the steps that it begins, and the one it stopped
    after."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    begun = []

    def step(state: TrainState, batch) -> tuple[TrainState, dict]:
        begun.append(batch)
        os.write(1, b"step\n")
        time.sleep(0.01)
        return count(state, 0.0)

    try:
        state = on_mesh(1, 2, 1)
        train(step, state, lambda i: i + 1, 100_000, Path(folder), "member", every=10)
    except KeyboardInterrupt:
        print("stopped", begun[-1])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_after_one_step(tmp_path, trainee):
    """They begin from the checkpoint of a single process, and a single process goes on with
    theirs."""
    saved(tmp_path / "checkpoints", {}, 3)
    port = free_port()
    processes = [trainee("member", tmp_path, port, i) for i in range(2)]
    for _ in range(25):
        next(line for line in processes[1].stdout if line == "step\n")
    processes[1].send_signal(signal.SIGTERM)
    last = [process.communicate(timeout=300)[0].split()[-2:] for process in processes]
    assert last[0] == last[1] and last[0][0] == "stopped"
    step = int(last[0][1])
    assert step >= 28
    require_counted(restored(tmp_path / "checkpoints", {}, begin()), step)
    train(count, begin(), lambda i: 0.0, step + 7, tmp_path, "alone", every=5)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in log] == [(i, float(i)) for i in range(4, step + 8)]


# ---- kill -9

STEPS, EVERY = 720, 5


def chaotic(state: TrainState, batch) -> tuple[TrainState, dict]:
    """A step whose result, to the last bit, depends on all steps before it."""
    model = jax.tree.map(lambda a: jnp.sin(3 * a + batch), state.model)
    loss = sum(a.astype(jnp.float32).sum() for a in jax.tree.leaves(model))
    return state._replace(model=model, step=state.step + 1), {"loss": loss}


def killable(folder: str) -> None:
    """Prints the steps that it begins; and at the end writes the weights."""

    def step(state: TrainState, i: int) -> tuple[TrainState, dict]:
        os.write(1, b"%d\n" % i)
        return compiled(state, i / STEPS)

    compiled = jax.jit(chaotic, donate_argnums=0)
    path, record = Path(folder), {"seed": 0}
    model = train(step, begin(), lambda i: i, STEPS, path, "killable", every=EVERY, record=record)
    weights = {name: np.asarray(array, np.float32) for name, array in model.items()}
    np.savez(path / "weights.npz", **weights)


@pytest.mark.slow
def test_ten_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(tmp_path, trainee):
    """A step begins when the save of its last checkpoint has been started, and so the one before it
    is complete."""
    step, whole = jax.jit(chaotic), tmp_path / "whole"
    model = train(step, begin(), lambda i: i / STEPS, STEPS, whole, "whole", every=STEPS)
    rng, reached = random.Random(0), 0
    for _ in range(10):
        process = trainee("killable", tmp_path / "cut")
        lines = [process.stdout.readline() for _ in range(rng.randint(1, 35))]
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert (process.wait(), process.stderr.read()) == (-signal.SIGKILL, "")
        steps = [int(line) for line in [*lines, *process.stdout]]
        assert steps == list(range(steps[0], steps[-1] + 1)) and steps[0] % EVERY == 0
        assert steps[0] >= reached // EVERY * EVERY - EVERY
        reached = steps[-1]
    assert 40 < reached < STEPS
    succeed(trainee("killable", tmp_path / "cut"))
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("cut", "whole")]
    assert logs[0] == logs[1]
    with np.load(tmp_path / "cut/weights.npz") as weights:
        for name, array in model.items():
            np.testing.assert_array_equal(weights[name], np.asarray(array, np.float32))


if __name__ == "__main__":
    roles = (resharded, short, crowded, member, killable)
    {role.__name__: role for role in roles}[sys.argv[1]](*sys.argv[2:])
