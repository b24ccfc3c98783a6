"""`python -m benchmarks.plan`: a table of steps compiled for TPU pods.

The steps are those of DPO, d-DPO and e-DPO with five reward models.
"""

import json
import subprocess
import sys

from benchmarks.machine import describe

METHODS = ("dpo", "d-dpo", "e-dpo")
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


def plan(options: str, method: str) -> dict:
    command = [sys.executable, "-m", "scale.run", "plan", *options.split(), "--json"]
    command += ["--method", method]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(machine: str, figures: dict) -> list[str]:
    used, limit = (figures[name] / 2**30 for name in ("hbm_bytes_per_chip", "hbm_limit_bytes"))
    return [
        machine, figures["method"], " x ".join(map(str, figures["mesh"].values())),
        str(figures["batch"]), f"{used:.2f} of {limit:.0f}", "yes" if figures["fits"] else "no",
        f"{figures['compiled_flops']:.4e}", f"{figures['recompute_factor']:.3f}",
        f"{figures['step_seconds_bound']:.2f}", figures["binding"], f"{figures['mfu_bound']:.1%}",
        f"{figures['compile_seconds']:.0f}",
    ]


def main() -> None:
    print(f"{describe()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for machine, options in MACHINES.items():
        figures = {method: plan(options, method) for method in METHODS}
        for method in METHODS:
            print(f"| {' | '.join(row(machine, figures[method]))} |", flush=True)
        names = ("hbm_bytes_per_chip", "compiled_flops")
        memory, flops = (figures["e-dpo"][name] / figures["dpo"][name] - 1 for name in names)
        print(f"| | e-dpo over dpo | | | {memory:+.2%} | | {flops:+.2%} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
