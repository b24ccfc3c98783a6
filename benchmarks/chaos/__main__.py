"""`python -m benchmarks.chaos`: the default run in small and `tune --quick`, hurt on purpose.

Each is killed (`kill -9`, SIGTERM, Ctrl-C; workers too) at random moments of its stages, and the
same command started again until it ends: its files must be those of an undisturbed run byte for
byte, no process and no temporary file may be left, and no complete stage may run again.

`kills` of which `resumed_equal`; `faults` are disks, clocks and inputs that fail; `lost` are runs
that did not come back as they must. The results are in `results/reliability.md`.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.chaos.faults import FAULTS, faults
from benchmarks.chaos.kills import Tally, Undisturbed, kill
from benchmarks.chaos.runs import prepare
from scale.console import console

KEYS = ("kills", "resumed_equal", "faults", "tracebacks", "lost")
AT_ONCE = 5  # kills of one run, at most


@dataclass(frozen=True)
class Options:
    """What is done."""

    kills: int = 100
    """Kills over both commands."""
    faults: tuple[str, ...] = tuple(FAULTS)
    """Which disks, clocks and inputs fail too."""
    seed: int = 0
    """Of the moments and the ways."""
    commands: tuple[Literal["tune", "paper"], ...] = ("tune", "paper")
    """Which of the two."""
    home: Path | None = None
    """Where the undisturbed runs are kept, for the next call with other seeds. Default: nowhere."""
    json: bool = False
    """Print JSON alone at the end."""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console.quiet = True
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        home = options.home or Path(folder)
        if not (home / "model").exists():
            home.mkdir(exist_ok=True)
            prepare(home)
        whole: dict[str, Undisturbed] = {}
        for name in options.commands:
            whole[name] = Undisturbed.of(home, name)
            print(f"{name}: {len(whole[name].stages)} stages, {whole[name].seconds:.0f} s")
        seed = options.seed
        while tally.kills < options.kills:
            name = options.commands[seed % len(options.commands)]
            most = min(AT_ONCE, options.kills - tally.kills)
            kill(home, name, whole[name], seed, most, tally)
            print(f"{name}-{seed}: {tally.kills} kills, {tally.resumed_equal} resumed equal")
            seed += 1
        faults(home, whole, tally, options.seed, options.faults)
    result = {key: getattr(tally, key) for key in KEYS}
    print(json.dumps(result) if options.json else ", ".join(f"{k} {v}" for k, v in result.items()))


if __name__ == "__main__":
    main()
