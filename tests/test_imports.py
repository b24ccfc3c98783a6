"""`minipref` and `reference` work where only their own needs are installed."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest

NEEDS = {
    "reference": ["numpy"],
    "reference.conformance": ["numpy"],
    "minipref": ["numpy", "jax", "equinox", "optax", "jaxtyping"],
}
HIDE = """
import sys
hidden = {hidden}
class WithoutHidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(WithoutHidden, sys.meta_path)
import {module}
"""


def with_dependencies(names):
    """The distributions and everything that they require, without extras."""
    known, waiting = set(), [name.lower() for name in names]
    while waiting:
        name = waiting.pop()
        if name in known:
            continue
        known.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        needed = (re.match(r"[\w.-]+", line) for line in lines if "extra ==" not in line)
        waiting += [match[0].lower().replace("_", "-") for match in needed if match]
    return known


@pytest.mark.parametrize("module", NEEDS)
def test_imports_with_all_other_packages_hidden(module):
    allowed = with_dependencies(NEEDS[module])
    hidden = {
        name
        for name, distributions in packages_distributions().items()
        if not {d.lower().replace("_", "-") for d in distributions} & (allowed | {"minipref"})
    } - set(sys.stdlib_module_names)
    assert {"tyro", "pyarrow", "tokenizers"} <= hidden  # the list is not empty by mistake
    program = HIDE.format(hidden=sorted(hidden), module=module)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
