"""The vectors are written, and compared with what is stored, by the tests that check `reference/`.

`pytest tests/conformance --write-vectors` writes them; without it a stored file that differs in any
byte fails.
"""

import pytest

from reference.conformance.cases import VECTORS, load_cases
from reference.conformance.dialects import adapter
from reference.conformance.judge import judge
from tests.conformance.vectors import rendered


def pytest_addoption(parser):
    parser.addoption(
        "--write-vectors", action="store_true", help="write reference/conformance/vectors_v1"
    )


@pytest.fixture
def check_vectors(request):
    """It checks a file's bytes, then `reference/` against them, which are mpmath's values."""

    def check(file):
        path, text = VECTORS / file["objective"] / f"{file['dialect']}.json", rendered(file)
        if request.config.getoption("--write-vectors", False):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.read_text() == text, "not what is stored; see --write-vectors"
        for case in load_cases(file["objective"], file["dialect"]):
            result = judge(adapter, case)
            assert result.outcome == "passed", f"{case.id}: {result.detail}"
            assert not result.unchecked, f"{case.id}: {result.unchecked}"

    return check
