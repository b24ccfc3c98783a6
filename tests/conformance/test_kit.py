"""The kit passes what conforms, fails what does not, and says which, whatever it is put to."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest

from reference.conformance import __main__ as main
from reference.conformance import report
from reference.conformance.answers import from_json, to_json
from reference.conformance.cases import VECTORS, Tolerance, from_hex, load_cases, to_hex
from reference.conformance.dialects import DIALECTS, Reference
from reference.conformance.judge import differences, dtype_of, judge
from reference.conformance.lines import CommandAdapter, Rejected
from reference.conformance.loading import load_adapter
from reference.conformance.program import STARTS
from reference.conformance.report import run
from reference.conformance.text import table

ROOT = VECTORS.parents[2]
CLIENT = shlex.join(["node", str(VECTORS.parent / "client.js")])
ALL = load_cases()
VALUE, REJECT = (
    next(c for c in load_cases("dpo", "plain") if c.result == r) for r in ("value", "reject")
)
UNSPECIFIED = next(case for case in ALL if case.result == "unspecified")
BATCH = next(case for case in load_cases("dpo", "plain") if case.id.endswith("/batch"))


def client(evaluate, dtype="float64", supports=lambda objective, dialect: True):
    return SimpleNamespace(dtype=dtype, supports=supports, evaluate=evaluate)


def right(objective, dialect, params, inputs):
    return DIALECTS[objective, dialect](params, inputs)


def raising(error):
    def evaluate(*_):
        raise error

    return client(evaluate)


def answering(answer):
    return client(lambda *_: answer)


def changed(**outputs):
    """The reference's answers but for these outputs, each a function of the right one."""

    def evaluate(*question):
        answer = right(*question)
        return answer | {name: change(answer.get(name)) for name, change in outputs.items()}

    return client(evaluate)


def without(*names):
    return client(
        lambda *question: {name: v for name, v in right(*question).items() if name not in names}
    )


def swapped(**dialects):
    """The reference, but for dialects that are answered by another function."""
    return client(lambda o, d, p, i: dialects.get(d.replace("-", "_"), DIALECTS[o, d])(p, i))


# --- one case


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", np.dtype("float32")])
def test_the_reference_passes_at_every_precision(dtype):
    assert {judge(client(right, dtype), case).outcome for case in ALL} == {"passed"}


@pytest.mark.parametrize(
    "error", [ValueError("no"), TypeError("no"), KeyError("no"), AssertionError("no")]
)
def test_an_error_where_a_value_is_due_or_refused(error):
    assert judge(raising(error), VALUE).outcome == "errored"
    assert (
        judge(raising(error), REJECT).outcome
        == judge(raising(error), UNSPECIFIED).outcome
        == "passed"
    )
    assert type(error).__name__ in judge(raising(error), VALUE).detail


@pytest.mark.parametrize(
    "error", [NotImplementedError(), AttributeError(), NameError(), ImportError(), SystemExit(0)]
)
def test_a_broken_implementation_refuses_nothing(error):
    assert (
        judge(raising(error), VALUE).outcome == judge(raising(error), REJECT).outcome == "errored"
    )
    assert judge(raising(error), UNSPECIFIED).outcome == "passed"


def test_a_program_that_is_gone_has_not_answered_where_anything_may_be():
    assert judge(raising(ConnectionError()), UNSPECIFIED).outcome == "errored"


@pytest.mark.parametrize("answer", [None, {}, 3.0, {"loss": float("nan")}])
def test_where_anything_may_be_anything_passes_and_where_an_error_is_due_nothing_does(answer):
    assert judge(answering(answer), UNSPECIFIED).outcome == "passed"
    assert judge(answering(answer), REJECT)[1:3] == ("failed", "accepted, where an error is due")


def test_support_that_raises_is_an_error_of_the_implementation():
    def supports(*_):
        raise ValueError("no idea")

    for case in (VALUE, REJECT):
        assert judge(client(right, supports=supports), case)[1:3] == (
            "errored",
            "ValueError: no idea",
        )


@pytest.mark.parametrize("answer", [None, 0.5, [0.5], "loss", np.zeros(3)])
def test_an_answer_that_is_no_dict_fails(answer):
    result = judge(answering(answer), VALUE)
    assert (
        result.outcome == "failed"
        and type(answer).__name__ in result.detail
        and "dict" in result.detail
    )
    assert run(answering(answer), [VALUE]).diagnoses == []


@pytest.mark.parametrize("change", [lambda loss: None, lambda loss: {}])
def test_a_missing_loss_fails(change):
    assert judge(changed(loss=change), VALUE)[1:3] == ("failed", "loss is missing")
    assert judge(without("loss"), VALUE)[1:3] == ("failed", "loss is missing")


@pytest.mark.parametrize(
    "adapter",
    [without("grads"), changed(grads=lambda g: None), changed(grads=lambda g: dict.fromkeys(g))],
)
def test_missing_gradients_are_told(adapter):
    result = judge(adapter, VALUE)
    assert result.outcome == "passed" and set(result.unchecked) == {
        f"grads.{n}" for n in VALUE.expected["grads"]
    }
    told = table(run(adapter, [VALUE]))
    assert "not reported, so not checked: 1 x grads.policy_chosen_logps" in told


def test_nothing_is_unchecked_where_all_is_reported():
    assert judge(Reference(), VALUE).unchecked == ()
    assert "not checked" not in table(run(Reference(), [VALUE]))


@pytest.mark.parametrize(
    "change", [float, np.float32, np.float64, np.asarray, partial(np.asarray, dtype=np.float32)]
)
def test_numbers_of_any_kind_are_accepted(change):
    adapter = changed(
        loss=change, per_example=list, metrics=lambda m: {n: change(v) for n, v in m.items()}
    )
    assert judge(adapter, BATCH, "float32").outcome == "passed"


