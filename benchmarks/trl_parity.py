"""`python -m benchmarks.trl_parity`: DPO of SmolLM2 in TRL and here, from one file of preferences.

Two questions. *The same numbers?* Both take `--steps` steps with the same model, rows in the same
order, Adam and loss, each with its own tokenization of the chat rows: losses and margins of every
step, and the log-probabilities of the rows under both final models (both read by us). *What does a
user do, and wait for?* The commands from the file to an aligned Hugging Face folder, their options,
seconds and peak memory; TRL's is its own command line, `trl dpo`.

Extra `peers`. The results go to `results/trl_parity.md`.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.machine import describe
from scale.data.dataset import Limits
from scale.data.formats import SIDES
from scale.data.rows import Row, read
from scale.files import write_json, write_text
from scale.io import model_folder
from scale.model.inference import sequence_logps
from scale.stages.align import Align
from scale.stages.command_line import command_line
from scale.stages.export import Export
from scale.stages.score import Score
from scale.train.batches import row_order
from scale.train.loop import TrainingConfig
from scale.train.metrics import logged

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-3
METRICS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected")
TEMPLATE = (
    "{% for turn in messages %}{{ '\\n' if not loop.first }}<|im_start|>{{ turn['role'] }}\n"
    "{{ turn['content'] }}<|im_end|>{% endfor %}"
    "{{ '\\n<|im_start|>assistant\\n' if add_generation_prompt }}"
)
"""ChatML with the newline before a turn, not after it: TRL counts all that a template writes after
the prompt as the response, and we stop at the token that ends the turn."""


@dataclass(frozen=True)
class Parity:
    """What is compared."""

    data: Path
    """Chat rows: `prompt` as turns, or texts that a user says."""
    model: Path = Path("smollm2")
    """The model."""
    steps: int = 20
    """Steps of both."""
    batch_size: int = 4
    """Pairs of a step."""
    learning_rate: float = 1e-6
    """Constant."""
    limits: Limits = field(default_factory=lambda: Limits(128, 64))
    """Longer rows are left out."""
    out: Path = Path("runs/trl_parity")
    """Folder of both runs: the same command goes on after the last finished one."""

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            self.steps, self.batch_size, self.learning_rate, warmup=0, end_lr_ratio=1.0
        )


def prepare(work: Parity, folder: Path) -> list[Row]:
    """`model/`, `rows.jsonl` and, in the order of our steps, `ordered/`; returns the rows.

    TRL reads the rows of a step one after another; ours is drawn by the seed.
    """
    if not (folder / "model").exists():
        Export(policy=work.model, out=folder / "model").run()
    (folder / "model/chat_template.jinja").write_text(TEMPLATE)
    policy = model_folder.load_policy(folder / "model")
    rows = [turns(row) for row in read(work.data)]
    dataset = policy.make_dataset(rows, SIDES, work.limits)
    rows = dataset.select(rows)[: work.steps * work.batch_size]
    tokens = dataset.tokens.lengths.sum(1)[: len(rows)]
    order = row_order(tokens, work.training, 0, num_sequences=1).ravel()
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "ordered/train.jsonl", [conversational(rows[i]) for i in order])
    return rows


def turns(row: Row) -> Row:
    """The row with its prompt as turns: TRL applies the chat template to these alone."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt} | {side: row[side] for side in SIDES}


def conversational(row: Row) -> Row:
    """The row with its responses as turns, as TRL reads them."""
    replies = {side: [{"role": "assistant", "content": row[side]}] for side in SIDES}
    return {"prompt": row["prompt"]} | replies


