"""`python -m benchmarks.plan`: the steps of DPO, d-DPO and e-DPO (five rewards) compiled for TPU pods, as a table."""

import json
import subprocess
import sys

from benchmarks.machine import describe

METHODS = ("dpo", "d-dpo", "e-dpo")
MACHINES = {  # what a user would type after `python -m scale.run plan`
    "8B on the paper's 32 v3 chips": "--model palm-8b --topology v3:4x8 --batch 256",
    "62B on 256 v5p chips": "--model palm-62b --topology v5p:4x8x8 --batch 512",
    "540B on 2 x 3,072 v4 chips": "--model palm-540b --topology v4:12x16x16 --slices 2 --batch 1024",
    "540B on 2,048 v5p chips": "--model palm-540b --topology v5p:8x16x16 --batch 1024",
}
COLUMNS = ("machine", "method", "mesh", "pairs", "GiB of a chip", "fits", "compiled FLOPs", "recomputed", "s a step",
           "bound by", "MFU at most", "compiled in s")


def plan(options: str, method: str) -> dict:
    command = [sys.executable, "-m", "scale.run", "plan", *options.split(), "--method", method, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(machine: str, found: dict) -> list[str]:
    gib = 2**30
    return [machine, found["method"], " x ".join(map(str, found["mesh"].values())), str(found["batch"]),
            f"{found['hbm_bytes_per_chip'] / gib:.2f} of {found['hbm_limit_bytes'] / gib:.0f}",
            "yes" if found["fits"] else "no", f"{found['compiled_flops']:.4e}", f"{found['recompute_factor']:.3f}",
            f"{found['step_seconds_bound']:.2f}", found["binding"], f"{found['mfu_bound']:.1%}",
            f"{found['compile_seconds']:.0f}"]


def main() -> None:
    print(f"{describe()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for machine, options in MACHINES.items():
        found = {method: plan(options, method) for method in METHODS}
        for each in found.values():
            print(f"| {' | '.join(row(machine, each))} |", flush=True)
        names = ("hbm_bytes_per_chip", "compiled_flops")
        memory, flops = (found["e-dpo"][name] / found["dpo"][name] - 1 for name in names)
        print(f"| | e-dpo over dpo | | | {memory:+.2%} | | {flops:+.2%} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
