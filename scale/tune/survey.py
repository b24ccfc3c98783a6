"""What `tune` learns of the rows and the model before it starts: counts, lengths, limits."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from scale.data.dataset import Limits, make_dataset
from scale.data.formats import SIDES
from scale.data.rows import Row, column_types, read, split
from scale.errors import InputError
from scale.io.huggingface import settings_for
from scale.io.model_folder import config_of, tokenizer_of
from scale.model.config import ModelConfig
from scale.model.transformer import Transformer, parameter_count
from scale.tune.options import Options

HELD_OUT_ROWS = 32  # of the test part, whose samples training looks at
PERCENTILE, QUICK_PERCENTILE = 95, 50  # of the lengths, where no limit is given
MULTIPLE = 16  # of a limit that is not given
NO_LIMITS = Limits(prompt=10**9, response=10**9)


@dataclass(frozen=True)
class Survey:
    """The rows by part, with the lengths of those that are read.

    Attributes:
        config: The shape of the model.
        parameters: Its number of parameters.
        rows: How many rows there are.
        lengths: For each part the tokens of prompt, chosen and rejected [N, 3], without the pairs
            whose responses have equal tokens.
        limits: The limits of the run.
    """

    config: ModelConfig
    parameters: int
    rows: int
    lengths: dict[str, np.ndarray]
    limits: Limits

    @cached_property
    def kept(self) -> dict[str, np.ndarray]:
        """The lengths of the rows within the limits, whose prompts are cut."""
        return {name: within(lengths, self.limits) for name, lengths in self.lengths.items()}

    @property
    def dropped(self) -> dict[str, int]:
        """Why how many rows are not used."""
        read_ = sum(map(len, self.lengths.values()))
        kept = sum(map(len, self.kept.values()))
        longer = f"with a response over {self.limits.response} tokens"
        return {"with equal responses": self.rows - read_, longer: read_ - kept}

    @property
    def cut(self) -> int:
        """How many prompts of the kept rows are cut."""
        kept = [lengths[fits(lengths, self.limits)] for lengths in self.lengths.values()]
        return sum(int((lengths[:, 0] > self.limits.prompt).sum()) for lengths in kept)


def survey(options: Options, rows: list[Row], shares: dict[str, float]) -> Survey:
    """Look at rows and model; the weights are not read.

    Args:
        options: Those of `tune`.
        rows: Preference rows.
        shares: The share of each part.

    Returns:
        The survey.

    Raises:
        InputError: The model or its tokenizer cannot be used, or a part has no row within the
            limits.
    """
    data, model = options.data, options.model
    config, tokenizer = config_of(model), tokenizer_of(model)
    settings_for(config, tokenizer)  # refuses what cannot be exported
    dataset = make_dataset(tokenizer, rows, SIDES, NO_LIMITS, str(data))
    kept, lengths = dataset.select(rows), dataset.tokens.lengths
    numbered = [{"prompt": row["prompt"], "i": i} for i, row in enumerate(kept)]
    parts = split(numbered, shares, options.seed)
    limits = limits_of(config, lengths, options)
    used = f"{data}: {len(rows)} rows" + " (--rows)" * (len(rows) == options.rows)
    by_part = {name: lengths[[row["i"] for row in part]] for name, part in parts.items()}
    for name, part in by_part.items():
        read_ = part[:HELD_OUT_ROWS] if name == "test" else part
        if not len(part):
            raise InputError(f"{used} have too few prompts for a {name} part")
        if not len(within(read_, limits)):
            raise InputError(
                f"{used}, of which none within --limits of {limits.prompt} + {limits.response} "
                f"tokens is left for {name}"
            )
    shape = eqx.filter_eval_shape(Transformer, config, jax.random.key(0))
    return Survey(config, parameter_count(shape), len(rows), by_part, limits)


def limits_of(config: ModelConfig, lengths: np.ndarray, options: Options) -> Limits:
    """The limits that are given, or those that the rows need and the model allows."""
    share = QUICK_PERCENTILE if options.quick else PERCENTILE
    prompt, response = options.limits.prompt, options.limits.response

    def percentile(values: np.ndarray) -> int:
        return int(-(-np.percentile(values, share) // MULTIPLE) * MULTIPLE)

    longest = config.max_seq_len
    for name, given in (("prompt", prompt), ("response", response)):
        if given and given >= longest:
            limit = f"--limits.{name} {given}"
            raise InputError(f"{limit}: the model has sequences of {longest} tokens")
    most = longest - prompt if prompt else longest // 2
    response = response or min(percentile(lengths[:, 1:].max(1)), most)
    prompt = prompt or min(percentile(lengths[:, 0]), longest - response)
    if prompt + response > longest:
        raise InputError(
            f"--limits: {prompt} + {response} tokens, but the model has sequences of {longest}"
        )
    return Limits(prompt, response, truncation_side="left")


def fits(lengths: np.ndarray, limits: Limits) -> np.ndarray:
    return lengths[:, 1:].max(1, initial=0) <= limits.response


def within(lengths: np.ndarray, limits: Limits) -> np.ndarray:
    kept = lengths[fits(lengths, limits)].copy()
    kept[:, 0] = np.minimum(kept[:, 0], limits.prompt)
    return kept


def usable(data: Path, refused: list[str] | None) -> list[Row]:
    """The preference rows of --data.

    Raises:
        InputError: A row cannot be used, and `refused` is None; or there is one row only.
    """
    rows: list[dict[str, Any]] = read(data, refused=refused)
    if len(rows) < 2:
        raise InputError(f"{data}: one row; nothing is left to evaluate on")
    column_types(data, rows)  # what could not be written is refused before any work
    return rows
