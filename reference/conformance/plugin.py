"""The kit as a pytest plugin: `pytest --preference-adapter module:attribute` adds its cases.

pytest finds this module by the package's entry point. Nothing else imports it, since it alone needs
pytest.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from reference.conformance.cases import Case, load_cases
from reference.conformance.isolated import IsolatedAdapter
from reference.conformance.judge import Adapter
from reference.conformance.loading import load_adapter, read_expected_failures
from reference.conformance.program import TIMEOUT
from reference.conformance.report import Report, run
from reference.conformance.sentences import sentences

ASKED = pytest.StashKey[tuple[Adapter, frozenset[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options `--preference-adapter`, `--preference-xfail` and `--preference-timeout`."""
    group = parser.getgroup("preference conformance")
    group.addoption(
        "--preference-adapter",
        metavar="MODULE:ATTRIBUTE",
        help="run the conformance cases on this object",
    )
    group.addoption(
        "--preference-xfail",
        metavar="FILE",
        help="ids of cases that are expected to fail, one a line",
    )
    group.addoption(
        "--preference-timeout",
        metavar="S",
        type=float,
        default=TIMEOUT,
        help="seconds that an answer may take",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    """Loads the adapter before xdist starts a worker, since errors in a worker are not reported."""
    adapter, xfail = (
        session.config.getoption(name) for name in ("--preference-adapter", "--preference-xfail")
    )
    if not adapter:
        return
    timeout = session.config.getoption("--preference-timeout")
    debugged = session.config.getoption("usepdb") or session.config.getoption("trace")
    try:
        expected = read_expected_failures(Path(xfail), load_cases()) if xfail else frozenset()
        opened = load_adapter(adapter) if debugged else IsolatedAdapter(adapter, timeout)
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error
    session.config.stash[ASKED] = opened, expected
    if isinstance(opened, IsolatedAdapter):
        session.config.add_cleanup(opened.close)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Adds the cases to what the session collects from files."""
    report = yield
    if isinstance(collector, pytest.Session) and ASKED in collector.config.stash:
        report.result.append(Cases.from_parent(collector, name="conformance", nodeid="conformance"))
    return report


class Cases(pytest.Collector):
    """All cases of the kit."""

    def collect(self) -> Iterator["CaseItem"]:
        """One item for each case."""
        adapter, expected = self.config.stash[ASKED]
        judged = cache(lambda dialect: run(adapter, load_cases(*dialect)))
        for case in load_cases():
            item = CaseItem.from_parent(self, name=case.id, case=case, judged=judged)
            if case.id in expected:
                item.add_marker(pytest.mark.xfail)
            yield item


class CaseItem(pytest.Item):
    """One case as a test; the first of a dialect judges them all, so that it can be diagnosed."""

    def __init__(self, *, case: Case, judged: Callable[[tuple[str, str]], Report], **rest):
        super().__init__(**rest)
        self.case, self.judged = case, judged

    def runtest(self) -> None:
        """Reports what came of the case: it is skipped where it is not supported."""
        report = self.judged((self.case.objective, self.case.dialect))
        result = next(r for r in report.results if r.case.id == self.case.id)
        if result.outcome == "skipped":
            pytest.skip("not supported")
        lines = [line for diagnosis in report.diagnoses for line in sentences(diagnosis)]
        if result.outcome == "noted":
            self.user_properties.append(("note", f"{self.case.comment}; {result.detail}"))
        elif result.outcome != "passed":
            self.user_properties += [("diagnosis", line.strip()) for line in lines]
            raise NonConformance("\n".join([self.case.comment, result.detail, *lines]))

    def repr_failure(self, excinfo, style=None):
        return (
            str(excinfo.value)
            if isinstance(excinfo.value, NonConformance)
            else super().repr_failure(excinfo, style)
        )

    def reportinfo(self):
        return "conformance", None, self.name


class NonConformance(AssertionError):
    """A case that the implementation does not meet."""