def write_lines(path: Path, rows: list[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def our_stages(work: Parity, folder: Path) -> list[Any]:
    """Reference log-probabilities, DPO, and a Hugging Face folder."""
    ours, model = folder / "ours", folder / "model"
    return [
        Score(
            out=ours / "scored", data=folder / "rows.jsonl", reference=model, method="dpo",
            limits=work.limits,
        ),
        Align(
            out=ours / "policy", data=ours / "scored/rows.parquet", policy=model, method="dpo",
            training=work.training, limits=work.limits,
        ),
        Export(policy=ours / "policy", out=ours / "hf"),
    ]  # fmt: skip


def trl_command(work: Parity, folder: Path) -> str:
    """TRL's own command, with the options that make it the same run."""
    options = {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "ordered",
        "dataset_train_split": "train",
        "output_dir": folder / "trl",
        "per_device_train_batch_size": work.batch_size,
        "max_steps": work.steps,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.99,
        "beta": 0.1,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": "false",
        "dtype": "float32",
        "bf16": "false",
        "use_cpu": "true",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": work.steps,
        "save_only_model": "true",
        "report_to": "none",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["trl", "dpo", *words])


@dataclass(frozen=True)
class Timed:
    """A command that ran."""

    command: str
    seconds: float
    gib: float

    @property
    def options(self) -> int:
        return sum(word.startswith("--") for word in shlex.split(self.command))


def timed(command: str, kept: Path) -> Timed:
    """Run a command in a process of its own; what it took is kept in a file."""
    if kept.exists():
        return Timed(**json.loads(kept.read_text(encoding="utf-8")))
    words = shlex.split(command)
    program = [sys.executable, *words[1:]] if words[0] == "python" else words
    start = time.perf_counter()
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}  # `trl dpo` takes one thread otherwise
    process = subprocess.Popen(program, env=os.environ | {"JAX_PLATFORMS": "cpu"} | threads)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"exit status {status}: {command}")
    result = Timed(command, time.perf_counter() - start, usage.ru_maxrss / 2**20)
    write_json(kept, asdict(result))
    return result


def final_logps(folder: Path, rows: list[Row], limits: Limits) -> np.ndarray:
    """log pi of chosen and rejected [N, 2] under a Hugging Face folder, read by us."""
    policy = model_folder.load_policy(folder)
    return sequence_logps(policy.model, policy.make_dataset(rows, SIDES, limits))


def run(work: Parity, folder: Path) -> str:
    """Both runs, and the page about them."""
    rows = prepare(work, folder)
    stages = our_stages(work, folder)
    ours = [timed(command_line(stage), folder / f"{stage.out.name}.json") for stage in stages]
    theirs = timed(trl_command(work, folder), folder / "trl.json")
    records = [r for r in logged(folder / "ours/policy/metrics.jsonl") if "loss" in r]
    state = folder / f"trl/checkpoint-{work.steps}/trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    steps = [record for record in history if "loss" in record]
    pairs = {name: np.array([[o[name], t[name]] for o, t in zip(records, steps, strict=True)])
             for name in METRICS}  # fmt: skip
    after = [final_logps(path, rows, work.limits) for path in (folder / "ours/hf", folder / "trl")]
    before = final_logps(folder / "model", rows, work.limits)
    return page(work, ours, theirs, pairs, before, after)


def page(
    work: Parity,
    ours: list[Timed],
    theirs: Timed,
    pairs: dict[str, np.ndarray],
    before: np.ndarray,
    after: list[np.ndarray],
) -> str:
    differences = {name: float(np.abs(values[:, 0] - values[:, 1]).max())
                   for name, values in pairs.items()}  # fmt: skip
    differences["log-probabilities after training"] = float(np.abs(after[0] - after[1]).max())
    moved = float(np.abs(after[0] - before).max())
    lines = [
        "# DPO in TRL and here, from one file",
        "",
        f"{describe()}. `python -m benchmarks.trl_parity --data FILE`: {work.steps} steps of "
        f"{work.batch_size} pairs, learning rate {work.learning_rate:g}, float32.",
        "",
        f"| over all steps or rows | largest difference | within {TOLERANCE:g} |",
        "|---|---|---|",
        *(
            f"| {name} | {value:.2e} | {'yes' if value <= TOLERANCE else 'NO'} |"
            for name, value in differences.items()
        ),
        "",
        f"Training moved a log-probability by up to {moved:.3f} nats. First and last loss: "
        f"{pairs['loss'][0, 0]:.6f} and {pairs['loss'][-1, 0]:.6f} here, "
        f"{pairs['loss'][0, 1]:.6f} and {pairs['loss'][-1, 1]:.6f} in TRL.",
        "",
        "| | commands | options | seconds | peak GiB |",
        "|---|---|---|---|---|",
        row_of("minipref", ours),
        row_of("TRL", [theirs]),
        "",
        "```",
        *(shortened(run.command) for run in (*ours, theirs)),
        "```",
    ]
    return "\n".join(lines) + "\n"


def row_of(name: str, runs: list[Timed]) -> str:
    seconds, options = sum(run.seconds for run in runs), sum(run.options for run in runs)
    most = max(run.gib for run in runs)
    return f"| {name} | {len(runs)} | {options} | {seconds:.0f} | {most:.2f} |"


def shortened(command: str) -> str:
    """The command without the folder in which it ran."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in command.split())


def main(work: Parity) -> None:
    text = run(work, work.out.absolute())
    print(text)
    (RESULTS / "trl_parity.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Parity, description=__doc__))
