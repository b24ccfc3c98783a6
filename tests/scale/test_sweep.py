"""A grid of policies: each as `align` alone trains it, compiled once a method, skipped where it is
complete."""

import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import scale.parallel.workers
from scale.console import console
from scale.data.dataset import Limits, limits_text
from scale.data.rows import read, write
from scale.data.tokenizer import train_tokenizer
from scale.errors import InputError
from scale.files import read_json, write_json
from scale.io import model_folder
from scale.model import batch_shapes
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.parallel.programs import keep_programs, machine
from scale.parallel.workers import execute_all, run_in_worker, workers
from scale.run import parse
from scale.stages.align import Align
from scale.stages.stage import execute
from scale.stages.sweep import Sweep, shares
from scale.train import batches
from scale.train.batches import plan_batches
from scale.train.loop import TrainingConfig
from scale.train.steps import policy_step

CONFIG = ModelConfig(vocab_size=272, num_layers=1, d_model=16, num_heads=2, head_dim=8, d_ff=16)
LIMITS = Limits(60, 40)
WORDS = ["tea", "rain", "a cat", "stone", "the sea", "no", "yes", "blue"]
TRAINING = TrainingConfig(6, 4, 1e-2, 1)
METHODS = ("dpo", "ipo", "p-dpo")
NAMES = [f"{m}-{beta}-0.01-{seed}" for m in METHODS for beta in (0.1, 0.5) for seed in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def silent():
    console.quiet = True
    yield
    console.quiet = False


def make_row(rng):
    """Texts of very different lengths, scores of two reward models, made-up log-probs."""
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(4)]
    responses = "chosen", "rejected", "sample"
    columns = {f"score_{side}": rng.normal(size=2).tolist() for side in responses[:2]}
    columns |= {f"ref_{name}_logps": float(-rng.uniform(5, 20)) for name in responses}
    names = "prompt", "chosen", "rejected", "ref_sample"
    return {**dict(zip(names, texts, strict=True)), "ref_sample_complete": True, **columns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    model, tokenizer = Transformer(CONFIG, jax.random.key(0)), train_tokenizer(WORDS, 272)
    model_folder.save(model_folder.ModelFolder(folder / "policy", model, CONFIG, tokenizer))
    rng = np.random.default_rng(0)
    hashes = model_folder.load_policy(folder / "policy").hashes | {"--limits": limits_text(LIMITS)}
    write(folder / "rows.parquet", [make_row(rng) for _ in range(20)], hashes)
    return folder


def sweep(folder, out, **options) -> Sweep:
    common = {
        "data": folder / "rows.parquet",
        "policy": folder / "policy",
        "training": TRAINING,
        "limits": LIMITS,
    }
    grid = {"methods": METHODS, "betas": (0.1, 0.5), "seeds": 2}
    return Sweep(out=out, **(common | grid | options))


@pytest.fixture(scope="module")
def swept(folder) -> Path:
    """Twelve policies in two processes."""
    findings = execute(sweep(folder, folder / "swept", workers=2))
    assert findings == {"policies": 12, "diverged": 0}
    return folder / "swept"


def rows_of(out):
    return list(csv.DictReader((out / "results.csv").read_text().splitlines()))


def last_of(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
def test_a_row_for_each_policy_with_the_numbers_of_its_last_step(swept):
    rows = rows_of(swept)
    assert [r["policy"] for r in rows] == NAMES
    options = [(r["method"], r["beta"], r["learning_rate"], r["seed"]) for r in rows[3:5]]
    assert options == [("dpo", "0.5", "0.01", "1"), ("ipo", "0.1", "0.01", "0")]
    for r in rows:
        last, timing = last_of(swept / r["policy"]), swept / r["policy"] / "timing.json"
        assert last["step"] == 6 and float(r["loss"]) == last["loss"]
        assert float(r["margin"]) == last["rewards/margins"]
        assert float(r["accuracy"]) == last["rewards/accuracies"]
        assert float(r["seconds"]) == pytest.approx(read_json(timing)["seconds"], abs=1e-3)
        has_kl = r["method"] == "p-dpo"
        gammas = ("0.0001", "0.01") if has_kl else ("0.0", "0.0")
        assert (r["gamma_first"], r["gamma_last"]) == gammas
        assert r["kl"] == (str(last["kl"]) if has_kl else "")
    assert len({r["loss"] for r in rows}) == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "beta"),
    [
        ("dpo-0.5-0.01-1", "dpo", 0.5),
        ("ipo-0.1-0.01-0", "ipo", 0.1),
        ("p-dpo-0.1-0.01-1", "p-dpo", 0.1),
    ],
)
def test_a_policy_is_the_one_that_align_trains_alone(folder, swept, tmp_path, name, method, beta):
    stage = Align(
        out=tmp_path,
        data=folder / "rows.parquet",
        policy=folder / "policy",
        training=replace(TRAINING, seed=int(name[-1])),
        limits=LIMITS,
        method=method,
        beta=beta,
    )
    execute(stage)
    assert last_of(swept / name)["loss"] == pytest.approx(last_of(tmp_path)["loss"], rel=1e-6)
    models = [model_folder.load_policy(path).model for path in (swept / name, tmp_path)]
    embeddings = [np.asarray(model.embedding) for model in models]
    np.testing.assert_allclose(*embeddings, rtol=1e-6, atol=1e-5)  # moved by some 0.04


