"""The command line: what is parsed to what, what every option's help says, and how errors end."""

import json
import signal
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import jax
import pytest
from tyro.conf import Suppress

from scale import run
from scale.console import console
from scale.data.dataset import Limits
from scale.paper.pipeline import PRESETS, Paper
from scale.parallel.mesh import RuntimeConfig
from scale.run import COMMANDS, main, parse
from scale.stages.align import Align
from scale.stages.evaluate import Evaluate
from scale.train.optimizer import OptimizerConfig

# ---- what the command line means


def test_without_arguments_it_is_the_paper_in_miniature():
    assert parse([]) == Paper() == PRESETS["miniature"]


def test_options_alone_are_the_papers():
    assert parse(["--out", "x"]) == Paper(out=Path("x")) == parse(["paper", "--out", "x"])


@pytest.mark.parametrize(
    "argv", [["--preset", "paper"], ["--preset=paper"], ["paper", "--preset", "paper"]]
)
def test_a_preset_brings_its_own_defaults(argv):
    """Both of the ways in which an option may be written."""
    assert parse(argv) == PRESETS["paper"]


def test_a_presets_defaults_can_be_overridden():
    paper = PRESETS["paper"]
    command = parse(["--preset", "paper", "--seeds", "2", "--align.steps", "7"])
    assert command == replace(paper, seeds=2, align=replace(paper.align, steps=7))


def test_the_last_preset_counts():
    assert parse(["--preset", "paper", "--preset", "miniature"]) == Paper()


def test_align_from_the_command_line():
    plain = Align(out=Path("o"), data=Path("d"), policy=Path("p"))
    argv = ["align", "--out", "o", "--data", "d", "--policy", "p"]
    assert parse(argv) == plain
    argv += ["--method", "p-dpo", "--beta", "0.1", "--gamma", "0", "0.5"]
    argv += ["--training.steps", "9", "--training.batch-size", "7", "--runtime.remat", "full"]
    argv += ["--limits.prompt", "5", "--limits.truncation-side", "left"]
    argv += ["--optimizer.z-loss", "0.5"]
    assert parse(argv) == replace(
        plain,
        method="p-dpo",
        beta=0.1,
        gamma=(0.0, 0.5),
        limits=Limits(5, truncation_side="left"),
        training=replace(plain.training, steps=9, batch_size=7),
        runtime=RuntimeConfig(remat="full"),
        optimizer=OptimizerConfig(z_loss=0.5),
    )


def test_evaluate_takes_several_policies():
    argv = ["evaluate", "--out", "o", "--data", "d", "--policies", "a", "b"]
    argv += ["--reference", "r", "--rewards", "w"]
    assert parse(argv) == Evaluate(
        out=Path("o"),
        data=Path("d"),
        policies=(Path("a"), Path("b")),
        reference=Path("r"),
        rewards=Path("w"),
    )


