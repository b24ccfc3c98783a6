"""Real processes on this machine train what one process trains, whatever the mesh; a dead one stops
the others."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from scale.data.dataset import limits_text
from scale.data.rows import read, write
from scale.data.tokenizer import train_tokenizer
from scale.io import model_folder
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.train.metrics import WALL_CLOCK
from tests.scale import align_worker

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=272,
    num_layers=1,
    d_model=16,
    num_heads=4,
    head_dim=8,
    d_ff=16,
    num_kv_heads=4,
    block="sequential",
    norm="rms",
    tie_embeddings=False,
    scaled_logits=False,
)
TRAINED = ["ipo", "dp-dpo", "e-dpo", "hull"]  # of each kind of reward and of loss one at least
WORDS = ["tea", "rain", "a cat", "stone", "the sea", "no", "yes", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random policy, and rows with columns for it: an ensemble's scores, and one model's."""
    folder = tmp_path_factory.mktemp("distributed")
    model, tokenizer = Transformer(CONFIG, jax.random.key(0)), train_tokenizer(WORDS, 272)
    model_folder.save(model_folder.ModelFolder(folder / "policy", model, CONFIG, tokenizer))
    policy, rng = model_folder.load_policy(folder / "policy"), np.random.default_rng(0)
    hashes = policy.hashes | {"--limits": limits_text(align_worker.LIMITS)}
    for name, num_reward_models in (("ensemble", 3), ("single", 1)):
        rows = [make_row(rng, i, num_reward_models) for i in range(12)]
        write(folder / f"{name}.parquet", rows, hashes)
    return folder


def make_row(rng, i, num_reward_models):
    chosen, rejected, sample = rng.choice(WORDS, 3, replace=False)
    responses = "chosen", "rejected", "sample"
    scores = {f"score_{s}": rng.normal(size=num_reward_models).tolist() for s in responses[:2]}
    logps = {f"ref_{name}_logps": float(-rng.uniform(5, 20)) for name in responses}
    return {
        "prompt": f"{WORDS[i % 8]} {i}",
        "chosen": chosen,
        "rejected": rejected,
        "ref_sample": sample,
        "ref_sample_complete": True,
        **scores,
        **logps,
    }


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(command, processes, devices=8):
    """One of several processes with so many devices in all."""
    count = f"--xla_force_host_platform_device_count={devices // processes}"
    flags = f"{os.environ['XLA_FLAGS']} {count}"
    fixed = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    variables = os.environ | fixed | {"XLA_FLAGS": flags}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*map(str, command)], env=variables, text=True, **pipes)


def launch(folder, out, processes, mesh, *methods):
    """Processes that run these methods: one list for all, or one for each."""
    command, port = [sys.executable, align_worker.__file__, folder, out, processes], free_port()
    return [
        start([*command, i, port, mesh, *methods[i % len(methods)]], processes)
        for i in range(processes)
    ]


def ended_well(workers, timeout):
    """The outputs of processes, of which none may have failed.

    A failure shows the errors of Python and the last findings of each process: what JAX says of
    processes that stopped together is long.
    """
    outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    codes = [worker.returncode for worker in workers]
    errors = [re.findall(r"^\w[\w.]*(?:Error|Interrupt)\b.*", text, re.M)[:3] for text in outputs]
    findings = [re.findall(r"^  \S.*", text, re.M)[-3:] for text in outputs]
    assert not any(codes), (codes, errors, findings)
    return outputs


