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
SHARED = sorted(
    path.stem
    for path in (ROOT / "reference").glob("[!_]*.py")
    if (ROOT / "minipref" / path.name).exists()
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
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    return {
        f.name: [a.arg for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]]
        for f in found
    }


@pytest.mark.parametrize("path", modules("reference"), ids=lambda path: path.stem)
def test_reference_needs_only_numpy(path):
    only_pytest_loads_it = {"pytest"} if path.name == "plugin.py" else set()
    assert set(imports(path)) <= {"numpy", "reference"} | only_pytest_loads_it | set(
        sys.stdlib_module_names
    )


@pytest.mark.parametrize("path", modules("minipref"), ids=lambda path: path.stem)
def test_minipref_is_pure(path):
    assert not set(imports(path)) & {*OTHER_LAYERS, *CONFIG, *FILES}
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    assert not any(
        isinstance(call, ast.Name) and call.id in {"open", "print", "input"} for call in calls
    )


@pytest.mark.parametrize("module", SHARED)
def test_shared_functions_have_the_same_arguments(module):
    ours, theirs = functions("minipref", module), functions("reference", module)
    for name in set(ours) & set(theirs):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize("module", ["objectives", "methods", "bag_of_words", "bandit"])
def test_modules_have_the_same_functions_in_the_same_order(module):
    assert list(functions("minipref", module)) == list(functions("reference", module))


@pytest.mark.parametrize("layer", ["reference", "minipref"])
def test_no_branch_on_a_methods_name(layer):
    """Rule 4: a method is a row of the table, so no code compares anything with a row's name."""
    names = set(METHODS)
    for path in modules(layer):
        compares = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)
        ]
        constants = {
            c.value for node in compares for c in ast.walk(node) if isinstance(c, ast.Constant)
        }
        assert not names & constants, path


LOSSES = ("minipref.objectives", "minipref.simplex", "optax.losses", "optax.loss")
FORMULAS = {"log_sigmoid", "sigmoid", "softplus", "logaddexp", "square", "softmax_cross_entropy"}


@pytest.mark.parametrize("path", modules("scale"), ids=lambda path: path.stem)
def test_scale_has_no_loss_formula(path):
    """It imports no objective, and none of the functions that objectives are made of."""
    tree = ast.parse(path.read_text())
    sources = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not sources & set(LOSSES) and not attributes & FORMULAS


# ---- rooms


ROOMS = (  # from the bottom up: a room imports from its own and from those before it
    "errors console files health memory statistics templates",
    "parallel",
    "data",
    "model",
    "io",
    "train",
    "stages",
    "paper plan",
    "tune",
    "run",
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}
SOURCES = [path for layer in ("reference", "minipref", "scale") for path in modules(layer)]


def imported_modules(path):
    """The modules of this project that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules("scale"), ids=dotted)
def test_rooms_import_downwards_alone(path):
    room = dotted(path).split(".")[1:2]
    for name in imported_modules(path):
        if name.startswith("scale.") and room:
            assert FLOOR[name.split(".")[1]] <= FLOOR[room[0]], name
            same = FLOOR[name.split(".")[1]] == FLOOR[room[0]]
            assert not same or name.split(".")[1] == room[0] or FLOOR[room[0]] == 0, name


def test_modules_import_in_no_circle():
    graph = {dotted(path): set(imported_modules(path)) - {dotted(path)} for path in SOURCES}
    graph = {name: needs & graph.keys() for name, needs in graph.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: needs - leaves for name, needs in graph.items() if name not in leaves}


def test_scale_has_at_most_eight_modules_of_its_own():
    assert len([*(ROOT / "scale").glob("[!_]*.py")]) <= 8


@pytest.mark.parametrize("path", SOURCES, ids=dotted)
def test_modules_functions_and_lines_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    assert max(map(len, text.splitlines()), default=0) <= 100
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno + 1 <= 30, node.name


@pytest.mark.parametrize("room", ["train", "stages"])
def test_a_training_run_does_not_import_the_pod_compiler(room):
    for path in (ROOT / "scale" / room).glob("*.py"):
        assert not any(name.startswith("scale.plan") for name in imported_modules(path))


@pytest.mark.parametrize("module", ["model.attention", "model.splash", "parallel.sharding"])
def test_attention_and_sharding_know_nothing_of_files(module):
    """Not even through what they import."""
    waiting, known = [f"scale.{module}"], set()
    while waiting:
        name = waiting.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in known or not path.exists():
            continue
        known.add(name)
        waiting += [other for other in imported_modules(path) if other.startswith("scale.")]
        assert not {"pyarrow", "safetensors", "tokenizers"} & set(imports(path)), name