@pytest.mark.parametrize(
    "argv",
    [["nonsense"], ["align", "--out", "o"], ["align", "--method", "ppo"], ["--nonsense", "1"]],
)
def test_what_is_no_command_is_an_error(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2 and capsys.readouterr().err


# ---- help


def options(cls, prefix=""):
    """The flag of every option, those of nested dataclasses too."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in fields(cls):
        inner = hints[f.name]
        if Suppress in typing.get_args(inner):
            continue
        if is_dataclass(inner):
            yield from options(inner, f"{prefix}{f.name}.")
        else:
            named = [getattr(a, "name", None) for a in typing.get_args(inner)]
            name = next((n for n in named if isinstance(n, str)), f.name)
            yield f"--{prefix}{name}".replace("_", "-")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_sentence(name, capsys, monkeypatch):
    """In `--help`, every flag is followed by words before the default that is shown in
    parentheses."""
    monkeypatch.setenv("COLUMNS", "100")  # one column
    with pytest.raises(SystemExit) as caught:
        parse([name, "--help"])
    assert caught.value.code == 0
    lines = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
    for flag in options(COMMANDS[name]):
        places = [i for i, line in enumerate(lines) if line.split(" ")[0].rstrip(",") == flag]
        assert len(places) == 1, flag
        first, second, *_ = [*lines[places[0] :], ""]
        text = f"{first[len(flag) :]} {second}".split("(default")[0].split("(required)")[0]
        words = [w for w in text.split() if w[0].isalpha() and not w.isupper()]
        assert words, f"{name} {flag}: {text}"


def test_every_stage_says_what_it_does_in_the_overview(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and run.__doc__.split(":")[0] in printed
    for name, command in COMMANDS.items():
        first = command.__doc__.split(".")[0].split("\n")[0][:40]
        assert name in printed and first in printed, name


# ---- errors


def failing(argv, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["run", *map(str, argv)])
    monkeypatch.setattr(console, "quiet", False)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_a_missing_file_is_one_line_and_exit_code_2(tmp_path):
    data = tmp_path / "nowhere.jsonl"
    options = ["corpus", "--out", tmp_path / "o", "--data", data]
    argv = [sys.executable, "-m", "scale.run", *map(str, options)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    printed = (done.stdout + done.stderr).strip()
    assert printed == f"error: --data {data}: no such file or folder"
    assert not (tmp_path / "o").exists()


def test_a_faulty_row_is_named_by_file_and_line(tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p"}\n')
    message = failing(["corpus", "--out", tmp_path / "o", "--data", data], monkeypatch, capsys)
    assert message.startswith(f"error: {data}:2: field 'completion'")


@pytest.mark.parametrize("name", ["rows[a].jsonl", "rows[/a].jsonl"])
def test_messages_are_printed_as_they_are(tmp_path, monkeypatch, capsys, name):
    """Not read as markup of the console, which would drop `[a]` and choke on `[/a]`."""
    argv = ["corpus", "--out", tmp_path / "o", "--data", f"folder/{name}"]
    message = failing(argv, monkeypatch, capsys)
    assert message == f"error: --data folder/{name}: no such file or folder"


def test_a_damaged_model_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    data, model = tmp_path / "rows.jsonl", tmp_path / "model"
    data.write_text(json.dumps({"prompt": "p"}))
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"no weights")
    (model / "config.json").write_text(json.dumps({"num_reward_models": 0, "model": {}}))
    argv = ["sample", "--out", tmp_path / "o", "--policy", model, "--data", data]
    assert failing(argv, monkeypatch, capsys).startswith(f"error: {model}")


def test_devices_that_are_full_are_one_line_with_what_helps(tmp_path, monkeypatch, capsys):
    def explode(stage):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB\nmore lines")

    monkeypatch.setattr(run, "execute", explode)
    message = failing(["corpus", "--out", tmp_path], monkeypatch, capsys)
    assert message.startswith("error: the devices have too little memory (RESOURCE_EXHAUSTED: Out ")
    assert "--training.accumulation" in message and "more lines" not in message


def test_an_interrupt_is_not_lost_in_the_garbage_collector(monkeypatch):
    """What JAX's callback raises there is ignored, so the signal comes again a moment later."""
    later = []
    monkeypatch.setattr(signal, "setitimer", lambda *arguments: later.append(arguments))

    def _xla_gc_callback():
        run.interrupt(signal.SIGINT, sys._getframe())

    _xla_gc_callback()
    assert later == [(signal.ITIMER_REAL, 0.01)]
    with pytest.raises(KeyboardInterrupt):
        run.interrupt(signal.SIGALRM, sys._getframe())
    assert len(later) == 1


@pytest.mark.parametrize(
    "error", [FloatingPointError("o: loss is nan at step 3"), MemoryError("Unable to allocate")]
)
def test_a_run_that_cannot_go_on_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, error):
    def explode(stage):
        raise error

    monkeypatch.setattr(run, "execute", explode)
    argv = ["corpus", "--out", tmp_path]
    assert failing(argv, monkeypatch, capsys) == f"error: {error}"
