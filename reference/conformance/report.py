"""All cases are put to one implementation: what came of them, and what it computes."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from reference.conformance.cases import Case
from reference.conformance.diagnosis import REFUSALS, Diagnosis, Part, diagnose
from reference.conformance.flags import is_note
from reference.conformance.judge import Adapter, Result, attempted, dtype_of, judge

OUTCOMES = ("passed", "noted", "failed", "skipped", "errored")
BAD = ("failed", "errored")


class Report(NamedTuple):
    """The results of one implementation.

    Attributes:
        results: one for each case; "noted" is a failure that is a convention.
        diagnoses: what it computes in place of what it claims, one for each failing dialect.
        expected_failures: ids of cases that are known to fail.
        search_errors: dialects whose search failed by an error of the kit, and the error.
    """

    results: list[Result]
    diagnoses: list[Diagnosis]
    expected_failures: frozenset[str]
    search_errors: dict[str, str]

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
    announce: Callable[[str], object] = lambda dialect: None,
) -> Report:
    """Put cases to an implementation.

    Args:
        adapter: the implementation.
        cases: the cases, in any order.
        expected_failures: ids of cases that are known to fail.
        dtype: how exact the answers must be, in place of what the adapter says of itself.
        announce: is called with each failing dialect before the search, which may take a minute.

    Returns:
        The report.
    """
    results = [judge(adapter, case, dtype) for case in cases]
    diagnoses, errors = dict[str, Diagnosis](), dict[str, str]()
    for name, asked in _failing(results).items():
        announce(name)
        found, error = attempted(partial(diagnose, adapter, *asked, dtype or dtype_of(adapter)))
        diagnoses |= {name: found} if found else {}
        errors |= {name: f"{type(error).__name__}: {error}"} if error else {}
    noted = [_noted(result, diagnoses.get(dialect_of(result))) for result in results]
    return Report(noted, list(diagnoses.values()), expected_failures, errors)


def _failing(results: list[Result]) -> dict[str, tuple[list[Case], set[str]]]:
    """The dialects that fail: all cases of each, and the ids of those that fail."""
    cases, failed = defaultdict[str, list[Case]](list), defaultdict[str, set[str]](set)
    for result in results:
        cases[dialect_of(result)].append(result.case)
        if _failed(result):
            failed[dialect_of(result)].add(result.case.id)
    return {name: (cases[name], ids) for name, ids in sorted(failed.items())}


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


def dialect_of(result: Result) -> str:
    """`objective/dialect` of a result.

    Args:
        result: what came of a case.
    """
    return f"{result.case.objective}/{result.case.dialect}"
