"""The kit's pages say what its files hold, and the adapter of its guide works."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from reference.conformance import load_cases, run
from reference.conformance.cases import VECTORS
from reference.conformance.dialects import DIALECTS

GUIDE = (VECTORS.parent / "README.md").read_text()
FILES = sorted(VECTORS.glob("*/*.json"))


def names(case):
    """What a case has that a page must explain."""
    return {
        *case["params"],
        *case["inputs"],
        *case["expected"],
        *case["expected"].get("metrics", {}),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_page_explains_every_field(path):
    page, file = (path.parent / "README.md").read_text(), json.loads(path.read_text())
    assert f"`{path.stem}`" in page
    fields = set().union(*map(names, file["cases"])) - {"metrics"}
    assert not [name for name in fields if f"`{name}`" not in page]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_page_has_the_files_tolerances(path):
    page, file = (path.parent / "README.md").read_text(), json.loads(path.read_text())
    for dtype, kinds in file["tolerance"].items():
        numbers = [number for kind in kinds.values() for number in (kind["rtol"], kind["atol"])]
        row = re.search(rf"^\| {dtype} \|(.*)\|$", page, re.MULTILINE)
        assert (row and re.split(r"[|,]", row[1])) or not any(numbers)
        assert not row or [number(text) for text in re.split(r"[|,]", row[1])] == numbers


def number(text):
    base, _, power = text.strip().partition("^")
    return float(base) ** float(power or 1)


def test_every_dialect_has_its_file_and_its_line():
    assert {(path.parent.name, path.stem) for path in FILES} == set(DIALECTS)
    lines = GUIDE[GUIDE.index("## Dialects") : GUIDE.index("## Cases")]
    for objective, dialect in DIALECTS:
        assert f"`{objective}/{dialect}`" in lines or (
            objective == "training" and f"`{dialect}`" in lines
        )


def test_guides_adapter_is_short_and_works(tmp_path):
    source = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1]
    assert len(source.splitlines()) < 40
    pytest.importorskip(
        "torchtune", reason="the guide's adapter is of torchtune, in the extra peers"
    )
    path = Path(tmp_path / "torchtune_adapter.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("torchtune_adapter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = run(module.adapter, load_cases("dpo"))
    outcomes = {r.case.id: r.outcome for r in report.results if r.case.dialect != "robust"}
    noted = {name for name, outcome in outcomes.items() if outcome == "noted"}
    assert noted == {f"dpo/{dialect}/one-for-four" for dialect in ("plain", "conservative")}
    assert set(outcomes.values()) == {"passed", "noted"} and not report.unexpected
