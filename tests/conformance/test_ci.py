"""What the kit gives to CI: a record, JUnit, a workflow and a hook of its guide, and a wheel."""

import json
import os
import re
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml

from reference.conformance import __main__ as main
from reference.conformance import __version__, load_cases, run
from reference.conformance.cases import VECTORS
from reference.conformance.dialects import Reference
from reference.conformance.flags import FLAGS
from reference.conformance.lookalikes import LOOKALIKES
from reference.conformance.record import record, vectors_hash
from reference.conformance.wheel import build

GUIDE = (VECTORS.parent / "README.md").read_text()
SCHEMA = json.loads((VECTORS.parent / "record.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
WORKFLOW, PRE_COMMIT = map(yaml.safe_load, BLOCKS)
STEPS = WORKFLOW["jobs"]["conformance"]["steps"]
HOOK = PRE_COMMIT["repos"][0]["hooks"][0]

ADAPTERS = """
import numpy as np
from reference.conformance.dialects import DIALECTS

class Adapter:
    dtype = "float64"

    def __init__(self, **other):
        self.other = other

    def supports(self, objective, dialect):
        return (objective, dialect) in {("dpo", "plain"), ("dpo", "conservative")}

    def evaluate(self, objective, dialect, params, inputs):
        logps = [name for name in inputs if name.endswith("logps")]
        arrays = np.broadcast_arrays(*(inputs[name] for name in logps))
        inputs = inputs | dict(zip(logps, arrays))
        params = params | {name: change(params[name]) for name, change in self.other.items()
                           if name in params}
        return DIALECTS[objective, dialect](params, inputs)

adapter = Adapter()
wrong = Adapter(label_smoothing=lambda e: 1 - e)
"""


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """A folder with the adapters, where the kit runs."""
    (tmp_path / "my_adapter.py").write_text(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_adapter", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def told(capsys, *arguments):
    code = main.main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_schema_is_one_and_closed_records_fit():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    made = record(run(Reference(), load_cases("dpo")), "a:b", "float64")
    VALIDATOR.validate(made)
    for name in SCHEMA["required"]:
        assert list(VALIDATOR.iter_errors({k: v for k, v in made.items() if k != name}))
    assert set(made) == set(SCHEMA["required"]) == set(SCHEMA["properties"])


def test_a_record_says_what_was_tested_and_what_is_wrong(clients, capsys):
    code, made = told(capsys, "--adapter", "my_adapter:wrong", "--only", "dpo")
    VALIDATOR.validate(made)
    assert code == 1 and made["adapter"] == "my_adapter:wrong" and made["dtype"] == "float64"
    assert made["kit"] == {
        "version": __version__,
        "vectors": "vectors_v1",
        "sha256": vectors_hash(),
    }
    (found, accepted) = made["diagnoses"]
    assert found["dialect"] == "dpo/conservative" and found["known"] and found["whole"]
    names = [[h["name"] for h in part["hypotheses"]] for part in found["parts"]]
    assert names[0] == ["dpo/conservative at label_smoothing 1 - e"]
    severities = {r["id"]: r["severity"] for r in made["results"]}
    assert severities["dpo/conservative/batch"] == "error"
    assert severities["dpo/conservative/one-for-four"] == "note"
    assert severities["dpo/plain/batch"] is None and severities["dpo/robust/batch"] is None
    assert made["badge"]["color"] == "red" and accepted["dialect"] == "dpo/plain"


def test_notes_fail_no_run(clients, capsys):
    code, made = told(capsys, "--adapter", "my_adapter:adapter")
    tested = len(load_cases("dpo", "plain") + load_cases("dpo", "conservative"))
    assert code == 0 and made["totals"]["noted"] == 2 and made["unexpected"] == []
    assert made["badge"] == {
        "schemaVersion": 1,
        "label": "preference conformance",
        "message": f"{tested} of {tested} cases",
        "color": "brightgreen",
    }


def test_expected_failures_that_pass_are_in_the_record_and_a_badge_is_yellow(clients, capsys):
    (clients / "xfail").write_text("dpo/plain/batch\n")
    code, made = told(capsys, "--adapter", "my_adapter:adapter", "--xfail", "xfail")
    assert code == 0 and made["mended"] == ["dpo/plain/batch"]
    _, wrong = told(capsys, "--adapter", "my_adapter:wrong", "--only", "dpo")
    (clients / "xfail").write_text("\n".join(wrong["unexpected"]))
    code, made = told(capsys, "--adapter", "my_adapter:wrong", "--xfail", "xfail", "--only", "dpo")
    assert code == 0 and made["badge"]["color"] == "yellow"
    expected = {r["id"] for r in made["results"] if r["expected_failure"]}
    assert expected == set(wrong["unexpected"])


def test_the_hash_is_of_names_and_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr("reference.conformance.record.VECTORS", tmp_path)
    hashes = [vectors_hash()]
    for name in ("a/x.json", "a/y.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
        hashes.append(vectors_hash())
    (tmp_path / "a/x.json").write_text("2")
    assert len({*hashes, vectors_hash()}) == 4


def pytest_in(folder, *arguments):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = clean | {"PYTHONPATH": str(VECTORS.parents[2])}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([*line, *arguments], timeout=300, **options)


def test_junit_has_the_diagnosis_and_the_notes(clients):
    done = pytest_in(
        clients, "--preference-adapter", "my_adapter:wrong", "-k", "dpo/", "--junitxml", "out.xml"
    )
    assert done.returncode == 1 and "at label_smoothing 1 - e" in done.stdout
    cases = {
        case.get("name"): case for case in ElementTree.parse(clients / "out.xml").iter("testcase")
    }
    batch, repeated = cases["dpo/conservative/batch"], cases["dpo/conservative/one-for-four"]
    assert "at label_smoothing 1 - e" in properties(batch)["diagnosis"]
    failure = batch.find("failure").text
    assert "five pairs" in failure and "Traceback" not in failure
    assert repeated.find("failure") is None and "array libraries" in properties(repeated)["note"]
    assert cases["dpo/robust/batch"].find("skipped") is not None
    assert not properties(cases["dpo/plain/batch"])


def properties(case):
    """The first of each name."""
    found = [(p.get("name"), p.get("value")) for p in case.iter("property")]
    return dict(reversed(found))


def test_the_workflow_and_the_hook_have_what_github_and_pre_commit_need():
    assert WORKFLOW[True] == ["push", "pull_request"]  # `on` is a boolean of YAML 1.1
    assert WORKFLOW["jobs"]["conformance"]["runs-on"] == "ubuntu-latest"
    assert all(("uses" in step) != ("run" in step) for step in STEPS)
    assert {"id", "name", "entry", "language", "files"} <= set(HOOK)
    assert PRE_COMMIT["repos"][0]["repo"] == "local" and HOOK["language"] == "system"


def test_the_guides_version_is_the_kits():
    assert set(re.findall(r"preference_conformance-(\d+\.\d+\.\d+)-", GUIDE)) == {__version__}


def test_the_flags_page_is_the_table_of_flags():
    page = GUIDE[GUIDE.index("## Flags") : GUIDE.index("## How it is made")]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert [(row[0].strip("`"), *row[1:]) for row in rows] == sorted(
        (name, *flag) for name, flag in FLAGS.items()
    )


def test_the_lookalikes_are_in_the_guide():
    page = GUIDE[GUIDE.index("| what people mistake") : GUIDE.index("## Cases")]
    for key, look in LOOKALIKES.items():
        row = next(line for line in page.splitlines() if f"`{'/'.join(key)}`" in line)
        equation, source = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:4])
        assert equation.replace("\\|", "|").startswith(look.equation) and source == look.source


def test_the_wheel_has_the_kit_and_no_jax(tmp_path):
    with zipfile.ZipFile(build(tmp_path)) as wheel:
        names = set(wheel.namelist())
        sources = {name: wheel.read(name).decode() for name in names if name.endswith(".py")}
        about = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {str(path.relative_to(VECTORS.parents[2])) for path in VECTORS.rglob("*.json")} <= names
    assert re.findall(r"^Requires-Dist: (.*)$", about, re.M) == ["numpy>=2.0"]
    assert not any("jax" in source or "minipref." in source for source in sources.values())


def test_the_wheels_bytes_depend_on_the_tree_alone(tmp_path):
    first = build(tmp_path).read_bytes()
    assert build(tmp_path).read_bytes() == first


@pytest.mark.slow
def test_the_guides_lines_run_in_a_bare_environment(clients):
    """The workflow's and the hook's commands, where nothing but pip is installed."""
    ci = clients / "ci"
    ci.mkdir()
    (clients / "my_adapter.py").rename(ci / "my_adapter.py")
    build(ci)
    bare = clients / "bare"
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True)
    path = f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYT")}
    options = {"cwd": clients, "env": kept | {"PATH": path}, "capture_output": True, "text": True}
    lines = [step["run"] for step in STEPS if "run" in step]
    assert lines[0].startswith("pip install ")
    for line in [*lines, HOOK["entry"]]:
        done = subprocess.run(["bash", "-ec", line], timeout=300, **options)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    VALIDATOR.validate(json.loads((ci / "conformance.json").read_text()))
    assert ElementTree.parse(ci / "conformance.xml").getroot() is not None
    installed = subprocess.run(["pip", "list"], **options).stdout
    assert "numpy" in installed and "jax" not in installed
    wrong = HOOK["entry"].replace("my_adapter:adapter", "my_adapter:wrong")
    assert subprocess.run(["bash", "-c", wrong], **options).returncode == 1
