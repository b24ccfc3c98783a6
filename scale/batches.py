"""Rows of text to shared-prefix arrays, and the batch of a step as a function of (seed, step) alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from minipref.sequences import Batch
from scale.console import console
from scale.rows import RESPONSES, DataError
from scale.tokenizer import PAD, Codec

LANES = 128
Pieces: TypeAlias = list[tuple[list[int], list[list[int]]]]  # of each row, its prompt and its responses
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
class Layout:
    """A row in fixed regions, `[prompt | response_1 | ... | response_n]`, each padded at its end: the static mask of
    TPU attention. Whole blocks of keys are skipped where regions end at multiples of a block, 128 to 512 slots."""

    prompt: int
    """Slots of the prompt's region at least."""
    response: int
    """Slots of each response's region."""
    responses: int
    """How many responses, n."""

    @property
    def labels(self) -> int:
        return self.responses * self.response

    @property
    def width(self) -> int:
        """Slots of a row, a multiple of the TPU's 128 lanes: the prompt's region takes what that adds."""
        return round_up(self.prompt + self.labels, LANES)

    @property
    def start(self) -> int:
        """Where the prompt's region ends and the first response's starts."""
        return self.width - self.labels

    def region(self, slots: np.ndarray) -> np.ndarray:
        """0 in the prompt's region, i in that of response i."""
        return np.where(slots < self.start, 0, 1 + (slots - self.start) // max(self.response, 1))


def layout_of(batch: Batch) -> Layout:
    """The layout of a batch that was packed with one: its labels fill the responses' regions."""
    labels, n = batch.owners.shape[1], batch.last.shape[1]
    return Layout(batch.tokens.shape[1] - labels, labels // max(n, 1), n)


@dataclass(frozen=True)
class Encoded:
    """`data` holds row `kept[i]` of the file in its i-th row."""

    data: Batch
    kept: list[int]

    def rows(self, rows: Sequence[dict]) -> list[dict]:
        return [rows[i] for i in self.kept]


def fit_prompt(ids: list[int], limits: Limits, closing: int = 1) -> list[int] | None:
    """The prompt within its limit (the `closing` tokens that open the response stay), or None where the row must go."""
    if len(ids) <= limits.prompt:
        return ids
    if limits.overlong == "keep-start":
        return [*ids[: limits.prompt - closing], *ids[len(ids) - closing :]]
    return ids[-limits.prompt :] if limits.overlong == "keep-end" else None


def encode(
    codec: Codec, rows: Sequence[dict[str, Any]], fields: Sequence[str], limits: Limits, source: str = "",
    regions: bool = False,
) -> Encoded:
    """Token arrays of the rows' prompts with the responses named by `fields`, their columns where present.

    The limit of responses is for data. A text that a policy sampled may encode to more tokens than were sampled; it
    is kept, so that what is computed of the samples is of all samples.

    `source` names the file that a user gave, and prints what did not fit; rows that an earlier stage took are silent.
    With `regions` all rows have one static layout.
    """
    pieces, kept, cut = [], [], 0
    for i, row in enumerate(rows):
        ids = codec.prompt_ids(row["prompt"])
        prompt = fit_prompt(ids, limits, len(codec.closing))
        responses = [codec.response_ids(row[f], row.get(f"{f}_complete", True)) for f in fields]
        bounded = [len(r) for f, r in zip(fields, responses, strict=True) if f in RESPONSES]
        if prompt is None or max(bounded, default=0) > limits.response:
            if limits.overlong == "error":
                raise DataError(f"{source}: row {i + 1}: longer than {limits.prompt} + {limits.response} tokens")
            continue
        cut += len(prompt) < len(ids)
        pieces.append((prompt, responses))
        kept.append(i)
    report(source, len(rows), len(kept), cut, limits)
    layout = common_layout(pieces, limits, len(fields)) if regions else None
    return Encoded(pack(pieces, [rows[i] for i in kept], fields, layout, codec.pad), kept)


def common_layout(pieces: Pieces, limits: Limits, n: int) -> Layout:
    """As wide as the limits allow, so that every file has the same, and as sampled responses need."""
    return Layout(limits.prompt, max(limits.response, *(len(r) for _, rs in pieces for r in rs), 0), n)


def report(source: str, total: int, kept: int, cut: int, limits: Limits) -> None:
    if not kept:
        raise DataError(f"{source}: all {total} rows are longer than {limits.prompt} + {limits.response} tokens")
    if source and (kept < total or cut):
        bounds = f"{limits.prompt} prompt + {limits.response} response tokens"
        lost = f"{total - kept} of {total} rows over {bounds} dropped, {cut} prompts cut ({limits.overlong})"
        console.print(f"  {source}: {lost}", markup=False)


def pack(
    pieces: Pieces, rows: list[dict], fields: Sequence[str], layout: Layout | None = None, pad: int = PAD
) -> Batch:
    """Rows one piece after another without a gap, or in the regions of `layout`."""
    n = len(fields)
    if layout:
        check_regions(pieces, layout, n)
        width, labels = layout.width, layout.labels
    else:
        width = round_up(max(len(p) + sum(map(len, rs)) for p, rs in pieces))
        labels = round_up(max((sum(map(len, rs)) for _, rs in pieces), default=0))
    packed = [pack_row(prompt, responses, width, labels, layout, pad) for prompt, responses in pieces]
    arrays: list[Any] = [np.stack(column) for column in zip(*packed, strict=True)]
    return Batch._make([*arrays, ref_logps(rows, fields), scores(rows, n)])


def check_regions(pieces: Pieces, layout: Layout, n: int) -> None:
    """Errors: DataError where a row has another number of responses than the layout, or a piece over its region."""
    if n != layout.responses:
        raise DataError(f"{layout}: has {layout.responses} responses, the rows have {n}")
    prompt = max(len(p) for p, _ in pieces)
    response = max((len(r) for _, rs in pieces for r in rs), default=0)
    for name, longest, region in (("prompt", prompt, layout.start), ("response", response, layout.response)):
        if longest > region:
            raise DataError(f"{layout}: a {name} of {longest} tokens does not fit its region of {region}")


def round_up(length: int, multiple: int = 8) -> int:
    """Few distinct shapes, so few compilations."""
    return -(-length // multiple) * multiple


def pack_row(
    prompt: list[int], responses: list[list[int]], width: int, labels: int, layout: Layout | None = None, pad: int = PAD
) -> tuple[np.ndarray, ...]:
    """One row's tokens, positions, segments, labels, predictors, owners and last slots; see `minipref.sequences`."""
    p, lengths = len(prompt), np.array([len(r) for r in responses], int)
    flat = [token for response in responses for token in response]
    owners = np.repeat(np.arange(len(responses)), lengths)
    offsets = np.concatenate([np.arange(length) for length in lengths]) if responses else np.arange(0)
    starts = layout.response * np.arange(len(responses)) if layout else np.cumsum(lengths) - lengths
    base = layout.start if layout else p
    at = starts[owners] + offsets
    slots = [*range(p), *(base + at)]
    return (
        place([*prompt, *flat], slots, width, pad),
        place([*range(p), *(p + offsets)], slots, width, 0),
        place([*[0] * p, *(owners + 1)], slots, width, -1),
        place(flat, at, labels, pad),
        place(np.where(offsets == 0, p - 1, base + at - 1), at, labels, 0),
        place(owners, at, labels, len(responses)),
        np.where(lengths, base + starts + lengths - 1, p - 1).astype(np.int32),
    )


def place(values: Any, slots: Any, width: int, pad: int) -> np.ndarray:
    filled = np.full(width, pad, np.int32)
    filled[slots] = values
    return filled


def ref_logps(rows: list[dict], fields: Sequence[str]) -> np.ndarray:
    """[N, n] of the columns that `score --reference` adds; [N, 0] where the file has none."""
    names = [REF_LOGPS[f] for f in fields if f in REF_LOGPS]
    have = [name for name in names if name in rows[0]]
    return np.asarray([[row[name] for name in have] for row in rows], np.float32).reshape(len(rows), len(have))


def scores(rows: list[dict], n: int) -> np.ndarray:
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
    return np.asarray([permutation(n, seed, int(i // n))[i % n] for i in at])


def take(data: Batch, indices: np.ndarray) -> Batch:
    return jax.tree.map(lambda a: a[indices], data)
