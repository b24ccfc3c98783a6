"""The house rules: which layer may import what, and that the two loss layers read side by side."""

import ast
import sys
from pathlib import Path

import pytest

from minipref.methods import METHODS

ROOT = Path(__file__).parents[1]
FILES = (
    "io",
    "os",
    "pathlib",
    "shutil",
    "tempfile",
    "glob",
    "json",
    "csv",
    "pickle",
    "pyarrow",
    "safetensors",
)
CONFIG = ("tyro", "argparse", "configparser", "tomllib", "yaml", "subprocess", "logging")
OTHER_LAYERS = ("reference", "scale", "tests", "benchmarks")
OWN_ARGUMENTS = {("logps", "token_logps"): ["chunk"]}  # in minipref only; the reference's docstring says why
SHARED = sorted(
    path.stem for path in (ROOT / "reference").glob("[!_]*.py") if (ROOT / "minipref" / path.name).exists()
)


def modules(layer):
    return sorted((ROOT / layer).rglob("*.py"))


def imports(path):
    """The top-level packages that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0] if node.level == 0 and node.module else path.parent.name


def functions(layer, module):
    """Public functions of a module, in order: name -> argument names."""
    tree = ast.parse((ROOT / layer / f"{module}.py").read_text())
    found = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    return {f.name: [a.arg for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]] for f in found}


@pytest.mark.parametrize("path", modules("reference"), ids=lambda path: path.stem)
def test_reference_needs_only_numpy(path):
    only_pytest_loads_it = {"pytest"} if path.name == "plugin.py" else set()
    assert set(imports(path)) <= {"numpy", "reference"} | only_pytest_loads_it | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", modules("minipref"), ids=lambda path: path.stem)
def test_minipref_is_pure(path):
    assert not set(imports(path)) & {*OTHER_LAYERS, *CONFIG, *FILES}
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call, ast.Name) and call.id in {"open", "print", "input"} for call in calls)


@pytest.mark.parametrize("module", SHARED)
def test_shared_functions_have_the_same_arguments(module):
    ours, theirs = functions("minipref", module), functions("reference", module)
    for name in set(ours) & set(theirs):
        assert ours[name] == theirs[name] + OWN_ARGUMENTS.get((module, name), [])


@pytest.mark.parametrize("module", ["objectives", "methods", "bag_of_words", "bandit"])
def test_modules_have_the_same_functions_in_the_same_order(module):
    assert list(functions("minipref", module)) == list(functions("reference", module))


@pytest.mark.parametrize("layer", ["reference", "minipref"])
def test_no_branch_on_a_methods_name(layer):
    """Rule 4: a method is a row of the table, so no code compares anything with a row's name."""
    names = set(METHODS)
    for path in modules(layer):
        compares = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
        constants = {c.value for node in compares for c in ast.walk(node) if isinstance(c, ast.Constant)}
        assert not names & constants, path


LOSSES = ("minipref.objectives", "optax.losses", "optax.loss")
FORMULAS = {"log_sigmoid", "sigmoid", "softplus", "logaddexp", "square", "softmax_cross_entropy"}


@pytest.mark.parametrize("path", modules("scale"), ids=lambda path: path.stem)
def test_scale_has_no_loss_formula(path):
    """It imports no objective, and none of the functions that objectives are made of."""
    tree = ast.parse(path.read_text())
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not sources & set(LOSSES) and not attributes & FORMULAS