@pytest.mark.slow
def test_a_step_is_compiled_once_a_method_and_shape(folder, tmp_path):
    """Twelve policies in this process, of two methods, two betas and three seeds."""
    policy_step.clear_cache()
    execute(sweep(folder, tmp_path, methods=("dpo", "p-dpo"), seeds=3, workers=1))
    assert [r["programs"] for r in rows_of(tmp_path)] == ["1", *"00000", "1", *"00000"]


def test_a_worker_gets_neighbours(folder):
    stage = sweep(folder, folder).stage("dpo", None, None, 1e-2, 0)
    stages = [replace(stage, snapshots=i) for i in range(10)]
    parts = [[s.snapshots for s in part] for part in shares(stages, 3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]


def test_runs_that_differ_by_seed_can_have_their_shapes_in_common(folder, monkeypatch):
    """Where alone they would not, as long as sizes are not coarsened and rows not shared out."""
    monkeypatch.setattr(batches, "WINDOW", 1)
    monkeypatch.setattr(batch_shapes, "coarsen_sizes", lambda sizes, *_: sizes)
    policy = model_folder.load_policy(folder / "policy")
    data = folder / "rows.parquet"
    stage = Align(out=folder, data=data, policy=folder / "policy", limits=LIMITS)
    dataset = stage.dataset(policy, data, read(data), ["chosen", "rejected"])
    runs = [replace(TRAINING, seed=seed) for seed in range(3)]
    alone = [plan_batches(dataset, run, policy.model) for run in runs]
    together = [plan_batches(dataset, run, policy.model, range(3)) for run in runs]
    assert len({shape for plan in alone for shape in plan.shapes}) > 1
    assert len({shape for plan in together for shape in plan.shapes}) == 1
    for plan, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(plan.rows, expected.rows)
        lengths = dataset.tokens.lengths[plan.rows].sum((1, 2))
        assert max(lengths) <= plan.shapes[0].length and len(plan.shapes) == TRAINING.steps


def test_a_chain_waits_for_those_that_it_needs(tmp_path):
    """A folder can be made only in one that exists: a before a/b before a/b/c, though they are in
    the other order and two workers are free."""
    c, b, a = tmp_path / "a/b/c", tmp_path / "a/b", tmp_path / "a"
    with workers(2) as pool:
        chains = [[c, c / "d"], [b], [a], [tmp_path / "alone"]]
        needs = [{1, 2}, {2}, set(), set()]
        assert execute_all(pool, chains, "", os.mkdir, needs) == [
            [None, None],
            [None],
            [None],
            [None],
        ]
        assert (c / "d").is_dir() and (tmp_path / "alone").is_dir()
        assert execute_all(pool, [["a", "b"], ["c"]], "", str.upper) == [["A", "B"], ["C"]]


VARIABLES = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def compiled(home, **environment):
    """The files that a process leaves in a user's cache folder."""
    code = """if True:
        import os
        import jax
        import jax.numpy as jnp
        from scale.parallel.programs import keep_programs
        keep_programs()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).sum())
        # what other processes inherit
        assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == jax.config.jax_compilation_cache_dir
    """
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True,
                   env=kept | {"XDG_CACHE_HOME": str(home)} | environment)  # fmt: skip
    return sorted(path.relative_to(home).parts[:2] for path in home.rglob("*-cache"))


def test_programs_are_kept_in_the_users_folder_unless_jax_is_told_otherwise(tmp_path):
    assert set(compiled(tmp_path / "a")) == {("minipref", "programs")}
    elsewhere = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "c")}
    assert not compiled(tmp_path / "b", **elsewhere) and any((tmp_path / "c").iterdir())
    assert not compiled(tmp_path / "d", JAX_ENABLE_COMPILATION_CACHE="0")


