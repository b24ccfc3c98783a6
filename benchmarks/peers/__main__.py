"""`python -m benchmarks.peers`: the same DPO step in TRL (PyTorch), Tunix (JAX) and here.

All three load the same initial weights (a Hugging Face folder). They read the same rows in the same
order, with the same stored reference log-probabilities. They have the same objective and optimizer:
Adam, the gradient clipped at norm 1, a constant learning rate. The losses of the first step have to
agree, or there is no result. These losses depend on all weights and tokens, because the reference
is not the policy itself.

Each library has a process of its own, in its fastest configuration. Two passes over all batches
compile what is compiled. Then the libraries take turns: a round is one pass of each, with no other
at work. A ratio is minipref's number over that of another library in the same round; the table has
the median and the range. Memory is the peak of the process, its libraries included; on a GPU it is
the peak of the allocator. Real tokens are those of the prompt, the chosen and the rejected
response, each once: no padding, and no prompt twice.

Two things of TRL 1.16.0 are not used: `padding_free`, which warns that it is "temporarily
unavailable" and pads; and, on a CPU, Liger's layers, whose kernels are for GPUs. Tunix 0.1.7
computes in the type of its weights, so it has no bfloat16 products with float32 weights. IPO is
left out: TRL's is of token means, another objective than the paper's, and Tunix has none.
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
from benchmarks.work import in_new_process
from scale.data.packing import TokenizedRows
from scale.data.tokenizer import Tokenizer
from scale.errors import InputError

Library = Literal["trl", "tunix", "minipref"]
PACKAGES = {
    "trl": ("trl", "transformers", "torch"),
    "tunix": ("google-tunix", "flax", "jax"),
    "minipref": ("jax", "equinox"),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
WARM_UP = 2
Passes = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What is compared."""

    shapes: tuple[Literal["49m", "135m", "miniature", "1b"], ...] = ("49m", "135m", "miniature")
    """Models: 49M parameters, SmolLM2-135M's shape, the miniature's sizes, Llama 3.2 1B's shape (on
    random rows)."""
    hh: Path | None = None
    """Anthropic's HH rows (JSONL). Without them there are only the short rows of the docstring
    corpus."""
    pairs: int = 64
    """Pairs of a pass: a multiple of each batch."""
    lengths: tuple[int, int] = (256, 256)
    """Tokens of a prompt and of a response, at most. The miniature's rows are whole."""
    rounds: int = 5
    """Timed passes of each library."""
    libraries: tuple[Library, ...] = ("trl", "tunix", "minipref")
    """The libraries that run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; weights are float32."""
    json: bool = False
    """Print JSON, not a table."""


