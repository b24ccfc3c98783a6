"""`evaluate`: policies against pi_ref on held-out prompts."""

import json
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from scale.console import console
from scale.data.dataset import Dataset, Limits
from scale.data.rows import read, write
from scale.errors import InputError
from scale.health import as_findings, sample_signs
from scale.io import model_folder
from scale.io.model_folder import ModelFolder
from scale.model.inference import generate, sequence_logps
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.chat_judge import ChatJudge
from scale.stages.judge import Judge, load_judge
from scale.stages.stage import TOKENS, Stage
from scale.statistics import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Compare samples of policies with samples of pi_ref under one judge or two.

    `rows.parquet` has a row for each policy (its place in --policies) and prompt: mean reward, mean
    reward of pi_ref, shares of wins, ties and losses (these with --rewards), KL, and of the samples
    and those of pi_ref their texts, tokens and the share that was cut at the limit.
    """

    data: Path
    """Rows with `prompt`."""
    policies: tuple[Path, ...]
    """The policies: folders of ours, Hugging Face folders, ids of its hub, .gguf files, smollm2."""
    reference: Path
    """pi_ref: a folder of ours, a Hugging Face folder, an id of its hub, a .gguf file, smollm2."""
    rewards: Path | None = None
    """A judge by numbers: a folder of reward models that no policy distilled (their mean reward),
    or `village` for the true reward of its summaries."""
    judge: str | None = None
    """A judge of pairs, as in section 6.3: the URL of an OpenAI-compatible endpoint, such as
    http://localhost:8000/v1 (extra `judge`; the key is that of OPENAI_API_KEY). It compares first
    samples, each pair in both orders."""
    judge_model: str | None = None
    """The name of the model at --judge."""
    baseline: Path | None = None
    """One of --policies, for instance DPO's: --judge compares the others with it, too."""
    n: int = 2
    """Samples of each prompt."""
    seed: int = 0
    """Seed of the samples."""
    limits: Limits = field(default_factory=Limits)
    """Length limits; `response` is the most tokens of a sample (its text may encode to more)."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def run(self) -> dict[str, Any]:
        chat = self.check()
        runtime = make_runtime(self.runtime)
        reference = model_folder.load_policy(self.reference, runtime)
        judge = load_judge(self.rewards, runtime) if self.rewards else None
        prompts = read(self.data, need=("prompt",))
        if judge:
            judge.check_prompts(prompts, str(self.data))
        dataset = self.dataset(reference, prompts)
        prompts = dataset.select(prompts)
        baseline = self.outcomes(reference, judge, prompts, dataset, self.seed, "reference")
        tables: list[list[dict[str, Any]]] = []
        warnings: list[str] = []
        for i, path in enumerate(self.policies):
            policy = model_folder.load_policy(path, runtime)
            dataset = self.dataset(policy, prompts)
            require_all(prompts, dataset.kept, path)
            outcomes = self.outcomes(policy, judge, prompts, dataset, self.seed + 1, str(i))
            outcomes["kl"] = self.kls(policy, reference, outcomes)
            tables.append(per_prompt(i, outcomes, baseline))
            signs = sample_signs(path.name, outcomes["ids"], baseline["ids"])
            warnings += signs.values()
        write(self.out / "rows.parquet", [row for table in tables for row in table], {})
        findings: dict[str, Any] = {"policies": [summary(table) for table in tables]}
        if chat:
            findings["judged pairs"] = self.judged(chat, tables)
        return findings | as_findings(warnings)

    def check(self) -> ChatJudge | None:
        """The judge of pairs, if there is one, which answers; refuse options that do not fit."""
        if not self.policies:
            raise InputError("--policies: name at least one folder")
        if not (self.rewards or self.judge):
            raise InputError("evaluate needs --rewards, --judge or both")
        if bool(self.judge) != bool(self.judge_model):
            raise InputError("--judge and --judge-model: name both")
        if self.baseline and (self.baseline not in self.policies or not self.judge):
            raise InputError("--baseline: it is one of --policies, for --judge")
        if not (self.judge and self.judge_model):
            return None
        if jax.process_count() > 1:
            raise InputError("--judge: with one process; several would each ask all questions")
        chat = ChatJudge(self.judge, self.judge_model, self.out / "judge.jsonl")
        chat.check()
        return chat

    def judged(
        self, chat: ChatJudge, tables: list[list[dict[str, Any]]]
    ) -> dict[str, dict[str, Any]]:
        """What the judge of pairs says: each policy against pi_ref, and against the baseline."""
        verdicts = {}
        by_path = dict(zip(self.policies, tables, strict=True))
        for path, rows in by_path.items():
            prompts, own = [row["prompt"] for row in rows], first(rows, "samples")
            theirs = {"pi_ref": first(rows, "reference_samples")}
            if self.baseline and path != self.baseline:
                theirs[str(self.baseline)] = first(by_path[self.baseline], "samples")
            for name, others in theirs.items():
                verdicts[f"{path} against {name}"] = chat.compare(prompts, own, others)
        console.print(table_of(verdicts))
        return verdicts

    def dataset(self, policy: ModelFolder, rows: list[dict]) -> Dataset:
        """The prompts within the limits, in tokens of a policy."""
        source = f"{self.data}, in tokens of {policy.path}"
        return policy.make_dataset(rows, [], self.limits, source)

    def outcomes(
        self,
        policy: ModelFolder,
        judge: Judge | None,
        rows: list[dict],
        dataset: Dataset,
        seed: int,
        name: str,
    ) -> dict[str, Any]:
        """Lengths and rewards of samples [N, n] for N prompts, and the samples."""
        samples = generate(
            policy.model, policy.tokenizer, dataset, n=self.n, max_new_tokens=self.limits.response,
            seed=seed, temperature=1.0, label=f"sample {policy.path.name}",
            cache=self.out / TOKENS / name,
        )  # fmt: skip
        sampled = []
        for row, drawn in zip(rows, samples, strict=True):
            named = dict(zip(self.fields, drawn, strict=True))
            texts = {name: sample.text for name, sample in named.items()}
            complete = {f"{name}_complete": sample.complete for name, sample in named.items()}
            sampled.append(row | texts | complete)
        own = policy.make_dataset(sampled, self.fields, self.limits)
        rewards = None
        if judge:
            judged, values = judge.rewards(sampled, self.fields, self.limits)
            require_all(rows, judged, self.rewards)
            rewards = values.mean(-1)
        return {
            "sampled": sampled,
            "dataset": own,
            "texts": [[row[name] for name in self.fields] for row in sampled],
            "tokens": own.tokens.lengths[:, 1:],
            "cut": np.array([[not sample.complete for sample in drawn] for drawn in samples]),
            "ids": [sample.ids for drawn in samples for sample in drawn],
            "rewards": rewards,
        }

    @property
    def fields(self) -> list[str]:
        """The columns of the samples."""
        return [f"sample_{i}" for i in range(self.n)]

    def kls(
        self, policy: ModelFolder, reference: ModelFolder, outcomes: dict[str, Any]
    ) -> np.ndarray:
        """log pi - log pi_ref of the samples of a policy [N, n]."""
        theirs = reference.make_dataset(outcomes["sampled"], self.fields, self.limits)
        own_logps = sequence_logps(policy.model, outcomes["dataset"])
        return own_logps - sequence_logps(reference.model, theirs)


def require_all(rows: Sized, kept: Sized, path: Path | None) -> None:
    """Refuse a model whose own tokens make some prompts too long that pi_ref's do not."""
    if len(kept) < len(rows):
        raise InputError(
            f"{path}: {len(rows) - len(kept)} of {len(rows)} prompts are over --limits.prompt in "
            "its tokens, but not in pi_ref's: raise it, or cut prompts by --limits.truncation-side"
        )


