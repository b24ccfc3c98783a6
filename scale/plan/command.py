"""`plan`: what a training step of `align` takes on TPUs that nobody has rented yet."""

import json
import sys
from dataclasses import dataclass
from typing import Any

from scale.console import console
from scale.errors import InputError
from scale.plan.report import report
from scale.plan.search import best
from scale.plan.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class Plan(StepConfig):
    """Compile the step that `align` would run for TPUs that are not there; print its memory, work
    and speed limit.

    A row has --tokens positions: half are the prompt's, half the responses', of which a method with
    a KL term has three and the others two; only the responses' half has logits.
    """

    search: bool = False
    """Try half and twice the batch, all remat policies and meshes; print every outcome, and the
    best that fits."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        """Prints the figures, or those of the best candidate.

        Raises:
            InputError: Nothing fits. With `json` it is printed, and the exit status is 2.
        """
        try:
            figures = best(self, self.log) if self.search else report(self)
        except InputError as error:
            if self.json:
                print(json.dumps({"fits": False, "error": str(error)}))
                sys.exit(2)
            raise
        if self.json:
            print(json.dumps(figures))
        else:
            show(figures)

    def log(self, line: str) -> None:
        """Prints a line of the search.

        Args:
            line: The outcome of a candidate.
        """
        if not self.json:
            console.print(line)


SUMMARY = """\
{model}, {method}, {batch} pairs x {tokens} tokens a step, remat {remat}; compiled in \
{compile_seconds:.0f} s
devices     {devices} of {topology} x {slices}; mesh {mesh}
parameters  {params_in_billions:.2f}B
HBM a chip  {gib:.2f} of {limit_in_gib:.1f} GiB: {verdict} \
(total, temporaries and program: the compiler's; others: arithmetic)
            {parts}
FLOPs       {model_flops:.3e} a step of the model's own (arithmetic: PaLM's 6N + 12LHQT, \
vocabulary at labels); {compiled_flops:.3e} compiled (attention kernels: arithmetic)
recompute   {recompute_factor:.3f} times the products of one forward and backward pass
network     GB a device sends a step (the compiler's): {network}
seconds     each part alone at its peak (arithmetic): {times}
bound       {step_seconds_bound:.3f} s a step by {binding}: MFU at most {mfu_bound:.1%}"""


def show(figures: dict[str, Any]) -> None:
    """Prints the figures for a person.

    Args:
        figures: What `report` returns.
    """
    gib = 2**30
    text = SUMMARY.format_map(figures | {
        "mesh": " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()),
        "params_in_billions": figures["params"] / 1e9,
        "gib": figures["hbm_bytes_per_chip"] / gib,
        "limit_in_gib": figures["hbm_limit_bytes"] / gib,
        "verdict": "fits" if figures["fits"] else "DOES NOT FIT",
        "parts": _listed(figures["hbm_parts"], 1 / gib, ".2f"),
        "network": _listed(figures["bytes_moved_per_device"], 1e-9, ".1f"),
        "times": _listed(figures["seconds"], 1.0, ".3f"),
    })
    for line in text.splitlines():
        console.print(line, markup=False, highlight=False)


def _listed(values: dict[str, Any], unit: float, digits: str) -> str:
    return ", ".join(f"{name} {value * unit:{digits}}" for name, value in values.items())
