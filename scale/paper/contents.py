"""What samples say of a village's pages: how much is true, false, said twice or padding."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from scale.data.village import assess, read_page

CONTENTS = (
    *("facts", "false", "repeated", "padded", "false_share", "grammatical", "words"),
    "true_reward",
)
Texts = Iterable[tuple[str, str]]  # prompts and summaries of them


def contents(texts: Texts) -> dict[str, float]:
    """Means over summaries.

    Returns:
        Counts of facts, of false and of repeated statements; shares of summaries with padding, with
        a false statement, of good grammar; words; the true reward.
    """
    assessed = [(assess(read_page(prompt), text), text) for prompt, text in texts]
    rows = [
        (
            *(len(a.true), len(a.false), a.repeated, a.padded, bool(a.false), a.grammatical),
            *(len(text.split()), a.reward),
        )
        for a, text in assessed
    ]
    return dict(zip(CONTENTS, np.mean(rows, axis=0).tolist(), strict=True))


def sampled_texts(rows: Iterable[dict[str, Any]], column: str = "samples") -> Texts:
    """All samples of the rows of an evaluation."""
    return ((row["prompt"], text) for row in rows for text in row[column])