@pytest.mark.parametrize(
    "kind", [list, tuple, np.ndarray.tolist, partial(np.asarray, dtype=object)]
)
def test_arrays_of_any_kind_are_accepted(kind):
    adapter = changed(per_example=kind, grads=lambda g: {n: kind(v) for n, v in g.items()})
    assert judge(adapter, BATCH).outcome == "passed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: [[v] for v in x], "shape [5, 1], not [5]"),
        (lambda x: x[:-1], "shape [4], not [5]"),
        (lambda x: x[0], "shape [], not [5]"),
        (lambda x: [], "shape [0], not [5]"),
        (lambda x: [1.0, [2.0]], "no array of numbers"),
        (lambda x: "many", "no array of numbers"),
        (lambda x: [str(v) for v in x], "no array of numbers"),
        (lambda x: x + 0j, "no array of numbers"),
        (lambda x: object(), "no array of numbers"),
        (lambda x: x * np.nan, "per_example[0]: nan, not "),
        (lambda x: [*x[:-1], np.inf], "per_example[4]: inf, not "),
        (lambda x: [*x[:-1], None], "per_example[4]: nan, not "),
        (lambda x: [10**400] * 5, "no array of numbers"),
    ],
)
def test_wrong_arrays_fail_and_are_described(change, said):
    result = judge(changed(per_example=change), BATCH)
    assert (
        result.outcome == "failed"
        and result.detail.startswith("per_example")
        and said in result.detail
    )
    assert ";" not in result.detail


def test_a_loss_of_one_element_is_no_loss():
    assert judge(changed(loss=lambda x: [x]), BATCH).detail == "loss: shape [1], not []"


def test_names_that_are_no_text_are_ignored():
    assert (
        judge(client(lambda *question: {**right(*question), 3: 4.0, None: {}}), BATCH).outcome
        == "passed"
    )


def test_infinity_is_expected_exactly():
    case = VALUE._replace(expected={"loss": np.inf, "per_example": np.array([1.0, -np.inf])})
    assert not list(differences(case, {"loss": np.inf, "per_example": [1.0, -np.inf]}, "float64"))
    for wrong in (-np.inf, np.nan, 1e308):
        assert list(differences(case, {"loss": wrong}, "bfloat16"))
    assert list(differences(case, {"loss": np.inf, "per_example": [1.1, -np.inf]}, "bfloat16"))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["values", "grads"])
def test_tolerance_is_relative_to_the_largest_of_the_array(dtype, kind):
    allowed, expected = VALUE.tolerance[dtype][kind], np.array([100.0, 0.0])
    slack = 100 * allowed.rtol + allowed.atol
    case = VALUE._replace(
        expected={"grads": {"x": expected}} if kind == "grads" else {"loss": expected}
    )
    for error, outcome in ((0.9, "passed"), (-0.9, "passed"), (1.1, "failed"), (-1.1, "failed")):
        found = expected + np.array([0.0, error * slack])
        answer = {"grads": {"x": found}} if kind == "grads" else {"loss": found}
        assert judge(client(lambda *_, answer=answer: answer, dtype), case).outcome == outcome


def test_precision_is_what_the_adapter_says_unless_it_is_told():
    near = changed(loss=lambda x: x * (1 + 1e-7))
    assert (
        judge(near, BATCH).outcome == "failed" and judge(near, BATCH, "float32").outcome == "passed"
    )
    del near.dtype
    assert dtype_of(near) == "float32" and judge(near, BATCH).outcome == "passed"
    assert judge(near, BATCH, "float64").outcome == "failed"


def test_an_unknown_precision_is_named():
    with pytest.raises(ValueError, match="float16 is none of float64, float32, bfloat16"):
        judge(client(right, "float16"), VALUE)


def test_zero_tolerance_is_equality():
    case = VALUE._replace(
        tolerance={"float64": {"values": Tolerance(0.0, 0.0)}}, expected={"loss": 0.1}
    )
    assert judge(answering({"loss": 0.1}), case).outcome == "passed"
    assert judge(answering({"loss": np.nextafter(0.1, 1)}), case).outcome == "failed"


@pytest.mark.parametrize(
    "ids", [(7, 8), [np.int64(7), 8], np.array([7, 8]), [np.array(7), np.array(8)]]
)
def test_ids_may_be_of_any_kind(ids):
    case = VALUE._replace(expected={"ids": [7, 8], "text": "a"})
    assert judge(answering({"ids": ids, "text": "a"}), case).outcome == "passed"
    assert judge(answering({"ids": ids, "text": "b"}), case).detail == "text: 'b', not 'a'"
    assert (
        judge(answering({"ids": [*ids, 9], "text": "a"}), case).detail
        == "ids: [7, 8, 9], not [7, 8]"
    )


def test_an_implementation_cannot_disturb_the_next_question():
    def evaluate(objective, dialect, params, inputs):
        answer = right(objective, "plain", copy.deepcopy(params), copy.deepcopy(inputs))
        for array in inputs.values():
            array *= 0
        inputs.clear(), params.clear()
        return answer

    cases = load_cases("dpo", "plain")
    assert {judge(client(evaluate), case).outcome for case in cases * 2} == {"passed"}
    asked = [case for case in load_cases("dpo", "conservative") if case.result == "value"]
    assert run(client(evaluate), asked).follows == {"dpo/conservative": ["dpo/plain"]}
    assert all(case.params and case.inputs["policy_chosen_logps"].size for case in cases)


# --- which dialect is followed

CONFUSED = [
    ("ipo/paper", "ipo/sum"),
    ("ipo/sum", "ipo/paper"),
    ("ipo/token-mean", "ipo/sum"),
    ("dpo/conservative", "dpo/plain"),
    ("dpo/robust", "dpo/conservative"),
    ("ensemble/batch-min", "ensemble/example-min"),
    ("ensemble/example-min", "ensemble/batch-min"),
    ("ensemble/hull", "ensemble/mean"),
    ("distillation/rebel", "distillation/d-dpo"),
    ("training/e-dpo", "training/dpo"),
    ("logps/sum", "logps/mean"),
    ("data/tokens-keep-end", "data/tokens-keep-start"),
]


