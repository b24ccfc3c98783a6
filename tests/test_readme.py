"""The READMEs keep their promises: Python runs, commands parse, links exist, and they fit."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from scale.run import parse

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "minipref/README.md", "scale/README.md", "reference/README.md"]
PROGRAM = "python -m scale.run"


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands(page):
    """The commands of a page: continued lines joined, `$run` and `$limits` filled in."""
    text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
    variables = {}
    for line in text.splitlines():
        line = line.strip()
        for name, value in re.findall(r'(\w+)="([^"]*)"', line):
            variables[name] = value
        line = re.sub(r"\$(run|limits)", lambda match: variables[match[1]], line)
        line = line.replace("$JOB_COMPLETION_INDEX", "1").split("   #")[0]
        if line.startswith(PROGRAM) and "..." not in line:
            yield line


@pytest.mark.parametrize("page", ["README.md", "minipref/README.md"])
def test_python_blocks_run(page):
    assert blocks(page)
    for block in blocks(page):
        exec(compile(block, page, "exec"), {})


def test_the_first_example_computes_what_the_equation_says(capsys):
    """By hand: h = 2, 0 - ... by the table of Eq. 11 with the nearest model and one KL a sample."""
    namespace = {}
    exec(compile(blocks("README.md")[0], "README.md", "exec"), namespace)
    margins = [(-12 + 13) - (-15 + 14), (-20 + 20) - (-18 + 19)]  # 2, -1
    by_model = [[1.0 - 0.2, 0.3 - 0.9], [0.8 - 0.1, 0.7 - 0.4]]
    losses = [
        sum((rho - 0.1 * h) ** 2 for rho, h in zip(model, margins, strict=True)) / 2
        for model in by_model
    ]
    kl = ((-14.5 + 14.0) + (-15.0 + 16.0)) / 2
    assert float(namespace["loss"]) == pytest.approx(min(losses) + 1e-3 * kl, rel=1e-5)


@pytest.mark.parametrize("page", ["README.md", "scale/README.md"])
def test_commands_parse(page, monkeypatch):
    parsed = [parse(shlex.split(line)[3:]) for line in commands(page)]
    assert len(parsed) >= {"README.md": 2, "scale/README.md": 3}[page]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if not link.startswith("http"):
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_the_front_page_has_the_study_s_numbers():
    """The mean and half of the interval of each method, from the table that the study wrote."""
    with (ROOT / "scale/paper/study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "README.md").read_text()
    [header] = re.findall(r"^\| rho \| (.*) \|$", text, re.MULTILINE)
    methods = header.replace("`", "").split(" | ")
    for rho in (".2", ".5", ".8"):
        [line] = re.findall(rf"^\| \{rho} \| (.*) \|$", text, re.MULTILINE)
        shown = dict(zip(methods, line.split(" | "), strict=True))
        cells = [row for row in rows if float(row["rho"]) == float(rho)]
        assert shown.keys() == {row["method"] for row in cells}
        for row in cells:
            mean, half = map(float, shown[row["method"]].split(" ±"))
            assert mean == pytest.approx(float(row["advantage"]), abs=0.0051)
            width = float(row["high"]) - float(row["low"])
            assert half == pytest.approx(width / 2, abs=0.0051)
