from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.rows import read, write
from scale.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Pairs(Stage):
    """Pairs of responses from sampled prompts: `rows.parquet` to be labelled, `human.parquet` to train an oracle on.

    rows: two samples of a prompt (as many such pairs as it has), and the human's completion against a sample; each
    with one more sample as `ref_sample`.
    human: the human's completion over each sample, and over the completions of as many other prompts, so that the
    oracle learns what is said well and what is said of this prompt. Samples that were cut short are left out of both,
    and so are pairs of equal texts.
    """

    data: Path
    """Rows with `prompt`, `completion` and the `samples` and `complete` of the sample stage."""
    seed: int = 0
    """Seed of which other prompts' completions are the negatives."""

    def run(self) -> dict[str, Any]:
        rows = read(self.data, need=("prompt", "completion"))
        rng = np.random.default_rng(self.seed)
        orders = [rng.permutation(len(rows)) for _ in rows[0]["samples"]]
        unlabelled = [pair for row in rows for pair in to_label(row)]
        human = [pair for i, row in enumerate(rows) for pair in preferred(row, [rows[o[i]] for o in orders])]
        write(self.out / "rows.parquet", unlabelled, {})
        write(self.out / "human.parquet", human, {})
        return {"pairs to label": len(unlabelled), "human preferences": len(human)}


def finished(row: dict[str, Any]) -> list[str]:
    """Samples that ended by themselves and say something."""
    return [s for s, complete in zip(row["samples"], row["complete"], strict=True) if complete and s.strip()]


def pair(row: dict[str, Any], chosen: str, rejected: str) -> list[dict[str, Any]]:
    different = chosen.strip() != rejected.strip()
    return [{"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}] * different


def to_label(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Neighbouring samples, and the human against the first; each with a sample of the prompt for Eq. 11's KL.

    That sample is one the pair does not contain (where there are enough of them), finished or not, so that it is
    a draw from pi_ref whatever the pair is.
    """
    n = len(row["samples"])
    pairs = [(i, i + 1) for i in range(0, n - 1, 2)]
    found = []
    for left, right in [*pairs, (None, 0)]:
        sides = [side_text(row, left), side_text(row, right)]
        third = next((i for i in range(n) if i not in (left, right)), 0)
        extra = {"ref_sample": row["samples"][third], "ref_sample_complete": row["complete"][third]}
        found += [p | extra for p in (pair(row, *sides) if all(sides) else [])]
    return found


def side_text(row: dict[str, Any], index: int | None) -> str:
    """The human's completion, or a sample; empty where the sample was cut short."""
    if index is None:
        return row["completion"]
    return row["samples"][index].strip() and row["samples"][index] if row["complete"][index] else ""


def preferred(row: dict[str, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    negatives = [*finished(row), *(other["completion"] for other in others)]
    return [p for negative in negatives for p in pair(row, row["completion"], negative)]
