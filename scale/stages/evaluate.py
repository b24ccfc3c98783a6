"""`evaluate`: policies against pi_ref on held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.dataset import Limits
from scale.data.rows import read, write
from scale.errors import InputError
from scale.io import model_folder
from scale.io.model_folder import ModelFolder
from scale.model.inference import generate, sequence_logps
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.judge import Judge, load_judge
from scale.stages.stage import Stage
from scale.statistics import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Compare samples of policies with samples of pi_ref under a judge.

    `rows.parquet` has a row for each policy (its place in --policies) and prompt: mean reward, mean
    reward of pi_ref, shares of wins, ties and losses, KL, tokens, the samples and those of pi_ref.
    """

    data: Path
    """Rows with `prompt`."""
    policies: tuple[Path, ...]
    """The policies: folders of ours or of Hugging Face's, .gguf files, or smollm2."""
    reference: Path
    """pi_ref: a folder of ours or of Hugging Face's, a .gguf file, or smollm2."""
    rewards: Path
    """The judge: a folder of reward models that no policy distilled (their mean reward), or
    `village` for the true reward of its summaries."""
    n: int = 2
    """Samples of each prompt."""
    seed: int = 0
    """Seed of the samples."""
    limits: Limits = field(default_factory=Limits)
    """Length limits; `response` is the most tokens of a sample (its text may encode to more)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def run(self) -> dict[str, Any]:
        if not self.policies:
            raise InputError("--policies: name at least one folder")
        runtime = make_runtime(self.runtime)
        reference = model_folder.load_policy(self.reference, runtime)
        judge = load_judge(self.rewards, runtime)
        prompts = read(self.data, need=("prompt",))
        judge.check_prompts(prompts, str(self.data))
        baseline = self.outcomes(reference, reference, judge, prompts, self.seed)
        tables = []
        for i, path in enumerate(self.policies):
            policy = model_folder.load_policy(path, runtime)
            outcomes = self.outcomes(policy, reference, judge, prompts, self.seed + 1)
            tables.append(per_prompt(i, outcomes, baseline))
        write(self.out / "rows.parquet", [row for table in tables for row in table], {})
        return {"policies": [summary(table) for table in tables]}

    def outcomes(
        self,
        policy: ModelFolder,
        reference: ModelFolder,
        judge: Judge,
        rows: list[dict],
        seed: int,
    ) -> dict[str, Any]:
        """Rewards, KLs and lengths of samples [N, n] for the N kept prompts, and the texts."""
        dataset = policy.make_dataset(rows, [], self.limits, str(self.data))
        samples = generate(
            policy.model, policy.tokenizer, dataset, n=self.n, max_new_tokens=self.limits.response,
            seed=seed, temperature=1.0, label=f"sample {policy.path.name}",
        )  # fmt: skip
        fields = [f"sample_{i}" for i in range(self.n)]
        sampled = []
        for row, drawn in zip(dataset.select(rows), samples, strict=True):
            named = dict(zip(fields, drawn, strict=True))
            texts = {name: sample.text for name, sample in named.items()}
            complete = {f"{name}_complete": sample.complete for name, sample in named.items()}
            sampled.append(row | texts | complete)
        own, ref = (
            folder.make_dataset(sampled, fields, self.limits).all.inputs
            for folder in (policy, reference)
        )
        _, values = judge.rewards(sampled, fields, self.limits)
        tokens = [(own.response_ids == i).sum(1) for i in range(self.n)]
        return {
            "prompts": dataset.select(rows),
            "texts": [[row[name] for name in fields] for row in sampled],
            "tokens": np.stack(tokens, axis=1),
            "rewards": values.mean(-1),
            "kl": sequence_logps(policy.model, own) - sequence_logps(reference.model, ref),
        }


def per_prompt(
    policy: int, outcomes: dict[str, Any], baseline: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one policy; `baseline` are the outcomes of pi_ref."""
    ours, theirs = outcomes["rewards"], baseline["rewards"]
    columns = {
        "reward": ours.mean(1),
        "reference_reward": theirs.mean(1),
        "win": (ours > theirs).mean(1),
        "tie": (ours == theirs).mean(1),
        "loss": (ours < theirs).mean(1),
        "kl": outcomes["kl"].mean(1),
        "tokens": outcomes["tokens"].mean(1),
    }
    table = np.stack(list(columns.values()), axis=1).astype(float).tolist()
    texts = zip(outcomes["prompts"], outcomes["texts"], baseline["texts"], strict=True)
    return [
        {"policy": policy, "prompt": row["prompt"], "samples": own, "reference_samples": ref}
        | dict(zip(columns, values, strict=True))
        for (row, own, ref), values in zip(texts, table, strict=True)
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over prompts; the advantage (reward minus pi_ref's) with its bootstrap interval."""
    names = ("win", "tie", "loss", "kl", "tokens")
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    differences = np.array([row["reward"] - row["reference_reward"] for row in rows])
    low, high = bootstrap_interval(differences)
    return {"advantage": float(differences.mean()), "low": low, "high": high} | means
