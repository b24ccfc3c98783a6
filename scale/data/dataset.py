"""Rows of text to token ids and columns, and the batch of a step as a function of (seed, step) alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from minipref.batch import Batch
from scale.console import console
from scale.data.formats import RESPONSES
from scale.data.layout import Layout, Shape, least_shape
from scale.data.packing import Pieces, Tokens, lay, tokens_of
from scale.data.tokenizer import PAD, Codec
from scale.errors import InputError
from scale.files import atomic

REF_LOGPS = {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps", "ref_sample": "ref_sample_logps"}


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to one that is longer. Never silent: the counts are printed."""

    prompt: int = 64
    """Tokens of a prompt at most."""
    response: int = 32
    """Tokens of a response at most, its end-of-sequence token included."""
    overlong: Literal["drop", "keep-start", "keep-end", "error"] = "drop"
    """An over-long prompt: drop the row, keep the prompt's start or its end, or stop. An over-long response is
    never cut: its row is dropped, or `error` stops."""


@dataclass(frozen=True)
class Encoded:
    """Rows of token ids with their columns; row i is row `kept[i]` of the file."""

    tokens: Tokens
    ref_logps: np.ndarray
    scores: np.ndarray
    kept: np.ndarray
    layout: Layout | None = None
    pad: int = PAD

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def data(self) -> Batch:
        """All rows, a line each."""
        return self.batch(np.arange(len(self)), self.shape(len(self)))

    def shape(self, rows: int) -> Shape:
        """That of any `rows` rows, a line each."""
        if self.layout:
            return self.layout.shape(rows)
        return least_shape(self.tokens.lengths, len(self))._replace(lines=rows)

    def batch(self, indices: np.ndarray, shape: Shape) -> Batch:
        arrays = lay(self.tokens.take(indices), shape, self.layout, self.pad)
        return Batch(*arrays, self.ref_logps[indices], self.scores[indices])  # type: ignore[call-arg,arg-type]

    def rows(self, rows: Sequence[dict]) -> list[dict]:
        return [rows[i] for i in self.kept]


def fit_prompt(ids: list[int], limits: Limits, closing: int = 1) -> list[int] | None:
    """The prompt within its limit (the `closing` tokens that open the response stay), or None where the row must go.

    Errors: InputError for a limit that the closing alone exceeds.
    """
    if len(ids) <= limits.prompt:
        return ids
    if limits.overlong == "keep-start":
        if limits.prompt < closing:
            raise InputError(f"--limits.prompt {limits.prompt}: the {closing} tokens that open a response do not fit")
        return [*ids[: limits.prompt - closing], *ids[len(ids) - closing :]]
    return ids[-limits.prompt :] if limits.overlong == "keep-end" else None


def encode(
    codec: Codec, rows: Sequence[dict[str, Any]], fields: Sequence[str], limits: Limits, source: str = "",
    regions: bool = False, folder: Path | None = None,
) -> Encoded:
    """Token ids of the rows' prompts with the responses named by `fields`, and their columns where present.

    The limit of responses is for data. A text that a policy sampled may encode to more tokens than were sampled; it
    is kept, so that what is computed of the samples is of all samples.

    `source` names the file that a user gave, and prints what did not fit; rows that an earlier stage took are silent.
    With `regions` all rows have one static layout. In `folder` the ids are kept, for the next call; they are read from
    there as they are needed.
    """
    def tokenise() -> tuple[np.ndarray, ...]:
        kept, tokens = tokenised(codec, rows, fields, limits, source)
        return kept, tokens.ends, tokens.ids

    kept, ends, ids = on_disk(folder, ("kept", "ends", "ids"), tokenise) if folder else tokenise()
    tokens, taken = Tokens(ids, ends), [rows[i] for i in kept]
    layout = common_layout(tokens, limits) if regions else None
    return Encoded(tokens, ref_logps(taken, fields), scores(taken, len(fields)), kept, layout, codec.pad)