@pytest.mark.parametrize(("claimed", "other"), CONFUSED)
def test_a_dialect_that_follows_another_is_named(claimed, other):
    """The second, though it was asked for the first."""
    objective, dialect = claimed.split("/")
    found = run(
        swapped(**{dialect.replace("-", "_"): DIALECTS[objective, other.split("/")[1]]}),
        load_cases(objective),
    )
    assert set(found.follows) == {claimed} and other in found.follows[claimed]
    assert f"\n{claimed} in fact computes {' or '.join(found.follows[claimed])}\n" in table(found)
    assert claimed not in found.follows[claimed]


def test_a_loss_alone_is_enough_to_name_the_dialect():
    adapter = client(lambda o, d, p, i: {"loss": DIALECTS[o, "sum"](p, i)["loss"]})
    assert run(adapter, load_cases("ipo", "paper")).follows == {"ipo/paper": ["ipo/sum"]}


def test_a_bug_of_its_own_follows_nothing():
    halved = changed(loss=lambda x: x / 2)
    assert run(halved, load_cases("ipo")).follows == {}
    gradients = changed(grads=lambda g: {n: -v for n, v in g.items()})
    assert run(gradients, load_cases("ipo")).follows == {}


def test_what_is_followed_explains_every_failed_case():
    def evaluate(objective, dialect, params, inputs):
        answer = DIALECTS["ipo", "sum"](params, inputs)
        return answer if len(inputs["ref_chosen_logps"]) == 1 else answer | {"loss": 7.0}

    assert run(client(evaluate), load_cases("ipo", "paper")).follows == {}


def test_metrics_do_not_hide_what_is_followed():
    def evaluate(objective, dialect, params, inputs):
        return DIALECTS["dpo", "plain"](params, inputs) | {"metrics": {"rewards/chosen": 7.0}}

    assert run(client(evaluate), load_cases("dpo", "conservative")).follows == {
        "dpo/conservative": ["dpo/plain"]
    }


def test_wrong_metrics_alone_follow_nothing():
    wrong = changed(
        metrics=lambda metrics: {name: value + 1 for name, value in (metrics or {}).items()}
    )
    report = run(wrong, load_cases("dpo", "plain"))
    assert report.unexpected and report.follows == {}


def test_cases_may_come_in_any_order():
    """Those of one dialect are judged together: one of `paper` is wrong in a way of its own."""

    def paper(params, inputs):
        answer = DIALECTS["ipo", "sum"](params, inputs)
        return answer | ({"loss": 7.0} if inputs["ref_chosen_logps"].size == 1 else {})

    cases = load_cases("ipo", "paper") + load_cases("ipo", "token-mean")
    mixed = run(
        swapped(paper=paper, token_mean=DIALECTS["ipo", "sum"]),
        cases[::2] + cases[1::2] + [cases[3]],
    )
    assert mixed.follows == {"ipo/token-mean": ["ipo/sum"]}


# --- the command line


@pytest.fixture
def kit(capsys, monkeypatch):
    """`python -m reference.conformance` runs on an object: exit status, output, standard error."""

    def call(adapter, *arguments):
        module = SimpleNamespace(adapter=adapter)
        monkeypatch.setitem(sys.modules, "client_under_test", module)
        code = main.main(["--in-process", "--adapter", "client_under_test:adapter", *arguments])
        return code, *capsys.readouterr()

    return call


def command(*arguments, **options):
    call = [sys.executable, "-W", "error", "-m", "reference.conformance", *arguments]
    return subprocess.run(
        call, capture_output=True, text=True, timeout=300, **{"cwd": ROOT} | options
    )


def test_nothing_tested_is_no_success(kit):
    code, _, err = kit(SimpleNamespace(supports=lambda o, d: False, evaluate=right))
    assert code == 2 and "nothing was tested" in err


def test_all_passed(kit):
    code, out, err = kit(Reference())
    assert code == 0 and not err
    total = f"{len(ALL)} cases: {len(ALL)} passed, 0 noted, 0 failed, 0 skipped, 0 errored"
    assert f"\n{total}\n" in out


def test_the_table_counts_outcomes_of_every_dialect(kit):
    def evaluate(objective, dialect, params, inputs):
        if dialect == "robust":
            raise RuntimeError("out of order")
        return right(objective, dialect, params, inputs) | (
            {"loss": 0.0} if dialect == "conservative" else {}
        )

    code, out, _ = kit(client(evaluate, supports=lambda o, d: o == "dpo" or d == "sum"))
    rows = {line.split()[0]: line.split()[1:] for line in out.split("\n\n")[0].splitlines()}
    assert code == 1 and rows.pop("objective/dialect") == list(report.OUTCOMES)
    assert set(rows) == {f"{c.objective}/{c.dialect}" for c in ALL if c.objective == "dpo"} | {
        f"{c.objective}/{c.dialect}" for c in ALL if c.dialect == "sum"
    }
    values, others = (
        [sum((c.result == "value") == due for c in load_cases("dpo", "robust")) for due in (1, 0)]
    )
    assert rows["dpo/plain"] == [str(len(load_cases("dpo", "plain"))), ".", ".", ".", "."]
    assert rows["dpo/conservative"] == [str(others), ".", str(values), ".", "."]
    assert rows["dpo/robust"] == [str(others), ".", ".", ".", str(values)]
    assert "\nERRORED dpo/robust/one-pair: " in out and "    RuntimeError: out of order\n" in out
    assert "\nFAILED dpo/conservative/one-pair: " in out
    assert f"\n{values - 1} more of dpo/conservative: reference, policy-is-reference, " in out
    assert "\nnot supported: data/*, distillation/*, ensemble/*, ipo/paper, ipo/token-mean, " in out


SEARCHING = "searching for what is computed in place of dpo/plain ...\n"


