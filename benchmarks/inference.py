"""`python -m benchmarks.inference`: log-probabilities and samples of SmolLM2-135M beside
`transformers`.

Rows/s of the log-probabilities of chosen and rejected, and tokens/s of samples; both on the CPU in
float32, with a thread for each core, from the same token ids. Each program has a process of its
own, and they take turns. `transformers` gets batches of rows of similar length too, and has logits
only where a label is predicted; a first pass tries its batch sizes, and the fastest is measured.
The log-probabilities of both have to agree.

The floor is the time of the products with weights, without padding, at the rate of a large product.
Without --data the rows are random tokens with lengths like those of HH.

Extras `peers` and `smollm2`. The results go to `results/inference.md`.
"""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tyro

from benchmarks.machine import describe, matmul_flops, median
from minipref.batch import Targets
from scale.data.dataset import Dataset, Limits
from scale.data.formats import SIDES
from scale.data.packing import tokenized_rows
from scale.data.rows import read
from scale.io import model_folder
from scale.model.config import ModelConfig
from scale.model.inference import generate, sequence_logps
from scale.model.presets import MODELS
from scale.stages.export import Export

RESULTS = Path(__file__).parent / "results"
MODEL = Path("smollm2")
PEER = "benchmarks.peers.inference_transformers"
TOLERANCE = 1e-2  # nats of a response of up to 64 tokens
BATCHES = {"logps": (4, 16), "sample": (16, 32, 64)}  # of transformers

Rows: TypeAlias = list[tuple[list[int], ...]]
"""Token ids of prompt, chosen and rejected."""

OURS: dict[str, model_folder.ModelFolder] = {}


@dataclass(frozen=True)
class Options:
    """What is compared."""

    data: Path | None = None
    """Preference rows, for instance HH's. Default: random tokens."""
    rows: int = 64
    """Rows of a pass."""
    limits: Limits = field(default_factory=lambda: Limits(128, 64))
    """Longer rows are left out; `response` is the most tokens of a sample."""
    rounds: int = 3
    """Timed passes of each program."""
    json: bool = False
    """Print JSON, not a table."""


def prepare() -> None:
    """Load the model, once for this process."""
    OURS["policy"] = model_folder.load_policy(MODEL)


def logps(rows: Rows) -> np.ndarray:
    """log pi of both responses of each row [N, 2], by us."""
    return sequence_logps(OURS["policy"].model, dataset_of([(p, [c, r]) for p, c, r in rows]))


def sample(rows: Rows, max_new: int) -> int:
    """One sample for each prompt; returns their tokens."""
    policy, prompts = OURS["policy"], dataset_of([(row[0], []) for row in rows])
    samples = generate(
        policy.model, policy.tokenizer, prompts, n=1, max_new_tokens=max_new, seed=0,
        temperature=1.0, label="sample",
    )  # fmt: skip
    return sum(len(one.ids) for [one] in samples)


def dataset_of(rows: list[tuple[list[int], list[list[int]]]]) -> Dataset:
    nothing = np.zeros((len(rows), 0), np.float32), np.zeros((len(rows), 2, 0), np.float32)
    targets = Targets(*nothing)  # type: ignore[arg-type]  # NumPy arrays
    return Dataset(tokenized_rows(rows), targets, np.arange(len(rows)))


def rows_of(options: Options) -> Rows:
    """The rows of --data within the limits, or random ones."""
    if options.data is None:
        return random_rows(options)
    dataset = model_folder.load_policy(MODEL).make_dataset(
        read(options.data), SIDES, options.limits
    )
    taken = dataset.head(options.rows).tokens
    parts = [part.tolist() for part in np.split(taken.ids, taken.ends.ravel()[:-1])]
    return [tuple(parts[i : i + 3]) for i in range(0, len(parts), 3)]


def random_rows(options: Options) -> Rows:
    """Random tokens; lengths are log-normal around HH's medians, 60 and 30, within the limits."""
    rng = np.random.default_rng(0)
    most = (options.limits.prompt, options.limits.response, options.limits.response)
    medians = np.array([60, 30, 30])
    lengths = medians * np.exp(0.6 * rng.normal(size=(options.rows, 3)))
    lengths = np.clip(lengths.astype(int), 8, most)
    vocab = MODELS["smollm2-135m"].vocab_size
    return [tuple(rng.integers(20, vocab, n).tolist() for n in row) for row in lengths]


def flops(config: ModelConfig, tokens: int, labels: int) -> float:
    """FLOPs of products with weights: all layers at each token, the unembedding at each label."""
    c = config
    layer = c.d_model * (2 * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.d_ff)
    return 2.0 * (c.num_layers * layer * tokens + c.vocab_size * c.d_model * labels)


def floors(rows: Rows, tokens: int, rate: float) -> dict[str, float]:
    """Seconds of the products of one pass, where so many tokens are sampled."""
    config = MODELS["smollm2-135m"]
    every = sum(len(part) for row in rows for part in row)
    prompts = sum(len(row[0]) for row in rows)
    needed = {"logps": (every, every - prompts), "sample": (prompts + tokens, tokens)}
    return {name: flops(config, *counts) / rate for name, counts in needed.items()}