def test_programs_of_last_month_are_removed(tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "minipref/programs" / machine()
    folder.mkdir(parents=True)
    for name, days in (("old-cache", 31), ("new-cache", 29)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    keep_programs()
    assert [path.name for path in folder.iterdir()] == ["new-cache"]


def test_without_a_folder_to_write_programs_run(tmp_path):
    (tmp_path / "file").touch()
    assert not compiled(tmp_path / "file")


def test_what_needs_a_chain_that_failed_does_not_run(tmp_path):
    chains = [[tmp_path / "after"], [tmp_path]]
    with workers(1) as pool, pytest.raises(FileExistsError):
        execute_all(pool, chains, "", os.mkdir, [{1}, set()])
    assert not (tmp_path / "after").exists()


def test_an_interrupted_worker_begins_no_other_chain(monkeypatch):
    """SIGTERM to `paper` ends all its workers at once, also where more chains wait."""
    monkeypatch.setattr(scale.parallel.workers, "interrupted", threading.Event())
    ran = []

    def run(stage):
        ran.append(stage)
        if stage == "b":
            raise KeyboardInterrupt

    run_in_worker(run, ["a"])
    for chain in (["b", "c"], ["d"]):
        with pytest.raises(KeyboardInterrupt):
            run_in_worker(run, chain)
    assert ran == ["a", "b"]


def test_without_workers_chains_run_in_their_order():
    ran = []

    def run(stage):
        ran.append(stage)
        return stage.upper()

    assert execute_all(None, [["a", "b"], ["c"]], "", run, [set(), {0}]) == [["A", "B"], ["C"]]
    assert ran == ["a", "b", "c"]


@pytest.mark.slow
def test_it_goes_on_with_what_is_not_complete(folder, tmp_path):
    stage = sweep(folder, tmp_path, methods=("dpo",), workers=1, seeds=1)
    execute(stage)
    before = rows_of(tmp_path)
    kept, lost = (tmp_path / name for name in ("dpo-0.1-0.01-0", "dpo-0.5-0.01-0"))
    for path in (tmp_path / "stage.json", lost / "stage.json"):  # as if stopped
        write_json(path, {k: v for k, v in read_json(path).items() if k != "findings"})
    times = [(path / "weights.safetensors").stat().st_mtime_ns for path in (kept, lost)]
    execute(stage)
    again = [(path / "weights.safetensors").stat().st_mtime_ns for path in (kept, lost)]
    assert again[0] == times[0] and again[1] > times[1]
    assert [r["loss"] for r in rows_of(tmp_path)] == [r["loss"] for r in before]


@pytest.mark.slow
def test_a_policy_that_diverges_does_not_stop_the_others(folder, tmp_path):
    rates = (1e30, 1e-2)
    options = {"methods": ("dpo",), "betas": (), "seeds": 1, "workers": 2}
    stage = sweep(folder, tmp_path, learning_rates=rates, **options)
    assert execute(stage) == {"policies": 2, "diverged": 1}
    bad, good = rows_of(tmp_path)
    assert re.search(r"is nan at step \d|a weight is not finite", bad["error"])
    assert bad["loss"] == bad["seconds"] == ""
    assert not (tmp_path / bad["policy"] / "weights.safetensors").exists()
    assert good["error"] == ""
    assert float(good["loss"]) == last_of(tmp_path / "dpo-0.1-0.01-0")["loss"]


@pytest.mark.slow
def test_a_folder_takes_a_wider_and_a_narrower_grid(folder, tmp_path):
    options = {"methods": ("dpo",), "betas": (), "seeds": 1, "workers": 1}

    def made(*rates):
        execute(sweep(folder, tmp_path, learning_rates=rates, **options))
        paths = [tmp_path / r["policy"] / "weights.safetensors" for r in rows_of(tmp_path)]
        return {path.parent.name: path.stat().st_mtime_ns for path in paths}

    one, two = made(1e-2), made(1e-2, 2e-2)
    assert [*two] == ["dpo-0.1-0.01-0", "dpo-0.1-0.02-0"] and one.items() < two.items()
    assert made(2e-2).items() < two.items()
    longer = replace(TRAINING, steps=7)
    with pytest.raises(InputError, match=r"begun with other training.steps \(6, not 7\);"):
        execute(sweep(folder, tmp_path, methods=("dpo",), training=longer))


@pytest.mark.slow
def test_sigterm_saves_what_the_workers_are_at(folder, tmp_path):
    """Two policies of a run that would take minutes."""
    inputs = ["--data", folder / "rows.parquet", "--policy", folder / "policy", "--out", tmp_path]
    grid = ["--methods", "dpo", "ipo", "--workers", "2"]
    limits = ["--limits.prompt", "60", "--limits.response", "40"]
    training = ["--training.batch-size", "4", "--training.steps", "90000"]
    options = [*inputs, *grid, *limits, *training]
    argv = [sys.executable, "-m", "scale.run", "sweep", *map(str, options)]
    running = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    logs = [tmp_path / name / "metrics.jsonl" for name in ("dpo-0.1-0.003-0", "ipo-0.1-0.003-0")]
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if all(log.exists() and log.stat().st_size for log in logs):
            break
        time.sleep(0.1)
    running.terminate()
    printed = running.communicate(timeout=300)[0]
    assert "stopped; the same command resumes" in printed and running.returncode == 130
    for log in logs:
        names = [path.name for path in (log.parent / "checkpoints").iterdir()]
        steps = [int(name) for name in names if name.isdigit()]
        assert max(steps) == last_of(log.parent)["step"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"methods": ("dpo", "ipo"), "gammas": ((0.0, 0.1),)},
            "--gammas: none of dpo, ipo has a KL term",
        ),
        ({"betas": (0.1, 0.1)}, "--betas 0.1 0.1: the same twice"),
        ({"methods": ("ipo", "dpo", "ipo")}, "--methods ipo dpo ipo: the same twice"),
        ({"learning_rates": (1e-3, 1e-3)}, "--learning-rates 0.001 0.001: the same twice"),
        ({"gammas": ((0.0, 0.1), (0.0, 0.1))}, "--gammas 0-0.1 0-0.1: the same twice"),
        ({"gammas": ((0.0, -0.1),)}, "--gammas: must be at least 0, not -0.1"),
        ({"betas": (0.1, 0.0)}, "--betas: must be above 0, not 0"),
        ({"seeds": 0}, "--seeds: must be at least 1, not 0"),
        ({"methods": ()}, "--methods: none"),
        ({"learning_rates": (1e-60,)}, "--learning-rates: must be above 0, not 1e-60"),
        ({"workers": -1}, "--workers: must be at least 0, not -1"),
        ({"methods": ("dpo", "ipo", "d-dpo")}, "distils one reward.*, not 2"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(folder, tmp_path, options, named):
    with pytest.raises(InputError, match=named):
        execute(sweep(folder, tmp_path / "out", workers=options.pop("workers", 1), **options))
    assert not list((tmp_path / "out").glob("*/"))


def test_columns_are_looked_at_before_anything_is_trained(folder, tmp_path):
    stage = sweep(folder, tmp_path / "out", workers=1)
    row = make_row(np.random.default_rng(0))
    rows = [{k: v for k, v in row.items() if k != "ref_sample"}]
    write(tmp_path / "rows.parquet", rows, {})
    with pytest.raises(InputError, match=r"rows.parquet: row 1: field 'ref_sample': missing"):
        execute(replace(stage, data=tmp_path / "rows.parquet"))
    assert not list((tmp_path / "out").glob("*/"))


def test_large_seeds_have_a_folder_each(folder):
    stage = sweep(folder, folder, methods=("dpo",), betas=())
    stage = replace(stage, training=replace(TRAINING, seed=10**6))
    names = [stage.stage("dpo", *rest).out.name for rest in stage.grid("dpo")]
    assert names == ["dpo-0.1-0.01-1000000", "dpo-0.1-0.01-1000001"]


def test_gammas_are_for_the_methods_with_a_kl_term(folder, tmp_path):
    gammas = (0.0, 0.0), (0.0, 0.5)
    options = {"betas": (), "gammas": gammas, "learning_rates": (1e-3,), "seeds": 1}
    stage = sweep(folder, tmp_path, **options)
    stages = [stage.stage(method, *rest) for method in METHODS for rest in stage.grid(method)]
    assert [(s.out.name, s.gamma) for s in stages] == [
        ("dpo-0.1-0.001-0", None),
        ("ipo-0.1-0.001-0", None),
        ("p-dpo-0.1-0-0-0.001-0", (0.0, 0.0)),
        ("p-dpo-0.1-0-0.5-0.001-0", (0.0, 0.5)),
    ]
    assert stages[0].beta is None
    assert stages[0].training == replace(TRAINING, learning_rate=1e-3)


def test_from_the_command_line():
    argv = ["sweep", "--out", "o", "--data", "d", "--policy", "p", "--methods", "dpo", "p-dpo"]
    argv += ["--betas", "0.1", "1", "--gammas", "0", "0.1", "0", "0.5"]
    argv += ["--seeds", "3", "--training.steps", "9"]
    expected = Sweep(
        out=Path("o"),
        data=Path("d"),
        policy=Path("p"),
        methods=("dpo", "p-dpo"),
        betas=(0.1, 1.0),
        gammas=((0.0, 0.1), (0.0, 0.5)),
        seeds=3,
    )
    training = replace(expected.training, steps=9)
    assert parse(argv) == replace(expected, training=training)
