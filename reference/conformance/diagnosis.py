"""Which hypotheses reproduce an implementation's numbers on ALL the cases of a dialect.

Outputs are looked at one by one, since a loss may be wrong where its gradient is right. Which
inputs are refused is looked at by itself.
"""

from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.cases import Case
from reference.conformance.evidence import (
    ACCEPTED,
    REFUSALS,
    Evidence,
    Found,
    differs,
    error_of,
    evaluated,
    evidence_of,
    reproduced,
    searched,
    size_of,
)
from reference.conformance.features import first_losses_differ, shared
from reference.conformance.fitting import fitted
from reference.conformance.formulas import formulas
from reference.conformance.hypotheses import (
    Hypothesis,
    Key,
    beyond,
    compound,
    compound_families,
    families,
    right,
    simple,
)
from reference.conformance.judge import Adapter
from reference.conformance.metrics import sums_of_columns

OF_METRICS = frozenset(
    ("accuracy", "accuracy-tie", "accuracy-of-means", "batch-sum", "metrics", "scale", "sign")
)
"""Flags of mistakes that an accuracy alone may tell."""


OF_MARGINS = {"metrics.rewards/margins", "metrics.rewards/accuracies"}


class Part(NamedTuple):
    """What some wrong outputs are.

    Attributes:
        outputs: their names.
        hypotheses: those that reproduce them, and that nothing tells apart; none where there is
            none.
    """

    outputs: tuple[str, ...]
    hypotheses: tuple[Hypothesis, ...]


