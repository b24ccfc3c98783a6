"""`python -m reference` runs in a clean interpreter; the house rules hold for all of reference/."""

import ast
import inspect
import os
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
MODULES = sorted(REFERENCE.rglob("*.py"))
TEXTS = [*MODULES, *REFERENCE.rglob("*.md"), *REFERENCE.rglob("*.js")]
TREES = {path: ast.parse(path.read_text()) for path in MODULES}
FUNCTIONS = [
    node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
]
# What the glossary of their package or module says of arguments is not repeated in each function.
KIT = [
    REFERENCE / "conformance" / f"{name}.py"
    for name in ("pairs", "tokens", "data", "training", "plugin", "hypotheses", "lookalikes")
]
MISTAKES = REFERENCE / "conformance" / "mistakes"  # a row of a table says what its function does
GLOSSARY = [REFERENCE / "claims", REFERENCE / "errata.py", *KIT, MISTAKES]

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
    """What `python -m reference` prints.

    Nothing but NumPy and the standard library can be imported.
    """
    command = [sys.executable, "-W", "error", "-c", BLOCKED]
    return subprocess.run(
        command, cwd=REFERENCE.parent, capture_output=True, text=True, check=True, timeout=600
    ).stdout


def test_the_tables_fit_a_hundred_columns(printed):
    assert max(map(len, printed.splitlines())) <= 100


def run(*arguments, **options):
    command = [sys.executable, "-W", "error", "-m", "reference", *arguments]
    return subprocess.run(
        command, cwd=REFERENCE.parent, stderr=subprocess.PIPE, text=True, timeout=600, **options
    )


