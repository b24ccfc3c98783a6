"""`score`: compute, once, the columns that alignment needs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from minipref.methods import METHODS
from scale.console import console
from scale.data.dataset import REF_LOGPS, Limits, limits_text
from scale.data.formats import LOGPS, SCORES, SIDES
from scale.data.hub_rows import row_files
from scale.data.rows import as_table, provenance, read, write
from scale.errors import InputError
from scale.files import fingerprint
from scale.io import model_folder
from scale.io.model_folder import ModelFolder
from scale.model.inference import Sampled, generate, sequence_logps
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.align import MethodName
from scale.stages.judge import Judge, load_judge
from scale.stages.stage import TOKENS, Stage


@dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """Compute, once, the columns that alignment reads: rewards, reference log-probs and samples."""

    data: Path
    """Preference rows."""
    rows: int | None = None
    """Only the first so many. Default: all."""
    rewards: Path | None = None
    """Folder of reward models, or `village` for the true reward of its summaries: adds
    `score_chosen` and `score_rejected`, a number for each model."""
    reference: Path | None = None
    """pi_ref: a folder of ours, a Hugging Face folder, an id of its hub, a .gguf file, or smollm2.
    It adds `ref_chosen_logps`, `ref_rejected_logps`, and `ref_sample_logps` of a `ref_sample`,
    which is drawn where the rows have none."""
    method: Annotated[MethodName | None, tyro.conf.arg(name="for")] = None
    """Compute only what this method reads. Default: a sample of pi_ref too, which only methods with
    a KL term read."""
    relabel: bool = False
    """Let the (first) reward decide which response is chosen, and drop ties; adds no scores."""
    standardize: bool = False
    """Divide the rewards of each model by the standard deviation of its margins on --data. Default:
    they stay in nats, as Bradley-Terry fits them: Eq. 7 gives beta its meaning in that unit."""
    seed: int = 0
    """Seed of the reference samples."""
    limits: Limits = field(default_factory=Limits)
    """Length limits: `align` must have the same."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def run(self) -> dict[str, Any]:
        rows = read(self.data)[: self.rows]
        as_table(self.data, rows)  # what could not be written is refused before it is scored
        self.check("score_chosen" in rows[0])
        hashes = provenance(self.data) | {"data": fingerprint(*row_files(self.data))}
        findings: dict[str, Any] = {}
        runtime = make_runtime(self.runtime)
        if self.rewards:
            judge = load_judge(self.rewards, runtime)
            rows, findings = self.with_rewards(judge, rows)
            hashes["labelled by" if self.relabel else "rewards"] = judge.identity
        if self.reference:
            reference = model_folder.load_policy(self.reference, runtime)
            rows = self.with_reference(reference, rows)
            hashes |= reference.hashes | {"--limits": limits_text(self.limits)}
        require_finite(self.out, rows)
        write(self.out / "rows.parquet", rows, hashes)
        return {"rows": len(rows)} | findings

    def check(self, scored: bool) -> None:
        """Refuse options that leave out what is asked for, or add what is not read.

        Args:
            scored: Whether the rows have rewards.
        """
        if not (self.rewards or self.reference) or (self.relabel and not self.rewards):
            raise InputError(
                "score needs --rewards, --reference or both; --relabel needs --rewards"
            )
        if self.standardize and (self.relabel or not self.rewards):
            raise InputError("--standardize: it needs --rewards, and --relabel adds no rewards")
        reads_none = self.method and METHODS[self.method].rewards == "none"
        if reads_none and self.rewards and not self.relabel:
            raise InputError(f"--for {self.method}: it reads no rewards; leave --rewards out")
        if self.method and not (reads_none or scored) and (self.relabel or not self.rewards):
            raise InputError(f"--for {self.method}: it reads rewards; name --rewards")

    def with_rewards(self, judge: Judge, rows: list[dict]) -> tuple[list[dict], dict[str, Any]]:
        """Rows with the rewards as columns, or relabelled by them; and the findings."""
        rows, values = judge.rewards(rows, SIDES, self.limits, str(self.data))
        margins = values[:, 0] - values[:, 1]
        if self.relabel:
            first = margins[:, 0]
            if not first.any():
                raise InputError(f"{self.data}: --relabel: all {len(rows)} pairs are ties")
            return [relabelled(row, m) for row, m in zip(rows, first, strict=True) if m], {
                "share of pairs without a tie": float((first != 0).mean()),
                "share of labels kept": float((first > 0).sum() / (first != 0).sum()),
            }
        if self.standardize and not margins.std(0).all():
            raise InputError(f"{self.data}: --standardize: all margins of a model are equal")
        if self.standardize:
            values, margins = values / margins.std(0), margins / margins.std(0)
        scored = [
            row | {"score_chosen": chosen.tolist(), "score_rejected": rejected.tolist()}
            for row, (chosen, rejected) in zip(rows, values, strict=True)
        ]
        return scored, {
            "reward models": values.shape[2],
            "accuracy of each reward model": [round(float(a), 4) for a in (margins > 0).mean(0)],
            "standard deviation of margins": [round(float(s), 3) for s in margins.std(0)],
        }

    def with_reference(self, reference: ModelFolder, rows: list[dict]) -> list[dict]:
        """Rows with pi_ref's log-probabilities, and a sample of it, as columns."""
        source, cache = str(self.data), self.out / TOKENS
        source += ", after the rewards" if self.rewards else ""
        recorded = provenance(self.data)
        if recorded.get("model", reference.hashes["model"]) != reference.hashes["model"]:
            console.print("  the samples and log-probabilities of another model are dropped")
            rows = [{k: v for k, v in row.items() if not k.startswith("ref_")} for row in rows]
        fields = (*SIDES, "ref_sample") if self.reads_samples else SIDES
        if recorded.get("tokenizer") != reference.hashes["tokenizer"]:
            rows = [{k: v for k, v in row.items() if k != "ref_sample_ids"} for row in rows]
        if self.reads_samples and "ref_sample" not in rows[0]:
            rows, source = with_samples(reference, rows, self.limits, self.seed, source, cache), ""
            if reference.model.runtime.dtype == "float32":
                fields = SIDES  # the samples came with their log-probabilities
        dataset = reference.make_dataset(rows, fields, self.limits, source)
        logps = sequence_logps(reference.model, dataset, cache).astype(float)
        names = [REF_LOGPS[field] for field in fields]
        return [
            row | dict(zip(names, values.tolist(), strict=True))
            for row, values in zip(dataset.select(rows), logps, strict=True)
        ]

    @property
    def reads_samples(self) -> bool:
        return self.method is None or METHODS[self.method].gamma is not None