class Diagnosis(NamedTuple):
    """What an implementation computes in place of a dialect.

    Attributes:
        dialect: the claimed `objective/dialect`.
        parts: the wrong outputs.
        whole: the first part's hypotheses reproduce all outputs, those that are right too.
        smallest: the failing case with the fewest numbers.
        furthest: the case with the output that is wrong by most.
        right: names of the outputs that are right on all cases.
        common: what all failing cases have, and no other, and further clues; "" where there are
            none.
    """

    dialect: str
    parts: tuple[Part, ...]
    whole: bool
    smallest: Case
    furthest: Case
    right: tuple[str, ...] = ()
    common: str = ""

    @property
    def known(self) -> bool:
        """Every wrong output is explained."""
        return all(part.hypotheses for part in self.parts)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of all mistakes that it names."""
        named = (h.flags for part in self.parts for h in part.hypotheses)
        return tuple(dict.fromkeys(flag for flags in named for flag in flags))


@np.errstate(all="ignore")  # answers and hypotheses may be NaN, or infinite
def diagnose(adapter: Adapter, cases: list[Case], failed: set[str], dtype: str) -> Diagnosis | None:
    """Search for what an implementation computes in place of one dialect.

    Args:
        adapter: the implementation.
        cases: all cases of the dialect, whatever came of them.
        failed: ids of those that failed.
        dtype: how exact the answers are.

    Returns:
        The diagnosis; None where no output of an answered case is wrong.
    """
    cases = sorted(cases, key=lambda case: (case.id not in failed, size_of(case)))
    evidence, key = evidence_of(adapter, cases, dtype), (cases[0].objective, cases[0].dialect)
    wrong = evidence.outputs - reproduced(right(*key), evidence, evidence.outputs) - {ACCEPTED}
    if not wrong:
        return None
    values = evidence._replace(outputs=evidence.outputs - {REFUSALS, ACCEPTED})
    parts = _parts(key, values, wrong - {REFUSALS})
    whole = len(parts) < 2 and _any_reproduces(parts, evidence, values.outputs)
    if REFUSALS in wrong and not _any_reproduces(parts, evidence, frozenset([REFUSALS])):
        parts.append(_refusals(key, evidence, parts))
    others = sorted(n for n in values.outputs - wrong if not n.startswith("grads.ref"))
    furthest = _furthest(right(*key), evidence, failed) or cases[0]
    clues = [shared(cases, failed), *_clues(adapter, key, evidence, wrong)]
    told = (cases[0], furthest, tuple(others), "; ".join(clue for clue in clues if clue))
    return Diagnosis("/".join(key), tuple(parts), whole, *told)


def _clues(
    adapter: Adapter, key: Key, evidence: Evidence, wrong: frozenset[str]
) -> Iterator[str]:
    """What tells where to look, besides the failing cases."""
    case, before = evidence.asked[0]
    again = evidence_of(adapter, [case], evidence.dtype)
    for _, answer in again.asked:
        changed = answer.keys() & before.keys() if answer and before else ()
        if any(differs(case, name, before, answer, evidence.dtype) for name in changed):
            yield (
                f"{case.id} has another answer when it is asked again, so something is kept from "
                "one question to the next, or is random"
            )
    if "losses" in wrong:
        yield (
            "the first loss of a run is wrong, before any update"
            if first_losses_differ(right(*key), evidence)
            else "the first loss of each run is right, so look at the updates, and at what else "
            "changes between the steps, as the reference"
        )


def _furthest(usual: Hypothesis, evidence: Evidence, failed: set[str]) -> Case | None:
    """The failing case with the output that is wrong by most; None where none is a number."""
    wrong = [
        (error_of(due.get(name), value), case)
        for case, answer in evidence.asked
        if case.id in failed
        for due in [evaluated(usual, case) or {}]
        for name, value in (answer or {}).items()
    ]
    furthest, case = max(wrong, key=itemgetter(0), default=(0.0, None))
    return case if furthest > 0 else None


def _refusals(key: Key, evidence: Evidence, parts: list[Part]) -> Part:
    """What accepts the same inputs, and computes the same of them; the values may be mistaken."""
    mistaken = [h for part in parts for h in part.hypotheses] if len(parts) == 1 else []
    hypotheses = beyond(*key, mistaken) if parts else simple(*key)
    due = frozenset([REFUSALS, ACCEPTED])
    found = [one for one in searched(hypotheses, evidence, due) if one.outputs >= due]
    named = {one.hypothesis.name: one.hypothesis for one in _best(found, due, evidence)}
    return Part((REFUSALS,), tuple(named.values()))


def _any_reproduces(parts: list[Part], evidence: Evidence, outputs: frozenset[str]) -> bool:
    hypotheses = [hypothesis for part in parts for hypothesis in part.hypotheses]
    return any(reproduced(h, evidence, outputs) >= outputs for h in hypotheses)


def _parts(key: Key, evidence: Evidence, wrong: frozenset[str]) -> list[Part]:
    """The wrong outputs by what explains most of them.

    Two mistakes together come before two mistakes in two outputs.
    """
    if not wrong:
        return []
    one, two = _simple(key, evidence, wrong), list[Found]()
    rewards = frozenset(name for name in wrong if name.startswith("metrics.rewards/"))
    if rewards and (rewards <= OF_MARGINS or not _explained(one, wrong)):
        one += searched(sums_of_columns(key, evidence), evidence, rewards)
    if not _explained(one, wrong):
        two = _compound(key, evidence, wrong)
        one = [found for found in two if found.outputs >= wrong] or one
    parts, left = list[Part](), wrong
    while best := _best(one, left, evidence) or _best(two, left, evidence):
        explained = best[0].outputs & left
        same = [found for found in best if found.outputs & left == explained]
        named = {found.hypothesis.name: found.hypothesis for found in same}
        parts.append(Part(tuple(sorted(explained)), tuple(named.values())))
        left -= explained
    if any(name.split(".")[0] not in ("per_example", "metrics") for name in left):
        return [Part(tuple(sorted(wrong)), ())]  # a loss, or gradients, alone tell little
    return parts + [Part(tuple(sorted(left)), ())] * bool(left)


def _plausible(found: list[Found], left: frozenset[str]) -> list[Found]:
    """An accuracy has few values: alone it tells no other mistakes than those of metrics."""
    if left != {"metrics.rewards/accuracies"}:
        return found
    return [f for f in found if f.hypothesis.flags and OF_METRICS.issuperset(f.hypothesis.flags)]


def _explained(found: list[Found], wrong: frozenset[str]) -> bool:
    """Whether one explains all; but metrics and the values of single pairs, if there are others."""
    core = {name for name in wrong if name.split(".")[0] not in ("per_example", "metrics")}
    return any(one.outputs >= (core or wrong) for one in found)


def _matters(usual: list[tuple[Case, Any]], dtype: str, hypothesis: Hypothesis) -> bool:
    """Whether a hypothesis differs from the usual one, but for what can be wrong by itself."""
    for case, expected in usual:
        made = evaluated(hypothesis, case)
        if made is None:
            continue
        names = [name for name in expected if name.split(".")[0] not in ("per_example", "metrics")]
        if any(differs(case, name, made, expected, dtype) for name in names):
            return True
    return False


def _best(found: list[Found], wrong: frozenset[str], evidence: Evidence) -> list[Found]:
    """Those that explain most, with most of the right outputs too, and the simplest.

    Of these the one with the shortest name is the first.
    """

    def rank(one: Found) -> tuple[int, int, int]:
        right_too = len(one.outputs & evidence.outputs)
        return -len(one.outputs & wrong), -right_too, one.hypothesis.cost

    useful = sorted((one for one in _plausible(found, wrong) if one.outputs & wrong), key=rank)
    best = [one for one in useful if rank(one) == rank(useful[0])]
    best = sorted(best, key=lambda one: len(one.hypothesis.name))
    marks = (" and ", ", and ", ": ")  # what follows has no effect on the cases
    names = [one.hypothesis.name + mark for one in best for mark in marks]
    return [one for one in best if not one.hypothesis.name.startswith(tuple(names))]


def _simple(key: Key, evidence: Evidence, wrong: frozenset[str]) -> list[Found]:
    """What one mistake, or another dialect, explains."""
    found = searched(simple(*key), evidence, wrong)
    for whole in (True, False):
        if any(one.outputs >= wrong for one in found):
            break
        if whole or first_losses_differ(right(*key), evidence) is not False:
            found += fitted(key, families(*key, whole), evidence, wrong)
    return found


def _compound(key: Key, evidence: Evidence, wrong: frozenset[str]) -> list[Found]:
    """What a formula explains, or two mistakes, or one in another dialect."""
    written = searched(formulas(key, evidence), evidence, wrong) if "loss" in wrong else []
    if _explained(written, wrong):
        return [one for one in written if _explained([one], wrong)][:1]
    cases = [one.case for one in evidence.asked if one.case.result == "value"]
    usual = [(case, evaluated(right(*key), case)) for case in cases]
    matters = partial(_matters, usual, evidence.dtype)
    found = searched(compound(*key, matters), evidence, wrong)
    if _explained(found, wrong):
        return found
    return found + fitted(key, compound_families(*key), evidence, wrong)
