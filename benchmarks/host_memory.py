"""`python -m benchmarks.host_memory`: host memory beyond the model itself while it is made, saved and loaded.

On CPU devices the model lies in host memory too, so its own size is taken off the peak of each process.
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
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.parallel.sharding import initialise

CONFIG = replace(MODELS["smollm2-135m"], num_layers=16, d_model=1024, num_heads=16, num_kv_heads=4, d_ff=4096, max_seq_len=128)
JOBS = ("initialise", "initialise and save", "load", "initialise and export", "load exported")


def model_of(config: ModelConfig) -> Transformer:
    runtime = make_runtime(RuntimeConfig(tensor=2) if jax.device_count() > 1 else RuntimeConfig())
    return jax.block_until_ready(initialise(lambda: Transformer(config, jax.random.key(0), runtime)))


def run(job: str, at: Path) -> None:
    """Does the job and prints its process's peak, and its size before."""
    runtime = make_runtime(RuntimeConfig(tensor=2) if jax.device_count() > 1 else RuntimeConfig())
    tokenizer = train_tokenizer(["some words"], 300)
    if job.startswith("load"):
        before = peak_memory_gib()
        jax.block_until_ready(model_folder.load_policy(at / ("hf" if "exported" in job else "ours"), runtime).model)
    else:
        before = peak_memory_gib()
        model = model_of(CONFIG)
        if job == "initialise and save":
            model_folder.save(at / "ours", model, CONFIG, tokenizer)
        elif job == "initialise and export":
            export(at / "hf", model, tokenizer)
    print(before, peak_memory_gib())


def main() -> None:
    sizes = [leaf.size * 4 / 2**20 for leaf in jax.tree.leaves(jax.eval_shape(
        lambda: Transformer(CONFIG, jax.random.key(0))))]
    print(f"{describe()}\nmodel {sum(sizes):.0f} MiB, largest array (of all layers) {max(sizes):.0f} MiB\n")
    print("| devices | job | MiB beyond the model |\n|---|---|---|")
    for devices in (1, 8):
        with tempfile.TemporaryDirectory() as at:
            for job in JOBS:
                print(f"| {devices} | {job} | {beyond(job, at, devices, sum(sizes)):.0f} |", flush=True)


def beyond(job: str, at: str, devices: int, model: float) -> float:
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "benchmarks.host_memory", job, at]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    before, peak = (1024 * float(number) for number in done.stdout.split())
    return peak - before - model


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else run(sys.argv[1], Path(sys.argv[2]))
