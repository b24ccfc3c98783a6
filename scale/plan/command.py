"""`plan`: what a stage takes on TPUs that nobody has rented yet."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scale.console import console
from scale.data.table import scan
from scale.errors import InputError
from scale.io.model_folder import require_length
from scale.parallel.chips import chip_of
from scale.plan.options import TRAINED, PlanOptions
from scale.plan.search import best, memory_text, planned
from scale.stages.command_line import command_line
from scale.stages.rates import rates_for

REALISTIC = 0.56
"""Of the bound, what a good run reaches: PaLM 540B's MFU of 46.2% on 6,144 chips (arXiv 2204.02311)
beside our bound of a step of its shape there, 82% (`benchmarks/results/plan.md`)."""
RMS = 0.02  # about that of a model's weights, to which Adafactor's learning rates are relative


@dataclass(frozen=True, kw_only=True)
class Plan(PlanOptions):
    """Compile the step that a stage would run for TPUs that are not there; print its memory, work
    and speed limit, and the command that runs it.

    The options are those of the stage. Without --batch, the largest batch that fits is looked for.
    """

    data: Path | None = None
    """Rows of the stage: steps, hours and chip-hours of --epochs over them are printed too."""
    epochs: float = 1.0
    """Passes over --data."""
    search: bool = False
    """Try all meshes and remat policies; print every outcome, and the best that fits."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def run(self) -> None:
        """Print the figures, or those of the best candidate.

        Raises:
            InputError: The rows cannot be read, the stage has no such option, the model is made
                for shorter rows, or nothing fits. With `json` all but the first are printed, and
                the exit status is 2.
        """
        rows = len(scan(self.data, ("prompt",))) if self.data else None
        try:
            self.require_used()
            require_length(self.limits, self.config, self.model)
            figures = best(self, self.log) if self.search else planned(self, self.log)
        except InputError as error:
            if self.json:
                print(json.dumps({"fits": False, "error": str(error)}))
                sys.exit(2)
            raise
        figures |= {"command": self.command_of(figures)}
        if rows:
            figures |= duration(self, figures, rows)
        if self.json:
            print(json.dumps(figures))
        else:
            show(figures)

    def log(self, line: str) -> None:
        """Print a line of the search."""
        if not self.json:
            console.print(f"  {line}", markup=False, highlight=False)

    def command_of(self, figures: dict[str, Any]) -> str:
        """The command that runs the step of the figures."""
        mesh, adapters = figures["mesh"], self.adapter.rank > 0
        rates = rates_for(figures["params"], adapters)
        rate = rates.reward if self.stage == "reward" else rates.policy
        if self.stage != "reward" and self.optimizer.optimizer == "adafactor":
            rate /= RMS
        runtime = replace(self.runtime, remat=figures["remat"], **mesh, processes=0)
        stage = replace(self, runtime=runtime).command(
            self.data or Path("DATA"), batch_size=figures["batch"], epochs=self.epochs,
            learning_rate=float(f"{rate:.3g}"), accumulation=self.accumulation,
        )  # fmt: skip
        return command_line(stage)


def duration(plan: Plan, figures: dict[str, Any], rows: int) -> dict[str, Any]:
    """Steps, hours and chip-hours of a stage over so many rows, at the bound and realistically."""
    passes = plan.epochs if plan.stage in TRAINED else 1.0
    steps = max(1, round(passes * rows / figures["batch"]))
    repeats = {"reward": plan.num_reward_models // figures["reward_models"]}
    repeats["score"] = 1 + plan.distilled
    seconds = steps * repeats.get(plan.stage, 1) * figures["step_seconds_bound"]
    chips = figures["devices"] // chip_of(plan.topology).devices
    hours = {"at the bound": seconds / 3600, "at a realistic share": seconds / 3600 / REALISTIC}
    chip_hours = {name: value * chips for name, value in hours.items()}
    return {"rows": rows, "steps": steps, "hours": hours, "chip_hours": chip_hours}


SUMMARY = """\
{stage} of {model}, {objective}{batch} rows x {tokens} tokens a step, {dtype}, remat {remat}; \
compiled in {compile_seconds:.0f} s
devices     {devices} of {topology} x {slices}; mesh {shape}
parameters  {params_in_billions:.2f}B{adapters}
memory      {fit}
            GiB: {parts}
FLOPs       {model_flops:.3e} a step of the model's own (arithmetic; blocks of attention that the \
mask skips do not count); {compiled_flops:.3e} compiled (attention kernels: arithmetic)
recompute   {recompute_factor:.3f} times the model's own
network     GB a device sends a step (the compiler's): {network}
seconds     each part alone at its peak (arithmetic): {times}
bound       {step_seconds_bound:.3f} s a step by {binding}: MFU at most {mfu_bound:.1%}"""

DURATION = """\
rows        {rows:,}: {steps:,} steps
hours       {bound:.2f} at the bound ({chip_bound:.1f} chip-hours), \
{real:.2f} at {share:.0%} of it ({chip_real:.1f} chip-hours)"""


def show(figures: dict[str, Any]) -> None:
    """Print the figures, as `planned` returns them, for a person."""
    billions = figures["params"] / 1e9
    adapters = figures["adapter_params"]
    lines = SUMMARY.format_map(figures | {
        "objective": f"{figures['method']}, " if figures["stage"] == "align" else "",
        "shape": " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items()),
        "params_in_billions": billions,
        "adapters": f", frozen; {adapters / 1e6:.1f}M of adapters are trained" if adapters else "",
        "fit": memory_text(figures),
        "parts": _listed(figures["hbm_parts"], 2**-30, ".2f"),
        "network": _listed(figures["bytes_moved_per_device"], 1e-9, ".1f"),
        "times": _listed(figures["seconds"], 1.0, ".3f"),
    }).splitlines()
    if "rows" in figures:
        lines += duration_text(figures).splitlines()
    for line in (*lines, "command     " + figures["command"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def duration_text(figures: dict[str, Any]) -> str:
    """The lines about steps and hours."""
    values = {"share": REALISTIC}
    for name, key in (("bound", "at the bound"), ("real", "at a realistic share")):
        values |= {name: figures["hours"][key], f"chip_{name}": figures["chip_hours"][key]}
    return DURATION.format_map(figures | values)


def _listed(values: dict[str, Any], unit: float, digits: str) -> str:
    return ", ".join(f"{name} {value * unit:{digits}}" for name, value in values.items())
