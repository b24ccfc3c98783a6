"""Align language models: the paper in miniature, or one stage on your own data and model.

`python -m scale.run` alone is `paper`. `scale/README.md` explains the stages.
"""

# ruff: noqa: E402
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it imports, Ctrl-C ends it silently

from scale.memory import keep_freed_memory

keep_freed_memory()

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from io import TextIOWrapper
from itertools import pairwise
from types import FrameType
from typing import Any, NoReturn

import jax
import tyro

from scale.console import console
from scale.errors import InputError, one_line
from scale.paper.pipeline import PRESETS, Paper
from scale.parallel.processes import join
from scale.parallel.programs import keep_programs
from scale.plan.command import Plan
from scale.plan.options import RECIPES
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
from scale.tune.command import Tune

PROG = "python -m scale.run"
FULL = "RESOURCE_EXHAUSTED"  # in JAX's errors
SMALLER = (
    "what helps: shorter --limits, --training.accumulation, --runtime.remat full, --runtime.dtype "
    "bfloat16, a smaller batch"
)
COMMANDS: dict[str, Any] = {
    "tune": Tune,
    "paper": Paper,
    "corpus": Corpus,
    "sft": Sft,
    "sample": Sample,
    "pairs": Pairs,
    "reward": Reward,
    "score": Score,
    "bias": Bias,
    "align": Align,
    "sweep": Sweep,
    "evaluate": Evaluate,
    "export": Export,
    "plan": Plan,
}


def parse(argv: Sequence[str]) -> Any:
    """The command with its options; `paper` where none is named."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["paper", *argv]
    if default := {"paper": preset, "plan": recipe}.get(argv[0]):  # it depends on an option
        command, prog = COMMANDS[argv[0]], f"{PROG} {argv[0]}"
        return tyro.cli(command, prog=prog, default=default(argv), args=argv[1:])
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog=PROG, description=__doc__, args=argv
    )


def preset(argv: Sequence[str]) -> Paper:
    """The preset that the arguments name, or the first one."""
    return PRESETS.get(named(argv, "--preset"), PRESETS["miniature"])


def recipe(argv: Sequence[str]) -> Plan:
    """`plan` with what the recipe that the arguments name, if any, has instead of defaults."""
    return Plan(**RECIPES.get(named(argv, "--recipe"), {}))


def named(argv: Sequence[str], option: str) -> str:
    """The last value of an option, or nothing."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    return next((value for value, name in pairwise(words[::-1]) if name == option), "")


def start(command: Any) -> None:
    require_bounds(command)
    if hasattr(command, "runtime"):
        join(command.runtime)
    if isinstance(command, Stage):
        execute(command)
    else:
        command.run()


def main() -> None:
    if isinstance(sys.stdout, TextIOWrapper):  # a name that the console cannot write is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    command = parse(sys.argv[1:])
    keep_programs()
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):  # before, they just end it
            signal.signal(number, interrupt)
        start(command)
    except (InputError, FloatingPointError, MemoryError, BrokenProcessPool, OSError) as error:
        stop(str(error))
    except jax.errors.JaxRuntimeError as error:
        if FULL not in str(error):
            raise
        stop(f"the devices have too little memory ({str(error).splitlines()[0]}); {SMALLER}")
    except KeyboardInterrupt:
        if isinstance(command, Stage):
            message = f"stopped; the same command resumes {command.out}"
            console.print(message, markup=False)
        sys.exit(130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; a moment later where JAX's callback of the garbage collector runs,
    in which Python ignores errors."""
    if frame is not None and "gc_callback" in frame.f_code.co_name:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        raise KeyboardInterrupt


def stop(message: str) -> NoReturn:
    console.quiet = False  # also in a process that does not print otherwise
    console.print(f"error: {one_line(message)}", style="bold red", markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
