"""`python -m benchmarks.fuzz`: faulty rows and folders, read here and by an independent reader.

Each input is either read as `json`, `pyarrow`, `safetensors`, `gguf` or `transformers` reads it, or
refused in one line that names its file. A seed is one input, so a run can go on at `--seed N`.

`wrong` are inputs that are read otherwise, or refused without the file's name; `slow` those that
take more than 5 s or 1 GiB. The results are in `results/reliability.md`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tyro

from benchmarks.fuzz.workers import outcomes, prepare

KEYS = ("inputs", "accepted", "refused", "tracebacks", "slow", "wrong")


@dataclass(frozen=True)
class Options:
    """What is made."""

    rows: int = 1000
    """Files of rows."""
    folders: int = 100
    """Folders of models, stages and checkpoints."""
    seed: int = 0
    """The first seed."""
    json: bool = False
    """Print JSON alone."""


def counted(kind: str, seeds: range, show: Callable[[str], None]) -> Counter[str]:
    """How often each outcome came; those that must not come are shown with their seeds."""
    counts: Counter[str] = Counter()
    for seed, outcome in outcomes(partial(prepare, kind), seeds):
        name = outcome.partition(":")[0]
        counts[name + "s" * (name == "traceback")] += 1
        if name not in ("accepted", "refused"):
            show(f"{kind} {seed}: {re.sub(r'[^ -~]', '?', outcome)[:600]}")
    return counts


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    counts: Counter[str] = Counter()
    show: Callable[[str], None] = (lambda _: None) if options.json else partial(print, flush=True)
    for kind, number in (("rows", options.rows), ("folders", options.folders)):
        counts += counted(kind, range(options.seed, options.seed + number), show)
    counts["inputs"] = options.rows + options.folders
    result = {key: counts[key] for key in KEYS}
    if options.json:
        print(json.dumps(result))
    else:
        print(", ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