def per_prompt(
    policy: int, outcomes: dict[str, Any], baseline: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one policy; `baseline` are the outcomes of pi_ref."""
    columns = {"kl": outcomes["kl"].mean(1)}
    for name in ("tokens", "cut"):
        columns |= {name: outcomes[name].mean(1), f"reference_{name}": baseline[name].mean(1)}
    ours, theirs = outcomes["rewards"], baseline["rewards"]
    if ours is not None:
        columns |= {
            "reward": ours.mean(1),
            "reference_reward": theirs.mean(1),
            "win": (ours > theirs).mean(1),
            "tie": (ours == theirs).mean(1),
            "loss": (ours < theirs).mean(1),
        }
    table = np.stack(list(columns.values()), axis=1).astype(float).tolist()
    texts = zip(outcomes["sampled"], outcomes["texts"], baseline["texts"], strict=True)
    return [
        {"policy": policy, "prompt": row["prompt"], "samples": own, "reference_samples": ref}
        | dict(zip(columns, values, strict=True))
        for (row, own, ref), values in zip(texts, table, strict=True)
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over rows; the advantage (reward minus pi_ref's) is the mean over prompts, with the
    bootstrap's interval: rows of one prompt are not independent."""
    names = [n for n in ("win", "tie", "loss", "kl", "tokens") if n in rows[0]]
    means: dict[str, float] = {name: float(np.mean([row[name] for row in rows])) for name in names}
    if "reward" not in rows[0]:
        return means
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        difference = row["reward"] - row["reference_reward"]
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(difference)
    differences = np.array([np.mean(own) for own in by_prompt.values()])
    low, high = bootstrap_interval(differences)
    return {"advantage": float(differences.mean()), "low": low, "high": high} | means


def first(rows: Sequence[dict[str, Any]], column: str) -> list[str]:
    """The first of each row's samples."""
    return [row[column][0] for row in rows]


def table_of(verdicts: dict[str, dict[str, Any]]) -> Table:
    """Win, tie and loss in percent, with their intervals, as in Table 1."""
    table = Table("", "win %", "tie %", "loss %", "pairs", "not usable", title="judged pairs")
    for name, verdict in verdicts.items():
        shares = [
            "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * x for x in verdict[outcome]))
            for outcome in ("win", "tie", "loss")
        ]
        unusable = verdict["refused"] + verdict["malformed"]
        table.add_row(name, *shares, str(verdict["pairs"]), f"{unusable} answers")
    return table