def require_finite(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse rewards and log-probabilities that no training can use.

    Raises:
        FloatingPointError: One is a NaN or an infinity.
    """
    for name in (*SCORES, *LOGPS):
        if name in rows[0] and not np.all(finite := np.isfinite([row[name] for row in rows])):
            number = int(np.argmin(finite.reshape(len(rows), -1).all(1))) + 1
            raise FloatingPointError(f"{out}: {name} of row {number} is not finite")


def relabelled(row: dict[str, Any], margin: np.floating) -> dict[str, Any]:
    """The row with its two responses, and all that belongs to them, exchanged if margin < 0."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    swap = re.compile("chosen|rejected")
    if margin >= 0:
        return row
    swapped = {swap.sub(lambda match: other[match[0]], name): v for name, v in row.items()}
    return swapped | ({"completion": swapped["chosen"]} if "completion" in row else {})


def with_samples(
    reference: ModelFolder, rows: list[dict], limits: Limits, seed: int, source: str, cache: Path
) -> list[dict]:
    """Each row with one `ref_sample` y ~ pi_ref, for Eq. 11's KL, and its log-probability."""
    rows = reference.make_dataset(rows, SIDES, limits, source).select(rows)
    prompts = reference.make_dataset(rows, [], limits)
    samples = generate(
        reference.model, reference.tokenizer, prompts, n=1, max_new_tokens=limits.response,
        seed=seed, temperature=1.0, label="reference samples", cache=cache,
    )  # fmt: skip
    return [row | sample_columns(sample) for row, [sample] in zip(rows, samples, strict=True)]


def sample_columns(sample: Sampled) -> dict[str, Any]:
    """The columns of a reference sample."""
    return {
        "ref_sample": sample.text,
        "ref_sample_complete": sample.complete,
        "ref_sample_ids": sample.ids,
        REF_LOGPS["ref_sample"]: sample.logp,
    }
