"""What a response is worth: by reward models, or by the village's true reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from scale.data.dataset import Limits
from scale.data.table import Table
from scale.data.village import assess, read_page
from scale.errors import InputError
from scale.files import fingerprint
from scale.io import model_folder
from scale.io.model_folder import VILLAGE, ModelFolder, located
from scale.model.inference import rewards
from scale.parallel.mesh import Runtime

Rows = TypeVar("Rows", list[dict[str, Any]], Table)


@runtime_checkable
class Judge(Protocol):
    """Gives rewards to responses."""

    @property
    def identity(self) -> str:
        """A hash, for the provenance of the columns that it computes."""

    def check_prompts(self, rows: Rows, source: str) -> None:
        """Refuse prompts that it cannot judge responses to, before anything is sampled."""

    def rewards(
        self, rows: Rows, fields: Sequence[str], limits: Limits, source: str = ""
    ) -> tuple[Rows, np.ndarray]:
        """The rows that it can read, and the rewards [N, n, K] of their n responses.

        Args:
            rows: Rows with `prompt` and the fields.
            fields: The columns that hold responses.
            limits: Length limits; the true reward has none.
            source: The name of the user's file, for messages.
        """


@dataclass(frozen=True)
class RewardModels:
    """K reward models as a judge."""

    folder: ModelFolder

    @property
    def identity(self) -> str:
        return self.folder.hashes["model"]

    def check_prompts(self, rows: Rows, source: str) -> None:
        """A reward model reads any text."""

    def rewards(
        self, rows: Rows, fields: Sequence[str], limits: Limits, source: str = ""
    ) -> tuple[Rows, np.ndarray]:
        dataset = self.folder.make_dataset(rows, fields, limits, source)
        values = rewards(self.folder.model, dataset).astype(float)
        require_finite(values, self.folder.path, source or "the samples")
        return dataset.select(rows), values


def require_finite(values: np.ndarray, path: Path, source: str) -> None:
    """Raise FloatingPointError where a reward is a NaN or an infinity."""
    for number, of_row in enumerate(values, 1):
        if not np.all(np.isfinite(of_row)):
            where = f"{source}: row {number} of those that are kept"
            raise FloatingPointError(f"{where}: a reward of {path} is not finite")


class TrueReward:
    """The village's true reward as a judge, with K = 1."""

    @property
    def identity(self) -> str:
        return fingerprint(located(VILLAGE))

    def check_prompts(self, rows: Rows, source: str) -> None:
        for i, row in enumerate(rows, 1):
            true_rewards(i, row, (), source)

    def rewards(
        self, rows: Rows, fields: Sequence[str], limits: Limits, source: str = ""
    ) -> tuple[Rows, np.ndarray]:
        values = [true_rewards(i, row, fields, source) for i, row in enumerate(rows, 1)]
        return rows, np.array(values).reshape(len(rows), len(fields), 1)


def true_rewards(
    number: int, row: dict[str, Any], fields: Sequence[str], source: str
) -> list[float]:
    """The true rewards of the responses of one row."""
    prompt, place = row["prompt"], f"{source}: row {number}: field 'prompt'"
    if not isinstance(prompt, str):
        raise InputError(f"{place}: a conversation, not a page of a diary")
    try:
        diary = read_page(prompt)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    return [assess(diary, row[field]).reward for field in fields]


def load_judge(path: Path, runtime: Runtime) -> Judge:
    """The judge that an option names: a folder of reward models, or `village`."""
    if path == VILLAGE:
        return TrueReward()
    return RewardModels(model_folder.load_rewards(path, runtime))
