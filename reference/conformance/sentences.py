"""Diagnoses in words."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from reference.conformance.cases import Case
from reference.conformance.diagnosis import REFUSALS, Diagnosis, Part
from reference.conformance.flags import FLAGS
from reference.conformance.hypotheses import Hypothesis


def sentences(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis in words.

    Args:
        diagnosis: what `diagnose` returned.

    Returns:
        One line for what is computed, or one for each group of wrong outputs, then how to mend it.
    """
    said = [_said(diagnosis, part) for part in diagnosis.parts]
    remedies = dict.fromkeys(remedy for _, remedies in said for remedy in remedies)
    return [sentence for sentence, _ in said] + list(remedies)


def _sentence(diagnosis: Diagnosis, part: Part) -> str:
    names, outputs = " or ".join(h.name for h in part.hypotheses), _listed(part.outputs)
    if part.outputs == (REFUSALS,):
        like = f", as {names}" if names else ""
        return f"{diagnosis.dialect} accepts what it should refuse{like}"
    if not part.hypotheses:
        told = [f"{diagnosis.dialect} is unknown, no named mistake gives its {outputs}"]
        right = [f"right: {_listed(diagnosis.right)}"] if diagnosis.right else []
        return "; ".join([*told, *right, *_telling(diagnosis)])
    if diagnosis.whole:
        return f"{diagnosis.dialect} in fact computes {names}{_symbols(names)}"
    return f"{diagnosis.dialect} in fact computes {outputs} of {names}{_symbols(names)}"


def _listed(outputs: Sequence[str]) -> str:
    """Names of outputs; several gradients, or metrics, in one word."""
    kinds = groupby(sorted(outputs), key=lambda name: name.split(".")[0])
    groups = [(kind, list(names)) for kind, names in kinds]
    words = {"grads": "gradients", "metrics": "metrics"}
    return ", ".join(words[kind] if len(names) > 1 else names[0] for kind, names in groups)


def _symbols(names: str) -> str:
    """What stands for what in a formula."""
    return ", where L is -log sigmoid" if "with the loss" in names and "L(" in names else ""


def _telling(diagnosis: Diagnosis) -> Iterator[str]:
    """What the failing cases say of an unknown output."""

    def named(case: Case) -> str:
        return f"{case.id} ({case.comment})"

    yield f"the smallest failing case is {named(diagnosis.smallest)}"
    if diagnosis.furthest is not diagnosis.smallest:
        yield f"the largest difference is in {named(diagnosis.furthest)}"
    if diagnosis.common:
        yield diagnosis.common


def _remedies(dialect: str, hypotheses: Sequence[Hypothesis]) -> Iterator[str]:
    """How to mend each mistake, or what to do where another dialect is computed."""
    flags = (flag for hypothesis in hypotheses for flag in hypothesis.flags)
    yield from (f"    {name}: {FLAGS[name].remedy}" for name in dict.fromkeys(flags))
    for name in (h.name for h in hypotheses if not h.cost and h.name != dialect):
        yield f"    {name} is another dialect: claim it, or compare the equations in the guide"


def _said(diagnosis: Diagnosis, part: Part) -> tuple[str, tuple[str, ...]]:
    """What a part is, and how to mend it."""
    return _sentence(diagnosis, part), tuple(_remedies(diagnosis.dialect, part.hypotheses))


def together(diagnoses: Sequence[Diagnosis]) -> Iterator[str]:
    """Diagnoses in words: first what is unknown; a mistake that several dialects share comes last.

    Args:
        diagnoses: those of one report.

    Returns:
        Lines; how to mend something comes once, after all that it mends.
    """
    parts = [(diagnosis, part) for diagnosis in diagnoses for part in diagnosis.parts]
    parts.sort(key=lambda both: bool(both[1].hypotheses))
    causes = list[tuple[str, tuple[str, ...]]]()
    while cause := _most_shared(parts):
        causes.append(_said_of_all(cause))
        parts = [both for both in parts if both not in cause.sharing]
    groups: dict[tuple[str, ...], list[str]] = {}
    for sentence, remedies in [*(_said(*both) for both in parts), *reversed(causes)]:
        groups.setdefault(remedies, []).append(sentence)
    for remedies, group in groups.items():
        yield from (*group, *remedies)


Both = tuple[Diagnosis, Part]


class _Cause(NamedTuple):
    """What may be wrong with several dialects at once.

    Attributes:
        names: of the mistakes, which nothing tells apart.
        outputs: those that have it; "" where all have.
        sharing: the parts of the dialects.
    """

    names: list[str]
    outputs: str
    sharing: list[Both]


def _most_shared(parts: Sequence[Both]) -> _Cause | None:
    """What most dialects share; None where nothing is shared."""
    found: dict[tuple[str, str], list[Both]] = {}
    for diagnosis, part in parts:
        outputs = "" if diagnosis.whole else _listed(part.outputs)
        for name in _mistakes(diagnosis, part):
            found.setdefault((name, outputs), []).append((diagnosis, part))
    most = max(found.values(), key=len, default=[])
    if len(most) < 2:
        return None
    names = [name for (name, _), sharing in found.items() if sharing == most]
    [outputs, *_] = [outputs for (_, outputs), sharing in found.items() if sharing == most]
    return _Cause(names, outputs, most)


def _mistakes(diagnosis: Diagnosis, part: Part) -> dict[str, Hypothesis]:
    """What may be wrong with the dialect itself, by the names of the mistakes."""
    own = f"{diagnosis.dialect} "
    if part.outputs == (REFUSALS,):
        return {}
    return {h.name.removeprefix(own): h for h in part.hypotheses if h.name.startswith(own)}


def _said_of_all(cause: _Cause) -> tuple[str, tuple[str, ...]]:
    """What several dialects share, and how to mend it."""
    diagnosis, part = cause.sharing[0]
    mistakes, names = _mistakes(diagnosis, part), " or ".join(cause.names)
    remedies = _remedies(diagnosis.dialect, [mistakes[name] for name in cause.names])
    dialects = [diagnosis.dialect for diagnosis, _ in cause.sharing]
    verb = f"have {cause.outputs} of what is" if cause.outputs else "are"
    which = f"{len(dialects)} dialects ({', '.join(dialects)})"
    return f"{which} in fact {verb} computed {names}{_symbols(names)}", tuple(remedies)
