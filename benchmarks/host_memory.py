"""`python -m benchmarks.host_memory`: host memory beyond the model itself.

Jobs make a model, save it and load it. On CPU devices the model lies in host memory too, so its own
size is subtracted from the peak of each process.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

from benchmarks.machine import describe, peak_memory_gib
from scale.data.tokenizer import train_tokenizer
from scale.io import model_folder
from scale.io.huggingface import export
from scale.model.config import ModelConfig
from scale.model.presets import MODELS
from scale.model.transformer import Transformer
from scale.parallel.mesh import Runtime, RuntimeConfig, make_runtime
from scale.parallel.sharding import initialise

CONFIG = replace(
    MODELS["smollm2-135m"],
    num_layers=16,
    d_model=1024,
    num_heads=16,
    num_kv_heads=4,
    d_ff=4096,
    max_seq_len=128,
)
JOBS = ("initialise", "initialise and save", "load", "initialise and export", "load exported")


def runtime_of_devices() -> Runtime:
    """Two-way tensor parallelism where there are several devices."""
    return make_runtime(RuntimeConfig(tensor=2) if jax.device_count() > 1 else RuntimeConfig())


def make_model(config: ModelConfig, runtime: Runtime) -> Transformer:
    model = initialise(lambda: Transformer(config, jax.random.key(0), runtime))
    return jax.block_until_ready(model)


def run(job: str, folder: Path) -> None:
    """Do the job; print the size of the process before it and the peak after it, GiB."""
    runtime = runtime_of_devices()
    tokenizer = train_tokenizer(["some words"], 300)
    before = peak_memory_gib()
    if job.startswith("load"):
        path = folder / ("hf" if "exported" in job else "ours")
        jax.block_until_ready(model_folder.load_policy(path, runtime).model)
    else:
        model = make_model(CONFIG, runtime)
        if job == "initialise and save":
            model_folder.save(model_folder.ModelFolder(folder / "ours", model, CONFIG, tokenizer))
        elif job == "initialise and export":
            export(folder / "hf", model, tokenizer)
    print(before, peak_memory_gib())


def main() -> None:
    """Print the table, with a process for each job."""
    model = jax.eval_shape(lambda: Transformer(CONFIG, jax.random.key(0)))
    sizes = [leaf.size * 4 / 2**20 for leaf in jax.tree.leaves(model)]
    largest = f"largest array (of all layers) {max(sizes):.0f} MiB"
    print(f"{describe()}\nmodel {sum(sizes):.0f} MiB, {largest}\n")
    print("| devices | job | MiB beyond the model |\n|---|---|---|")
    for devices in (1, 8):
        with tempfile.TemporaryDirectory() as folder:
            for job in JOBS:
                extra = memory_beyond(job, folder, devices, sum(sizes))
                print(f"| {devices} | {job} | {extra:.0f} |", flush=True)


def memory_beyond(job: str, folder: str, devices: int, model_mib: float) -> float:
    """The memory that a job takes beyond its model, MiB."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "benchmarks.host_memory", job, folder]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | flags
    )
    before, peak = (1024 * float(number) for number in done.stdout.split())
    return peak - before - model_mib


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else run(sys.argv[1], Path(sys.argv[2]))
