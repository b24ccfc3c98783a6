"""`python -m benchmarks.plan`: training steps compiled for TPU pods, as a table.

The steps are those of DPO, d-DPO and e-DPO with five reward models.
"""

import json
import subprocess
import sys

from benchmarks.machine import describe

METHODS = ("dpo", "d-dpo", "e-dpo")
MACHINES = {  # what a user types after `python -m scale.run plan`
    "8B on the paper's 32 v3 chips": "--model palm-8b --topology v3:4x8 --batch 256",
    "62B on 256 v5p chips": "--model palm-62b --topology v5p:4x8x8 --batch 512",
    "540B on 2 x 3,072 v4 chips": (
        "--model palm-540b --topology v4:12x16x16 --slices 2 --batch 1024"
    ),
    "540B on 2,048 v5p chips": "--model palm-540b --topology v5p:8x16x16 --batch 1024",
}
COLUMNS = (
    "machine",
    "method",
    "mesh",
    "pairs",
    "GiB of a chip",
    "fits",
    "compiled FLOPs",
    "recomputed",
    "s a step",
    "bound by",
    "MFU at most",
    "compiled in s",
)
GIB = 2**30


def plan(options: str, method: str) -> dict:
    """What `plan` says of a method on a machine."""
    command = [sys.executable, "-m", "scale.run", "plan", *options.split(), "--method", method]
    done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def cells(machine: str, answer: dict) -> list[str]:
    """One row of the table."""
    memory, limit = answer["hbm_bytes_per_chip"] / GIB, answer["hbm_limit_bytes"] / GIB
    return [
        machine,
        answer["method"],
        " x ".join(map(str, answer["mesh"].values())),
        str(answer["batch"]),
        f"{memory:.2f} of {limit:.0f}",
        "yes" if answer["fits"] else "no",
        f"{answer['compiled_flops']:.4e}",
        f"{answer['recompute_factor']:.3f}",
        f"{answer['step_seconds_bound']:.2f}",
        answer["binding"],
        f"{answer['mfu_bound']:.1%}",
        f"{answer['compile_seconds']:.0f}",
    ]


def main() -> None:
    """Print the table."""
    print(f"{describe()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for machine, options in MACHINES.items():
        answers = {method: plan(options, method) for method in METHODS}
        for answer in answers.values():
            print(f"| {' | '.join(cells(machine, answer))} |", flush=True)
        dpo, e_dpo = answers["dpo"], answers["e-dpo"]
        memory, flops = (
            e_dpo[name] / dpo[name] - 1 for name in ("hbm_bytes_per_chip", "compiled_flops")
        )
        print(f"| | e-dpo over dpo | | | {memory:+.2%} | | {flops:+.2%} | | | | | |", flush=True)


if __name__ == "__main__":
    main()
