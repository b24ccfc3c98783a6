"""Implementations that hang, exit, fill the memory or print garbage are reported as such."""

import json
import os
import signal
import subprocess
import sys
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest

from reference.conformance import __main__ as main
from reference.conformance import answers, load_cases, program, run
from reference.conformance.answers import plain, readable
from reference.conformance.cases import VECTORS
from reference.conformance.isolated import IsolatedAdapter
from reference.conformance.judge import judge
from reference.conformance.program import SHOWN, STARTS, Program
from reference.conformance.record import record
from reference.conformance.text import table
from tests.conformance.test_kit import all_end, answering, client, plugged, raising, right

__all__ = ["plugged"]  # a fixture
ALL = load_cases()
BATCH = next(case for case in load_cases("dpo", "plain") if case.id.endswith("/batch"))
REJECT = next(case for case in load_cases("dpo", "plain") if case.result == "reject")
CASES = [BATCH, *load_cases("dpo", "plain")[1:3], REJECT]
SCHEMA = json.loads((VECTORS.parent / "record.schema.json").read_text())

HEAD = r"""
import fcntl, os, signal, sys, threading, time
import numpy as np
from reference.conformance.dialects import DIALECTS

def right(question):
    return DIALECTS[question[:2]](*question[2:])

def garbage():
    for n in range(3, 256):
        try:
            if fcntl.fcntl(n, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                os.write(n, b"Loading weights\n")
        except OSError:
            pass

class Text(Exception):
    def __str__(self):
        raise ValueError("no text")

class Liar:
    shape = ()
    def __array__(self, *_, **__):
        raise SystemExit(7)

class Adapter:
    dtype = "float64"
    def supports(self, objective, dialect):
        return objective == "dpo"
    def evaluate(self, *question):
        open("pids", "a").write(f"{os.getpid()} ")
"""
GONE = {
    "hangs": ("time.sleep(600)", "was silent for 0.5 s"),
    "spins": ("\n        while True: pass", "was silent for 0.5 s"),
    "stops": ("os.kill(os.getpid(), signal.SIGSTOP)", "was silent for 0.5 s"),
    "exits": ("os._exit(0)", "ended with status 0"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9"),
    "has no such address": ("import ctypes; ctypes.string_at(0)", "ended with status -11"),
    "fills the memory": ("[b'x' * n for n in [2**24] * 1000]", "more than 0.25 GiB of memory"),
    "exits later": (
        "threading.Timer(0.1, os._exit, [9]).start(); time.sleep(60)",
        "ended with status 9",
    ),
    "closes its files": ("os.closerange(0, 256)", "ended with status"),
    "writes garbage on every file": ("garbage()", "out of turn, or not in JSON"),
    "prints without end": (
        "\n        while True: os.write(1, b'x' * 2**20)",
        "was silent for 0.5 s",
    ),
    "answers gigabytes": (
        "return {n: 'x' * 10**6 for n in map(str, range(40))}",
        "answered more than 16 MiB",
    ),
    "answers one list many times": (
        "x = [1.0] * 10**6; return {'loss': [x] * 10**6}",
        "was silent for 0.5 s",
    ),
}
ALIKE = ("spins", "prints without end", "answers one list many times", "exits later")
RAISED = {
    "SystemExit": ("sys.exit(3)", "SystemExit: 3"),
    "Ctrl-C": ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    "GeneratorExit": ("raise GeneratorExit", "GeneratorExit: "),
    "BaseException": ("raise BaseException('all')", "BaseException: all"),
    "MemoryError": ("np.zeros(2**50)", "MemoryError: Unable to allocate"),
    "no text": ("raise Text", "Text: "),
    "no encoding": ("raise KeyboardInterrupt('\\ud800\\x1b[2J\\0')", r"\ud800\x1b[2J\x00"),
    "a long text": ("raise KeyboardInterrupt('x' * 10**8)", "xx ... (100000019 characters)"),
}
ANSWERS = {
    "NaN": ("return right(question) | {'loss': np.nan}", "loss: nan, not "),
    "a shape": ("return right(question) | {'loss': np.zeros((2, 3))}", "shape [2, 3], not []"),
    "an array of gigabytes": (
        "return right(question) | {'loss': np.broadcast_to(0.0, (10**15,))}",
        "loss: no array of numbers: an array of shape [1000000000000000]",
    ),
    "a text of gigabytes": (
        "return right(question) | {'loss': 'x' * 10**8}",
        "loss: no array of numbers: a text of 100000000 characters",
    ),
    "a list that holds itself": (
        "x = []; x.append(x); return {'loss': x}",
        "loss: no array of numbers: texts",
    ),
    "an object": ("return {'loss': object()}", "loss: no array of numbers: a object of object"),
    "an array that exits": ("return {'loss': Liar()}", "SystemExit: 7"),
    "nothing": ("return None", "of type NoneType"),
}
HARMLESS = {
    "prints": "print('Loading'); os.write(1, b'\\xff\\n'); return right(question)",
    "reads": "sys.stdin.read(); return right(question)",
    "closes its output": "sys.stdout.close(); return right(question)",
    "moves": "os.chdir('/'); sys.path.clear(); return right(question)",
}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """An adapter that answers by a line of Python."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    made = []

    def write(line):
        (tmp_path / "hostile.py").write_text(f"{HEAD}        {line}\n\nadapter = Adapter()\n")
        made.append(IsolatedAdapter("hostile:adapter"))
        return made[-1]

    write.pids = lambda: [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    yield write
    for adapter in made:
        adapter.close()


def reported(adapter):
    """The results, after they were written in every way."""
    report = run(adapter, CASES)
    made = record(report, "hostile:adapter", "float64")
    jsonschema.validate(json.loads(json.dumps(made)), SCHEMA)
    text = table(report)
    assert text.isascii() and all(c.isprintable() or c == "\n" for c in text)
    return {result.case.id: result for result in report.results}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in ALIKE else k for k in GONE],
)
def test_an_adapter_that_is_lost(opened, monkeypatch, kind):
    line, said = GONE[kind]
    monkeypatch.setattr(program, "machine_memory", lambda: 2**29)
    adapter = opened(line)
    adapter.program.timeout = 0.5 if "silent" in said else 60.0
    details = [result.detail for result in reported(adapter).values()]
    assert all(said in detail for detail in details[:STARTS]), details[0]
    assert set(details[STARTS:]) == {"ConnectionError: the process of hostile:adapter is gone"}
    assert all_end(opened.pids())


def test_an_adapter_that_is_two(opened):
    """How soon the second answer comes is a race: the last process may be alive at the end."""
    adapter = opened("os.fork(); return right(question)")
    details = [result.detail for result in reported(adapter).values()]
    adapter.close()
    assert any("out of turn, or not in JSON" in detail for detail in details)
    assert all_end(opened.pids())


@pytest.mark.parametrize("kind", RAISED)
def test_an_adapter_that_raises_what_is_no_refusal(opened, kind):
    line, said = RAISED[kind]
    results = reported(opened(line))
    assert said in results[BATCH.id].detail
    assert results[BATCH.id].outcome == "errored" and len(set(opened.pids())) == 1
    assert results[REJECT.id].outcome == ("passed" if kind == "no text" else "errored")


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_that_is_none(opened, kind):
    line, said = ANSWERS[kind]
    result = judge(opened(line), BATCH)
    assert said in result.detail and result.outcome in ("failed", "errored")
    assert len(set(opened.pids())) == 1


@pytest.mark.parametrize("kind", HARMLESS)
def test_an_adapter_whose_answers_are_right(opened, kind):
    assert {result.outcome for result in reported(opened(HARMLESS[kind])).values()} == {"passed"}


def test_what_is_printed_without_end_is_cut(opened, capfd):
    adapter = opened("os.write(2, b'x' * 3 * 2**20); return right(question)")
    results = reported(adapter)
    printed = capfd.readouterr().err
    assert {result.outcome for result in results.values()} == {"passed"}
    assert (
        printed.count("x") == SHOWN + printed.count("exe") and "writes more than 1 MiB" in printed
    )


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kit_that_is_ended_leaves_no_adapter_that_hangs(opened, tmp_path, sent):
    opened("print('here', flush=True); time.sleep(600)").close()
    asked = [sys.executable, "-m", "reference.conformance", "--adapter", "hostile:adapter"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(asked, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as kit:
        assert kit.stderr.read(4) == b"here"
        kit.send_signal(sent)
        assert kit.wait(10) == -sent and all_end(opened.pids())


LOADS = {
    "exits": ("os._exit(5)", "ended with status 5"),
    "raises": ("raise BaseException('no\\ndevice')", "BaseException: no device"),
    "prints": ("os.write(1, b'x' * 10**8); raise ValueError('no')", "ValueError: no"),
    "hangs": ("time.sleep(600)", "was silent for 2 s"),
}


@pytest.mark.parametrize("kind", LOADS)
def test_an_adapter_that_cannot_be_imported(tmp_path, monkeypatch, capsys, kind):
    line, said = LOADS[kind]
    (tmp_path / "hostile.py").write_text(f"import os, time\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main.main(["--adapter", "hostile:adapter", "--timeout", "2"]) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert not out and "error: " in last and "hostile:adapter" in last and said in last


MIXED = """
BEHAVIOURS = {
    "conservative": lambda question: print("\\x00" * 10**6) or right(question),
    "plain": lambda question: {"loss": np.broadcast_to(np.nan, (10**15,))},
    "robust": lambda question: os._exit(4),
}

class Mixed(Adapter):
    def evaluate(self, *question):
        return BEHAVIOURS[question[1]](question)

adapter = Mixed()
"""


def test_junit_survives(plugged, tmp_path):
    (tmp_path / "clients.py").write_text(HEAD + "        pass\n" + MIXED)
    options = ("--preference-adapter", "clients:adapter", "-p", "no:xdist")
    code, out = plugged(*options, "-k", "dpo/", "--junitxml", "made.xml")
    suite = ElementTree.parse(tmp_path / "made.xml").getroot()[0]
    failed = {case.get("name") for case in suite if case.find("failure") is not None}
    cases = [case for case in load_cases("dpo") if case.dialect != "conservative"]
    assert code == 1 and "Traceback" not in out
    assert {c.id for c in cases if c.result == "value"} <= failed
    assert not any(name.startswith("dpo/conservative") for name in failed)
    assert "ended with status 4" in out and "an array of shape [1000000000000000]" in out


# --- in the kit's own process


class Stop(BaseException):
    pass


class Wordless(Exception):
    def __str__(self):
        raise Stop


def holding_itself():
    made = {}
    made["loss"] = made
    return made


@pytest.mark.parametrize("error", [Stop("no"), GeneratorExit(), Wordless()])
def test_any_error_but_ctrl_c_is_the_adapters(error):
    found = judge(raising(error), BATCH)
    assert found.outcome == "errored" and found.detail.startswith(type(error).__name__)
    with pytest.raises(KeyboardInterrupt):
        judge(raising(KeyboardInterrupt()), BATCH)


@pytest.mark.parametrize(
    "answer",
    [holding_itself(), {"loss": "NaN"}, {"loss": [1.0, [2.0]]}, {"loss": np.zeros((9, 9))}],
)
def test_an_answer_that_no_hypothesis_gives_is_reported(answer):
    report = run(answering(answer), CASES)
    assert report.results[0].outcome == "failed" and table(report)


@pytest.mark.parametrize("name", ["loss", "grads"])
@pytest.mark.parametrize(
    "value", [None, "x", [[1.0], 2.0], {"x": {"y": 1}}, 10**400], ids=lambda value: str(value)[:9]
)
def test_one_output_that_is_none(name, value):
    report = run(client(lambda *question: right(*question) | {name: value}), CASES)
    assert report.results[0].outcome in ("failed", "passed") and table(report)


def test_answers_are_bounded():
    long = answers.LARGEST + 1
    assert plain(np.zeros(long)) == f"an array of shape [{long}]"
    assert plain([0] * long) == f"a list of {long} items, 0 deep"
    assert plain("x" * long) == f"a text of {long} characters"
    assert plain({"x": (1, {3: 4, "y": np.float32(0.5)})}) == {"x": [1, {"y": np.float32(0.5)}]}
    assert (
        plain(np.array(["a", None], object)) == ["a", None]
        and plain(1j) == "a complex of complex128"
    )
    assert readable("a\nb\x1b\ud800é") == "a\nb\\x1b\\ud800é"
    assert len(readable(readable("x" * 9999))) <= answers.READABLE


def test_a_program_that_is_lost_is_started_again_so_often():
    asked = Program([sys.executable, "-c", "print(input(), flush=True)"], "it")
    for _ in range(STARTS):
        assert asked.exchange("a") == "a\n"
        with pytest.raises(ConnectionError, match="it ended with status 0"):
            asked.exchange("b")
    with pytest.raises(ConnectionError, match="it is gone"):
        asked.exchange("c")
