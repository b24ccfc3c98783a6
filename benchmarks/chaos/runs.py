"""Two small runs as processes, and what must be equal between two of them."""

import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.dataset import Limits
from scale.files import LOGS
from scale.model.config import ModelConfig
from scale.stages.sft import Sft
from scale.stages.stage import SCRATCH, execute
from scale.train.loop import TrainingConfig
from scale.train.metrics import WALL_CLOCK

ROOT = Path(__file__).parents[2]
OUT = "out"  # of every run, in a folder of its own: names in reports are equal
MARK = "MINIPREF_CHAOS"  # an environment variable that all processes of a run have
SECONDS = 300.0  # for a run
PAPER = shlex.split("""
    --pages 300 --seeds 1 --rhos 0.5 --methods dpo e-dpo --pairs 24 --length-biases 0.4 0.6
    --samples 2 --betas 0.1 --learning-rates 0.01 --snapshots 1 --most-kl 1e9
    --model.vocab-size 400 --model.d-model 32 --model.num-heads 2 --model.num-kv-heads 1
    --model.head-dim 16 --model.d-ff 64 --sft.steps 120 --sft.batch-size 32
    --sft.learning-rate 0.02 --reward.steps 8 --reward.batch-size 8 --align.steps 12
    --align.batch-size 8
""")
TUNE = shlex.split("tune --data prefs.jsonl --model model --quick --method e-dpo")
COMMANDS = {"paper": PAPER, "tune": TUNE}
LLAMA = ModelConfig(
    vocab_size=300, num_layers=1, d_model=16, num_heads=2, head_dim=8, d_ff=16, block="sequential",
    norm="rms", scaled_logits=False,
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Write the rows and the model that `tune` reads."""
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(rng.choice(["alpha", "beta", "gamma", "delta"], n))

    rows = [
        {"prompt": f"{text(2)} {i}", "chosen": text(2 + i % 2), "rejected": text(4)}
        for i in range(80)
    ]
    data = folder / "prefs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = TrainingConfig(80, 8, 3e-2, 5)
    execute(Sft(out=folder / "model", data=data, model=LLAMA, limits=Limits(24, 12),
                training=training))  # fmt: skip


@dataclass
class Run:
    """A command in a folder, which may be started several times."""

    name: str
    folder: Path
    home: Path
    """Where the caches are that all runs have in common."""
    environment: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def out(self) -> Path:
        return self.folder / OUT

    def start(self, **environment: str) -> subprocess.Popen[str]:
        """Start the command; its output is one text, and its processes are a group."""
        fixed = {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), MARK: self.mark,
            "JAX_COMPILATION_CACHE_DIR": str(self.home / "programs"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "scale.run", *COMMANDS[self.name], "--out", OUT],
            cwd=self.folder, env=os.environ | fixed | self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def finish(self, **environment: str) -> tuple[int, str]:
        """Run the command to its end: exit code and output."""
        return ended(self.start(**environment))

    def processes(self) -> list[int]:
        """The processes of this run, workers included."""
        return [pid for pid in pids() if f"{MARK}={self.mark}" in read(pid, "environ").split("\0")]

    def workers(self) -> list[int]:
        return [pid for pid in self.processes() if "spawn_main" in read(pid, "cmdline")]

    def records(self) -> dict[str, dict[str, Any]]:
        """What each stage recorded that began, in the order in which they began."""
        files = sorted(self.out.rglob("stage.json"), key=lambda file: file.stat().st_ctime_ns)
        found = {}
        for file in files:
            text = file.read_text()  # written whole or not at all
            found[str(file.parent.relative_to(self.out))] = json.loads(text)
        return found

    def complete(self) -> dict[str, int]:
        """The stages that are complete, with the time at which each became so."""
        return {
            name: (self.out / name / "stage.json").stat().st_mtime_ns
            for name, record in self.records().items()
            if "findings" in record
        }


def ended(process: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Exit code and output; a process that hangs is ended, and says so."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + f"\nTraceback: no end within {seconds:g} s"
    return process.returncode, output


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def read(pid: int, name: str) -> str:
    """A file of a process; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """The first true value of a condition, or its last one."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def contents(out: Path) -> dict[str, bytes]:
    """What is promised byte for byte: all files but logs, and of these the metrics."""
    files = {file.relative_to(out).as_posix(): file for file in out.rglob("*") if file.is_file()}
    kept = {n: f for n, f in files.items() if LOGS.isdisjoint(Path(n).parts)}
    metrics = {n: f for n, f in files.items() if n.endswith("metrics.jsonl")}
    return {n: f.read_bytes() for n, f in kept.items()} | {
        n: b"".join(without_clock(f)) for n, f in metrics.items()
    }


def without_clock(file: Path) -> Iterator[bytes]:
    for line in file.read_text().splitlines():
        record = json.loads(line)
        kept = {name: value for name, value in record.items() if name not in WALL_CLOCK}
        yield json.dumps(kept).encode() + b"\n"


def differences(out: Path, expected: dict[str, bytes]) -> list[str]:
    """Files that differ from those expected, and what should not be there."""
    found = contents(out)
    names = sorted(found.keys() ^ expected.keys())
    names += [name for name in found if found[name] != expected.get(name, found[name])]
    paths = [path.relative_to(out) for path in out.rglob("*")]
    left = [p for p in paths if p.name.startswith(".") or "-tmp" in p.name or p.name in SCRATCH]
    return [f"{name}: differs" for name in names] + [f"{path}: is left" for path in left]
