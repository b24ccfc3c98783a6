"""What a run is asked for: the adapter, the cases, and those that are known to fail."""

import sys
from importlib import import_module
from pathlib import Path

from reference.conformance.cases import Case, load_cases
from reference.conformance.judge import Adapter, attempted, dtype_of, words


def load_adapter(path: str) -> Adapter:
    """Import an adapter.

    Args:
        path: `module:attribute`.

    Returns:
        The adapter.

    Raises:
        ValueError: there is no such module or attribute, or it is no adapter.
    """
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"{path}: must be module:attribute")
    if "" not in sys.path:
        sys.path.insert(0, "")
    adapter, error = attempted(lambda: getattr(import_module(module), attribute))
    if error is None:
        _, error = attempted(lambda: dtype_of(adapter))
    if error:
        raise ValueError(f"{path}: {words(error)}") from error
    lacking = [
        name for name in ("supports", "evaluate") if not callable(getattr(adapter, name, None))
    ]
    if lacking:
        raise ValueError(f"{path}: has no {' and no '.join(lacking)}")
    return adapter


def read_expected_failures(path: Path, cases: list[Case]) -> frozenset[str]:
    """Read the ids of cases that are known to fail.

    Args:
        path: a file with one case id a line, where `#` begins a comment.
        cases: all cases.

    Returns:
        The ids.

    Raises:
        ValueError: an id is unknown; the text names its line.
    """
    known, listed = {case.id for case in cases}, set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name = line.partition("#")[0].strip()
        if name and name not in known:
            raise ValueError(f"{path}:{number}: no case {name!r}")
        listed.add(name)
    return frozenset(listed - {""})


def cases_named(names: list[str] | None) -> list[Case]:
    """The cases that `--only` selects.

    Args:
        names: `objective` or `objective/dialect`; None selects all.

    Returns:
        The cases.

    Raises:
        ValueError: there are none of a name.
    """
    if names is None:
        return load_cases()
    named = {case.id: case for name in names for case in load_cases(*name.split("/", 1))}
    return list(named.values())
