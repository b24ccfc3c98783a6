"""Real processes on this machine train what one process trains, whatever the mesh; a dead one stops the others."""

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from minipref.methods import METHODS
from scale.data.rows import read, write
from scale.data.tokenizer import train_tokenizer
from scale.io import model_folder
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.train.metrics import WALL_CLOCK
from tests.scale import align_worker

CONFIG = ModelConfig(vocab_size=272, num_layers=2, d_model=16, num_heads=4, head_dim=8, d_ff=16, num_kv_heads=4, block="sequential",
                     norm="rms", tie_embeddings=False)
WORDS = ["tea", "rain", "a cat", "stone", "the sea", "no", "yes", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy, and rows with columns for it: an ensemble's scores, and one model's."""
    at = tmp_path_factory.mktemp("distributed")
    model_folder.save(at / "policy", Transformer(CONFIG, jax.random.key(0)), CONFIG, train_tokenizer(WORDS, 272))
    policy, rng = model_folder.load_policy(at / "policy"), np.random.default_rng(0)
    hashes = policy.hashes | {"limits": str(align_worker.LIMITS)}
    for name, members in (("ensemble", 3), ("single", 1)):
        write(at / f"{name}.parquet", [row(rng, i, members) for i in range(12)], hashes)
    return at


def row(rng, i, members):
    chosen, rejected, sample = rng.choice(WORDS, 3, replace=False)
    scores = {f"score_{side}": rng.normal(size=members).tolist() for side in ("chosen", "rejected")}
    logps = {f"ref_{side}_logps": float(-rng.uniform(5, 20)) for side in ("chosen", "rejected", "sample")}
    return {"prompt": f"{WORDS[i % 8]} {i}", "chosen": chosen, "rejected": rejected, "ref_sample": sample,
            "ref_sample_complete": True, **scores, **logps}


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def launch(folder, out, processes, mesh, *methods):
    """Processes that run these methods: one list for all, or one for each."""
    port, devices = free_port(), 8 // processes
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                                "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    start = partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [start([sys.executable, align_worker.__file__, folder, out, *map(str, (processes, i, port)), mesh,
                   *methods[i % len(methods)]]) for i in range(processes)]


def metrics(folder, out, processes, mesh, methods):
    """Every number that is logged, by method, step and name."""
    workers = launch(folder, out, processes, mesh, methods)
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(outputs)
    assert "dpo" in outputs[0] and not any("dpo" in output for output in outputs[1:])  # only process 0 prints
    lines = {m: (out / m / "metrics.jsonl").read_text().splitlines() for m in methods}
    return {(m, n["step"], k): v for m, ns in lines.items() for n in map(json.loads, ns)
            for k, v in n.items() if k not in WALL_CLOCK}


@pytest.fixture(scope="module")
def alone(folder):
    return metrics(folder, folder / "alone", 1, "1,8,1", METHODS)


@pytest.mark.parametrize(
    ("processes", "mesh", "methods"),
    [(2, "1,8,1", METHODS), (4, "1,8,1", METHODS), (4, "2,2,2", ["e-dpo"]), (1, "2,1,4", ["e-dpo", "ipo"])],
)
def test_processes_and_meshes_do_not_matter(folder, alone, processes, mesh, methods):
    found = metrics(folder, folder / f"{processes}-{mesh}", processes, mesh, list(methods))
    expected = {key: value for key, value in alone.items() if key[0] in methods}
    assert found.keys() == expected.keys() and len(found) >= 3 * len(methods)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-4, atol=2e-5, err_msg=str(key))


def test_a_worker_that_dies_stops_the_others(folder):
    workers = launch(folder, folder / "dying", 2, "1,8,1", ["e-dpo"])
    wait_for(folder / "dying/e-dpo/stage.json")
    workers[1].kill()
    outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    assert workers[0].returncode != 0, outputs[0]


def wait_for(path, seconds=300):
    for _ in range(seconds * 10):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{path}: not there after {seconds} s")


def test_a_worker_that_ends_with_an_error_stops_the_others(folder):
    """One has no more to do after its first method than an error; the other waits for it in a collective."""
    workers = launch(folder, folder / "failing", 2, "1,8,1", ["e-dpo", "dpo"], ["e-dpo", "no such method"])
    wait_for(folder / "failing/dpo/stage.json")
    for worker in workers:
        worker.communicate(timeout=60)
        assert worker.returncode != 0


def stage(processes, *options):
    """A stage of the command line, in processes with eight devices in all."""
    port, flags = free_port(), f"--xla_force_host_platform_device_count={8 // processes}"
    fixed = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    limits = ["--limits.prompt", "8", "--limits.response", "6"]
    ours = [["--runtime.processes", processes, "--runtime.process", i, "--runtime.coordinator", f"localhost:{port}"]
            for i in range(processes)]
    workers = [subprocess.Popen([sys.executable, "-m", "scale.run", *map(str, (*options, *limits, *each))],
                                env=os.environ | fixed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for each in ours]
    outputs = [worker.communicate(timeout=200)[0] for worker in workers]
    assert not any(worker.returncode for worker in workers), "\n".join(outputs)


def test_reward_score_and_its_samples_in_two_processes(folder):
    """The second `score` reads the first's reward models, so that what differs is its own."""
    plain = folder / "plain.parquet"
    write(plain, [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in read(folder / "single.parquet")], {})
    for n in (1, 2):
        stage(n, "reward", "--data", plain, "--validation", plain, "--init", folder / "policy", "--num-reward-models", 2,
              "--training.steps", 3, "--training.batch", 8, "--out", folder / f"rewards-{n}")
        stage(n, "score", "--data", plain, "--rewards", folder / "rewards-1", "--reference", folder / "policy",
              "--out", folder / f"scored-{n}")
    one, two = (load_file(folder / f"rewards-{n}/weights.safetensors") for n in (1, 2))
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=0, atol=1e-6, err_msg=name)  # Adam moved them by 1e-3
    for a, b in zip(*(read(folder / f"scored-{n}/rows.parquet") for n in (1, 2)), strict=True):
        assert a["ref_sample"] == b["ref_sample"]
        for column in ("score_chosen", "score_rejected", "ref_chosen_logps", "ref_rejected_logps", "ref_sample_logps"):
            np.testing.assert_allclose(b[column], a[column], rtol=1e-5, atol=1e-5)
