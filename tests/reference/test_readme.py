"""`reference/README.md` has every claim, and its links lead to the functions."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from reference.__main__ import CLAIMS
from reference.claims import maximin_values
from reference.instances import draw

FOLDER = Path(__file__).parents[2] / "reference"
TEXT, LINKS = (FOLDER / "README.md").read_text().split("\n\n[`", 1)


def names_in(path):
    """The functions and annotated constants of a module."""
    for node in ast.parse(path.read_text()).body:
        target = getattr(node, "target", None)
        if name := getattr(node, "name", None) or getattr(target, "id", None):
            yield name


def test_links_lead_to_the_modules_that_define_the_functions():
    linked = dict(re.findall(r"`(\w+)`\]: (\S+)\n", "[`" + LINKS))
    for name, module in linked.items():
        assert name in names_in(FOLDER / module)
    assert set(linked) == set(re.findall(r"\[`(\w+)`\]", TEXT))


def test_the_snippet_prints_what_it_says():
    """Each line that prints is followed by a comment with what it prints."""
    source = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)) == {
        "numpy",
        "reference",
    }
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", source, re.MULTILINE) != []


def test_the_figures_are_those_of_the_table():
    """e-DPO's limit, of 50 instances: its mean value, and in how many of them it is optimal."""
    rng, values = np.random.default_rng(0), []
    while len(values) < 50:
        instance = draw(maximin_values, rng)
        if len(instance["rewards"]) > 1:
            values.append(maximin_values(**instance))
    best, hull, finite, _ = np.transpose(values)
    optimal = [int(np.sum(best - limit <= 1e-6)) for limit in (hull, finite)]
    assert optimal == [50, 11] and round(np.mean(finite), 3) == -0.545
    opening = " ".join(TEXT[: TEXT.index("## In an hour")].split())
    assert (
        "optimal in 11 of 50" in opening and "-.545" in opening and "optimal in all 50" in opening
    )


def test_every_claim_is_in_a_table():
    tables = "".join(line for line in TEXT.splitlines() if line.startswith("| "))
    assert {claim.function.__name__ for claim in CLAIMS} <= set(re.findall(r"\[`(\w+)`\]", tables))
