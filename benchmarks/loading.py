"""`python -m benchmarks.loading`: seconds and memory from a file of chat rows to the first batch.

Here and in `datasets`' `map` with the function that TRL's DPO trainer maps, both with SmolLM2's
tokenizer. A job is a process of its own on some cores; its clock starts when interpreter, tokenizer
and a tiny model are there. Cold: nothing is kept of an earlier run. Cached: the same command again.
Memory is what the process takes beyond its size at that time, and what it and all processes that it
starts take together (the shares of pages that several have in common), once a quarter second. The
seconds of a core are those of process 0 and of all that it started: other work on the machine
changes them less.

Extras `smollm2` and `peers`.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import psutil
import tyro

from benchmarks.machine import describe
from scale.data.dataset import Limits, make_dataset
from scale.data.formats import SIDES
from scale.data.table import scan
from scale.data.tokenizer import Tokenizer
from scale.io.model_folder import tokenizer_of
from scale.model.presets import MODELS
from scale.model.transformer import Transformer
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.parallel.processes import join
from scale.train.batches import plan_batches
from scale.train.loop import TrainingConfig

TEXT = (
    "the of and to a in is that it for you was with on as have but be they this from at not can "
    "what how do make people food time good way recipe water need some little house work also "
    "should would like about family think first long great kitchen doctor garden music movie"
)
TINY = replace(
    MODELS["smollm2-135m"], num_layers=1, d_model=8, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8
)
TRAINING = TrainingConfig(batch_size=64, epochs=1.0)
LIMITS = Limits(512, 256)
MIB = 2**20
COLUMNS = (
    *("program", "cores", "JAX processes", "start", "seconds", "seconds of a core"),
    *("MiB beyond interpreter and model", "MiB of all processes"),
)


@dataclass(frozen=True)
class Job:
    """One process, which prints its figures."""

    program: str
    data: Path
    cores: int
    processes: int = 1
    """JAX processes of one run."""
    process: int = 0
    port: int = 0


def write_rows(path: Path, num_rows: int, seed: int = 0) -> None:
    """Preference pairs of one or two turns, as short as Anthropic HH's; no two are equal."""
    rng, known = np.random.default_rng(seed), TEXT.split()
    said = [" ".join(rng.choice(known, rng.integers(5, 15))) for _ in range(2**12)]
    with path.open("w") as file:
        for i in range(num_rows):
            texts = [f"{said[k].capitalize()}." for k in rng.integers(len(said), size=5)]
            turns = [("user", texts[0]), ("assistant", texts[1]), ("user", texts[2])]
            named = {
                "prompt": turns if i % 5 < 2 else turns[2:],
                "chosen": [("assistant", f"{texts[3]} {i}")],
                "rejected": [("assistant", texts[4])],
            }
            row = {
                name: [{"role": role, "content": text} for role, text in turns]
                for name, turns in named.items()
            }
            file.write(json.dumps(row) + "\n")


def ours(job: Job, tokenizer: Tokenizer) -> Callable[[], Any]:
    """Reads the file as `align` does, up to its first batch."""
    runtime = make_runtime(RuntimeConfig(data=job.processes))
    model = Transformer(TINY, jax.random.key(0), runtime)

    def first_batch() -> Any:
        rows = scan(job.data)
        dataset = make_dataset(tokenizer, rows, SIDES, LIMITS, str(job.data))
        plan = plan_batches(dataset, TRAINING.for_rows(len(dataset)), model)
        return jax.block_until_ready(plan.batch(0).inputs.tokens)

    return first_batch


