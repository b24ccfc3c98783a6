"""Rows of text to token ids and targets; a batch is a function of (rows, seed, step)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from itertools import compress
from typing import Any, Literal, overload

import jax
import numpy as np

from minipref.batch import Batch, Targets
from scale.console import console
from scale.data.encoding import (
    Arrays,
    Chunk,
    Counts,
    Encoded,
    columns_of,
    encoded,
    joined,
    load,
    names_in,
    stored,
)
from scale.data.formats import RESPONSES, SCORES, SIDES
from scale.data.layout import BatchShape, Layout, smallest_shape
from scale.data.packing import TokenizedRows, pack, tokenized_rows
from scale.data.pieces import place
from scale.data.table import Table
from scale.data.token_cache import entry
from scale.data.tokenizer import PAD, RefusedRow, Tokenizer
from scale.errors import InputError
from scale.parallel.processes import main_first

REF_LOGPS = {
    "chosen": "ref_chosen_logps",
    "rejected": "ref_rejected_logps",
    "ref_sample": "ref_sample_logps",
}


@dataclass(frozen=True)
class Limits:
    """How long a row may be, and what happens to a longer one; the counts are printed."""

    prompt: int = 64
    """Tokens of a prompt, at most."""
    response: int = 32
    """Tokens of a response, at most, its end-of-sequence token included."""
    truncation_side: Literal["left", "right"] | None = None
    """Where a longer prompt is cut: left keeps its end, right its start. None: it is not cut.
    Responses are never cut."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to a row that is still too long: it is dropped, or the command stops."""


@dataclass(frozen=True)
class Dataset:
    """Tokenized rows with the targets of their losses."""

    tokens: TokenizedRows
    targets: Targets
    """The targets of all rows, as NumPy arrays."""
    kept: np.ndarray
    """Row i is row `kept[i]` of the file."""
    layout: Layout | None = None
    pad: int = PAD

    def __len__(self) -> int:
        return len(self.kept)

    @cached_property
    def all(self) -> Batch:
        """All rows, one in each sequence."""
        return self.batch(np.arange(len(self)), self.shape(len(self)))

    def shape(self, rows: int) -> BatchShape:
        """A shape for any `rows` rows, one in each sequence."""
        if self.layout:
            return self.layout.shape(rows)
        return smallest_shape(self.tokens.lengths, len(self))._replace(num_sequences=rows)

    def batch(self, indices: np.ndarray, shape: BatchShape, parts: int = 1) -> Batch:
        """These rows; in several parts of one shape the inputs have a leading axis for them."""
        inputs = [
            pack(self.tokens.take(part), shape, self.layout, self.pad)
            for part in np.split(indices, parts)
        ]
        packed = jax.tree.map(lambda *arrays: np.stack(arrays), *inputs) if parts > 1 else inputs[0]
        return Batch(packed, take(self.targets, indices))

    def head(self, n: int) -> "Dataset":
        """The first n rows, or all where there are fewer."""
        rows = np.arange(min(n, len(self)))
        columns = self.tokens.take(rows), take(self.targets, rows), self.kept[rows]
        return Dataset(*columns, self.layout, self.pad)

    def mask(self, total: int) -> np.ndarray:
        """Which of all rows of the file are in the dataset [total]."""
        mask = np.zeros(total, bool)
        mask[self.kept] = True
        return mask

    @overload
    def select(self, rows: Table) -> Table: ...
    @overload
    def select(self, rows: list[dict]) -> list[dict]: ...

    def select(self, rows: Any) -> Any:
        """The rows of the file that are in the dataset."""
        mask = self.mask(len(rows))
        return rows.where(mask) if isinstance(rows, Table) else [*compress(rows, mask)]


