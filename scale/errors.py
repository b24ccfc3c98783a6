"""The error for what a user gave: a file, a field, an option."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 1000  # characters of a message
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def option_name(field: str) -> str:
    """The option of a field: `--learning-rate` of `learning_rate`."""
    return f"--{field.replace('_', '-')}"


def one_line(message: str) -> str:
    """A message as one line of bearable length, without what controls a terminal."""
    line = CONTROL.sub(" ", message).strip()
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."


class InputError(ValueError):
    """A message that names the place: `FILE:LINE: field 'F': ...`, `FILE: row 3: ...`, `--option`.

    Lines and rows count from 1. The command line prints the message alone, without a traceback.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def reason_of(error: Exception) -> str:
    """What an error says; its kind, where it says nothing, as MemoryError does."""
    return str(error) or type(error).__name__


@contextmanager
def as_input_error(path: Path) -> Iterator[None]:
    """Raise whatever goes wrong in reading `path` as InputError: libraries that read files, and
    values of unexpected types, raise nothing narrower than Exception."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error
