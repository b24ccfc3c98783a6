"""`python -m benchmarks.grid`: a grid of policies by one `sweep`, against `align` commands in turn.

The model is the miniature's, on docstring summaries. The written summary is chosen, that of another
docstring is rejected, and rewards are random: nothing here asks what a policy learns. Both ways
start from nothing, in processes of their own, and both count compilation.

`python -m benchmarks.grid vmap` prints the second table alone, which needs no data and also runs on
a GPU. It compares one step of all policies of one method's grid as one `vmap` with their steps one
after another, once compiled.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.machine import describe, median, timed
from benchmarks.work import (
    OPTIMIZER,
    SCHEDULE,
    Work,
    batch_for,
    hyperparameters,
    num_responses,
)
from minipref.training import TrainState
from scale.console import quiet
from scale.data.dataset import Limits
from scale.data.rows import read, write
from scale.data.tokenizer import train_tokenizer
from scale.files import read_json
from scale.io import model_folder
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer
from scale.paper.figures import records
from scale.stages.align import MethodName
from scale.stages.corpus import Corpus
from scale.stages.score import Score
from scale.stages.stage import execute
from scale.train.steps import policy_step, start_state

LIMITS = Limits(48, 24, "right")
LIMIT_OPTIONS = (
    *("--limits.prompt", "48"),
    *("--limits.response", "24"),
    *("--limits.truncation-side", "right"),
)
NUM_REWARD_MODELS = 5


@dataclass(frozen=True)
class Options:
    """What is measured."""

    tables: tyro.conf.Positional[Literal["all", "vmap"]] = "all"
    """all: both tables. vmap: the second."""
    methods: tuple[MethodName, ...] = ("dpo", "p-dpo", "e-dpo")
    """Methods of the grid; the second table is of the last one."""
    betas: tuple[float, ...] = (0.1, 1.0)
    """Values of beta in the grid."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates of the grid."""
    steps: int = 60
    """Updates of each policy."""
    pairs: int = 2000
    """Rows that the policies are trained on, at most."""
    sizes: tuple[int, ...] = (4, 16)
    """Policies of the grids of the second table."""
    rounds: int = 15
    """Rounds of measurement of the second table."""
    work: Work = field(default_factory=lambda: Work(ModelConfig(), 16, 48, 24))
    """The work of a step in the second table."""


def prepare(folder: Path, pairs: int) -> None:
    """Write an untrained policy, and rows with every column of the score stage."""
    execute(Corpus(out=folder / "corpus", source="docstrings"))
    corpus = read(folder / "corpus/train.parquet", need=("prompt", "completion"))
    rows = [*{row["completion"]: row for row in corpus}.values()][:pairs]  # no summary twice
    texts = (row[name] for row in rows for name in ("prompt", "completion"))
    config = ModelConfig()
    tokenizer = train_tokenizer(texts, config.vocab_size)
    model = Transformer(config, jax.random.key(0))
    model_folder.save(model_folder.ModelFolder(folder / "policy", model, config, tokenizer))
    rng = np.random.default_rng(0)
    data = folder / "pairs.parquet"
    write(data, [make_pair(rng, rows, i) for i in range(len(rows))], {})
    execute(Score(out=folder / "scored", data=data, reference=folder / "policy", limits=LIMITS))