def make_dataset(
    tokenizer: Tokenizer,
    rows: Sequence[dict[str, Any]],
    fields: Sequence[str],
    limits: Limits,
    source: str = "",
    with_layout: bool = False,
) -> Dataset:
    """Tokenize prompts and responses, and read the columns that `score` added.

    The limit of responses is for data. A text that a policy sampled may encode to more tokens than
    were sampled; it is kept, so that what is computed of the samples is of all samples.

    Tokens of a `Table` go to the user's cache and are read from there as needed, whichever command
    made them. Of several processes, process 0 makes them while the others wait.

    Args:
        tokenizer: The tokenizer of the model.
        rows: Rows as `scale.data.rows.read` or `scale.data.table.scan` give them.
        fields: The columns that hold responses.
        limits: How long prompts and responses may be.
        source: The name of the user's file, for messages. Rows of an earlier stage have none, and
            nothing is printed of them.
        with_layout: Whether all rows have one static layout (TPU attention).

    Returns:
        The dataset.

    Raises:
        InputError: No row fits the limits, or one does not and `limits.overlong` is "error".
    """
    if not len(rows):
        raise InputError(f"{source}: there are no rows")
    encode = Encoder(tokenizer, tuple(fields), limits, source)
    arrays, counts = tokenize(encode, rows)
    warn_of_names(source, counts)
    report(source, counts, limits)
    tokens = TokenizedRows(arrays.ids, arrays.ends)
    targets = Targets(arrays.ref_logps, arrays.rewards)  # type: ignore[arg-type]  # NumPy arrays
    layout = common_layout(tokens, limits) if with_layout else None
    return Dataset(tokens, targets, arrays.kept, layout, tokenizer.pad)


def tokenize(encode: "Encoder", rows: Sequence[dict[str, Any]]) -> Encoded:
    """The arrays of all rows, from the user's cache where they are a table."""
    chunks = encoded(encode, rows)
    if not isinstance(rows, Table):
        return joined(chunks)
    inputs = ["tokens", *rows.identity, *encode.identity]
    folder, counts = main_first(lambda: entry(inputs, partial(stored, chunks)))
    return load(folder), Counts(*counts)


@dataclass(frozen=True)
class Encoder:
    """Makes tokens and targets of rows; its arguments are those of `make_dataset`."""

    tokenizer: Tokenizer
    fields: tuple[str, ...]
    limits: Limits
    source: str

    @property
    def identity(self) -> list[Any]:
        """All that the tokens of a row depend on."""
        return [self.tokenizer.identity, self.fields, asdict(self.limits)]

    def __call__(self, chunk: Chunk) -> Encoded:
        rows = chunk.read()
        parts, kept, cut, identical = [], [], 0, 0
        for i, (ids, *responses) in enumerate(self.tokens(chunk.start, rows)):
            prompt = truncate(ids, self.limits, len(self.tokenizer.generation_prompt))
            if self.fields[:2] == SIDES and responses[0] == responses[1]:
                identical += 1
            elif self.fits(prompt, responses):
                parts.append((prompt, responses))
                kept.append(i)
                cut += len(prompt) < len(ids)
            elif self.limits.overlong == "error":
                where = place(self.source, chunk.start + i + 1)
                raise InputError(f"{where}: longer than {length_limits(self.limits)} tokens")
        spelled = names_in(self.tokenizer, rows, self.fields)
        first = chunk.start + spelled[0] if spelled else -1
        counts = Counts(len(rows), len(kept), cut, identical, len(spelled), first)
        tokens = tokenized_rows(parts)
        ends = tokens.ends.reshape(len(kept), 1 + len(self.fields))
        targets = read_targets([rows[i] for i in kept] or rows[:1], self.fields)
        ref_logps, rewards = (np.asarray(array)[: len(kept)] for array in targets)
        indices = chunk.start + np.asarray(kept, int)
        return Arrays(indices, tokens.ids, ends, ref_logps, rewards), counts

    def tokens(self, start: int, rows: Sequence[dict[str, Any]]) -> Iterator[tuple[list[int], ...]]:
        """The tokens of the prompt and of each response of the rows."""
        try:
            columns = columns_of(self.tokenizer, self.fields, rows)
        except RefusedRow as error:
            where = place(self.source, start + error.index + 1)
            raise InputError(f"{where}: {error}") from error
        return zip(*columns, strict=True)

    def fits(self, prompt: list[int], responses: Sequence[list[int]]) -> bool:
        """Whether a prompt and the responses that a file gives are within the limits."""
        named = zip(self.fields, responses, strict=True)
        longest = max((len(ids) for name, ids in named if name in RESPONSES), default=0)
        return len(prompt) <= self.limits.prompt and longest <= self.limits.response


