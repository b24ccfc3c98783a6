"""Diagnoses in words."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from reference.conformance.cases import Case, load_cases
from reference.conformance.diagnosis import REFUSALS, Diagnosis, Part
from reference.conformance.dialects import DIALECTS
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
        return _unknown_of([diagnosis.dialect], diagnosis, part)
    mistakes = _mistakes(diagnosis, part)
    if len(mistakes) == len(part.hypotheses):
        of = "" if diagnosis.whole else outputs
        return f"{diagnosis.dialect}{_computed(of, list(mistakes), several=False)}"
    what = "" if diagnosis.whole else f" {outputs} of"
    return f"{diagnosis.dialect} in fact computes{what} {names}{_symbols(names)}"


def _computed(outputs: str, mistakes: Sequence[str], several: bool) -> str:
    """That outputs, or all, of one or several dialects are computed with mistakes."""
    plural = outputs in ("gradients", "metrics") or "," in outputs if outputs else several
    names = " or ".join(mistakes)
    subject = f": {outputs}" if outputs else ""
    return f"{subject} {'are' if plural else 'is'} in fact computed {names}{_symbols(names)}"


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
    """What is right beside an unknown output, and what the failing cases say of it."""

    def named(case: Case) -> str:
        return f"{case.id} ({case.comment})"

    if diagnosis.right:
        yield f"right: {_listed(diagnosis.right)}"
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
        yield f"    {name}{_equation(name)} is another dialect: claim it, or compare the equations"


def _equation(dialect: str) -> str:
    """In brackets what a dialect that has vectors computes."""
    objective, _, name = dialect.partition("/")
    if (objective, name) not in DIALECTS:
        return ""
    return f" ({load_cases(objective, name)[0].equation})"


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
    causes = list[tuple[str, tuple[str, ...]]]()
    while cause := _most_shared(parts):
        causes.append(_said_of_all(*cause))
        parts = [both for both in parts if both not in cause[1]]
    unknown = [both for both in parts if not both[1].hypotheses]
    yield from _unknown(unknown)
    said = [*(_said(*both) for both in parts if both[1].hypotheses), *reversed(causes)]
    if said and any(part.outputs != (REFUSALS,) for _, part in unknown):
        yield "what is named below may be the cause of what is unknown: mend it first"
    groups: dict[tuple[str, ...], list[str]] = {}
    for sentence, remedies in said:
        groups.setdefault(remedies, []).append(sentence)
    for remedies, group in groups.items():
        yield from (*group, *remedies)


Both = tuple[Diagnosis, Part]


def _unknown(parts: Sequence[Both]) -> Iterator[str]:
    """What is unknown; once where the same outputs of several dialects are."""
    groups: dict[tuple[object, ...], list[Both]] = {}
    for diagnosis, part in parts:
        alike = part.outputs, diagnosis.right, diagnosis.common
        groups.setdefault(alike, []).append((diagnosis, part))
    for (diagnosis, part), *others in groups.values():
        if part.outputs == (REFUSALS,):
            yield from (_sentence(*both) for both in [(diagnosis, part), *others])
            continue
        names = [diagnosis.dialect, *(other.dialect for other, _ in others)]
        yield _unknown_of(names, diagnosis, part)


def _unknown_of(dialects: Sequence[str], diagnosis: Diagnosis, part: Part) -> str:
    """What is unknown in these dialects, of which this is the diagnosis of the first."""
    if len(dialects) == 1:
        who, whose = f"{dialects[0]} is", "its"
    else:
        who, whose = f"{_which(dialects)} are", "their"
    told = f"{who} unknown, no named mistake gives {whose} {_listed(part.outputs)}"
    return "; ".join([told, *_telling(diagnosis)])


def _which(dialects: Sequence[str]) -> str:
    return f"{len(dialects)} dialects ({', '.join(dialects)})"


def _most_shared(parts: Sequence[Both]) -> tuple[list[str], list[Both]] | None:
    """The mistakes that most dialects share, which nothing tells apart, and where they are.

    None where nothing is shared.
    """
    found: dict[str, list[Both]] = {}
    for diagnosis, part in parts:
        for name in _mistakes(diagnosis, part):
            found.setdefault(name, []).append((diagnosis, part))
    most = max(found.values(), key=len, default=[])
    names = [name for name, sharing in found.items() if sharing == most]
    return (names, most) if len(most) > 1 else None


def _mistakes(diagnosis: Diagnosis, part: Part) -> dict[str, Hypothesis]:
    """What may be wrong with the dialect itself, by the names of the mistakes."""
    own = f"{diagnosis.dialect} "
    if part.outputs == (REFUSALS,):
        return {}
    named = {h.name.removeprefix(own): h for h in part.hypotheses if h.name.startswith(own)}
    return {name: h for name, h in named.items() if not name.startswith("of ")}  # of another loss


def _said_of_all(names: list[str], sharing: Sequence[Both]) -> tuple[str, tuple[str, ...]]:
    """What several dialects share, and how to mend it."""
    mistakes = _mistakes(*sharing[0])
    remedies = _remedies(sharing[0][0].dialect, [mistakes[name] for name in names])
    which = _which([diagnosis.dialect for diagnosis, _ in sharing])
    outputs = {"" if diagnosis.whole else _listed(part.outputs) for diagnosis, part in sharing}
    if len(outputs) > 1:
        which, outputs = f"{which}, in all or some of their outputs,", {""}
    return f"{which}{_computed(outputs.pop(), names, several=True)}", tuple(remedies)
