"""The kit as a pytest plugin: `pytest --preference-adapter module:attribute` adds every case as a test.

pytest finds this module by the package's entry point; nothing else imports it, as it is the one that needs pytest.
"""

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("preference conformance")
    group.addoption("--preference-adapter", metavar="MODULE:ATTRIBUTE", help="run the conformance cases on this object")
    group.addoption("--preference-xfail", metavar="FILE", help="ids of cases that are expected to fail, one a line")


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--preference-adapter"):
        items.extend(_items(session, config))


def _items(session: pytest.Session, config: pytest.Config) -> Iterator["CaseItem"]:
    from pathlib import Path

    from reference.conformance.cases import load_cases
    from reference.conformance.report import load_adapter, read_expected_failures

    cases, xfail = load_cases(), config.getoption("--preference-xfail")
    try:
        adapter = load_adapter(config.getoption("--preference-adapter"))
        expected = read_expected_failures(Path(xfail), cases) if xfail else frozenset()
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error
    for case in cases:
        item = CaseItem.from_parent(session, name=case.id, adapter=adapter, case=case)
        if case.id in expected:
            item.add_marker(pytest.mark.xfail)
        yield item


class CaseItem(pytest.Item):
    def __init__(self, *, adapter, case, **rest):
        super().__init__(**rest)
        self.adapter, self.case = adapter, case

    def runtest(self) -> None:
        from reference.conformance.judge import judge

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
