"""The vectors notice what they exist to notice: each seeded bug fails cases, and cases that name it are among them."""

from functools import cache, partial

import numpy as np
import pytest

from reference.conformance.cases import load_cases
from reference.conformance.dialects import adapter
from reference.conformance.flags import AIMED_AT
from reference.conformance.judge import judge
from tests.conformance.faults import FAULTS, ROUNDED, read_anew

ALL = load_cases()


@cache
def judged(name):
    """Every case put to an implementation with this fault."""
    faulty = read_anew(FAULTS[name]).dialects.adapter
    with np.errstate(all="ignore"):
        return [judge(faulty, case, FAULTS[name].dtype) for case in ALL]


def failed(name):
    return [result.case for result in judged(name) if result.outcome == "failed"]


def dialect(case):
    return case.objective, case.dialect


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed_by_name(name):
    """It raises nothing where a value is due, and cases that name it fail in every dialect that it breaks.

    Training is made of what the other files test, whose faults it need not name.
    """
    flag, module, *_ = FAULTS[name]
    assert {result.outcome for result in judged(name)} == {"passed", "failed"}
    wrong = [case for case in failed(name) if "training" in module or case.objective != "training"]
    assert wrong and {*map(dialect, wrong)} == {
        dialect(case) for case in wrong if flag in case.flags
    }


def test_every_flag_that_a_case_is_aimed_at_has_a_fault():
    assert (
        {fault.flag for fault in FAULTS.values()}
        == set(AIMED_AT)
        == {flag for case in ALL for flag in case.flags}
    )


def test_every_case_notices_what_its_flags_name():
    noticed = {(case.id, FAULTS[name].flag) for name in FAULTS for case in failed(name)}
    assert not {(case.id, flag) for case in ALL for flag in case.flags} - noticed


def test_reference_passes():
    assert {judge(adapter, case).outcome for case in ALL} == {"passed"}
    assert {judge(read_anew().dialects.adapter, case).outcome for case in ALL} == {"passed"}


class Narrow:
    """`reference/` in float32; with `dtype` bfloat16 its gradients, and training's table, are rounded to that."""

    def __init__(self, dtype):
        self.dtype, package = dtype, read_anew(ROUNDED if dtype == "bfloat16" else None)
        self.reference, self.supports = package.dialects.adapter, package.dialects.adapter.supports
        for module in ("simplex", "weights", "objectives", "tokens", "pairs", "training"):
            vars(getattr(package, module))["np"] = Numpy32()

    def evaluate(self, objective, dialect, params, inputs):
        made = self.reference.evaluate(
            objective, dialect, params, {n: narrowed(n, v) for n, v in inputs.items()}
        )
        assert all(made[name].dtype == np.float32 for name in made.keys() & RESULTS)
        return made | {
            "grads": {name: grad.astype(self.dtype) for name, grad in made.get("grads", {}).items()}
        }


RESULTS = {"loss", "per_example", "logps", "chosen_logps", "rejected_logps", "losses", "parameters"}


def narrowed(name, value):
    """All numbers but those that index or compare."""
    whole = (
        name.endswith("ids") or name in ("batches", "segments") or not isinstance(value, np.ndarray)
    )
    return value if whole else value.astype(np.float32)


class Numpy32:
    """NumPy that makes arrays of float32."""

    eye, zeros, full = (
        staticmethod(partial(make, dtype=np.float32)) for make in (np.eye, np.zeros, np.full)
    )

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_reference_passes(dtype):
    narrow = Narrow(dtype)
    results = [judge(narrow, case) for case in ALL]
    assert not [f"{r.case.id}: {r.detail}" for r in results if r.outcome != "passed"]
