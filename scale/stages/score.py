import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.dataset import Limits
from scale.data.length_bias import longer_side, longer_wins
from scale.data.rows import provenance, read, write
from scale.errors import InputError
from scale.files import fingerprint
from scale.io import model_folder as folders
from scale.model.inference import generate, rewards, sequence_logps
from scale.parallel.mesh import RuntimeConfig, make_runtime
from scale.stages.stage import Stage

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class Score(Stage):
    """RuntimeConfig, once, the columns that alignment needs: rewards, reference log-probs, a reference sample."""

    data: Path
    """Preference rows."""
    rewards: Path | None = None
    """Folder of reward models: adds `score_chosen` and `score_rejected`, a number for each member."""
    reference: Path | None = None
    """Folder of pi_ref: adds `ref_chosen_logps`, `ref_rejected_logps`, and `ref_sample_logps` of a
    `ref_sample`, which is drawn where the rows have none."""
    relabel: bool = False
    """Let the (first) reward model decide which response is chosen; adds no scores."""
    seed: int = 0
    """Seed of the reference samples."""
    limits: Limits = field(default_factory=Limits)
    """Length limits; alignment must use the same."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Devices, memory and precision."""

    def inputs(self) -> list[Path]:
        return [path for path in (self.data, self.rewards, self.reference) if path]

    def run(self) -> dict[str, Any]:
        rows, hashes = read(self.data), provenance(self.data) | {"data": fingerprint(self.data)}
        findings: dict[str, Any] = {}
        if not (self.rewards or self.reference) or (self.relabel and not self.rewards):
            raise InputError("score needs --rewards, --reference or both; --relabel needs --rewards")
        runtime = make_runtime(self.runtime)
        if self.rewards:
            models = folders.load_rewards(self.rewards, runtime)
            rows, findings = self.with_rewards(models, rows)
            hashes["labelled by" if self.relabel else "rewards"] = models.hashes["model"]
        if self.reference:
            reference = folders.load_policy(self.reference, runtime)
            rows = self.with_reference(reference, rows)
            hashes |= reference.hashes | {"limits": str(self.limits)}
        write(self.out / "rows.parquet", rows, hashes)
        return {"rows": len(rows)} | findings

    def with_rewards(self, models: folders.Folder, rows: list[dict]) -> tuple[list[dict], dict[str, Any]]:
        encoded = models.encode(rows, SIDES, self.limits, str(self.data))
        rows, values = encoded.rows(rows), rewards(models.model, encoded.data).astype(float)
        margins = values[:, 0] - values[:, 1]
        if self.relabel:
            rows = [relabelled(row, margin) for row, margin in zip(rows, margins[:, 0], strict=True)]
            return rows, {"share of pairs whose longer side wins": longer_wins(longer_side(models.codec, rows)),
                          "share of labels kept": float((margins[:, 0] >= 0).mean())}
        scored = [row | {"score_chosen": c.tolist(), "score_rejected": r.tolist()}
                  for row, (c, r) in zip(rows, values, strict=True)]
        return scored, {"members": values.shape[2],
                        "accuracy of each member": [round(float(a), 4) for a in (margins > 0).mean(0)],
                        "standard deviation of margins": [round(float(s), 3) for s in margins.std(0)]}

    def with_reference(self, reference: folders.Folder, rows: list[dict]) -> list[dict]:
        source = str(self.data)
        if "ref_sample" not in rows[0]:
            rows, source = with_samples(reference, rows, self.limits, self.seed, source), ""
        encoded = reference.encode(rows, (*SIDES, "ref_sample"), self.limits, source)
        rows, values = encoded.rows(rows), sequence_logps(reference.model, encoded.data).astype(float)
        names = [f"ref_{side}_logps" for side in SIDES] + ["ref_sample_logps"]
        return [row | dict(zip(names, each.tolist(), strict=True)) for row, each in zip(rows, values, strict=True)]


def relabelled(row: dict[str, Any], margin: np.floating) -> dict[str, Any]:
    """The row as it is, or with all that belongs to its two responses exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    swap = re.compile("chosen|rejected")
    return row if margin >= 0 else {swap.sub(lambda m: other[m[0]], k): v for k, v in row.items()}


def with_samples(reference: folders.Folder, rows: list[dict], limits: Limits, seed: int, source: str) -> list[dict]:
    """Each row with one `ref_sample` y ~ pi_ref, for Eq. 11's KL."""
    rows = reference.encode(rows, SIDES, limits, source).rows(rows)
    prompts = reference.encode(rows, [], limits)
    found = generate(reference, prompts, n=1, max_new=limits.response, seed=seed, temperature=1.0,
                     label="reference samples")
    return [row | {"ref_sample": text, "ref_sample_complete": complete}
            for row, [(text, complete)] in zip(rows, found, strict=True)]