@dataclass
class Pass:
    """One pass of a program: its result and seconds."""

    result: Any
    seconds: float


def timed_in(pool: ProcessPoolExecutor, call: Callable[[], Any]) -> Pass:
    """A call in the process of a pool."""
    start = time.perf_counter()
    result = pool.submit(call).result()
    return Pass(result, time.perf_counter() - start)


def compare(options: Options, folder: Path) -> dict[str, Any]:
    """Passes of both programs in turn, and what is computed of them.

    Raises:
        RuntimeError: The log-probabilities differ.
    """
    rows, threads = rows_of(options), len(os.sched_getaffinity(0))
    Export(policy=MODEL, out=folder / "model").run()
    spawn, peer = multiprocessing.get_context("spawn"), import_module(PEER)
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:
        ours.submit(prepare).result()
        theirs.submit(peer.prepare, folder / "model", threads).result()
        own = our_calls(rows, options)
        batches, other = fastest(theirs, peer, rows, options)
        for call in own.values():
            timed_in(ours, call)  # compiles
        rounds = [
            {name: (timed_in(ours, own[name]), timed_in(theirs, other[name])) for name in own}
            for _ in range(options.rounds)
        ]
        rate = ours.submit(matmul_flops).result()
    first, second = (run.result for run in rounds[0]["logps"])
    difference = float(np.abs(first - second).max())
    if not difference <= TOLERANCE:
        raise RuntimeError(f"log-probabilities differ by {difference:.2g} nats")
    return summary(rows, rounds, rate) | {"batch": batches, "GFLOP/s": rate / 1e9}


def our_calls(rows: Rows, options: Options) -> dict[str, Callable[[], Any]]:
    return {
        "logps": partial(logps, rows),
        "sample": partial(sample, rows, options.limits.response),
    }


def fastest(
    pool: ProcessPoolExecutor, peer: Any, rows: Rows, options: Options
) -> tuple[dict[str, int], dict[str, Callable[[], Any]]]:
    """The batch size of each work at which the peer is fastest, and the work with it."""
    stops = model_folder.load_policy(MODEL).tokenizer.stops
    kinds: dict[str, Callable[..., Any]] = {
        "logps": partial(peer.logps, rows),
        "sample": partial(peer.sample, rows, max_new=options.limits.response, stops=stops),
    }
    batches: dict[str, int] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, call in kinds.items():
        tried = {size: partial(call, batch=size) for size in BATCHES[name]}
        seconds = {size: timed_in(pool, one).seconds for size, one in tried.items()}
        batches[name] = min(seconds, key=lambda size: seconds[size])
        calls[name] = tried[batches[name]]
    return batches, calls


def summary(rows: Rows, rounds: list[dict[str, tuple[Pass, Pass]]], rate: float) -> dict[str, Any]:
    """Median and range of each program's speed and of their ratio, and the share of the floor."""
    found: dict[str, Any] = {}
    for name, unit in (("logps", "rows/s"), ("sample", "tokens/s")):
        speeds = np.array([
            [(len(rows) if name == "logps" else run.result) / run.seconds for run in turn[name]]
            for turn in rounds
        ])  # fmt: skip
        shares = [
            floors(rows, turn["sample"][0].result, rate)[name] / turn[name][0].seconds
            for turn in rounds
        ]
        found[name] = {
            "unit": unit,
            "minipref": spread(speeds[:, 0]),
            "transformers": spread(speeds[:, 1]),
            "ratio": spread(speeds[:, 0] / speeds[:, 1]),
            "share of the floor": median(shares),
        }
    return found


def spread(values: np.ndarray) -> list[float]:
    """Median, least and most."""
    return [median(values.tolist()), float(values.min()), float(values.max())]


def page(options: Options, found: dict[str, Any]) -> str:
    """`results/inference.md`."""
    data = "--data FILE " if options.data else ""
    lines = [
        "# Log-probabilities and samples of SmolLM2-135M beside transformers",
        "",
        f"{describe()}. `python -m benchmarks.inference {data}--rows {options.rows} --rounds "
        f"{options.rounds}`: prompts of at most {options.limits.prompt} tokens, responses and "
        f"samples of at most {options.limits.response}; float32; median [range] of the rounds. "
        f"Batches of transformers: {found['batch']['logps']} responses, {found['batch']['sample']} "
        f"prompts. A product of 2048 x 2048: {found['GFLOP/s']:.0f} GFLOP/s.",
        "",
        "| | minipref | transformers | ratio | share of the floor |",
        "|---|---|---|---|---|",
    ]
    for name, title in (("logps", "log-probabilities"), ("sample", "samples")):
        row = found[name]
        texts = [shown(row[key]) for key in ("minipref", "transformers", "ratio")]
        share = f"{row['share of the floor']:.0%}"
        lines.append(f"| {title}, {row['unit']} | {' | '.join(texts)} | {share} |")
    return "\n".join(lines) + "\n"


def shown(values: list[float]) -> str:
    return "{:.3g} [{:.3g}, {:.3g}]".format(*values)


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options, Path(folder))
    text = page(options, found)
    print(json.dumps(found) if options.json else text)
    (RESULTS / "inference.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