def tokenised(
    codec: Codec, rows: Sequence[dict[str, Any]], fields: Sequence[str], limits: Limits, source: str
) -> tuple[np.ndarray, Tokens]:
    """Which rows are within the limits, and their token ids."""
    pieces, kept, cut = [], [], 0
    for i, row in enumerate(rows):
        ids = codec.prompt_ids(row["prompt"])
        prompt = fit_prompt(ids, limits, len(codec.closing))
        responses = [codec.response_ids(row[f], row.get(f"{f}_complete", True)) for f in fields]
        bounded = [len(r) for f, r in zip(fields, responses, strict=True) if f in RESPONSES]
        if prompt is None or max(bounded, default=0) > limits.response:
            if limits.overlong == "error":
                raise InputError(f"{source}: row {i + 1}: longer than {limits.prompt} + {limits.response} tokens")
            continue
        cut += len(prompt) < len(ids)
        pieces.append((prompt, responses))
        kept.append(i)
    report(source, len(rows), len(kept), cut, limits)
    return np.asarray(kept), tokens_of(pieces)


def on_disk(
    folder: Path, names: Sequence[str], make: Callable[[], Sequence[np.ndarray]]
) -> Sequence[np.ndarray]:
    """The arrays that `make` gives, or gave before, as `NAME.npy` mapped into memory. The last is written last."""
    paths = [folder / f"{name}.npy" for name in names]
    if not paths[-1].exists():
        for path, array in zip(paths, make(), strict=True):
            with atomic(path) as temporary:
                np.save(temporary, array)
    multihost_utils.sync_global_devices(f"{folder} is written")
    return [np.load(path, mmap_mode="r") for path in paths]


def common_layout(tokens: Tokens, limits: Limits) -> Layout:
    """As wide as the limits allow, so that every file has the same, and as sampled responses need."""
    responses = tokens.lengths[:, 1:]
    return Layout(limits.prompt, int(responses.max(initial=limits.response)), responses.shape[1])


def report(source: str, total: int, kept: int, cut: int, limits: Limits) -> None:
    if not kept:
        raise InputError(f"{source}: all {total} rows are longer than {limits.prompt} + {limits.response} tokens")
    if source and (kept < total or cut):
        bounds = f"{limits.prompt} prompt + {limits.response} response tokens"
        lost = f"{total - kept} of {total} rows over {bounds} dropped, {cut} prompts cut ({limits.overlong})"
        console.print(f"  {source}: {lost}", markup=False)


def pack(
    pieces: Pieces, rows: Sequence[dict], fields: Sequence[str], layout: Layout | None = None, pad: int = PAD
) -> Batch:
    """Rows of token ids as one batch, a line each; with the columns of `rows`."""
    columns = ref_logps(rows, fields), scores(rows, len(fields))
    return Encoded(tokens_of(pieces), *columns, np.arange(len(rows)), layout, pad).data


def ref_logps(rows: Sequence[dict], fields: Sequence[str]) -> np.ndarray:
    """[N, n] of the columns that `score --reference` adds; [N, 0] where the file has none."""
    names = [REF_LOGPS[f] for f in fields if f in REF_LOGPS]
    have = [name for name in names if name in rows[0]]
    return np.asarray([[row[name] for name in have] for row in rows], np.float32).reshape(len(rows), len(have))


def scores(rows: Sequence[dict], n: int) -> np.ndarray:
    """[N, 2, K] of the columns that `score --rewards` adds; K of 0 where the file has none."""
    if n < 2 or "score_chosen" not in rows[0]:
        return np.zeros((len(rows), 2, 0), np.float32)
    pairs = [[np.atleast_1d(row["score_chosen"]), np.atleast_1d(row["score_rejected"])] for row in rows]
    return np.asarray(pairs, np.float32)


@lru_cache(maxsize=64)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, size: int, seed: int, step: int) -> np.ndarray:
    """Rows of batch `step`: a window on the endless run of one fresh permutation of the n rows per epoch."""
    at = step * size + np.arange(size)
    epochs, rows = np.divmod(at, n)
    return np.concatenate([permutation(n, seed, e)[rows[epochs == e]] for e in range(epochs[0], epochs[-1] + 1)])


def take(data: Batch, indices: np.ndarray) -> Batch:
    return jax.tree.map(lambda a: a[indices], data)
