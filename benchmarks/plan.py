"""`python -m benchmarks.plan`: steps compiled for TPU pods, and the paper's section 6 end to end.

The first table has the steps of DPO, d-DPO and e-DPO with five reward models, in rows of 2,048
positions. The second one has the stages of section 6.1 with the batches and steps that it states.
"""

import json
import subprocess
import sys

from benchmarks.machine import describe
from scale.plan.command import REALISTIC

METHODS = {"dpo": 512, "d-dpo": 512, "e-dpo": 336}  # tokens of a response: 1,024 of all
MACHINES = {  # what a user would type after `python -m scale.run plan`
    "8B on the paper's 32 v3 chips": "--model palm-8b --topology v3:4x8 --batch 256",
    "62B on 256 v5p chips": "--model palm-62b --topology v5p:4x8x8 --batch 512",
    "540B on 2 x 3,072 v4 chips":
        "--model palm-540b --topology v4:12x16x16 --slices 2 --batch 1024",
    "540B on 2,048 v5p chips": "--model palm-540b --topology v5p:8x16x16 --batch 1024",
}
COLUMNS = (
    *("machine", "method", "mesh", "pairs", "GiB of a chip", "fits"),
    *("compiled FLOPs", "recomputed", "s a step", "bound by", "MFU at most", "compiled in s"),
)
MODELS = ("llama-3-8b", "palm-8b")
SECTION_6 = {  # stage -> its options and its steps: appendix C's batches, chips and steps
    "sft": ("--topology v3:4x8 --batch 64", 5_000),
    "reward": ("--topology v3:4x4 --batch 64 --num-reward-models 1", 3_000),
    "align": ("--topology v3:4x8 --batch 16 --runtime.fsdp 16 --runtime.tensor 4", 10_000),
}
SECTION_6_COLUMNS = (
    *("stage", "model", "mesh", "pairs", "GiB of a chip", "steps"),
    *("steps/s at the bound", f"at {REALISTIC:.0%} of it", "hours of a run at that"),
)


def plan(options: str) -> dict:
    command = [sys.executable, "-m", "scale.run", "plan", *options.split(), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return json.loads(done.stdout)


def row(machine: str, figures: dict) -> list[str]:
    return [
        machine, figures["method"], mesh(figures), str(figures["batch"]), memory(figures),
        "yes" if figures["fits"] else "no",
        f"{figures['compiled_flops']:.4e}", f"{figures['recompute_factor']:.3f}",
        f"{figures['step_seconds_bound']:.2f}", figures["binding"], f"{figures['mfu_bound']:.1%}",
        f"{figures['compile_seconds']:.0f}",
    ]  # fmt: skip


def mesh(figures: dict) -> str:
    return " x ".join(map(str, figures["mesh"].values()))


def memory(figures: dict) -> str:
    used, limit = (figures[name] / 2**30 for name in ("hbm_bytes_per_chip", "hbm_limit_bytes"))
    return f"{used:.2f} of {limit:.0f}"


def section_6_row(stage: str, model: str) -> list[str]:
    options, steps = SECTION_6[stage]
    options = f"--stage {stage} --model {model} --limits.prompt 512 --limits.response 128 {options}"
    figures = plan(f"{options} --recipe palm")
    if "error" in figures:
        return [stage, model, figures["error"], *[""] * 6]
    rate = 1 / figures["step_seconds_bound"]
    return [
        stage, model, mesh(figures), str(figures["batch"]), memory(figures), f"{steps:,}",
        f"{rate:.2f}", f"{rate * REALISTIC:.2f}", f"{steps / rate / REALISTIC / 3600:.2f}",
    ]  # fmt: skip


def header(columns: tuple[str, ...]) -> str:
    return f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def main() -> None:
    print(describe())
    print(header(SECTION_6_COLUMNS))
    for stage in SECTION_6:
        for model in MODELS:
            print(f"| {' | '.join(section_6_row(stage, model))} |", flush=True)
    print(header(COLUMNS))
    for machine, options in MACHINES.items():
        figures = {
            method: plan(
                f"{options} --method {method} --recipe palm --limits.prompt 1024 "
                f"--limits.response {response}"
            )
            for method, response in METHODS.items()
        }
        for method in METHODS:
            print(f"| {' | '.join(row(machine, figures[method]))} |", flush=True)
        names = ("hbm_bytes_per_chip", "compiled_flops")
        more, flops = (figures["e-dpo"][name] / figures["dpo"][name] - 1 for name in names)
        print(f"| | e-dpo over dpo | | | {more:+.2%} | | {flops:+.2%} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
