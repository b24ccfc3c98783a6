"""`pairs`: preference pairs from samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scale.data.rows import read, write
from scale.errors import InputError
from scale.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Pairs(Stage):
    """Make pairs of responses: `rows.parquet` to label, `human.parquet` to train an oracle on.

    rows: two samples of a prompt (as many such pairs as it has), and the human's completion against
    a sample; each with one more sample as `ref_sample`.
    human: the human's completion over each sample, and over the completions of as many other
    prompts: the oracle learns what is said well and what is said of this prompt.
    Samples that were cut short are left out of both, and so are pairs of equal texts.
    """

    data: Path
    """Rows with `prompt`, `completion` and the `samples` and `complete` of the sample stage."""
    seed: int = 0
    """Seed of which other prompts' completions are the negatives."""

    def run(self) -> dict[str, Any]:
        rows = read(self.data, need=("prompt", "completion"))
        require_samples(self.data, rows)
        rng = np.random.default_rng(self.seed)
        orders = [rng.permutation(len(rows)) for _ in rows[0]["samples"]]
        unlabelled = [pair for row in rows for pair in to_label(row)]
        human = [
            pair
            for i, row in enumerate(rows)
            for pair in preferred(row, [rows[order[i]] for order in orders])
        ]
        write(self.out / "rows.parquet", unlabelled, {})
        write(self.out / "human.parquet", human, {})
        return {"pairs to label": len(unlabelled), "human preferences": len(human)}


def require_samples(path: Path, rows: list[dict[str, Any]]) -> None:
    """Refuse rows without samples, or without a flag for each of them."""
    for i, row in enumerate(rows, 1):
        place, samples, complete = f"{path}: row {i}", row.get("samples"), row.get("complete", [])
        if not samples or not is_list_of(str, samples):
            raise InputError(f"{place}: field 'samples': must be a list of texts; `sample` adds it")
        if not is_list_of(bool, complete) or len(complete) != len(samples):
            raise InputError(
                f"{place}: field 'complete': must be a list of {len(samples)} booleans; `sample` "
                "adds it"
            )


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def make_pairs(row: dict[str, Any], chosen: str, rejected: str) -> list[dict[str, Any]]:
    """One pair; none where the texts are equal."""
    different = chosen.strip() != rejected.strip()
    return [{"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}] * different


def response(row: dict[str, Any], index: int | None) -> str:
    """A sample, empty where it was cut short or is blank; for None, the human's completion."""
    if index is None:
        return row["completion"]
    text = row["samples"][index]
    return text if row["complete"][index] and text.strip() else ""


def to_label(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Neighbouring samples, and the human against the first; each with a sample for Eq. 11's KL.

    That sample is one that the pair does not contain, where there are enough of them. It may be cut
    short, so that it is a draw from pi_ref whatever the pair is.
    """
    n = len(row["samples"])
    pairs = []
    for sides in [*((i, i + 1) for i in range(0, n - 1, 2)), (None, 0)]:
        third = next((i for i in range(n) if i not in sides), 0)
        sample, complete = row["samples"][third], row["complete"][third]
        columns = {"ref_sample": sample, "ref_sample_complete": complete}
        texts = [response(row, side) for side in sides]
        pairs += [pair | columns for pair in (make_pairs(row, *texts) if all(texts) else [])]
    return pairs


def preferred(row: dict[str, Any], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The human's completion over the samples, and over the completions of other prompts."""
    samples = filter(None, (response(row, i) for i in range(len(row["samples"]))))
    rejected = [*samples, *(other["completion"] for other in others)]
    return [pair for text in rejected for pair in make_pairs(row, row["completion"], text)]
