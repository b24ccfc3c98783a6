"""What samples say of a village's pages: how much is true, false, said twice or padding."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from scale.data.village import assess, read_page

Texts = Iterable[tuple[str, str]]  # prompts and summaries of them


def contents(texts: Texts) -> dict[str, float]:
    """Means over summaries: counts of statements, shares of summaries, words."""
    assessed = [(assess(read_page(prompt), text), text) for prompt, text in texts]
    columns: dict[str, list[Any]] = {
        "facts": [len(a.true) for a, _ in assessed],
        "false": [len(a.false) for a, _ in assessed],
        "repeated": [a.repeated for a, _ in assessed],
        "padded": [a.padded for a, _ in assessed],
        "with a false statement": [bool(a.false) for a, _ in assessed],
        "grammatical": [a.grammatical for a, _ in assessed],
        "words": [len(text.split()) for _, text in assessed],
        "reward": [a.reward for a, _ in assessed],
    }
    return {name: float(np.mean(values)) for name, values in columns.items()}


def sampled_texts(rows: Iterable[dict[str, Any]], column: str = "samples") -> Texts:
    """All samples of the rows of an evaluation."""
    return ((row["prompt"], text) for row in rows for text in row[column])