def theirs(job: Job, tokenizer: Any) -> Callable[[], Any]:
    """Maps the file as TRL 1.16's DPO trainer does, and reads some rows."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()

    def tokenize(example: dict[str, Any], processing_class: Any) -> dict[str, list[int]]:
        def ids(turns: list[dict[str, str]], **options: Any) -> list[int]:
            template = processing_class.apply_chat_template
            return template(turns, tokenize=True, return_dict=True, **options)["input_ids"]

        prompt = ids(example["prompt"], add_generation_prompt=True)
        responses = [ids(example["prompt"] + example[side]) for side in SIDES]
        pairs = [zip(prompt, whole, strict=False) for whole in responses]
        alike = [sum(1 for a, b in pair if a == b) for pair in pairs]
        cut = min(alike)
        named = {f"{s}_ids": r[cut:] for s, r in zip(SIDES, responses, strict=True)}
        return {"prompt_ids": prompt[:cut]} | named

    def first_batch() -> Any:
        rows = load_dataset("json", data_files=str(job.data), split="train")
        mapped = rows.map(
            tokenize,
            fn_kwargs={"processing_class": tokenizer.theirs},
            num_proc=job.cores if job.cores > 1 else None,
        )
        return mapped[: TRAINING.batch_size]

    return first_batch


class Memory(threading.Thread):
    """Looks at the memory of this process and of those that it starts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        with suppress(OSError, AttributeError):  # what loading left free is not there to be used
            ctypes.CDLL(None).malloc_trim(0)
        self.process = psutil.Process()
        self.before, self.peak, self.all = self.own(), 0, 0
        self.ended = threading.Event()

    def own(self) -> int:
        return self.process.memory_info().rss

    def run(self) -> None:
        while not self.ended.wait(0.25):
            self.peak = max(self.peak, self.own())
            together = 0
            for process in (self.process, *self.process.children(recursive=True)):
                try:
                    together += process.memory_full_info().pss
                except psutil.Error:  # it has ended
                    continue
            self.all = max(self.all, together)

    def figures(self) -> dict[str, float]:
        """MiB beyond the start, and MiB of all processes."""
        self.ended.set()
        peak = max(self.peak, self.own())
        return {"beyond": (peak - self.before) / MIB, "all": max(self.all, peak) / MIB}


def run(job: Job) -> None:
    """Do the job in this process; print the figures of process 0."""
    if job.processes > 1:
        coordinator = f"localhost:{job.port}"
        join(RuntimeConfig(processes=job.processes, process=job.process, coordinator=coordinator))
    make = {"minipref": ours, "datasets": theirs}[job.program]
    first_batch = make(job, tokenizer_of(Path("smollm2")))
    memory = Memory()
    memory.start()
    start, before = time.perf_counter(), sum(os.times()[:4])
    first_batch()
    seconds = time.perf_counter() - start
    times = {"seconds": seconds, "cpu": sum(os.times()[:4]) - before}
    if job.process == 0:
        print(json.dumps(times | memory.figures()))


def measure(job: Job, cache: Path) -> dict[str, float]:
    """The figures of a job, in processes with this cache."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: job.cores]))
    places = {"XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hf"), "JAX_PLATFORMS": "cpu"}
    command = ["taskset", "-c", cores, sys.executable, "-m", "benchmarks.loading", "job"]
    started = [
        subprocess.Popen(
            [*command, json.dumps([job.program, str(job.data), job.cores, job.processes, i, 9973])],
            env=os.environ | places, stdout=subprocess.PIPE, text=True,
        )
        for i in range(job.processes)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{job}: {outputs}")
    return json.loads(outputs[0].splitlines()[-1])


def main(
    rows: int = 1_000_000,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    programs: tuple[str, ...] = ("minipref", "datasets"),
    cores: tuple[int, ...] = (1, 2),
) -> None:
    """Print the table.

    Args:
        rows: Rows of the file.
        json_: Print JSON instead.
        programs: What is measured.
        cores: On how many cores; here on two also as two processes of JAX.
    """
    if not json_:
        head = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
        print(f"{describe()}\n{rows:,} rows\n\n{head}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, rows)
        for program in programs:
            several = [(2, 2)] if program == "minipref" and 2 in cores else []
            for n, processes in (*((n, 1) for n in cores), *several):
                cache = Path(folder) / f"{program}-{n}-{processes}"
                for start in ("cold", "cached"):
                    figures = measure(Job(program, data, n, processes), cache)
                    show(json_, program, n, processes, start, figures)


def show(
    as_json: bool, program: str, cores: int, processes: int, start: str, figures: dict[str, float]
) -> None:
    named = {"program": program, "cores": cores, "JAX processes": processes, "start": start}
    if as_json:
        print(json.dumps(named | figures), flush=True)
    else:
        cells = (*named.values(), *(f"{figures[name]:.1f}" for name in ("seconds", "cpu")))
        mib = (f"{figures[name]:.0f}" for name in ("beyond", "all"))
        print(f"| {' | '.join(map(str, (*cells, *mib)))} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["job"]:
        program, data, *numbers = json.loads(sys.argv[2])
        run(Job(program, Path(data), *numbers))
    else:
        tyro.cli(main, description=__doc__)
