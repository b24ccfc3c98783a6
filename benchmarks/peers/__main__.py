"""`python -m benchmarks.peers`: one and the same DPO step in TRL (PyTorch), Tunix (JAX) and here, side by side.

All three load the same initial weights (a Hugging Face folder), read the same rows in the same order with the same
stored reference log-probs, and have the same objective and optimiser (Adam, the gradient clipped at norm 1, a constant
learning rate). The losses of the first step must agree, else there is no result. They depend on all weights and tokens:
the reference is not the policy itself.

Each library is a process of its own, in its fastest configuration. After two passes over all batches, which compile
what is compiled, they take turns: a round is one pass of each, alone at work. Ratios are minipref's over the other's in
the same round, their median and range. Memory is each process's peak, its libraries included; on a GPU, the
allocator's. Real tokens are those of prompt, chosen and rejected response, each once: no padding, and no prompt twice.

Not used of TRL 1.16.0: `padding_free`, which warns that it is "temporarily unavailable" and pads; on a CPU Liger's
layers, whose kernels are for GPUs. Tunix 0.1.7 computes in the type of its weights, so that it has no bfloat16 products
with float32 weights. IPO is left out: TRL's is of token means, another objective than the paper's, and Tunix has none.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from benchmarks.machine import describe, median
from benchmarks.peers.shapes import SHAPES, Shape, rows_of, save
from benchmarks.work import alone
from scale.data.packing import Tokens
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError

Library = Literal["trl", "tunix", "minipref"]
PACKAGES = {"trl": ("trl", "transformers", "torch"), "tunix": ("google-tunix", "flax", "jax"),
            "minipref": ("jax", "equinox")}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
               "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
WARM_UP = 2
Passes = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What is compared."""

    shapes: tuple[Literal["49m", "135m", "miniature", "1b"], ...] = ("49m", "135m", "miniature")
    """Models: 49M parameters, SmolLM2-135M's shape, the miniature's sizes, Llama 3.2 1B's shape (on random rows)."""
    hh: Path | None = None
    """Anthropic HH rows (JSONL). Without: short responses alone, of the docstring corpus."""
    pairs: int = 64
    """Pairs of a pass: a multiple of each batch."""
    lengths: tuple[int, int] = (256, 256)
    """Tokens of a prompt and of a response at most. The miniature's rows are whole."""
    rounds: int = 5
    """Timed passes of each library."""
    libraries: tuple[Library, ...] = ("trl", "tunix", "minipref")
    """Which run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; weights are float32."""
    json: bool = False
    """Print JSON, not a table."""