def truncate(ids: list[int], limits: Limits, generation_prompt: int = 1) -> list[int]:
    """The prompt, cut to its limit; its last `generation_prompt` tokens, which open the response,
    stay.

    Raises:
        InputError: The limit is below `generation_prompt`.
    """
    if len(ids) <= limits.prompt or limits.truncation_side is None:
        return ids
    if limits.truncation_side == "left":
        return ids[-limits.prompt :]
    if limits.prompt < generation_prompt:
        raise InputError(
            f"--limits.prompt {limits.prompt}: the {generation_prompt} tokens that open a response "
            "do not fit"
        )
    return [*ids[: limits.prompt - generation_prompt], *ids[len(ids) - generation_prompt :]]


def common_layout(tokens: TokenizedRows, limits: Limits) -> Layout:
    """As large as the limits, so that every file has the same, or as sampled responses need."""
    responses = tokens.lengths[:, 1:]
    longest = int(responses.max(initial=limits.response))
    return Layout(limits.prompt, longest, responses.shape[1])


def report(source: str, counts: Counts, limits: Limits) -> None:
    """Say how many rows were dropped and cut."""
    total, kept, cut, identical = counts[:4]
    if identical == total:
        raise InputError(f"{source}: the responses of each pair have the same tokens")
    if not kept:
        raise InputError(
            f"{source}: all {total} rows are longer than {length_limits(limits)} tokens"
        )
    if source and (kept < total or cut):
        bounds = f"{limits.prompt} prompt + {limits.response} response tokens"
        side = f" on the {limits.truncation_side}" if limits.truncation_side else ""
        longer = total - kept - identical
        numbers = {
            f"{longer} of {total} rows over {bounds} dropped": longer,
            f"{identical} pairs of equal tokens dropped": identical,
            f"{cut} prompts cut{side}": cut,
        }
        said = ", ".join(text for text, number in numbers.items() if number)
        console.print(f"  {source}: {said}", markup=False)


def warn_of_names(source: str, counts: Counts) -> None:
    """Say how many rows spell special tokens."""
    if source and counts.spelled:
        first = place(source, counts.first_spelled + 1)
        console.print(
            f"  {source}: {counts.spelled} of {counts.total} rows spell special tokens, the first "
            f"at {first}: they are read as text; a conversation is given as turns",
            markup=False,
        )


def length_limits(limits: Limits) -> str:
    return f"{limits.prompt} + {limits.response}"


def limits_text(limits: Limits) -> str:
    """The options that decide which tokens a kept row has, for its provenance."""
    side = f", truncation-side {limits.truncation_side}" if limits.truncation_side else ""
    return f"prompt {limits.prompt}, response {limits.response}{side}"


def read_targets(rows: Sequence[dict], fields: Sequence[str]) -> Targets:
    """The columns of `score`: log pi_ref [N, n], and rewards [N, 2, K].

    n or K is 0 where the rows have no such columns.
    """
    names = [REF_LOGPS[f] for f in fields if REF_LOGPS.get(f) in rows[0]]
    logps = np.asarray([[row[name] for name in names] for row in rows], np.float32)
    if len(fields) < 2 or "score_chosen" not in rows[0]:
        rewards = np.zeros((len(rows), 2, 0), np.float32)
    else:
        pairs = [[np.atleast_1d(row[name]) for name in SCORES] for row in rows]
        rewards = np.asarray(pairs, np.float32)
    columns = logps.reshape(len(rows), len(names)), rewards
    return Targets(*columns)  # type: ignore[arg-type]  # NumPy arrays


@lru_cache(maxsize=64)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, size: int, seed: int, step: int) -> np.ndarray:
    """The rows of batch `step`: a window on an endless run of permutations, one for each epoch."""
    positions = step * size + np.arange(size)
    epochs, rows = np.divmod(positions, n)
    windows = [permutation(n, seed, e)[rows[epochs == e]] for e in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate(windows)


def take(tree: Any, indices: np.ndarray) -> Any:
    """The rows `indices` of every array."""
    return jax.tree.map(lambda array: array[indices], tree)
