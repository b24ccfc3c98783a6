"""The rows of a file of any size, which are read again as they are needed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from scale.data.formats import Row
from scale.data.hub_rows import row_files
from scale.data.pieces import Piece, pieces
from scale.data.rows import checked
from scale.data.token_cache import entry, key_of
from scale.files import fingerprint
from scale.parallel.processes import main_first


@dataclass(frozen=True, eq=False)
class Table(Sequence[Row]):
    """Checked rows of a file, or some of them. Only what is asked for is in memory."""

    path: Path
    need: tuple[str, ...]
    """Fields that every row has."""
    contents: str
    """The hash of the file, or of the files."""
    num_rows: int
    """Rows of the file."""
    mask: np.ndarray | None = None
    """Which rows of the file these are. Default: all."""

    def __len__(self) -> int:
        return self.num_rows if self.mask is None else int(self.mask.sum())

    def __iter__(self) -> Iterator[Row]:
        for piece in self.pieces():
            yield from piece.rows(self.need)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """A row, or several; the rows before them are read too."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(islice(self, start, stop, step))
        [row] = self[range(len(self))[index] :][:1] if index else [self.first]
        return row

    @cached_property
    def first(self) -> Row:
        """The first row."""
        return next(iter(self))

    @property
    def identity(self) -> list[str]:
        """What the rows are: the contents of their files, how they are read, and which they are."""
        mask = b"" if self.mask is None else np.packbits(self.mask).tobytes()
        return [self.contents, *self.need, key_of(mask.hex())]

    def pieces(self) -> Iterator[Piece]:
        """The rows, some at a time; a piece may be empty."""
        start = 0
        for piece in pieces(self.path):
            stop = start + len(piece)
            yield piece if self.mask is None else piece.where(self.mask[start:stop])
            start = stop

    def where(self, mask: np.ndarray) -> "Table":
        """The rows whose value in `mask` is true [N]."""
        own = np.arange(self.num_rows) if self.mask is None else np.flatnonzero(self.mask)
        chosen = np.zeros(self.num_rows, bool)
        chosen[own[mask]] = True
        return replace(self, mask=chosen)


def scan(path: Path, need: tuple[str, ...] = ("prompt", "chosen", "rejected")) -> Table:
    """Check the rows of a file, without keeping them.

    A file that was checked before, by any command, is not read again. Of several processes, process
    0 reads the file while the others wait.

    Args:
        path: As `scale.data.rows.read` takes it.
        need: Fields that every row must have.

    Returns:
        The rows.

    Raises:
        InputError: As `read`.
    """
    contents = fingerprint(*row_files(path))

    def count(_: Path) -> int:
        return sum(1 for _ in checked(path, need))

    _, rows = main_first(lambda: entry(["checked", contents, *need], count))
    return Table(path, need, contents, rows)