def test_an_error_of_the_search_ends_no_report(kit, monkeypatch):
    def broken(*_):
        raise KeyError("beta")

    monkeypatch.setattr(report, "diagnose", broken)
    code, out, err = kit(changed(loss=lambda x: 2 * x), "--only", "dpo/plain")
    assert code == 1 and err == SEARCHING and "FAILED dpo/plain/one-pair" in out
    assert "SEARCH FAILED dpo/plain: KeyError: 'beta'; this is an error of the kit" in out
    found = json.loads(kit(changed(loss=lambda x: 2 * x), "--only", "dpo/plain", "--json")[1])
    assert found["search_errors"] == {"dpo/plain": "KeyError: 'beta'"}


def test_a_failure_is_an_exit_status(kit):
    code, out, err = kit(changed(loss=lambda x: 2 * x), "--only", "dpo/plain")
    assert code == 1 and err == SEARCHING
    assert "FAILED dpo/plain/one-pair" in out and "loss: " in out


@pytest.mark.parametrize("only", ["dpo", "dpo/plain"])
def test_only_these_cases(kit, only):
    found = json.loads(kit(Reference(), "--only", only, "--json")[1])
    assert {r["objective"] for r in found["results"]} == {"dpo"}
    assert len(found["results"]) == len([c for c in ALL if c.id.startswith(only + "/")])


@pytest.mark.parametrize(
    "only", ["dop", "dpo/plian", "dpo/", "/", "/etc", "../dpo", "**/..", "dpo/plain/batch"]
)
def test_an_unknown_selection(kit, only):
    code, out, err = kit(Reference(), "--only", only)
    assert code == 2 and not out and len(err.splitlines()) == 1 and only in err


RECORD = json.loads((VECTORS.parent / "record.schema.json").read_text())


def test_json(kit):
    adapter = client(
        lambda o, d, p, i: {"loss": DIALECTS[o, "sum"](p, i)["loss"]},
        supports=lambda o, d: d != "sum",
    )
    code, out, _ = kit(adapter, "--only", "ipo", "--json")
    found = json.loads(out)
    assert code == 1 and len(out.splitlines()) == 1
    assert set(found) == set(RECORD["properties"])
    fields = set(RECORD["$defs"]["result"]["properties"])
    assert all(set(result) == fields for result in found["results"])
    by_id = {result["id"]: result for result in found["results"]}
    assert list(by_id) == [case.id for case in load_cases("ipo")]
    batch = by_id["ipo/paper/batch"]
    assert (
        batch["outcome"] == "failed" and "loss: " in batch["detail"] and "target" in batch["flags"]
    )
    assert "per_example" in batch["unchecked"] and "grads.policy_chosen_logps" in batch["unchecked"]
    assert by_id["ipo/sum/batch"]["outcome"] == "skipped"
    assert found["follows"] == {"ipo/paper": ["ipo/sum"], "ipo/token-mean": ["ipo/sum"]}
    assert found["unexpected"] == [r["id"] for r in found["results"] if r["outcome"] == "failed"]
    assert set(found["totals"]) == set(report.OUTCOMES) and sum(found["totals"].values()) == len(
        by_id
    )


def test_what_an_implementation_prints_is_no_part_of_the_report(kit):
    def evaluate(*question):
        print("step 1")
        return right(*question)

    code, out, err = kit(client(evaluate), "--only", "dpo/plain", "--json")
    assert code == 0 and json.loads(out) and "step 1" in err


def test_expected_failures(kit, tmp_path):
    adapter = changed(loss=lambda x: 2 * x)
    failing = json.loads(kit(adapter, "--only", "dpo/plain", "--json")[1])["unexpected"]
    expected = tmp_path / "xfail"
    expected.write_text(
        "# known\n\n" + "\n".join(f"  {name}  # because" for name in failing) + "\n"
    )
    code, out, _ = kit(adapter, "--only", "dpo/plain", "--xfail", str(expected))
    assert (
        code == 0
        and "FAILED" not in out
        and "MENDED" not in out
        and f"({len(failing)} as expected)" in out
    )
    code, out, _ = kit(Reference(), "--only", "dpo/plain", "--xfail", str(expected))
    assert code == 0 and f"MENDED {failing[0]}: an expected failure that passed" in out
    found = json.loads(
        kit(Reference(), "--only", "dpo/plain", "--xfail", str(expected), "--json")[1]
    )
    assert found["mended"] == failing and found["unexpected"] == []
    expected.write_text("\n".join(failing[1:]))
    code, out, _ = kit(adapter, "--only", "dpo/plain", "--xfail", str(expected))
    assert code == 1 and re.findall("^FAILED (\\S+):", out, re.MULTILINE) == failing[:1]


def test_expected_failures_of_what_is_not_selected_are_known(kit, tmp_path):
    (tmp_path / "xfail").write_text("ipo/sum/batch\n")
    assert kit(Reference(), "--only", "dpo", "--xfail", str(tmp_path / "xfail"))[0] == 0


def test_an_unknown_expected_failure_is_named_with_its_line(kit, tmp_path):
    path = tmp_path / "xfail"
    path.write_text("# one\ndpo/plain/batch\ndpo/plain/bach # typo\n")
    code, out, err = kit(Reference(), "--xfail", str(path))
    assert (
        code == 2
        and not out
        and f"{path}:3: no case 'dpo/plain/bach'" in err
        and len(err.splitlines()) == 1
    )


