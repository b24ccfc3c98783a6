"""`python -m reference` in a clean interpreter, and the house rules that hold for the whole of reference/."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reference import __main__ as main
from reference import claims, errata

REFERENCE = Path(main.__file__).parent
MODULES = sorted(REFERENCE.glob("*.py"))
FUNCTIONS = [
    node for path in MODULES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
]

BLOCKED = """
import importlib.abc, runpy, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names | {"numpy", "reference"}:
            raise ModuleNotFoundError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
runpy.run_module("reference", run_name="__main__")
"""


@pytest.fixture(scope="module")
def printed():
    """What `python -m reference` prints where nothing but NumPy and the standard library can be imported."""
    command = [sys.executable, "-W", "error", "-c", BLOCKED]
    return subprocess.run(command, cwd=REFERENCE.parent, capture_output=True, text=True, check=True, timeout=120).stdout


def test_no_claim_is_missing(printed):
    numbers = [f"Proposition {n}" for n in range(1, 8)] + ["Theorem 1", "Theorem 2", "Corollary 1", "Eq. 13, 14"]
    for place in numbers:
        assert re.search(rf"^\w+ +{place} ", printed, re.MULTILINE), place
    public = {name for name, item in vars(claims).items() if getattr(item, "__module__", "") == claims.__name__}
    public |= {name for name, item in vars(errata).items() if getattr(item, "__module__", "") == errata.__name__}
    helpers = {"Evidence", "Erratum", "identity", "at_most", "worst", "bag_descent", "maximin_values", "equation_11"}
    names = {name for name in public - helpers if not name.startswith("_")}
    assert names == {line.split()[0] for line in printed.split("\n\n")[0].splitlines()[1:]}


def test_verdicts(printed):
    verdicts = [line.split("  ")[-1] for line in printed.split("\n\n")[0].splitlines()[1:]]
    assert set(verdicts) == {"holds", "refuted as printed", "holds as corrected"}
    assert verdicts.count("refuted as printed") == len(errata.ERRATA) >= 15


def test_the_corrected_method_is_exact_and_the_printed_one_is_not(printed):
    rows = {line[:32].strip(): line[32:].split() for line in printed.split("\n\n")[1].splitlines()[2:]}
    assert list(rows) == ["maximiser", "hull", "e-dpo: finite minimum", "mean"]
    assert float(rows["hull"][1]) < 1e-6 and rows["hull"][2] == "50"
    assert float(rows["e-dpo: finite minimum"][1]) > 1 and float(rows["mean"][1]) > 1


@pytest.mark.parametrize("expected", ["holds", "refuted as printed"])
def test_a_changed_verdict_is_an_exit_status(monkeypatch, capsys, expected):
    wrong = {"holds": errata.ERRATA[0].printed, "refuted as printed": claims.ipo_is_distillation}[expected]
    instance = {"holds": errata.ERRATA[0].counterexample, "refuted as printed": {"margin": 1.0, "beta": 2.0}}[expected]
    monkeypatch.setattr(main, "CLAIMS", [main.CLAIMS[0], main.Claim(wrong, "nowhere", expected, instance)])
    monkeypatch.setattr(main, "print_maximin", lambda: None)
    assert main.main() == 1
    assert {"holds": "REFUTED", "refuted as printed": "HOLDS AS PRINTED"}[expected] in capsys.readouterr().out
    monkeypatch.setattr(main, "CLAIMS", main.CLAIMS[:1])
    assert main.main() == 0


def test_functions_are_short():
    lengths = [node.end_lineno - node.lineno + 1 for node in FUNCTIONS]
    docstrings = [len((ast.get_docstring(node) or "").split("\n")) for node in FUNCTIONS]
    assert max(lengths) <= 30
    assert statistics.median(np.subtract(lengths, docstrings)) < 10


def test_every_public_function_says_what_it_is():
    assert not [n.name for n in FUNCTIONS if n.col_offset == 0 and n.name[0] != "_" and not ast.get_docstring(n)]


def test_objectives_settings_and_claims_fit_the_budget():
    harness = {"__main__", "instances"}
    assert sum(len(path.read_text().splitlines()) for path in MODULES if path.stem not in harness) < 1500
