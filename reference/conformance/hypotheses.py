"""What an implementation may compute in place of what it claims: dialects, with named mistakes.

A hypothesis is a dialect, the claimed one or another, with up to two rows of `mistakes/`.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, combinations
from typing import Any, NamedTuple

import numpy as np

from reference.conformance import pairs, training
from reference.conformance.dialects import DIALECTS
from reference.conformance.lookalikes import LOOKALIKES, Lookalike
from reference.conformance.mistakes import (
    DATA,
    ERASED,
    ERASING,
    FITTED,
    KL,
    OF_CLAIMED,
    OF_WHOLE,
    PAIRS,
    PARTNERS,
    RARE,
    TOKENS,
    TRAINING,
    Mistake,
)

Values = dict[str, Any]
Function = Callable[[Values, Values], Values]
Key = tuple[str, str]

LOSSES_OF_PAIRS = ("dpo", "ipo", "distillation", "ensemble", "reward")
BUILT: dict[Key, tuple[Callable, Key]] = {
    ("ipo", "token-mean"): (pairs.per_token, ("ipo", "sum")),
    ("distillation", "rebel"): (pairs.over_beta_squared, ("distillation", "d-dpo")),
    ("pessimistic", "sampled-kl"): (pairs.sampled_kl, ("dpo", "plain")),
    ("pessimistic", "exact-kl"): (pairs.exact_kl, ("dpo", "plain")),
    ("training", "dpo"): (training.train, ("dpo", "plain")),
    ("training", "d-dpo"): (training.train, ("distillation", "d-dpo")),
    ("training", "e-dpo"): (training.train, ("ensemble", "batch-min")),
}
"""Dialects that are built on a loss of pairs."""
SLOW = ("ensemble", "hull")
"""A dialect that solves for weights: it is searched with fewer mistakes."""
WHOLE = {"pessimistic": KL, "training": TRAINING, "logps": TOKENS, "data": DATA}
"""The mistakes of an objective, besides those in the loss of pairs that it is built on."""


PLAIN = ("times {c}", "plus {c}", "at {c} beta")
"""Mistakes with a constant that other dialects are searched with."""


class Hypothesis(NamedTuple):
    """One thing that an implementation may compute.

    Attributes:
        name: a dialect, and the names of mistakes.
        flags: those of the mistakes.
        function: (params, inputs) -> outputs.
        cost: 0 for a dialect as it is; 2 for the claimed one with one mistake, 3 for another, 4 for
            the claimed one with two.
    """

    name: str
    flags: tuple[str, ...]
    function: Function
    cost: int


class Change(NamedTuple):
    """A mistake in a dialect as a whole, or in the loss of pairs that it is built on."""

    mistake: Mistake
    whole: bool


class Base(NamedTuple):
    """A dialect before mistakes: `build(loss)`."""

    name: str
    loss: Function
    build: Callable[[Function], Function] = lambda loss: loss
    claimed: bool = False

    def with_changes(self, *changes: Change) -> Hypothesis:
        """The hypothesis of this dialect with these mistakes, the innermost first."""
        loss = self.loss
        for mistake, whole in changes:
            loss = loss if whole else mistake.change(loss)
        function = self.build(loss)
        for mistake, whole in changes:
            function = mistake.change(function) if whole else function
        words = " and ".join(sorted({mistake.name for mistake, _ in changes}))
        flags = tuple(mistake.flag for mistake, _ in changes)
        name = f"{self.name} {words}" if changes else self.name
        cost = 1 + 2 * len(changes) - self.claimed
        return Hypothesis(name, flags, function, bool(changes) * cost)


Family = Callable[[float], Hypothesis]
"""A constant -> the hypothesis with it."""


def simple(objective: str, dialect: str) -> Iterator[Hypothesis]:
    """Other dialects, and the claimed one with one mistake."""
    own, others = bases(objective, dialect)
    yield from (base.with_changes() for base in others)
    yield from (own.with_changes(change) for change in changes(objective, dialect))


def families(objective: str, dialect: str, whole: bool) -> Iterator[Family]:
    """Hypotheses with a constant that has to be fitted: in the dialect as a whole, or elsewhere."""
    own, others = bases(objective, dialect)
    for change in changes(objective, dialect, free=True):
        if change.whole != whole:
            continue
        if (objective, dialect) != SLOW or change.mistake not in RARE:
            yield partial(_with_fitted, own, change, None)
        if change.mistake.name in PLAIN and (objective, dialect) != SLOW:
            yield from (partial(_with_fitted, base, change, None) for base in others)
    if objective in LOSSES_OF_PAIRS and not whole:
        for key, look in LOOKALIKES.items():
            if look.free:
                yield partial(_with_constant, key, look)


def compound_families(objective: str, dialect: str) -> Iterator[Family]:
    """The claimed dialect with a constant and another mistake; of training, none."""
    own, _ = bases(objective, dialect)
    rows = changes(objective, dialect)
    partners = [row for row in rows if row.mistake.name in PARTNERS and not row.whole]
    for change in changes(objective, dialect, free=True):
        if change.mistake.name in FITTED and objective != "training":
            yield from (partial(_with_fitted, own, change, partner) for partner in partners)


def compound(
    objective: str, dialect: str, matters: Callable[[Hypothesis], bool]
) -> Iterator[Hypothesis]:
    """The claimed dialect with two mistakes, and others with one; of training, none.

    `matters(hypothesis)` says whether a single mistake changes anything; one in the number of
    tokens may do so where another mistake divides by it.
    """
    if objective == "training":
        return
    own, others = bases(objective, dialect)
    rows = [
        row
        for row in changes(objective, dialect)
        if row.mistake.flag == "sum-mean" or matters(own.with_changes(row))
    ]
    rows = [row for row in rows if not (row.whole and row.mistake in OF_WHOLE)]
    common = [row for row in rows if row.mistake not in RARE]
    for first, second in combinations(common if (objective, dialect) == SLOW else rows, 2):
        if _together(first.mistake, second.mistake):
            yield own.with_changes(first, second)
    of_others = [row for row in rows if row.mistake not in OF_CLAIMED]
    yield from (base.with_changes(change) for base in others for change in of_others)


def _together(first: Mistake, second: Mistake) -> bool:
    """Whether two mistakes are looked for together."""
    return not ({first, second} <= RARE or (first in ERASED and second in ERASING))


def beyond(objective: str, dialect: str, mistaken: list[Hypothesis]) -> Iterator[Hypothesis]:
    """Hypotheses with one mistake more, in what is accepted."""
    rows = dict.fromkeys(change.mistake for change in changes(objective, dialect))
    accepting = [row for row in rows if objective == "data" or row.flag == "broadcast"]
    for hypothesis in mistaken:
        for row in accepting:
            name, flags = f"{hypothesis.name} and {row.name}", (row.flag,)
            yield Hypothesis(name, flags, row.change(hypothesis.function), 2)


def right(objective: str, dialect: str) -> Hypothesis:
    """The claimed dialect as it is."""
    return bases(objective, dialect)[0].with_changes()


def bases(objective: str, dialect: str) -> tuple[Base, list[Base]]:
    """The claimed dialect, and the others that it may be confused with."""
    name, key = f"{objective}/{dialect}", (objective, dialect)
    if objective in LOSSES_OF_PAIRS:
        others = [Base("/".join(other), loss) for other, loss in losses().items() if other != key]
    elif key in BUILT:
        build, claimed = BUILT[key]
        alike = {other: loss for other, loss in losses().items() if other != claimed}
        others = [Base(_name(key, other), loss, _with(build)) for other, loss in alike.items()]
    else:
        alike = {other: f for other, f in DIALECTS.items() if other[0] == objective}
        others = [Base("/".join(other), f) for other, f in alike.items() if other != key]
    if key not in BUILT:
        loss = losses()[key] if objective in LOSSES_OF_PAIRS else DIALECTS[key]
        return Base(name, loss, claimed=True), others
    build, claimed = BUILT[key]
    return Base(name, losses()[claimed], _with(build), claimed=True), others


@cache
def losses() -> dict[Key, Function]:
    """The losses of pairs, those without vectors too."""
    alike = {key: look.function for key, look in LOOKALIKES.items() if not look.free}
    named = {key: f for key, f in DIALECTS.items() if key[0] in LOSSES_OF_PAIRS} | alike
    return {key: partial(_finite, f) if key[0] == "ensemble" else f for key, f in named.items()}


def _finite(loss: Function, params: Values, inputs: Values) -> Values:
    """A loss of finite numbers alone: LAPACK prints what it thinks of others."""
    if not all(np.all(np.isfinite(x)) for x in (*params.values(), *inputs.values())):
        raise ValueError("an input is not finite")
    return loss(params, inputs)


def changes(objective: str, dialect: str, free: bool = False) -> list[Change]:
    """The mistakes that a dialect is searched with: those with a constant, or those without."""
    built, of_pairs = (objective, dialect) in BUILT, objective in LOSSES_OF_PAIRS
    whole = WHOLE.get(objective, OF_WHOLE if built else ())
    rows = chain(
        (Change(row, False) for row in (PAIRS if of_pairs or built else ())),
        (Change(row, True) for row in whole),
    )
    return [row for row in rows if row.mistake.free == free]


def _with(build: Callable) -> Callable[[Function], Function]:
    return lambda loss: lambda params, inputs: build(loss, params, inputs)


def _name(key: Key, of: Key) -> str:
    """`training/dpo of ipo/sum`; a dialect that has a name of its own has that."""
    build, _ = BUILT[key]
    named = [built for built, made_of in BUILT.items() if made_of == (build, of)]
    return "/".join(named[0]) if named else f"{'/'.join(key)} of {'/'.join(of)}"


def _with_fitted(base: Base, change: Change, partner: Change | None, constant: float) -> Hypothesis:
    others = [partner] if partner else []
    return base.with_changes(change._replace(mistake=change.mistake.known(constant)), *others)


def _with_constant(key: Key, look: Lookalike, constant: float) -> Hypothesis:
    name = f"{'/'.join(key)} at {look.free} {constant:g}"
    return Base(name, lambda params, inputs: look.function(params, inputs, constant)).with_changes()