def test_help_explains_and_checks_nothing():
    done = run("--help", stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m reference [-h]")
    assert "margin" in done.stdout and "closed_form_is_optimal" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_an_unknown_option_is_an_error():
    done = run("--all", stdout=subprocess.PIPE)
    assert (
        done.returncode == 2 and not done.stdout and "unrecognized arguments: --all" in done.stderr
    )


def test_a_reader_that_stops_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_claim_is_missing(printed):
    numbers = [f"Proposition {n}" for n in range(1, 8)] + [
        "Theorem 1",
        "Theorem 2",
        "Corollary 1",
        "Eq. 13, 14",
    ]
    for place in numbers:
        assert re.search(rf"^\w+ +{place} ", printed, re.MULTILINE), place
    public = set(claims.__all__)
    public |= {
        name
        for name, item in vars(errata).items()
        if getattr(item, "__module__", "") == errata.__name__
    }
    helpers = {
        "Evidence",
        "Erratum",
        "identity",
        "at_most",
        "worst",
        "bag_descent",
        "maximin_values",
        "equation_11",
    }
    helpers |= {"uniform_distillation"}
    names = {name for name in public - helpers if not name.startswith("_")}
    assert names == {line.split()[0] for line in printed.split("\n\n")[0].splitlines()[1:]}


def test_every_public_name_of_the_claims_is_exported():
    paths = [path for path in TREES if path.parent.name == "claims"]
    defined = [node.name for path in paths for node in TREES[path].body if hasattr(node, "name")]
    assert sorted(claims.__all__) == sorted(name for name in defined if name[0] != "_")


def test_verdicts(printed):
    verdicts = [line.split("  ")[-1] for line in printed.split("\n\n")[0].splitlines()[1:]]
    assert set(verdicts) == {"holds", "refuted as printed", "holds as corrected"}
    assert verdicts.count("refuted as printed") == len(errata.ERRATA) >= 15


def test_the_corrected_method_is_exact_and_the_printed_one_is_not(printed):
    rows = {
        line[:32].strip(): line[32:].split() for line in printed.split("\n\n")[1].splitlines()[2:]
    }
    assert list(rows) == ["maximiser", "hull", "e-dpo: finite minimum", "mean"]
    assert float(rows["hull"][1]) < 1e-6 and rows["hull"][2] == "50"
    assert float(rows["e-dpo: finite minimum"][1]) > 1 and float(rows["mean"][1]) > 1
    assert (
        rows["e-dpo: finite minimum"][0] == "-0.545273" and rows["e-dpo: finite minimum"][2] == "11"
    )


@pytest.mark.parametrize("expected", ["holds", "refuted as printed"])
def test_a_changed_verdict_is_an_exit_status(monkeypatch, capsys, expected):
    wrong = {"holds": errata.ERRATA[0].printed, "refuted as printed": claims.ipo_is_distillation}[
        expected
    ]
    instance = {
        "holds": errata.ERRATA[0].counterexample,
        "refuted as printed": {"margin": 1.0, "beta": 2.0},
    }[expected]
    monkeypatch.setattr(
        main, "CLAIMS", [main.CLAIMS[0], main.Claim(wrong, "nowhere", expected, instance)]
    )
    monkeypatch.setattr(main, "print_maximin", lambda: None)
    assert main.main([]) == 1
    assert {"holds": "REFUTED", "refuted as printed": "HOLDS AS PRINTED"}[
        expected
    ] in capsys.readouterr().out
    monkeypatch.setattr(main, "CLAIMS", main.CLAIMS[:1])
    assert main.main([]) == 0


def test_functions_are_short():
    lengths = [node.end_lineno - node.lineno + 1 for node in FUNCTIONS]
    docstrings = [len((ast.get_docstring(node) or "").split("\n")) for node in FUNCTIONS]
    assert max(lengths) <= 30
    assert statistics.median(np.subtract(lengths, docstrings)) < 10


def test_every_public_function_says_what_it_is():
    assert not [
        node.name
        for path, tree in TREES.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_"
        and MISTAKES not in path.parents and not ast.get_docstring(node)
    ]  # fmt: skip


def documented():
    """Public functions that explain their arguments: (name, argument names, docstring)."""
    for path, tree in TREES.items():
        if not any(path == place or place in path.parents for place in GLOSSARY):
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
                    arguments = [*node.args.args, *filter(None, [node.args.vararg])]
                    yield (
                        node.name,
                        [argument.arg for argument in arguments],
                        ast.get_docstring(node),
                    )


def test_every_argument_is_explained_in_order():
    for name, arguments, docstring in documented():
        entries = re.search(r"^Args:\n((?: .*\n|\n)+?)\n\S", docstring + "\n\n.", re.MULTILINE)
        heads = re.findall(r"^    (\w[\w, ]*):", entries[1] if entries else "", re.MULTILINE)
        assert [argument for head in heads for argument in head.split(", ")] == arguments, name


def test_every_argument_of_a_claim_is_in_the_glossary():
    names = {
        name
        for head in re.findall(r"^    (\w[\w, ]*):", claims.__doc__, re.MULTILINE)
        for name in head.split(", ")
    }
    drawn = {
        name
        for row in main.CLAIMS
        if not row.counterexample
        for name in inspect.signature(row.function).parameters
    }
    assert drawn == names


def test_every_claim_says_where_the_paper_has_it():
    assert not [
        row.function.__name__ for row in main.CLAIMS if "\n    Source: " not in row.function.__doc__
    ]


def code_lines(path):
    """How many lines a module has besides its docstrings and empty lines."""
    nodes = [
        TREES[path],
        *(n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.ClassDef)),
    ]
    strings = [node.body[0] for node in nodes if ast.get_docstring(node)]
    inside = {line for string in strings for line in range(string.lineno, string.end_lineno + 1)}
    return sum(
        bool(line.strip()) and n not in inside
        for n, line in enumerate(path.read_text().splitlines(), 1)
    )


def test_objectives_settings_and_claims_fit_the_budget():
    harness = {"__main__", "instances", "section6", "worlds"}  # the last two are a study
    counted = [
        path for path in MODULES if path.stem not in harness and "conformance" not in path.parts
    ]
    assert sum(map(code_lines, counted)) < 1000


def test_modules_are_short():
    assert {
        path.name: lines for path in MODULES if (lines := len(path.read_text().splitlines())) > 350
    } == {}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REFERENCE)))
def test_lines_end_at_a_hundred_columns(path):
    """But for rows of tables, links and their definitions, which cannot be broken."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("|")]
    assert not [line for line in lines if len(line) > 100]
