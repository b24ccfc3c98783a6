"""All cases are put to one implementation, and the results are reported."""

import sys
from collections import Counter, defaultdict
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from reference.conformance.cases import Case, load_cases
from reference.conformance.judge import RAISED, Adapter, Result, dtype_of, followed, judge

OUTCOMES = ("passed", "failed", "skipped", "errored")
BAD = ("failed", "errored")


class Report(NamedTuple):
    """The results of one implementation.

    Attributes:
        results: one for each case.
        follows: what it does in place of what it claims, both as `objective/dialect`.
        expected_failures: ids of cases that are known to fail.
    """

    results: list[Result]
    follows: dict[str, list[str]]
    expected_failures: frozenset[str]

    @property
    def unexpected(self) -> list[Result]:
        """Failures and errors that were not expected."""
        return [
            r for r in self.results if r.outcome in BAD and r.case.id not in self.expected_failures
        ]

    @property
    def mended(self) -> list[str]:
        """Ids of expected failures that passed."""
        return [
            r.case.id
            for r in self.results
            if r.outcome == "passed" and r.case.id in self.expected_failures
        ]


def run(
    adapter: Adapter,
    cases: list[Case],
    expected_failures: frozenset[str] = frozenset(),
    dtype: str | None = None,
) -> Report:
    """Put cases to an implementation.

    Args:
        adapter: the implementation.
        cases: the cases, in any order.
        expected_failures: ids of cases that are known to fail.
        dtype: how exact the answers must be, in place of what the adapter says of itself.

    Returns:
        The report.
    """
    results = [judge(adapter, case, dtype) for case in cases]
    wrong = [r for r in results if r.outcome == "failed" and r.case.result == "value"]
    follows = {}
    for name, group in groupby(sorted(wrong, key=_dialect), key=_dialect):
        if dialects := followed(adapter, [r.case for r in group], dtype):
            follows[name] = [f"{name.split('/')[0]}/{dialect}" for dialect in dialects]
    return Report(results, follows, expected_failures)


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
    try:
        adapter = getattr(import_module(module), attribute)
        dtype_of(adapter)
    except RAISED as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
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


def table(report: Report) -> str:
    """The report as text.

    Args:
        report: what `run` returned.

    Returns:
        One line for each objective, dialect and flag, then the unexpected failures, then the
        dialects that are followed in place of the claimed ones, then the totals.
    """
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for result in report.results:
        for flag in result.case.flags or ("-",):
            counts[_name(result.case), flag][result.outcome] += 1
    lines = [f"{'objective/dialect':<26}{'flag':<26}" + "".join(f"{name:>9}" for name in OUTCOMES)]
    for (name, flag), outcomes in counts.items():
        if outcomes["skipped"] < outcomes.total():
            lines.append(
                f"{name:<26}{flag:<26}" + "".join(f"{outcomes[o] or '.':>9}" for o in OUTCOMES)
            )
    return "\n".join([*lines, "", *_findings(report), summary(report)])


def summary(report: Report) -> str:
    """The totals of a report, in one line.

    Args:
        report: what `run` returned.

    Returns:
        The number of cases by outcome.
    """
    totals = Counter(result.outcome for result in report.results)
    line = ", ".join(f"{totals[name]} {name}" for name in OUTCOMES)
    expected = totals["failed"] + totals["errored"] - len(report.unexpected)
    note = f" ({expected} as expected)" if expected else ""
    return f"{len(report.results)} cases: {line}{note}"


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs.

    Args:
        report: what `run` returned.

    Returns:
        results, follows, totals, unexpected and mended, as plain JSON.
    """
    outcomes = [result.outcome for result in report.results]
    return {
        "results": [_result_as_json(result, report) for result in report.results],
        "follows": report.follows,
        "totals": {name: outcomes.count(name) for name in OUTCOMES},
        "unexpected": [result.case.id for result in report.unexpected],
        "mended": report.mended,
    }


def _result_as_json(result: Result, report: Report) -> dict[str, Any]:
    return {
        "id": result.case.id,
        "objective": result.case.objective,
        "dialect": result.case.dialect,
        "flags": result.case.flags,
        "outcome": result.outcome,
        "expected_failure": result.case.id in report.expected_failures,
        "detail": result.detail,
        "unchecked": result.unchecked,
    }


def _findings(report: Report) -> list[str]:
    lines = []
    for result in report.unexpected:
        flags = ", ".join(result.case.flags)
        lines.append(f"{result.outcome.upper()} {result.case.id} ({flags}): {result.case.comment}")
        lines.append(f"    {result.detail}")
    lines += [
        f"{name} in fact follows {' or '.join(others)}" for name, others in report.follows.items()
    ]
    lines += [f"MENDED {name}: an expected failure that passed" for name in report.mended]
    unchecked = Counter(name for r in report.results for name in r.unchecked)
    if unchecked:
        lines.append(
            "not reported, so not checked: "
            + ", ".join(f"{n} x {name}" for name, n in unchecked.items())
        )
    unsupported = sorted({_name(r.case) for r in report.results if r.outcome == "skipped"})
    if unsupported:
        lines.append("not supported: " + ", ".join(unsupported))
    return lines


def _name(case: Case) -> str:
    return f"{case.objective}/{case.dialect}"


def _dialect(result: Result) -> str:
    return _name(result.case)


def cases_named(name: str | None) -> list[Case]:
    """The cases that `--only` selects.

    Args:
        name: `objective` or `objective/dialect`; None selects all.

    Returns:
        The cases.

    Raises:
        ValueError: there are none.
    """
    return load_cases(*name.split("/", 1)) if name else load_cases()
