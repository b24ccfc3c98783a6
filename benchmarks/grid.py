"""`python -m benchmarks.grid`: a grid of policies by one `sweep`, against as many `align` commands one after another.

The miniature's model on docstring summaries: the one that was written is chosen, another's is rejected, and rewards are
made up, for nothing here asks what is learned. Both ways start from nothing, in processes of their own, compilation
included. `python -m benchmarks.grid vmap` is the second table alone, which needs no data and also runs on a GPU: a step
of all members of one method's grid as one `vmap`, against their steps one by one, once compiled.
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
from benchmarks.work import Work, responses_of, rows_of
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
from scale.stages.align import MethodName, align_step
from scale.stages.corpus import Corpus
from scale.stages.score import Score
from scale.stages.stage import execute
from scale.train.loop import TrainingConfig, hyper
from scale.train.optimizer import OptimizerConfig, start_state

LIMITS = Limits(48, 24, "keep-start")
FLAGS = ["--limits.prompt", "48", "--limits.response", "24", "--limits.overlong", "keep-start"]
MEMBERS = 5


@dataclass(frozen=True)
class Options:
    what: tyro.conf.Positional[Literal["all", "vmap"]] = "all"
    """all: both tables. vmap: the second."""
    methods: tuple[MethodName, ...] = ("dpo", "p-dpo", "e-dpo")
    """Methods of the grid; the second table is of the last."""
    betas: tuple[float, ...] = (0.1, 1.0)
    """Strengths of the grid."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates of the grid."""
    steps: int = 60
    """Updates of each policy."""
    pairs: int = 2000
    """Rows that they are trained on, at most."""
    sizes: tuple[int, ...] = (4, 16)
    """Members of the second table's grids."""
    rounds: int = 15
    """Rounds of the second table's measurement."""
    work: Work = field(default_factory=lambda: Work(ModelConfig(), 16, 48, 24))
    """A step's work in the second table."""


def prepare(at: Path, pairs: int) -> None:
    """An untrained policy, and rows with every column of the score stage."""
    execute(Corpus(out=at / "corpus"))
    every = read(at / "corpus/train.parquet", need=("prompt", "completion"))
    found = [*{row["completion"]: row for row in every}.values()][:pairs]  # no summary twice
    tokenizer = train_tokenizer((row[name] for row in found for name in ("prompt", "completion")), ModelConfig().vocab_size)
    model_folder.save(at / "policy", Transformer(ModelConfig(), jax.random.key(0)), ModelConfig(), tokenizer)
    rng = np.random.default_rng(0)
    write(at / "pairs.parquet", [pair(rng, found, i) for i in range(len(found))], {})
    execute(Score(out=at / "scored", data=at / "pairs.parquet", reference=at / "policy", limits=LIMITS))


def pair(rng: np.random.Generator, found: Sequence[dict[str, Any]], i: int) -> dict[str, Any]:
    chosen, rejected, sample = (found[i - k]["completion"] for k in range(3))
    scores = {f"score_{side}": rng.normal(size=MEMBERS).tolist() for side in ("chosen", "rejected")}
    return {"prompt": found[i]["prompt"], "chosen": chosen, "rejected": rejected, "ref_sample": sample,
            "ref_sample_complete": True, **scores}


def command(at: Path, stage: str, out: str, steps: int, *more: Any) -> None:
    argv = [stage, "--data", at / "scored/rows.parquet", "--policy", at / "policy", "--out", at / out,
            "--training.steps", steps, *FLAGS, *more]
    subprocess.run([sys.executable, "-m", "scale.run", *map(str, argv)], check=True, stdout=sys.stderr)


def swept(options: Options, at: Path) -> None:
    command(at, "sweep", "swept", options.steps, "--methods", *options.methods, "--betas", *options.betas,
            "--learning-rates", *options.learning_rates)


