"""A report as text."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby

from reference.conformance.evidence import size_of
from reference.conformance.judge import Result
from reference.conformance.report import OUTCOMES, Report, dialect_of
from reference.conformance.sentences import together


def table(report: Report) -> str:
    """The whole report.

    Args:
        report: what `run` returned.

    Returns:
        One line for each objective and dialect, then the unexpected failures, then what is computed
        in place of what is claimed, then the totals.
    """
    lines = [f"{'objective/dialect':<26}" + "".join(f"{name:>9}" for name in OUTCOMES)]
    for name, group in groupby(sorted(report.results, key=dialect_of), key=dialect_of):
        outcomes = Counter(result.outcome for result in group)
        if outcomes["skipped"] < outcomes.total():
            lines.append(f"{name:<26}" + "".join(f"{outcomes[o] or '.':>9}" for o in OUTCOMES))
    return "\n".join([*lines, "", *_unsupported(report), *_findings(report), summary(report)])


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


def _findings(report: Report) -> list[str]:
    lines: list[str] = []
    unknown = {d.furthest.id for d in report.diagnoses if not d.known}
    known = {d.dialect for d in report.diagnoses if d.known}
    for name, group in groupby(report.unexpected, key=dialect_of):
        lines += _failures(list(group), unknown, most=1 if name in known else 3)
    lines += [
        f"NOTED {r.case.id}: {r.case.comment}; {r.detail}"
        for r in report.results
        if r.outcome == "noted"
    ]
    lines += together(report.diagnoses)
    lines += [
        f"SEARCH FAILED {name}: {error}; this is an error of the kit, not of the implementation"
        for name, error in report.search_errors.items()
    ]
    lines += [f"MENDED {name}: an expected failure that passed" for name in report.mended]
    unchecked = Counter(name for r in report.results for name in r.unchecked)
    if unchecked:
        lines.append(
            "not reported, so not checked: "
            + ", ".join(f"{n} x {name}" for name, n in unchecked.items())
        )
    return lines


def _unsupported(report: Report) -> Iterator[str]:
    """The objectives, or single dialects, that the implementation does not have."""
    skipped = {dialect_of(r) for r in report.results if r.outcome == "skipped"}
    others = {dialect_of(r).split("/")[0] for r in report.results if r.outcome != "skipped"}
    names = {n if n.split("/")[0] in others else f"{n.split('/')[0]}/*" for n in skipped}
    if names:
        yield f"not supported: {', '.join(sorted(names))}"


def _failures(results: list[Result], furthest: set[str], most: int) -> Iterator[str]:
    """Failures of one dialect with their numbers: the smallest case, and of one that is unknown the
    case with the largest difference and the largest; and the names of the others."""
    smallest, *rest = sorted(results, key=lambda result: size_of(result.case))
    telling = sorted(rest, key=lambda result: result.case.id not in furthest)
    shown = [smallest, *telling[:1], *telling[1:][-1:]][:most]
    for result in shown:
        yield f"{result.outcome.upper()} {result.case.id}: {result.case.comment}"
        yield f"    {result.detail}"
    ids = {result.case.id for result in shown}
    if others := [r.case.id.rpartition("/")[2] for r in telling if r.case.id not in ids]:
        yield f"{len(others)} more of {dialect_of(results[0])}: {', '.join(others)}"
