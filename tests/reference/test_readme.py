"""`reference/README.md` has every claim, and its links lead to the functions."""

import ast
import re
from pathlib import Path

from reference.__main__ import CLAIMS

FOLDER = Path(__file__).parents[2] / "reference"
TEXT, LINKS = (FOLDER / "README.md").read_text().split("\n\n[`", 1)


def lines_of(path):
    """Where each function and annotated constant of a module starts: (name, link)."""
    for node in ast.parse(path.read_text()).body:
        if name := getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None):
            yield name, f"{path.name}#L{node.lineno}"


def test_links_lead_to_the_functions():
    linked = dict(re.findall(r"`(\w+)`\]: (\S+)\n", "[`" + LINKS))
    modules = {link.split("#")[0] for link in linked.values()}
    lines = {module: dict(lines_of(FOLDER / module)) for module in modules}
    assert linked == {name: lines[link.split("#")[0]].get(name) for name, link in linked.items()}
    assert set(linked) == set(re.findall(r"\[`(\w+)`\]", TEXT))


def test_every_claim_is_in_a_table():
    tables = "".join(line for line in TEXT.splitlines() if line.startswith("| "))
    assert {claim.function.__name__ for claim in CLAIMS} <= set(re.findall(r"\[`(\w+)`\]", tables))