def make_pair(rng: np.random.Generator, rows: Sequence[dict[str, Any]], i: int) -> dict[str, Any]:
    """Row i as a preference pair, with the responses of the two rows before it."""
    chosen, rejected, sample = (rows[i - k]["completion"] for k in range(3))
    sizes = {"score_chosen": NUM_REWARD_MODELS, "score_rejected": NUM_REWARD_MODELS}
    return {
        "prompt": rows[i]["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "ref_sample": sample,
        "ref_sample_complete": True,
        **{name: rng.normal(size=size).tolist() for name, size in sizes.items()},
    }


def run_command(folder: Path, stage: str, out: str, steps: int, *more: Any) -> None:
    """Run a command of `scale.run` on the prepared rows."""
    paths = {
        "--data": folder / "scored/rows.parquet",
        "--policy": folder / "policy",
        "--out": folder / out,
        "--training.steps": steps,
    }
    options = [word for option in paths.items() for word in option]
    argv = map(str, (stage, *options, *LIMIT_OPTIONS, *more))
    subprocess.run([sys.executable, "-m", "scale.run", *argv], check=True, stdout=sys.stderr)


def sweep(options: Options, folder: Path) -> None:
    """Train the grid with one command."""
    betas, rates = options.betas, options.learning_rates
    grid = ["--methods", *options.methods, "--betas", *betas, "--learning-rates", *rates]
    run_command(folder, "sweep", "swept", options.steps, *grid)


def one_by_one(options: Options, folder: Path) -> None:
    """Train the grid with a command for each policy."""
    for method, beta, rate in product(options.methods, options.betas, options.learning_rates):
        point = ["--method", method, "--beta", beta, "--training.learning-rate", rate]
        out = f"alone/{method}-{beta:g}-{rate:g}-0"
        run_command(folder, "align", out, options.steps, *point)


def logged(folder: Path, key: str) -> np.ndarray:
    """A metric of all policies [policies, steps]."""
    paths = sorted(folder.glob("*/metrics.jsonl"))
    return np.array([[*records(path, key).values()] for path in paths])


def compare_commands(options: Options, folder: Path) -> None:
    """Print the first table."""
    quiet()
    prepare(folder, options.pairs)
    ways = {"alone": partial(one_by_one, options, folder), "swept": partial(sweep, options, folder)}
    seconds = {name: timed(way) for name, way in ways.items()}
    losses = {name: logged(folder / name, "loss") for name in ways}
    title = f"{len(losses['swept'])} policies of {options.steps} steps"
    print(f"\n| {title} | seconds | tokens/s | compilations |\n|---|---|---|---|")
    for name, label in (("alone", "`align`, one after another"), ("swept", "`sweep`")):
        rate = logged(folder / name, "tokens").sum() / seconds[name]
        timings = [read_json(path) for path in (folder / name).glob("*/timing.json")]
        programs = sum(timing["programs"] for timing in timings)
        print(f"| {label} | {seconds[name]:.1f} | {rate:,.0f} | {programs} |")
    difference = np.abs(losses["swept"] - losses["alone"])
    relative = (difference / np.abs(losses["alone"])).max()
    print(
        f"\nThroughput: {seconds['alone'] / seconds['swept']:.2f} x. Largest difference of a loss: "
        f"{difference.max():.1e} ({relative:.1e} of it)."
    )


def first_states(options: Options, n: int) -> list[TrainState]:
    """n of the states that a grid starts from; no two are alike."""

    def state(i: int) -> TrainState:
        model = Transformer(options.work.model, jax.random.key(0))
        rate, beta = 1e-3 * (1 + i % 4), 0.1 * 2 ** (i // 4)
        return start_state(model, OPTIMIZER, SCHEDULE, rate, hyperparameters(beta))

    return [state(i) for i in range(n)]


def compare_vmap(options: Options, n: int) -> str:
    """One row of the second table: medians of rounds in which both ways step all n policies."""
    method = options.methods[-1]
    batch = jax.device_put(batch_for(method, options.work))
    step = partial(policy_step, method, OPTIMIZER, SCHEDULE)
    vmapped_step = jax.jit(jax.vmap(step, (0, None)), donate_argnums=0)
    states: dict[str, Any] = {"alone": first_states(options, n)}
    states["vmap"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *first_states(options, n))
    losses: dict[str, Any] = {}

    def step_one_by_one() -> Any:
        results = [step(state, batch) for state in states["alone"]]
        states["alone"] = [state for state, _ in results]
        losses["alone"] = jnp.stack([metrics["loss"] for _, metrics in results])
        return results

    def step_together() -> Any:
        states["vmap"], metrics = vmapped_step(states["vmap"], batch)
        losses["vmap"] = metrics["loss"]
        return states["vmap"], metrics

    first = [timed(step_one_by_one), timed(step_together)]
    difference = float(jnp.abs(losses["alone"] - losses["vmap"]).max())
    rounds = [(timed(step_one_by_one), timed(step_together)) for _ in range(options.rounds)]
    alone, together = (median(seconds) for seconds in zip(*rounds, strict=True))
    tokens = n * options.work.batch * options.work.row_length(num_responses(method))
    return (
        f"| {method} x {n} | {alone * 1e3:.1f} | {together * 1e3:.1f} | {alone / together:.2f} x | "
        f"{tokens / alone:,.0f} | {tokens / together:,.0f} | {first[0]:.1f} | {first[1]:.1f} | "
        f"{difference:.0e} |"
    )


def main(options: Options) -> None:
    """Print both tables, or the second."""
    print(describe())
    if options.tables == "all":
        with tempfile.TemporaryDirectory() as folder:
            compare_commands(options, Path(folder))
    print(
        "\n| a step of each | one by one, ms | vmap, ms | faster | tokens/s | vmap | "
        "first call, s | vmap | difference of the first losses |"
    )
    print(f"|{'---|' * 9}")
    for n in options.sizes:
        print(compare_vmap(options, n), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