class Program:
    """One library in a process of its own, that waits for its turns."""

    def __init__(self, library: str, folder: Path):
        self.library, self.log = library, folder / f"{library}.log"
        command = [sys.executable, "-m", f"benchmarks.peers.step_{library}", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | ENVIRONMENT,
            )

    def run(self) -> dict[str, Any]:
        """One pass over the work. Errors: RuntimeError with the last lines that a program printed before it stopped."""
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            print("pass", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.library} stopped with {self.process.wait()}:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def compare(shape: Shape, tokenizer: Tokenizer, tokens: Tokens, options: Options) -> dict[str, Passes]:
    """Each library's passes, those of the warm-up first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone(save, folder, shape, tokenizer, tokens, options.dtype)  # on the accelerator, if there is one
        programs = {library: Program(library, folder) for library in options.libraries}
        try:
            passes: dict[str, Passes] = {}
            for library, program in programs.items():
                passes[library] = [program.run() for _ in range(WARM_UP)]
            require_agreement(first_losses(passes), TOLERANCE[options.dtype])
            for _ in range(options.rounds):
                for library, program in programs.items():
                    passes[library].append(program.run())
        finally:
            for program in programs.values():
                program.close()
    return passes


def first_losses(passes: dict[str, Passes]) -> dict[str, list[float]]:
    """Those of each step of the first pass."""
    return {library: found[0]["losses"] for library, found in passes.items()}


def require_agreement(losses: dict[str, list[float]], tolerance: float) -> None:
    """Errors: ValueError naming the two first losses that are furthest apart, where that is too far."""
    first = sorted((steps[0], library) for library, steps in losses.items())
    (low, one), (high, other) = first[0], first[-1]
    if not high - low <= tolerance:
        raise ValueError(f"the first step's loss is {low} in {one} and {high} in {other}: they do not do the same work")


def ratios(passes: dict[str, Passes]) -> dict[str, dict[str, Any]]:
    """minipref's speed and memory over each other library's."""
    timed = {library: found[WARM_UP:] for library, found in passes.items()}
    ours = timed.pop("minipref", [])
    return {library: ratio(ours, theirs) for library, theirs in timed.items() if ours}


def ratio(ours: Passes, theirs: Passes) -> dict[str, Any]:
    """All do the same pairs and tokens, so that speeds are as the inverse of seconds."""
    faster = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    speed, spread = median(faster), [min(faster), max(faster)]
    return {"pairs_per_second": speed, "pairs_per_second_range": spread, "tokens_per_second": speed,
            "tokens_per_second_range": spread, "peak_memory": ours[-1]["memory"] / theirs[-1]["memory"]}


def measured(shape: Shape, tokens: Tokens, passes: dict[str, Passes]) -> dict[str, Any]:
    pairs, real = tokens.lengths.shape[0], int(tokens.lengths.sum())
    return {
        "model": asdict(shape.model), "batch": shape.batch, "pairs": pairs, "tokens": real,
        "libraries": {library: summary(found, pairs, real) for library, found in passes.items()},
        "ratios": ratios(passes),
    }


def summary(passes: Passes, pairs: int, tokens: int) -> dict[str, Any]:
    seconds = [found["seconds"] for found in passes]
    last, typical = passes[-1], median(seconds[WARM_UP:])
    return {"pairs_per_second": pairs / typical, "tokens_per_second": tokens / typical, "seconds": seconds[WARM_UP:],
            "warm_up_seconds": seconds[:WARM_UP], "peak_memory_gib": last["memory"], "device": last["device"]}


def result(options: Options) -> dict[str, Any]:
    """`ratios` are those of the first shape and rows; `shapes` has all."""
    shapes, losses = {}, {}
    for name in options.shapes:
        shape = SHAPES[name]
        for kind in shape.rows if options.hh else set(shape.rows) - {"hh"}:
            tokenizer, tokens = rows_of(kind, shape, options.hh, options.lengths, options.pairs)
            passes = compare(shape, tokenizer, tokens, options)
            shapes[f"{name} {kind}"] = measured(shape, tokens, passes)
            losses[f"{name} {kind}"] = first_losses(passes)
    versions = {package: version(package) for library in options.libraries for package in PACKAGES[library]}
    return {"ratios": next(iter(shapes.values()))["ratios"], "shapes": shapes, "losses": losses,
            "rounds": options.rounds, "dtype": options.dtype, "machine": describe(), "versions": versions}


def table(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    lines = [f"{found['machine']}; {versions}; {found['dtype']}, {found['rounds']} rounds", "",
             "| model, rows | library | pairs/s | real tokens/s | peak GiB | minipref's pairs/s over its | memory |",
             "|---|---|---|---|---|---|---|"]
    return "\n".join(lines + [row for name, shape in found["shapes"].items() for row in table_rows(name, shape)])


def table_rows(name: str, shape: dict[str, Any]) -> Iterator[str]:
    for library, of in shape["libraries"].items():
        yield (f"| {name} | {library} | {of['pairs_per_second']:.2f} | {of['tokens_per_second']:,.0f} | "
               f"{of['peak_memory_gib']:.2f} | {against(shape['ratios'].get(library))} |")


def against(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "|"
    low, high = ratio["pairs_per_second_range"]
    return f"{ratio['pairs_per_second']:.2f} [{low:.2f}, {high:.2f}] | {ratio['peak_memory']:.2f}"


def main(options: Options) -> None:
    """Errors: InputError for options that do not go together."""
    if options.dtype == "bfloat16" and "tunix" in options.libraries:
        raise InputError("--dtype bfloat16: Tunix has no float32 weights with it; --libraries trl minipref")
    for name in options.shapes:
        if options.pairs % SHAPES[name].batch:
            raise InputError(f"--pairs {options.pairs}: not a multiple of {name}'s batch of {SHAPES[name].batch}")
    jax.config.update("jax_platforms", "cpu")  # accelerators are the programs'
    found = result(options)
    print(json.dumps(found) if options.json else table(found))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (InputError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