def metrics(folder, out, processes, mesh, methods):
    """Every number that is logged, by method, step and name."""
    workers = launch(folder, out, processes, mesh, methods)
    outputs = ended_well(workers, timeout=300)
    assert "pairs seen" in outputs[0]
    assert not any("pairs seen" in output for output in outputs[1:])  # only process 0 prints
    numbers = {}
    for method in methods:
        for line in (out / method / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            numbers |= {
                (method, record["step"], name): value
                for name, value in record.items()
                if name not in WALL_CLOCK
            }
    return numbers


@pytest.fixture(scope="module")
def alone(folder):
    return metrics(folder, folder / "alone", 1, "1,8,1,1", TRAINED)


@pytest.mark.parametrize(
    ("processes", "mesh", "methods"),
    [
        (2, "1,8,1,1", ["dp-dpo", "e-dpo"]),
        (4, "2,2,2,2", ["hull"]),
        (1, "2,1,4,1", ["ipo"]),
    ],
)
def test_processes_and_meshes_do_not_matter(folder, alone, processes, mesh, methods):
    numbers = metrics(folder, folder / f"{processes}-{mesh}", processes, mesh, list(methods))
    expected = {key: value for key, value in alone.items() if key[0] in methods}
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(numbers[key], value, rtol=2e-4, atol=2e-5, err_msg=str(key))


def test_a_worker_that_dies_stops_the_others(folder):
    workers = launch(folder, folder / "dying", 2, "1,8,1,1", ["e-dpo"])
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
    """One has no more to do after its first method than an error; the other waits for it in a
    collective."""
    workers = launch(
        folder, folder / "failing", 2, "1,8,1,1", ["e-dpo", "dpo"], ["e-dpo", "no such method"]
    )
    wait_for(folder / "failing/dpo/stage.json")
    for worker in workers:
        worker.communicate(timeout=150)
        assert worker.returncode != 0


def run_stages(folder, out, processes):
    """`sft`, `tune` of it, which has all other stages, and `sample`, in so many processes."""
    rows, policy = folder / "plain.parquet", folder / "policy"
    limits = "--limits.prompt 8 --limits.response 6"
    adapter = "--adapter.rank 2 --adapter.products query mlp_out"
    commands = [
        f"sft --data {rows} --init {policy} --out {out}/sft {limits} {adapter} "
        "--training.steps 3 --training.batch-size 8",
        f"tune --data {rows} --model {out}/sft --out {out}/tune {limits} {adapter} "
        "--batch-size 8 --reward-models 2 --learning-rate 1e-2",
        f"sample --data {rows} --policy {out}/tune/policy --out {out}/samples {limits} --n 2",
    ]
    worker, port = Path(align_worker.__file__).with_name("stages_worker.py"), free_port()
    workers = [
        start([sys.executable, worker, processes, i, port, *commands], processes, devices=2)
        for i in range(processes)
    ]
    ended_well(workers, timeout=400)


def test_every_stage_in_two_processes(folder):
    """Adapters of a policy and of reward models too. Adam moves them by up to 1e-2 a step."""
    rng, fields = np.random.default_rng(0), ("prompt", "chosen", "rejected")
    rows = [make_row(rng, i, 1) for i in range(64)]
    write(folder / "plain.parquet", [{k: row[k] for k in fields} for row in rows], {})
    outs = [folder / f"stages-{n}" for n in (1, 2)]
    for n, out in enumerate(outs, 1):
        run_stages(folder, out, n)
    for stage in ("sft", "tune/rewards", "tune/policy", "tune/judge"):
        one, two = (load_file(out / stage / "weights.safetensors") for out in outs)
        assert one.keys() == two.keys() and len(one) >= 4
        for name, array in one.items():
            np.testing.assert_allclose(two[name], array, rtol=0, atol=2e-5, err_msg=name)
    for name in ("tune/scored", "tune/held-out", "tune/evaluation", "samples"):
        tables = [read(out / name / "rows.parquet", need=("prompt",)) for out in outs]
        assert len(tables[0]) > 3
        for a, b in zip(*tables, strict=True):
            assert a.keys() == b.keys()
            for column, value in a.items():
                if isinstance(value, float):
                    np.testing.assert_allclose(b[column], value, atol=1e-4, err_msg=column)
                elif column not in ("score_chosen", "score_rejected"):
                    assert b[column] == value, column
                else:
                    np.testing.assert_allclose(b[column], value, atol=1e-4, err_msg=column)
    for out in outs:
        assert "Verdict on held-out prompts" in (out / "tune/hf/README.md").read_text()


READER = """if True:
    import sys
    from pathlib import Path
    from scale.data.chat_tokenizer import load_tokenizer
    from scale.data.dataset import Limits, make_dataset
    from scale.data.table import scan
    from scale.errors import InputError
    from scale.parallel.mesh import RuntimeConfig
    from scale.parallel.processes import join
    port, tokenizer, data, process = sys.argv[1:]
    join(RuntimeConfig(processes=2, process=int(process), coordinator=f"localhost:{port}"))
    try:
        rows = scan(Path(data))
        tokens = make_dataset(load_tokenizer(Path(tokenizer)), rows, ["chosen"], Limits(9, 9))
        print("tokens", tokens.tokens.ids.tolist(), tokens.kept.tolist())
    except InputError as error:
        print("refused", error)
"""


def read_in_two_processes(folder, data, caches):
    """What each process prints of the rows of a file."""
    command = [sys.executable, "-c", READER, free_port(), folder / "policy", data]
    workers = []
    for i, cache in enumerate(caches):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(cache))
            workers.append(start([*command, i], 2))
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    said = [[line for line in text.splitlines() if line[:1] in "rt"] for text in outputs]
    assert all(said), outputs
    return [lines[-1] for lines in said]


def test_one_process_makes_tokens_that_all_have_wherever_their_caches_are(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{WORDS[i % 8]} {i}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b = tmp_path / "a", tmp_path / "b"
    first, second = read_in_two_processes(folder, data, (a, a))
    assert first == second and first.startswith("tokens [")
    apart = read_in_two_processes(folder, data, (a, b))
    assert apart == [first, first]
    written = [sorted(path.name for path in cache.glob("minipref/tokens/*/*")) for cache in (a, b)]
    assert written[0] == written[1] and written[0].count("ids.npy") == 1


def test_a_file_that_process_0_refuses_all_refuse(folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "chosen": "é"}\n')
    said = read_in_two_processes(folder, data, [tmp_path] * 2)
    expected = f"refused {data}:1: field 'rejected': missing; the row has prompt, chosen"
    assert said == [expected, expected]
