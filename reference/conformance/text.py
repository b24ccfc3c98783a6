"""A report as text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

from reference.conformance.cases import Case
from reference.conformance.diagnosis import REFUSALS, Diagnosis, Part
from reference.conformance.evidence import size_of
from reference.conformance.flags import FLAGS
from reference.conformance.judge import Result
from reference.conformance.report import OUTCOMES, Report, dialect_of


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


def sentences(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis in words.

    Args:
        diagnosis: what `diagnose` returned.

    Returns:
        One line for what is computed, or one for each group of wrong outputs, then how to mend it.
    """
    lines = [_sentence(diagnosis, part) for part in diagnosis.parts]
    return lines + list(_remedies(diagnosis))


def _sentence(diagnosis: Diagnosis, part: Part) -> str:
    names, outputs = " or ".join(h.name for h in part.hypotheses), _listed(part.outputs)
    if part.outputs == (REFUSALS,):
        like = f", as {names}" if names else ""
        return f"{diagnosis.dialect} accepts what it should refuse{like}"
    if not part.hypotheses:
        told = [f"{diagnosis.dialect} is unknown, no named mistake gives its {outputs}"]
        right = [f"right: {_listed(diagnosis.right)}"] if diagnosis.right else []
        return "; ".join([*told, *right, *_telling(diagnosis)])
    if diagnosis.whole:
        return f"{diagnosis.dialect} in fact computes {names}{_symbols(names)}"
    return f"{diagnosis.dialect} in fact computes {outputs} of {names}{_symbols(names)}"


def _listed(outputs: Sequence[str]) -> str:
    """Names of outputs; several gradients, or metrics, in one word."""
    kinds = groupby(sorted(outputs), key=lambda name: name.split(".")[0])
    groups = [(kind, list(names)) for kind, names in kinds]
    words = {"grads": "gradients", "metrics": "metrics"}
    return ", ".join(words[kind] if len(names) > 1 else names[0] for kind, names in groups)


def _symbols(names: str) -> str:
    """What stands for what in a formula."""
    return ", where L is -log sigmoid" if "with the loss" in names and "L(" in names else ""


def _telling(diagnosis: Diagnosis) -> Iterator[str]:
    """What the failing cases say of an unknown output."""

    def named(case: Case) -> str:
        return f"{case.id} ({case.comment})"

    yield f"the smallest failing case is {named(diagnosis.smallest)}"
    if diagnosis.furthest is not diagnosis.smallest:
        yield f"the largest difference is in {named(diagnosis.furthest)}"
    if diagnosis.common:
        yield diagnosis.common


def _remedies(diagnosis: Diagnosis) -> Iterator[str]:
    """How to mend each mistake, or what to do where another dialect is computed."""
    yield from (f"    {name}: {FLAGS[name].remedy}" for name in diagnosis.flags)
    others = [h.name for p in diagnosis.parts for h in p.hypotheses if not h.cost]
    for name in dict.fromkeys(name for name in others if name != diagnosis.dialect):
        yield f"    {name} is another dialect: claim it, or compare the equations in the guide"


def _findings(report: Report) -> list[str]:
    lines: list[str] = []
    furthest = {diagnosis.furthest.id for diagnosis in report.diagnoses}
    for _, group in groupby(report.unexpected, key=dialect_of):
        lines += _failures(list(group), furthest)
    lines += [
        f"NOTED {r.case.id}: {r.case.comment}; {r.detail}"
        for r in report.results
        if r.outcome == "noted"
    ]
    lines += _together(report.diagnoses)
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


def _failures(results: list[Result], furthest: set[str]) -> Iterator[str]:
    """Failures of one dialect with their numbers: the smallest case, that of the largest difference
    and the largest case; and the names of the others."""
    smallest, *rest = sorted(results, key=lambda result: size_of(result.case))
    telling = sorted(rest, key=lambda result: result.case.id not in furthest)
    for result in [smallest, *telling[:1], *telling[1:][-1:]]:
        yield f"{result.outcome.upper()} {result.case.id}: {result.case.comment}"
        yield f"    {result.detail}"
    if others := [result.case.id.rpartition("/")[2] for result in telling[1:-1]]:
        yield f"{len(others)} more of {dialect_of(results[0])}: {', '.join(others)}"


def _together(diagnoses: list[Diagnosis]) -> Iterator[str]:
    """Diagnoses in words; what mends those of several dialects comes once, after the last."""
    groups: dict[tuple[str, ...], list[Diagnosis]] = {}
    for diagnosis in diagnoses:
        groups.setdefault(tuple(_remedies(diagnosis)), []).append(diagnosis)
    for remedies, group in groups.items():
        parts = [(diagnosis, part) for diagnosis in group for part in diagnosis.parts]
        parts.sort(key=lambda both: bool(both[1].hypotheses))  # what is mended comes last
        yield from (_sentence(*both) for both in parts)
        yield from remedies
