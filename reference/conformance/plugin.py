"""The kit as a pytest plugin: `pytest --preference-adapter module:attribute` adds every case as a test.

pytest finds this module by the package's entry point; nothing else imports it, as it is the one that needs pytest.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reference.conformance.cases import Case, load_cases
from reference.conformance.judge import Adapter, judge
from reference.conformance.report import load_adapter, read_expected_failures

ASKED = pytest.StashKey[tuple[Adapter, frozenset[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("preference conformance")
    group.addoption("--preference-adapter", metavar="MODULE:ATTRIBUTE", help="run the conformance cases on this object")
    group.addoption("--preference-xfail", metavar="FILE", help="ids of cases that are expected to fail, one a line")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Loads the adapter before xdist starts a worker: an error in a worker is not told, nor in the exit status."""
    adapter, xfail = (session.config.getoption(name) for name in ("--preference-adapter", "--preference-xfail"))
    if not adapter:
        return
    try:
        expected = read_expected_failures(Path(xfail), load_cases()) if xfail else frozenset()
        session.config.stash[ASKED] = load_adapter(adapter), expected
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """The cases stand beside what the session finds in files."""
    report = yield
    if isinstance(collector, pytest.Session) and ASKED in collector.config.stash:
        report.result.append(Cases.from_parent(collector, name="conformance", nodeid="conformance"))
    return report


class Cases(pytest.Collector):
    def collect(self) -> Iterator["CaseItem"]:
        adapter, expected = self.config.stash[ASKED]
        for case in load_cases():
            item = CaseItem.from_parent(self, name=case.id, adapter=adapter, case=case)
            if case.id in expected:
                item.add_marker(pytest.mark.xfail)
            yield item


class CaseItem(pytest.Item):
    def __init__(self, *, adapter: Adapter, case: Case, **rest):
        super().__init__(**rest)
        self.adapter, self.case = adapter, case

    def runtest(self) -> None:
        result = judge(self.adapter, self.case)
        if result.outcome == "skipped":
            pytest.skip("not supported")
        if result.outcome != "passed":
            raise NonConformance(f"{', '.join(self.case.flags)}: {self.case.comment}\n{result.detail}")

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if isinstance(excinfo.value, NonConformance) else super().repr_failure(excinfo, style)

    def reportinfo(self):
        return "conformance", None, self.name


class NonConformance(AssertionError):
    """A case that the implementation does not meet."""