def test_a_missing_file_of_expected_failures(kit, tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        code, out, err = kit(Reference(), "--xfail", str(path))
        assert code == 2 and not out and str(path) in err and len(err.splitlines()) == 1


UNUSABLE = (
    "json nowhere:adapter json:adapter json:dumps :x .a:b exits:a raises:a typo:a half:adapter"
    " narrow:adapter"
)


@pytest.mark.parametrize("path", UNUSABLE.split())
def test_an_unusable_adapter(tmp_path, monkeypatch, capsys, path):
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    (tmp_path / "raises.py").write_text("raise RuntimeError('no\\ndevice')")
    (tmp_path / "typo.py").write_text("def")
    (tmp_path / "half.py").write_text(
        "class adapter:\n    supports = staticmethod(lambda o, d: True)"
    )
    (tmp_path / "narrow.py").write_text(
        "from reference.conformance.dialects import Reference\n"
        "adapter = Reference()\nadapter.dtype = 'float16'"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main.main(["--adapter", path]) == 2
    out, err = capsys.readouterr()
    assert not out and path in err and len(err.splitlines()) == 1 and "error: " in err


def test_an_adapter_lacks_what_is_named():
    with pytest.raises(ValueError, match="json:dumps: has no supports and no evaluate"):
        load_adapter("json:dumps")


@pytest.mark.parametrize(
    "arguments", ["", "--adapter a:b --command c", "--adapter a:b --dtype int8", "--json"]
)
def test_wrong_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main.main(arguments.split())
    assert (
        exit_.value.code == 2
        and "usage: python -m reference.conformance" in capsys.readouterr().err
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0 and out.startswith("usage: python -m reference.conformance [-h]")
    assert "Exits with 0 " in out and "with 1 " in out and "with 2 " in out and "`" not in out


def test_help_has_the_command_that_was_typed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/preference-conformance", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().out.startswith("usage: preference-conformance [-h]")


def test_precision_on_the_command_line(kit):
    near = changed(loss=lambda x: x * (1 + 1e-7))
    assert kit(near, "--only", "ipo/sum")[0] == 1
    assert kit(near, "--only", "ipo/sum", "--dtype", "float32")[0] == 0


def test_the_module_in_an_interpreter_of_its_own(tmp_path):
    """An adapter in the folder where it is called; the exit status is the process's."""
    (tmp_path / "mine.py").write_text(
        "from reference.conformance.dialects import adapter as right\n"
        "class Wrong:\n"
        "    supports = right.supports\n"
        "    def evaluate(self, *question):\n"
        "        return right.evaluate(*question) | {'loss': 1.0}\n"
        "wrong = Wrong()\n"
    )
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    assert command("--adapter", "mine:right", "--only", "reward", **options).returncode == 0
    done = command("--adapter", "mine:wrong", "--only", "reward", **options)
    assert done.returncode == 1 and "FAILED reward/margin/" in done.stdout
    assert all(line.startswith("searching for ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("arguments", ["", "--json"])
def test_a_reader_may_stop_early(arguments):
    """The pipe is closed before anything is written, which is the worst that `head` can do.

    Python may buffer.
    """
    python = shlex.quote(sys.executable)
    call = f"{python} -m reference.conformance --adapter reference.conformance.dialects:adapter"
    call = f"{{ {call} --only dpo {arguments}; echo status $? >&2; }} | true"
    for unbuffered in ("", "1"):
        options = {"cwd": ROOT, "env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
        done = subprocess.run(
            ["bash", "-c", call], capture_output=True, text=True, timeout=300, **options
        )
        assert done.stderr == "status 0\n"


# --- floats in JSON


@pytest.mark.parametrize(
    "value",
    [
        np.array([0.1, -0.0, 5e-324, 1.7976931348623157e308]),
        np.array([np.inf, -np.inf, np.nan]),
        np.array([], float),
        np.zeros((2, 0)),
        np.arange(6).reshape(2, 3),
        np.array(0.1),
        np.float32(0.1),
        np.float64("-inf"),
        np.int64(3),
        7,
        0.1,
    ],
    ids=str,
)
def test_hex_is_exact(value):
    back = from_hex(json.loads(json.dumps(to_hex({"x": value}), allow_nan=False)))["x"]
    kept = np.asarray(value, float if isinstance(value, np.float32) else None)
    assert np.shape(back) == kept.shape and np.asarray(back).dtype == kept.dtype
    assert np.array_equal(back, kept, equal_nan=True) and np.array_equal(
        np.signbit(back), np.signbit(kept)
    )


def test_json_lines_keep_every_digit():
    value = {
        "a": np.array([0.1, 1 / 3, -0.0]),
        "b": np.array([[1, 2]]),
        "c": -np.inf,
        "d": "text",
        "e": [np.ones(1)],
    }
    sent = json.loads(json.dumps(to_json(value), allow_nan=False))
    assert sent == {
        "a": [0.1, 1 / 3, -0.0],
        "b": [[1, 2]],
        "c": "-Infinity",
        "d": "text",
        "e": [[1.0]],
    }
    back = from_json({"x": ["NaN", "Infinity", 1, {"y": "-Infinity"}], "z": "nan"})
    assert (
        np.isnan(back["x"][0])
        and back["x"][1:] == [np.inf, 1, {"y": -np.inf}]
        and back["z"] == "nan"
    )


# --- programs

PROGRAM = """
import json, os, sys, time
open(sys.argv[1], "a").write(f"{os.getpid()} ")
def say(text): print(text, flush=True)
def answer(id, **rest): say(json.dumps({"id": id} | rest))
for line in sys.stdin:
    asked = json.loads(line)
    id = asked["id"]
    if asked["method"] == "supports":
        answer(id, result=True)
        continue
"""
RIGHT = """
    sys.path.insert(0, ROOT)
    from reference.conformance.dialects import adapter
    from reference.conformance.answers import to_json
    import numpy as np
    inputs = {name: np.array(value) for name, value in asked["inputs"].items()}
    try:
        made = adapter.evaluate(asked["objective"], asked["dialect"], asked["params"], inputs)
        answer(id, result=to_json(made))
    except ValueError as error:
        answer(id, error=str(error))
"""
BROKEN = {
    "dies": ("    sys.exit(3)", "ended with status 3"),
    "dies-in-the-middle": ("    if id > 6: os._exit(4)\n" + RIGHT, "ended with status 4"),
    "half-a-line": (
        '    sys.stdout.write(\'{"id": 2, "res\'); sys.stdout.flush(); os._exit(5)',
        "ended with status 5",
    ),
    "garbage": ("    say('Loading weights ...')", "not in JSON: 'Loading weights"),
    "binary": ("    sys.stdout.buffer.write(b'\\xff\\xfe\\n'); sys.stdout.flush()", "not in JSON"),
    "empty-line": ("    say('')", "not in JSON"),
    "no-object": ("    say('[1]')", "out of turn"),
    "wrong-id": ("    answer(id + 1, result={'loss': 0.5})", "out of turn"),
    "no-id": ("    say('{}')", "out of turn"),
    "two-lines": (
        "    answer(id, result={'loss': 0.5}); answer(id, result={'loss': 0.5})",
        "out of turn",
    ),
    "hangs": ("    time.sleep(600)", "silent for 1 s"),
    "closes-its-output": ("    os.close(1); time.sleep(600)", "ended with status"),
}


@pytest.fixture
def program(tmp_path):
    """A program that supports everything and answers by these lines, and its processes."""
    pids = tmp_path / "pids"

    def write(evaluate):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM + evaluate.replace("ROOT", repr(str(ROOT))))
        return shlex.join([sys.executable, str(path), str(pids)])

    write.pids = lambda: [int(pid) for pid in pids.read_text().split()]
    return write


def is_running(pid):
    """Neither gone nor waiting to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids):
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(pids) and not any(is_running(pid) for pid in pids)


IMPATIENT = ("--only", "dpo/plain", "--timeout", "1")


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_javascript_client_passes():
    done = command("--command", CLIENT, "--only", "dpo/plain", "--json")
    found = json.loads(done.stdout)
    assert (
        done.returncode == 0
        and not done.stderr
        and {r["outcome"] for r in found["results"]} == {"passed"}
    )
    assert not any(result["unchecked"] for result in found["results"])
    refused = next(result for result in found["results"] if result["id"] == REJECT.id)
    assert refused["detail"] == "Rejected: arrays of different lengths"


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_javascript_client_claims_no_more_than_it_does():
    done = command("--command", CLIENT, "--json")
    supported = {
        r["id"].rpartition("/")[0]
        for r in json.loads(done.stdout)["results"]
        if r["outcome"] != "skipped"
    }
    assert done.returncode == 0 and supported == {"dpo/plain"}


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_javascript_client_on_extremes():
    adapter, one = CommandAdapter(CLIENT), np.ones(1)
    inputs = dict.fromkeys(VALUE.inputs, one)
    far = adapter.evaluate(
        "dpo", "plain", {"beta": 1.0}, inputs | {"policy_chosen_logps": one * -1e5}
    )
    lost = adapter.evaluate(
        "dpo", "plain", {"beta": 1.0}, inputs | {"policy_chosen_logps": one * -np.inf}
    )
    adapter.close()
    assert far["loss"] == 100001.0 and far["grads"]["policy_chosen_logps"] == [-1.0]
    assert lost["loss"] == np.inf and lost["metrics"]["rewards/chosen"] == -np.inf


def test_the_javascript_client_is_short():
    lines = (VECTORS.parent / "client.js").read_text().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120 and 'require("' in "".join(lines)


def test_a_program_that_is_right_passes_and_ends(program, capsys):
    assert main.main(["--command", program(RIGHT), "--only", "dpo/plain"]) == 0
    assert " 0 failed, 0 skipped, 0 errored" in capsys.readouterr().out
    assert all_end(program.pids())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_program_is_an_error_and_does_not_stay(program, capsys, kind):
    source, said = BROKEN[kind]
    start = time.monotonic()
    assert main.main(["--command", program(source), *IMPATIENT, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    outcomes = [result["outcome"] for result in found["results"]]
    assert set(outcomes) <= {"passed", "errored", "failed"} and outcomes[-1] == "errored"
    errored = [result["detail"] for result in found["results"] if result["outcome"] == "errored"]
    assert all(said in detail for detail in errored[:STARTS])
    assert set(errored[STARTS:]) == {"ConnectionError: the program is gone"}
    if kind != "two-lines":  # the second is met by the next question alone
        assert outcomes.count("errored") == len(outcomes) - outcomes.index("errored")
    if kind == "dies-in-the-middle":
        assert outcomes[:3] == ["passed"] * 3
    assert all_end(program.pids()) and time.monotonic() - start < 10


def test_a_shells_child_does_not_stay(program, capsys):
    """It would hold the pipe open after the shell is gone."""
    inner = program(BROKEN["hangs"][0])
    assert (
        main.main(
            ["--command", shlex.join(["bash", "-c", f"{inner}; true"]), *IMPATIENT]
        )
        == 1
    )
    assert "silent for 1 s" in capsys.readouterr().out and all_end(program.pids())


def test_a_program_that_does_not_read_is_not_waited_for(program):
    adapter = CommandAdapter(program("    time.sleep(600)") + " ", timeout=0.5)
    assert adapter.supports("dpo", "plain")
    adapter.program.timeout = 0.1
    with pytest.raises(ConnectionError, match="silent"):
        adapter.evaluate("dpo", "plain", {}, {})
    stuck = CommandAdapter("sleep 600", timeout=0.2)
    with pytest.raises(ConnectionError, match=re.escape("silent for 0.2 s")):
        stuck.evaluate("dpo", "plain", {}, {"x": np.ones(10**5)})
    for done in (adapter, stuck):
        done.close()
        with pytest.raises(ConnectionError, match="the program is gone"):
            done.supports("dpo", "plain")
        done.close()


def test_a_program_that_ends_before_it_is_asked():
    adapter = CommandAdapter("true")
    assert adapter.program.process.wait(10) == 0
    assert judge(adapter, VALUE)[1:3] == (
        "errored",
        "ConnectionError: the program ended with status 0",
    )
    assert adapter.program.process.stdin.closed and adapter.program.process.stdout.closed


def test_an_interrupted_run_leaves_no_program(program, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    class Asked(CommandAdapter):
        evaluate = interrupted

    monkeypatch.setattr(main, "CommandAdapter", Asked)
    with pytest.raises(KeyboardInterrupt):
        main.main(["--command", program(RIGHT), "--only", "dpo/plain"])
    assert all_end(program.pids())


@pytest.mark.parametrize("said", ["sys.stderr.write('a warning\\n'); ", ""])
def test_an_error_is_a_refusal(program, said):
    adapter = CommandAdapter(program(f"    {said}answer(id, error='too long')"))
    with pytest.raises(Rejected, match="too long"):
        adapter.evaluate("dpo", "plain", {}, {})
    assert judge(adapter, REJECT)[1:3] == ("passed", "Rejected: too long")
    assert judge(adapter, VALUE)[1:3] == ("errored", "Rejected: too long")
    adapter.close()


@pytest.mark.parametrize(
    "answer",
    [
        "answer(id, result={'loss': 'Infinity'}, error=None)",
        'say(\'{"id": %d, "result": {"loss": Infinity}}\' % id)',
    ],
)
def test_infinity_as_text_or_as_it_is(program, answer):
    adapter = CommandAdapter(program("    " + answer))
    assert adapter.evaluate("dpo", "plain", {}, {}) == {"loss": np.inf}
    assert judge(adapter, VALUE._replace(expected={"loss": np.inf})).outcome == "passed"
    assert (
        judge(adapter, VALUE._replace(expected={"loss": -np.inf})).detail == "loss: inf, not -inf"
    )
    adapter.close()


@pytest.mark.parametrize(
    "answer",
    [
        "answer(id)",
        "answer(id, result=None)",
        "answer(id, result=[0.5])",
        "answer(id, result={'loss': 'NaN'})",
        "answer(id, result={'loss': '0x1p-1'})",
        "answer(id, result={'loss': [[1], 2]})",
    ],
)
def test_a_wrong_answer_fails(program, answer):
    adapter = CommandAdapter(program("    " + answer))
    result = judge(adapter, VALUE)
    assert (
        result.outcome == "failed"
        and result.detail
        and judge(adapter, UNSPECIFIED).outcome == "passed"
    )
    adapter.close()


@pytest.mark.parametrize("given", ["", " ", "'", "/nowhere/at/all --x"])
def test_a_command_that_cannot_be_started(capsys, given):
    assert main.main(["--command", given]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "error: " in err


# --- the pytest plugin

ADAPTERS = """
from reference.conformance.dialects import DIALECTS

class Adapter:
    dtype = "float64"

    def __init__(self, other):
        self.other = other

    def supports(self, objective, dialect):
        return objective == "ipo"

    def evaluate(self, objective, dialect, params, inputs):
        return DIALECTS[objective, self.other.get(dialect, dialect)](params, inputs)

good, bad = Adapter({}), Adapter({"paper": "sum"})
"""
IPO = len(load_cases("ipo"))
PAPER = [case for case in load_cases("ipo", "paper") if case.result == "value"]
WORKERS = ["-p no:xdist", "-n 2"] if find_spec("xdist") else [""]
INSTALLED = any(
    found.value == "reference.conformance.plugin" for found in entry_points(group="pytest11")
)


@pytest.fixture
def plugged(tmp_path):
    """pytest in an empty folder: exit status and what it prints."""
    (tmp_path / "clients.py").write_text(ADAPTERS)

    def call(*arguments):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        }
        options = {"cwd": tmp_path, "env": clean | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}}
        plugin = [] if INSTALLED else ["-p", "reference.conformance.plugin"]
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-rA",
            *plugin,
            *arguments,
        ]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, **options)
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.mark.parametrize("workers", WORKERS)
def test_the_plugin_passes_what_conforms(plugged, workers):
    code, out = plugged("--preference-adapter", "clients:good", *workers.split())
    assert code == 0 and f"{IPO} passed, {len(ALL) - IPO} skipped in " in out
    assert "PASSED conformance::ipo/paper/batch" in out and "not supported" in out


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_the_plugin_fails_what_does_not(plugged, workers):
    code, out = plugged("--preference-adapter", "clients:bad", *workers.split())
    assert (
        code == 1
        and f"{len(PAPER)} failed, {IPO - len(PAPER)} passed, {len(ALL) - IPO} skipped in " in out
    )
    batch = next(case for case in PAPER if case.id == "ipo/paper/batch")
    message = f"{batch.comment}\nloss: "
    assert (
        message in out
        and "Traceback" not in out
        and "def runtest" not in out
        and "NonConformance" not in out
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("adapter", ["clients:nobody", "nowhere:adapter", "clients"])
def test_the_plugin_refuses_what_is_no_adapter(plugged, workers, adapter):
    code, out = plugged("--preference-adapter", adapter, *workers.split())
    assert (
        code == pytest.ExitCode.USAGE_ERROR
        and f"ERROR: {adapter}: " in out
        and "Traceback" not in out
    )


@pytest.mark.slow
def test_the_plugin_knows_expected_failures(plugged, tmp_path):
    names = [case.id for case in PAPER]
    (tmp_path / "xfail").write_text("\n".join(names[1:]))
    code, out = plugged("--preference-adapter", "clients:bad", "--preference-xfail", "xfail")
    assert (
        code == 1
        and f"1 failed, {IPO - len(PAPER)} passed" in out
        and f"{len(PAPER) - 1} xfailed" in out
    )
    code, out = plugged("--preference-adapter", "clients:good", "--preference-xfail", "xfail")
    assert (
        code == 0 and f"{len(PAPER) - 1} xpassed" in out and f"XPASS conformance::{names[1]}" in out
    )
    (tmp_path / "xfail").write_text("\nipo/paper/nothing\n")
    code, out = plugged("--preference-adapter", "clients:good", "--preference-xfail", "xfail")
    assert (
        code == pytest.ExitCode.USAGE_ERROR and "ERROR: xfail:2: no case 'ipo/paper/nothing'" in out
    )
    code, out = plugged("--preference-adapter", "clients:good", "--preference-xfail", "nowhere")
    assert code == pytest.ExitCode.USAGE_ERROR and "nowhere" in out


@pytest.mark.slow
def test_the_plugin_selects_and_counts_as_pytest_does(plugged, tmp_path):
    (tmp_path / "test_own.py").write_text("def test_own(): pass")
    code, out = plugged("--preference-adapter", "clients:good", "-k", "own or ipo/sum/batch")
    assert (
        code == 0
        and f"collected {len(ALL) + 1} items / {len(ALL) - 1} deselected / 2 selected" in out
    )
    assert "PASSED test_own.py::test_own" in out and "PASSED conformance::ipo/sum/batch" in out


@pytest.mark.slow
def test_without_its_option_the_plugin_does_nothing(plugged):
    code, out = plugged()
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED and "collected 0 items" in out


# --- the vector files

SCHEMA = json.loads((VECTORS / "schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FILES = sorted(VECTORS.glob("*/*.json"))


def faults(file):
    return [f"{error.json_path}: {error.message[:200]}" for error in VALIDATOR.iter_errors(file)]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_dialect_has_a_file():
    assert {(path.parent.name, path.stem) for path in FILES} == set(DIALECTS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_fits_the_schema(path):
    file = json.loads(path.read_text(encoding="utf-8"))
    assert not faults(file)
    assert (file["objective"], file["dialect"]) == (path.parent.name, path.stem)
    assert {flag for case in file["cases"] for flag in case["flags"]} == set(file["flags"])
    assert all(case["id"].startswith(f"{path.parent.name}/{path.stem}/") for case in file["cases"])
    assert ("grads" in file["tolerance"]["float64"]) >= any(
        "grads" in case["expected"] for case in file["cases"]
    )


def test_ids_are_unique():
    ids = [case.id for case in ALL]
    assert len(ids) == len(set(ids))


def put(value, *path):
    """A change to a file: what stands at the path is this, or is gone where there is no value."""

    def change(file):
        *way, last = path
        for name in way:
            file = file[name]
        file[last] = value
        if value is None:
            del file[last]

    return change


FIRST = ("cases", 0)
FAULTY = {
    "no-version": put(None, "version"),
    "another-version": put(2, "version"),
    "a-field-too-many": put(1, "author"),
    "no-source": put("", "source"),
    "an-encoding": put("base64", "encoding"),
    "a-dtype": put({"values": {"rtol": 0, "atol": 0}}, "tolerance", "float16"),
    "no-dtype": put(None, "tolerance", "bfloat16"),
    "no-values": put(None, "tolerance", "float32", "values"),
    "a-negative-tolerance": put(-1e-9, "tolerance", "float32", "values", "atol"),
    "a-flag-in-words": put("what", "flags", "Not a flag"),
    "a-flag-without-words": put("", "flags", "sign"),
    "no-cases": put([], "cases"),
    "no-comment": put(None, *FIRST, "comment"),
    "a-case-field": put(1, *FIRST, "weight"),
    "an-id": put("one-pair", *FIRST, "id"),
    "a-result": put("ok", *FIRST, "result"),
    "a-value-without-flags": put([], *FIRST, "flags"),
    "a-flag-twice": put(["sign", "sign"], *FIRST, "flags"),
    "nothing-expected": put({}, *FIRST, "expected"),
    "a-rejected-value": put("reject", *FIRST, "result"),
    "an-unspecified-value": put("unspecified", *FIRST, "result"),
    "an-output": put("0x0.0p+0", *FIRST, "expected", "losss"),
    "a-decimal": put(0.5, *FIRST, "params", "beta"),
    "a-decimal-as-text": put("0.5", *FIRST, "params", "beta"),
    "a-short-hex": put("0x1p-1", *FIRST, "params", "beta"),
    "two-zeros": put("0x0.0000000000000p+0", *FIRST, "params", "beta"),
    "upper-case": put("0X1.0000000000000P-1", *FIRST, "params", "beta"),
    "nan": put("NaN", *FIRST, "expected", "loss"),
    "null": put([None], *FIRST, "expected", "per_example"),
    "a-number-for-an-array": put("0x0.0p+0", *FIRST, "inputs", "policy_chosen_logps"),
    "an-array-for-a-number": put(["0x0.0p+0"], *FIRST, "expected", "loss"),
    "a-gradient": put("0x0.0p+0", *FIRST, "expected", "grads", "policy_chosen_logps"),
    "a-name": put(["0x0.0p+0"], *FIRST, "inputs", "Policy logps"),
    "text": put("text", *FIRST, "inputs", "prompt"),
    "no-inputs": put({}, *FIRST, "inputs"),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_faulty_file_does_not_fit(kind):
    file = json.loads((VECTORS / "dpo" / "plain.json").read_text())
    FAULTY[kind](file)
    assert faults(file)


@pytest.mark.parametrize(
    "change",
    [
        put({"a": 1}, *FIRST, "expected", "chosen"),
        put(["a"], *FIRST, "expected", "chosen"),
        put([{"role": "bot", "content": "a"}], *FIRST, "expected", "prompt"),
        put([{"role": "user"}], *FIRST, "expected", "prompt"),
        put([{"role": "user", "content": "a", "weight": 1}], *FIRST, "expected", "prompt"),
        put([1.5], *FIRST, "expected", "prompt_ids"),
        put([-1], *FIRST, "expected", "prompt_ids"),
        put(0.5, *FIRST, "params", "eos_id"),
        put({"a": 1}, *FIRST, "inputs", "prompt"),
        put("hex", "encoding"),
    ],
)
def test_a_faulty_file_of_plain_json_does_not_fit(change):
    file = json.loads((VECTORS / "data" / "explicit.json").read_text())
    change(file)
    assert faults(file)
