"""`python -m scale.run`: the paper in miniature, end to end; or one of its stages on your own data.

Without a subcommand: `paper`.
"""

# ruff: noqa: E402
from scale.memory import keep_freed_memory

keep_freed_memory()

import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from typing import TypeAlias

import tyro

from scale.console import console
from scale.errors import InputError
from scale.paper.pipeline import PRESETS, Paper
from scale.parallel.processes import join
from scale.plan.command import Plan
from scale.stages.align import Align
from scale.stages.bias import Bias
from scale.stages.bounds import require_bounds
from scale.stages.corpus import Corpus
from scale.stages.evaluate import Evaluate
from scale.stages.export import Export
from scale.stages.pairs import Pairs
from scale.stages.reward import Reward
from scale.stages.sample import Sample
from scale.stages.score import Score
from scale.stages.sft import Sft
from scale.stages.stage import Stage, execute
from scale.stages.sweep import Sweep

Job: TypeAlias = Stage | Plan | Export
STAGES: dict[str, Callable[..., Job]] = {
    stage.__name__.lower(): stage
    for stage in (Paper, Corpus, Sft, Sample, Pairs, Reward, Score, Bias, Align, Sweep, Evaluate, Export, Plan)
}


def parse(argv: Sequence[str]) -> Job:
    """The stage that the command line describes; without a subcommand, `paper`."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["paper", *argv]
    if argv[0] == "paper":
        return tyro.cli(Paper, prog="python -m scale.run paper", default=preset(argv), args=argv[1:])
    return tyro.extras.subcommand_cli_from_dict(STAGES, prog="python -m scale.run", description=__doc__, args=argv)


def preset(argv: Sequence[str]) -> Paper:
    """The defaults of the other options."""
    words = [word for arg in argv for word in arg.split("=", 1)]
    named = [value for flag, value in pairwise(words) if flag == "--preset"]
    return PRESETS.get(named[-1] if named else "miniature", PRESETS["miniature"])


def start(job: Job) -> None:
    require_bounds(job)
    if hasattr(job, "runtime"):
        join(job.runtime)
    if isinstance(job, Stage):
        execute(job)
    else:
        job.run()


def main() -> None:
    stage = parse(sys.argv[1:])
    try:
        start(stage)
    except (InputError, FloatingPointError, BrokenProcessPool, OSError) as error:
        console.quiet = False  # whichever of several processes it is
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if isinstance(stage, Stage):
            console.print(f"stopped; the same command goes on from {stage.out}", markup=False, soft_wrap=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
