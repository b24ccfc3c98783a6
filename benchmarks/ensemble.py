"""`python -m benchmarks.ensemble`: the cost of five reward models beside that of one.

SmolLM2-135M and pairs of random words, in batches of 4. `reward` trains one reward model or five;
`align` trains a policy by dpo, or by e-dpo with the columns of one or five reward models. Seconds
of a step and the peak memory are of a process for each case; its first step, which compiles, is
left out. Five reward models without adapters are trained in turn, each as one alone is.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tyro

from benchmarks.machine import describe
from scale.data.dataset import Limits, limits_text
from scale.data.rows import write
from scale.files import write_text
from scale.io.model_folder import identity
from scale.model.adapters import AdapterConfig
from scale.stages.align import Align
from scale.stages.reward import Reward
from scale.stages.stage import execute
from scale.train.loop import TrainingConfig
from scale.train.metrics import logged

RESULTS = Path(__file__).parent / "results"
LIMITS, ROWS, STEPS = Limits(112, 48), 64, 3
WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with")
CASES = [
    (stage, models, rank) for rank in (0, 16) for stage in ("reward", "align") for models in (1, 5)
] + [("dpo", 0, rank) for rank in (0, 16)]


def made_rows(models: int) -> list[dict]:
    """Pairs of random words with random columns."""
    rng = np.random.default_rng(0)

    def text(n: int) -> str:
        return " ".join(rng.choice(WORDS, n))

    return [
        {
            "prompt": f"{text(40)} {i}", "chosen": text(25), "rejected": text(25),
            "ref_sample": text(25), "score_chosen": rng.normal(size=models).tolist(),
            "score_rejected": rng.normal(size=models).tolist(), "ref_chosen_logps": -90.0,
            "ref_rejected_logps": -90.0, "ref_sample_logps": -90.0,
        }
        for i in range(ROWS)
    ]  # fmt: skip


def run_case(stage: str, models: int, rank: int, folder: Path) -> dict[str, float | None]:
    """Seconds of a step, and GiB at the peak, of a case in this process.

    Reward models that are trained in turn leave no log of their steps, so no seconds.
    """
    policy, data = Path("smollm2"), folder / "rows.parquet"
    hashes = dict.fromkeys(("model", "tokenizer"), identity(policy))
    write(data, made_rows(max(models, 1)), hashes | {"--limits": limits_text(LIMITS)})
    training, adapter = TrainingConfig(STEPS, 4, 1e-5, 1), AdapterConfig(rank)
    if stage == "reward":
        execute(
            Reward(
                out=folder / "out", data=data, init=policy, validation=data, limits=LIMITS,
                num_reward_models=models, training=training, adapter=adapter,
            )
        )  # fmt: skip
    else:
        method = "dpo" if stage == "dpo" else "e-dpo"
        execute(
            Align(
                out=folder / "out", data=data, policy=policy, method=method, limits=LIMITS,
                training=training, adapter=adapter,
            )
        )  # fmt: skip
    logs = sorted((folder / "out").rglob("metrics.jsonl"))
    rates = [logged(log)[-1] for log in logs]
    seconds = sum(np.sum(r["tokens"]) / r["tokens_per_second"] for r in rates)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": float(seconds) if logs else None, "gib": peak}


def in_new_process(stage: str, models: int, rank: int) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory() as folder:
        case = [stage, str(models), str(rank), folder]
        command = [sys.executable, "-m", "benchmarks.ensemble", "--case", *case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(case: tuple[str, int, int, Path] | None = None, json_: bool = False) -> None:
    """Measure all cases, or one of them in this process.

    Args:
        case: Stage, reward models, rank and a folder: one case in this process.
        json_: Print one JSON object.
    """
    if case:
        print(json.dumps(run_case(*case)))
        return
    measured = {each: in_new_process(*each) for each in CASES}
    if json_:
        print(json.dumps({" ".join(map(str, each)): values for each, values in measured.items()}))
        return
    lines = [
        f"`python -m benchmarks.ensemble`\n\n{describe()}\n",
        "| stage | reward models | rank of adapters | s a step | GiB at the peak |",
        "|---" * 5 + "|",
    ]
    for (stage, models, rank), values in measured.items():
        names = stage if stage == "reward" else f"align, {'dpo' if stage == 'dpo' else 'e-dpo'}"
        seconds, gib = values["seconds"], values["gib"]
        time = "in turn" if seconds is None else f"{seconds:.2f}"
        lines.append(f"| {names} | {models} | {rank or 'none'} | {time} | {gib:.2f} |")
    write_text(RESULTS / "ensemble.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
