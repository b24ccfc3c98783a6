"""All cases are put to one implementation: what came of them, what it computes, and the text."""

from collections import Counter
from itertools import groupby
from typing import NamedTuple

from reference.conformance.cases import Case
from reference.conformance.diagnosis import REFUSALS, Diagnosis, Part, diagnose
from reference.conformance.flags import FLAGS, is_note
from reference.conformance.judge import Adapter, Result, dtype_of, judge

OUTCOMES = ("passed", "noted", "failed", "skipped", "errored")
BAD = ("failed", "errored")


class Report(NamedTuple):
    """The results of one implementation.

    Attributes:
        results: one for each case; "noted" is a failure that is a convention.
        diagnoses: what it computes in place of what it claims, one for each failing dialect.
        expected_failures: ids of cases that are known to fail.
    """

    results: list[Result]
    diagnoses: list[Diagnosis]
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

    @property
    def follows(self) -> dict[str, list[str]]:
        """The dialects that it follows in place of those that it claims, whatever its metrics."""
        return {d.dialect: names for d in self.diagnoses if (names := _followed(d))}


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
    diagnoses: dict[str, Diagnosis] = {}
    for name, group in groupby(sorted(results, key=_dialect), key=_dialect):
        judged = list(group)
        failed = {r.case.id for r in judged if r.outcome == "failed"}
        asked = [r.case for r in judged]
        found = diagnose(adapter, asked, failed, dtype or dtype_of(adapter)) if failed else None
        diagnoses |= {name: found} if found else {}
    noted = [_noted(result, diagnoses.get(_dialect(result))) for result in results]
    return Report(noted, list(diagnoses.values()), expected_failures)


def table(report: Report) -> str:
    """The report as text.

    Args:
        report: what `run` returned.

    Returns:
        One line for each objective and dialect, then the unexpected failures, then what is computed
        in place of what is claimed, then the totals.
    """
    lines = [f"{'objective/dialect':<26}" + "".join(f"{name:>9}" for name in OUTCOMES)]
    for name, group in groupby(sorted(report.results, key=_dialect), key=_dialect):
        outcomes = Counter(result.outcome for result in group)
        if outcomes["skipped"] < outcomes.total():
            lines.append(f"{name:<26}" + "".join(f"{outcomes[o] or '.':>9}" for o in OUTCOMES))
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


def sentences(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis in words.

    Args:
        diagnosis: what `diagnose` returned.

    Returns:
        One line for what is computed, or one for each group of wrong outputs, then how to mend it.
    """
    lines = [_sentence(diagnosis, part) for part in diagnosis.parts]
    return lines + [f"    {name}: {FLAGS[name].remedy}" for name in diagnosis.flags]


def _sentence(diagnosis: Diagnosis, part: Part) -> str:
    names = " or ".join(hypothesis.name for hypothesis in part.hypotheses)
    if part.outputs == (REFUSALS,):
        like = f", as {names}" if names else ""
        return f"{diagnosis.dialect} accepts what it should refuse{like}"
    if not part.hypotheses:
        what, case = ", ".join(part.outputs), diagnosis.smallest
        smallest = f"the smallest failing case is {case.id} ({case.comment})"
        told = [f"{what}: unknown, no named mistake does this", smallest, diagnosis.common]
        return f"{diagnosis.dialect}: {'; '.join(filter(None, told))}"
    if diagnosis.whole:
        return f"{diagnosis.dialect} in fact computes {names}"
    return f"{diagnosis.dialect}: {', '.join(part.outputs)} as of {names}"


def _noted(result: Result, diagnosis: Diagnosis | None) -> Result:
    """A failure is a note where what is accepted, or all that is wrong, is a convention."""
    accepted = result.case.result == "reject" and is_note(result.case.flags, True)
    parts = diagnosis.parts if diagnosis and diagnosis.known else ()
    convention = accepted or (bool(parts) and all(map(_is_convention, parts)))
    return result._replace(outcome="noted") if _failed(result) and convention else result


def _is_convention(part: Part) -> bool:
    return all(is_note(h.flags, part.outputs == (REFUSALS,)) for h in part.hypotheses)


def _failed(result: Result) -> bool:
    return result.outcome == "failed"


def _followed(diagnosis: Diagnosis) -> list[str]:
    first, *rest = diagnosis.parts
    small = all(o.startswith("metrics") or o == REFUSALS for part in rest for o in part.outputs)
    return [h.name for h in first.hypotheses if not h.cost] if small else []


def _findings(report: Report) -> list[str]:
    lines = []
    for result in report.unexpected:
        lines.append(f"{result.outcome.upper()} {result.case.id}: {result.case.comment}")
        lines.append(f"    {result.detail}")
    lines += [
        f"NOTED {r.case.id}: {r.case.comment}; {r.detail}"
        for r in report.results
        if r.outcome == "noted"
    ]
    said = (line for diagnosis in report.diagnoses for line in sentences(diagnosis))
    lines += dict.fromkeys(said)  # one remedy for all dialects
    lines += [f"MENDED {name}: an expected failure that passed" for name in report.mended]
    unchecked = Counter(name for r in report.results for name in r.unchecked)
    if unchecked:
        lines.append(
            "not reported, so not checked: "
            + ", ".join(f"{n} x {name}" for name, n in unchecked.items())
        )
    unsupported = sorted({_dialect(r) for r in report.results if r.outcome == "skipped"})
    if unsupported:
        lines.append("not supported: " + ", ".join(unsupported))
    return lines


def _dialect(result: Result) -> str:
    return f"{result.case.objective}/{result.case.dialect}"