class Program:
    """One library in a process of its own, which waits for its turns."""

    def __init__(self, library: str, folder: Path):
        self.library, self.log = library, folder / f"{library}.log"
        command = [sys.executable, "-m", f"benchmarks.peers.step_{library}", str(folder)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | ENVIRONMENT,
            )

    def run(self) -> dict[str, Any]:
        """One pass over the work.

        Raises:
            RuntimeError: The program stopped; the message has the last lines that it printed.
        """
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            print("pass", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            status, printed = self.process.wait(), self.log.read_text()[-2000:]
            raise RuntimeError(f"{self.library} stopped with {status}:\n{printed}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()


def compare(
    shape: Shape, tokenizer: Tokenizer, tokens: TokenizedRows, options: Options
) -> dict[str, Passes]:
    """The passes of each library, with those of the warm-up first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A process of its own, on the accelerator if there is one.
        in_new_process(save, folder, shape, tokenizer, tokens, options.dtype)
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
    """The losses of the steps of each library's first pass."""
    return {library: results[0]["losses"] for library, results in passes.items()}


def require_agreement(losses: dict[str, list[float]], tolerance: float) -> None:
    """Refuse first losses that differ.

    Raises:
        ValueError: Two of them are further apart than the tolerance; the message names both.
    """
    first = sorted((steps[0], library) for library, steps in losses.items())
    (low, one), (high, other) = first[0], first[-1]
    if not high - low <= tolerance:
        losses_differ = f"the first step's loss is {low} in {one} and {high} in {other}"
        raise ValueError(f"{losses_differ}: they do not do the same work")


def ratios(passes: dict[str, Passes]) -> dict[str, dict[str, Any]]:
    """minipref's speed and memory over those of each other library."""
    timed = {library: results[WARM_UP:] for library, results in passes.items()}
    ours = timed.pop("minipref", [])
    return {library: ratio(ours, theirs) for library, theirs in timed.items() if ours}


def ratio(ours: Passes, theirs: Passes) -> dict[str, Any]:
    """The ratio of speeds, that of seconds inverted: both do the same pairs and tokens."""
    faster = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
    speed, spread = median(faster), [min(faster), max(faster)]
    return {
        "pairs_per_second": speed,
        "pairs_per_second_range": spread,
        "tokens_per_second": speed,
        "tokens_per_second_range": spread,
        "peak_memory": ours[-1]["memory"] / theirs[-1]["memory"],
    }


def measurement(shape: Shape, tokens: TokenizedRows, passes: dict[str, Passes]) -> dict[str, Any]:
    """The numbers of all libraries on one shape and one kind of rows."""
    pairs, real = tokens.lengths.shape[0], int(tokens.lengths.sum())
    return {
        "model": asdict(shape.model),
        "batch": shape.batch,
        "pairs": pairs,
        "tokens": real,
        "libraries": {name: summary(results, pairs, real) for name, results in passes.items()},
        "ratios": ratios(passes),
    }


def summary(passes: Passes, pairs: int, tokens: int) -> dict[str, Any]:
    """The numbers of one library."""
    seconds = [result["seconds"] for result in passes]
    last, typical = passes[-1], median(seconds[WARM_UP:])
    return {
        "pairs_per_second": pairs / typical,
        "tokens_per_second": tokens / typical,
        "seconds": seconds[WARM_UP:],
        "warm_up_seconds": seconds[:WARM_UP],
        "peak_memory_gib": last["memory"],
        "device": last["device"],
    }


def run(options: Options) -> dict[str, Any]:
    """All numbers. `ratios` are those of the first shape and rows; `shapes` has all."""
    shapes, losses = {}, {}
    for name in options.shapes:
        shape = SHAPES[name]
        for kind in shape.rows if options.hh else set(shape.rows) - {"hh"}:
            tokenizer, tokens = rows_of(kind, shape, options.hh, options.lengths, options.pairs)
            passes = compare(shape, tokenizer, tokens, options)
            shapes[f"{name} {kind}"] = measurement(shape, tokens, passes)
            losses[f"{name} {kind}"] = first_losses(passes)
    packages = [package for library in options.libraries for package in PACKAGES[library]]
    return {
        "ratios": next(iter(shapes.values()))["ratios"],
        "shapes": shapes,
        "losses": losses,
        "rounds": options.rounds,
        "dtype": options.dtype,
        "machine": describe(),
        "versions": {package: version(package) for package in packages},
    }


def table(numbers: dict[str, Any]) -> str:
    """The numbers in Markdown."""
    versions = ", ".join(f"{package} {number}" for package, number in numbers["versions"].items())
    lines = [
        f"{numbers['machine']}; {versions}; {numbers['dtype']}, {numbers['rounds']} rounds",
        "",
        "| model, rows | library | pairs/s | real tokens/s | peak GiB "
        "| minipref's pairs/s over its | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in numbers["shapes"].items():
        lines += table_rows(name, shape)
    return "\n".join(lines)


def table_rows(name: str, shape: dict[str, Any]) -> Iterator[str]:
    for library, numbers in shape["libraries"].items():
        speeds = f"{numbers['pairs_per_second']:.2f} | {numbers['tokens_per_second']:,.0f}"
        memory, ratios = numbers["peak_memory_gib"], ratio_cells(shape["ratios"].get(library))
        yield f"| {name} | {library} | {speeds} | {memory:.2f} | {ratios} |"


def ratio_cells(ratio: dict[str, Any] | None) -> str:
    """Two cells, which are empty in minipref's own row."""
    if ratio is None:
        return "|"
    low, high = ratio["pairs_per_second_range"]
    return f"{ratio['pairs_per_second']:.2f} [{low:.2f}, {high:.2f}] | {ratio['peak_memory']:.2f}"


def main(options: Options) -> None:
    """Print the table, or JSON.

    Raises:
        InputError: Two options do not go together.
    """
    if options.dtype == "bfloat16" and "tunix" in options.libraries:
        raise InputError(
            "--dtype bfloat16: Tunix has no float32 weights with it; --libraries trl minipref"
        )
    for name in options.shapes:
        if options.pairs % SHAPES[name].batch:
            batch = f"{name}'s batch of {SHAPES[name].batch}"
            raise InputError(f"--pairs {options.pairs}: not a multiple of {batch}")
    jax.config.update("jax_platforms", "cpu")  # the programs of the libraries use accelerators
    numbers = run(options)
    print(json.dumps(numbers) if options.json else table(numbers))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (InputError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