def one_by_one(options: Options, at: Path) -> None:
    for method, beta, rate in product(options.methods, options.betas, options.learning_rates):
        command(at, "align", f"alone/{method}-{beta:g}-{rate:g}-0", options.steps,
                "--method", method, "--beta", beta, "--training.learning-rate", rate)


def logged(folder: Path, key: str) -> np.ndarray:
    """[policies, steps] of a metric."""
    return np.array([[*records(path, key).values()] for path in sorted(folder.glob("*/metrics.jsonl"))])


def against_commands(options: Options, at: Path) -> None:
    quiet()
    prepare(at, options.pairs)
    ways = {"alone": partial(one_by_one, options, at), "swept": partial(swept, options, at)}
    seconds = {name: timed(way) for name, way in ways.items()}
    losses = {name: logged(at / name, "loss") for name in ways}
    print(f"\n| {len(losses['swept'])} policies of {options.steps} steps | seconds | tokens/s | compilations |\n"
          "|---|---|---|---|")
    for name, label in (("alone", "`align`, one after another"), ("swept", "`sweep`")):
        tokens = logged(at / name, "tokens").sum()
        programs = sum(read_json(path)["programs"] for path in (at / name).glob("*/timing.json"))
        print(f"| {label} | {seconds[name]:.1f} | {tokens / seconds[name]:,.0f} | {programs} |")
    difference = np.abs(losses["swept"] - losses["alone"])
    print(f"\nThroughput: {seconds['alone'] / seconds['swept']:.2f} x. Largest difference of a loss: "
          f"{difference.max():.1e} ({(difference / np.abs(losses['alone'])).max():.1e} of it).")


def members(options: Options, n: int) -> list[TrainState]:
    """n of the states that a grid starts from, no two alike."""
    def state(i: int) -> TrainState:
        values = hyper(TrainingConfig(learning_rate=1e-3 * (1 + i % 4)), 0.1 * 2 ** (i // 4), (1e-4, 1e-2))
        return start_state(Transformer(options.work.model, jax.random.key(0)), OptimizerConfig(), values)

    return [state(i) for i in range(n)]


def vmapped(options: Options, n: int) -> str:
    """One row of the table: medians of rounds in which both ways take a step of all members."""
    method = options.methods[-1]
    batch = jax.device_put(rows_of(method, options.work))
    step = partial(align_step, method, OptimizerConfig())
    every = jax.jit(jax.vmap(step, (0, None)), donate_argnums=0)
    states: dict[str, Any] = {"alone": members(options, n)}
    states["vmap"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members(options, n))
    losses: dict[str, Any] = {}

    def alone() -> Any:
        found = [step(state, batch) for state in states["alone"]]
        states["alone"] = [state for state, _ in found]
        losses["alone"] = jnp.stack([metrics["loss"] for _, metrics in found])
        return found

    def together() -> Any:
        states["vmap"], metrics = every(states["vmap"], batch)
        losses["vmap"] = metrics["loss"]
        return states["vmap"], metrics

    first = [timed(alone), timed(together)]
    difference = float(jnp.abs(losses["alone"] - losses["vmap"]).max())
    rounds = [(timed(alone), timed(together)) for _ in range(options.rounds)]
    single, joint = (median([each[i] for each in rounds]) for i in range(2))
    tokens = n * options.work.batch * (options.work.prompt + responses_of(method) * options.work.response)
    return (f"| {method} x {n} | {single * 1e3:.1f} | {joint * 1e3:.1f} | {single / joint:.2f} x | "
            f"{tokens / single:,.0f} | {tokens / joint:,.0f} | {first[0]:.1f} | {first[1]:.1f} | {difference:.0e} |")


def main(options: Options) -> None:
    print(describe())
    if options.what == "all":
        with tempfile.TemporaryDirectory() as at:
            against_commands(options, Path(at))
    print("\n| a step of each | one by one, ms | vmap, ms | faster | tokens/s | vmap | first call, s | vmap | "
          "difference of the first losses |\n|---|---|---|---|---|---|---|---|---|")
    for n in options.sizes:
        print(vmapped(options, n), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
