"""`score`: compute, once, the columns that alignment needs."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro
from jax.experimental.multihost_utils import sync_global_devices

from minipref.methods import METHODS
from scale.console import console
from scale.data.dataset import REF_LOGPS, Limits, limits_text
from scale.data.formats import LOGPS, SCORES, SIDES, Row
from scale.data.rows import column_types, provenance, write
from scale.data.table import Table, scan
from scale.errors import InputError
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
        rows = scan(self.data)
        if self.rows:
            rows = rows.where(np.arange(len(rows)) < self.rows)
        types = column_types(self.data, rows)  # what could not be written is not scored
        self.check("score_chosen" in rows[0])
        hashes = provenance(self.data) | {"data": rows.contents}
        findings: dict[str, Any] = {}
        runtime = make_runtime(self.runtime)
        if self.rewards:
            judge = load_judge(self.rewards, runtime)
            scored, findings = self.with_rewards(judge, rows)
            hashes["labelled by" if self.relabel else "rewards"] = judge.identity
        if self.reference:
            if self.rewards:
                rows = self.kept("rewards", scored, types)
            reference = model_folder.load_policy(self.reference, runtime)
            scored, types = self.with_reference(reference, rows, types)
            hashes |= reference.hashes | {"--limits": limits_text(self.limits)}
        count = write(self.out / "rows.parquet", finite(self.out, scored), hashes, types)
        return {"rows": count} | findings

    def kept(self, name: str, rows: Iterable[Row], types: pa.Schema) -> Table:
        """Rows in a file of this stage, for what comes next: memory does not hold all of them."""
        path = self.out / TOKENS / f"{name}.parquet"
        write(path, finite(self.out, rows), {}, types)
        sync_global_devices(f"{path} is written")
        return scan(path)

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

    def with_rewards(self, judge: Judge, rows: Table) -> tuple[Iterator[Row], dict[str, Any]]:
        """Rows with the rewards as columns, or relabelled by them; and the findings."""
        scored, values = judge.rewards(rows, SIDES, self.limits, str(self.data))
        margins = values[:, 0] - values[:, 1]
        if self.relabel:
            first = margins[:, 0]
            if not first.any():
                raise InputError(f"{self.data}: --relabel: all {len(rows)} pairs are ties")
            return (relabelled(row, m) for row, m in zip(scored, first, strict=True) if m), {
                "share of pairs without a tie": float((first != 0).mean()),
                "share of labels kept": float((first > 0).sum() / (first != 0).sum()),
            }
        if self.standardize and not margins.std(0).all():
            raise InputError(f"{self.data}: --standardize: all margins of a model are equal")
        if self.standardize:
            values, margins = values / margins.std(0), margins / margins.std(0)
        with_scores = (
            row | {"score_chosen": chosen.tolist(), "score_rejected": rejected.tolist()}
            for row, (chosen, rejected) in zip(scored, values, strict=True)
        )
        return with_scores, {
            "reward models": values.shape[2],
            "accuracy of each reward model": [round(float(a), 4) for a in (margins > 0).mean(0)],
            "standard deviation of margins": [round(float(s), 3) for s in margins.std(0)],
        }

    def with_reference(
        self, reference: ModelFolder, rows: Table, types: pa.Schema
    ) -> tuple[Iterator[Row], pa.Schema]:
        """Rows with pi_ref's log-probabilities, and a sample of it, as columns; and the types."""
        source, cache = str(self.data), self.out / TOKENS
        source += ", after the rewards" if self.rewards else ""
        if old := self.outdated(reference, types):
            types = pa.schema([field for field in types if field.name not in old])
            current = ({k: v for k, v in row.items() if k not in old} for row in rows)
            rows = self.kept("current", current, types)
        fields = (*SIDES, "ref_sample") if self.reads_samples else SIDES
        if self.reads_samples and "ref_sample" not in rows[0]:
            sampled = with_samples(reference, rows, self.limits, self.seed, source, cache)
            rows, source = self.kept("samples", sampled, types), ""
            if reference.model.runtime.dtype == "float32":
                fields = SIDES  # the samples came with their log-probabilities
        dataset = reference.make_dataset(rows, fields, self.limits, source)
        logps = sequence_logps(reference.model, dataset, cache).astype(float)
        names = [REF_LOGPS[field] for field in fields]
        with_logps = (
            row | dict(zip(names, values.tolist(), strict=True))
            for row, values in zip(dataset.select(rows), logps, strict=True)
        )
        return with_logps, types

    def outdated(self, reference: ModelFolder, types: pa.Schema) -> list[str]:
        """The columns of --data that another model, or another tokenizer, made."""
        recorded, hashes = provenance(self.data), reference.hashes
        of_model = [name for name in types.names if name.startswith("ref_")]
        if of_model and recorded.get("model", hashes["model"]) != hashes["model"]:
            console.print("  the samples and log-probabilities of another model are dropped")
            return of_model
        is_own = recorded.get("tokenizer") == hashes["tokenizer"]
        return [name for name in of_model if name == "ref_sample_ids" and not is_own]

    @property
    def reads_samples(self) -> bool:
        return self.method is None or METHODS[self.method].gamma is not None


def finite(out: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, whose rewards and log-probabilities training can use.

    Raises:
        FloatingPointError: One is a NaN or an infinity.
    """
    for number, row in enumerate(rows, 1):
        for name in (*SCORES, *LOGPS):
            if not np.all(np.isfinite(row.get(name, 0.0))):
                raise FloatingPointError(f"{out}: {name} of row {number} is not finite")
        yield row


def relabelled(row: dict[str, Any], margin: np.floating) -> dict[str, Any]:
    """The row with its two responses, and all that belongs to them, exchanged if margin < 0."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    swap = re.compile("chosen|rejected")
    if margin >= 0:
        return row
    swapped = {swap.sub(lambda match: other[match[0]], name): v for name, v in row.items()}
    return swapped | ({"completion": swapped["chosen"]} if "completion" in row else {})


def with_samples(
    reference: ModelFolder, rows: Table, limits: Limits, seed: int, source: str, cache: Path
) -> Iterator[Row]:
    """Each row with one `ref_sample` y ~ pi_ref, for Eq. 11's KL, and its log-probability."""
    rows = reference.make_dataset(rows, SIDES, limits, source).select(rows)
    prompts = reference.make_dataset(rows, [], limits)
    samples = generate(
        reference.model, reference.tokenizer, prompts, n=1, max_new_tokens=limits.response,
        seed=seed, temperature=1.0, label="reference samples", cache=cache,
    )  # fmt: skip
    return (row | sample_columns(sample) for row, [sample] in zip(rows, samples, strict=True))


def sample_columns(sample: Sampled) -> dict[str, Any]:
    """The columns of a reference sample."""
    return {
        "ref_sample": sample.text,
        "ref_sample_complete": sample.complete,
        "ref_sample_ids": sample.ids,
        REF_LOGPS["ref_sample"]: sample.logp,
    }
