"""The claims notice mistakes: every mutation changes the verdict of some claim."""

import ast
import runpy
from pathlib import Path

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "mutations.py"))
MUTATIONS, REFERENCE, catchers = (
    BENCHMARK["MUTATIONS"],
    BENCHMARK["REFERENCE"],
    BENCHMARK["catchers"],
)


def functions(module):
    """Name and source of every public function of a module of `reference/`."""
    source = (REFERENCE / f"{module}.py").read_text()
    nodes = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    return {
        node.name: ast.get_source_segment(source, node)
        for node in nodes
        if not node.name.startswith("_")
    }


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_some_claim_notices(mutation):
    assert next(catchers(mutation), None)


def test_nothing_is_noticed_without_a_mutation():
    same = MUTATIONS[0]._replace(after=MUTATIONS[0].before)
    assert not list(catchers(same, instances=2))


def test_a_mutation_that_does_not_apply_is_an_error():
    with pytest.raises(ValueError, match="must occur once"):
        list(catchers(MUTATIONS[0]._replace(before="no such expression")))


@pytest.mark.parametrize(
    "module", ["objectives", "weights", "simplex", "loglinear", "tabular", "bag_of_words", "bandit"]
)
def test_every_public_function_is_mutated(module):
    expressions = [mutation.before for mutation in MUTATIONS if mutation.module == module]
    sources = functions(module)
    assert sources
    assert not [
        name
        for name, source in sources.items()
        if not any(before in source for before in expressions)
    ]
