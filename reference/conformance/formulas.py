"""Sums of a few terms, whose coefficients are fitted: what no named mistake is.

A term is a function of a quantity of each pair, times 1, beta, 1 / beta or the label smoothing. The
loss of a batch is linear in the coefficients, so that those of a few terms follow from the losses
of all cases.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.cases import Case
from reference.conformance.evidence import Evidence
from reference.conformance.hypotheses import BUILT, Function, Hypothesis, Key, right
from reference.conformance.mistakes.mistake import SCORES, size, step
from reference.conformance.pairs import POLICY, REFERENCE, sigmoid

Values = dict[str, Any]
OBJECTIVES = ("dpo", "ipo", "distillation", "reward")
MOST = 3
"""The most terms of a sum."""
(PW, PL), (RW, RL), (SW, SL) = POLICY, REFERENCE, SCORES
RIGHT = "the right losses of the pairs"
"""An input that `formulas` adds."""
# fmt: off
QUANTITIES: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "the right loss": ({}, {RIGHT: 1}),
    "beta h": ({PW: 1, RW: -1, PL: -1, RL: 1}, {}),
    "2 beta h": ({PW: 2, RW: -2, PL: -2, RL: 2}, {}),
    "beta h/2": ({PW: 0.5, RW: -0.5, PL: -0.5, RL: 0.5}, {}),
    "beta h_w": ({PW: 1, RW: -1}, {}),
    "beta h_l": ({PL: 1, RL: -1}, {}),
    "beta log pi(y_w)/pi(y_l)": ({PW: 1, PL: -1}, {}),
    "h": ({}, {PW: 1, RW: -1, PL: -1, RL: 1}),
    "h_w": ({}, {PW: 1, RW: -1}),
    "h_l": ({}, {PL: 1, RL: -1}),
    "rho": ({}, {SW: 1, SL: -1}),
    "r_w": ({}, {SW: 1}),
    "r_l": ({}, {SL: 1}),
    "(r_w + r_l)": ({}, {SW: 1, SL: 1}),
    "(rho - beta h)": ({PW: -1, RW: 1, PL: 1, RL: -1}, {SW: 1, SL: -1}),
    "(r_w - beta h_w)": ({PW: -1, RW: 1}, {SW: 1}),
    "(r_l - beta h_l)": ({PL: -1, RL: 1}, {SL: 1}),
    "margin": ({}, {"margins": 1}),
    "(rho - margin)": ({}, {SW: 1, SL: -1, "margins": -1}),
    "1": ({}, {}),
}
"""Sums of inputs: those that are multiplied by beta, and the others."""
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "L({q})": (lambda x: np.logaddexp(0.0, -x), lambda x: -sigmoid(-x)),
    "L(-{q})": (lambda x: np.logaddexp(0.0, x), sigmoid),
    "{q}": (lambda x: x, np.ones_like),
    "{q}^2": (np.square, lambda x: 2 * x),
    "sigmoid({q})": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "sigmoid(-{q}) L({q})": (
        lambda x: sigmoid(-x) * np.logaddexp(0.0, -x),
        lambda x: -sigmoid(-x) * (sigmoid(x) * np.logaddexp(0.0, -x) + sigmoid(-x))),
    "max(0, {q})": (lambda x: np.maximum(x, 0.0), step),
    "max(0, 1 - {q})": (lambda x: np.maximum(1 - x, 0.0), lambda x: -step(1 - x)),
}
"""L is -log sigmoid."""
FACTORS: dict[str, Callable[[Values], float]] = {
    "": lambda p: 1.0,
    "label_smoothing ": lambda p: p["label_smoothing"],
    "beta ": lambda p: p["beta"],
    " / beta": lambda p: 1 / p["beta"],
    " / beta^2": lambda p: p["beta"] ** -2,
}
OWN = {
    "dpo/plain": "L(beta h)",
    "distillation/d-dpo": "(rho - beta h)^2",
    "reward/bradley-terry": "L(rho)",
    "reward/margin": "L(rho - margin)",
}
"""Right losses that are one term."""
# fmt: on


class Term(NamedTuple):
    """One term: the names of its factor, its function and its quantity."""

    factor: str
    function: str
    quantity: str

    @property
    def name(self) -> str:
        """As it is written; the quantity 1 is left out."""
        bare = " " not in self.quantity or self.quantity.startswith("(")
        power = self.function == "{q}^2" and not bare
        function = (
            self.function.replace("({q})", "{q}") if self.quantity[0] == "(" else self.function
        )
        value = function.replace("{q}", f"({self.quantity})" if power else self.quantity)
        value = "" if self.quantity == "1" else value
        return value + self.factor if self.factor.startswith(" /") else self.factor + value

    def times(self, constant: float) -> str:
        """The term with a coefficient."""
        return multiple(constant, self.name.strip())


def multiple(constant: float, name: str) -> str:
    """A number times a name, in words; a number of 1 is left out.

    Args:
        constant: the number.
        name: "" or "/ beta" need the number.
    """
    number = "" if abs(constant) == 1 and name and name[0] != "/" else f"{abs(constant):g} "
    return ("-" if constant < 0 else "") + (number + name).strip()


def written(terms: Iterable[str]) -> str:
    """The sum of terms, in words.

    Args:
        terms: each with its coefficient.
    """
    return " + ".join(terms).replace("+ -", "- ")


def formulas(key: Key, evidence: Evidence) -> Iterator[Hypothesis]:
    """The shortest sums that have the losses of all cases.

    Args:
        key: the claimed dialect.
        evidence: the answers.

    Returns:
        Hypotheses, which may fail in other outputs.
    """
    cases = [
        (case, float(answer["loss"].item()))
        for case, answer in evidence.asked
        if case.result == "value" and answer and _is_number(answer.get("loss"))
    ]
    cases = [(case, loss) for case, loss in cases if abs(loss) > 1e-9 and np.isfinite(loss)]
    if key[0] not in OBJECTIVES or key in BUILT or len(cases) <= MOST:
        return
    terms, table = _table(key, [case for case, _ in cases])
    scaled = table / np.array([loss for _, loss in cases])[:, None]
    for number in range(1, MOST + 1):
        chosen = sorted(_sums(terms, scaled, number), key=_digits)
        yield from (_hypothesis(key, sum_of) for sum_of in chosen)
        if chosen:
            return


def _is_number(value: Any) -> bool:
    """Whether an output is an array of one number."""
    return isinstance(value, np.ndarray) and value.size == 1


def _table(key: Key, cases: list[Case]) -> tuple[list[Term], np.ndarray]:
    """The terms that the cases have, and their means over the batch of each case."""
    every = (
        Term(c, f, q)
        for q in QUANTITIES
        for f in FUNCTIONS
        for c in FACTORS
        if q not in ("1", "the right loss") or f == "{q}"
    )
    terms, columns = list[Term](), list[list[float]]()
    both = [(case.params, _with_right(key, case.params, case.inputs)) for case in cases]
    for term in every:
        try:
            columns.append([np.mean(_value(term, *of_case)) for of_case in both])
        except KeyError:
            continue
        terms.append(term)
    usable = [i for i, column in enumerate(columns) if np.all(np.isfinite(column))]
    return [terms[i] for i in usable], np.array([columns[i] for i in usable]).T


def _with_right(key: Key, params: Values, inputs: Values) -> Values:
    """The inputs, and the right losses where they are not one term."""
    if "/".join(key) in OWN:
        return inputs
    return inputs | {RIGHT: right(*key).function(params, inputs)["per_example"]}


def _sums(terms: list[Term], table: np.ndarray, number: int) -> Iterator[list[tuple[float, Term]]]:
    """Sums of so many terms whose values are 1 in every row of the table."""
    plain = [i for i, term in enumerate(terms) if number < MOST or _is_plain(term)]
    subsets = np.array(list(combinations(plain, number)))
    gram, sums = table.T @ table, table.sum(axis=0)
    with np.errstate(all="ignore"):
        matrices = gram[subsets[:, :, None], subsets[:, None, :]]
        good = np.linalg.cond(matrices) < 1e14
        weights = np.linalg.solve(matrices[good], sums[subsets[good]][..., None])[..., 0]
    left = 1 - np.einsum("nk,nk->n", weights, sums[subsets[good]]) / len(table)
    for subset in subsets[good][np.abs(left) < 1e-6]:
        columns = table[:, subset]
        exact = np.linalg.lstsq(columns, np.ones(len(table)))[0]
        sum_of = [(_short(c), terms[i]) for c, i in zip(exact, subset, strict=True)]
        fits = np.allclose(columns @ exact, 1.0, rtol=0.0, atol=1e-4)
        if fits and np.all(np.abs(exact) > 1e-6) and _is_meant(sum_of):
            yield sum_of


def _is_plain(term: Term) -> bool:
    """Whether the longest sums may have it: with a power of beta, only what is simple."""
    simple = "beta" not in term.quantity and term.function in ("{q}", "{q}^2")
    return simple or "beta" not in term.factor


def _is_meant(sum_of: list[tuple[float, Term]]) -> bool:
    """Whether a sum may be what is written: the cases have few values of the label smoothing, and a
    line through what another function has at them has coefficients of many digits."""
    smoothed = any("label_smoothing" in term.factor for _, term in sum_of)
    return not smoothed or all(c == float(f"{c:.3g}") for c, _ in sum_of)


def _short(coefficient: float) -> float:
    """A coefficient with a few digits, where that is near enough."""
    rounded = (float(f"{coefficient:.{digits}g}") for digits in (1, 2, 3))
    near = [value for value in rounded if abs(value - coefficient) < 1e-5 * abs(coefficient)]
    return near[0] if near else float(coefficient)


def _digits(sum_of: list[tuple[float, Term]]) -> tuple[int, float, int]:
    """How long and large the coefficients, how long the terms are: the least is meant."""
    sizes = [abs(c) for c, _ in sum_of]
    return sum(len(f"{size:g}") for size in sizes), sum(sizes), sum(len(t.name) for _, t in sum_of)


def _hypothesis(key: Key, sum_of: list[tuple[float, Term]]) -> Hypothesis:
    dialect = "/".join(key)
    own = OWN.get(dialect, "the right loss")
    terms = sorted((term.times(c) for c, term in sum_of), key=lambda name: name != own)
    flag = "offset" if own in terms else "link"
    return Hypothesis(
        f"{dialect} with the loss {written(terms)}", (flag,), _function(key, sum_of), 2
    )


def _function(key: Key, sum_of: list[tuple[float, Term]]) -> Function:
    """The sum as a loss, with its gradient; the metrics are the right ones."""

    def function(params: Values, inputs: Values) -> Values:
        made = right(*key).function(params, inputs)
        inputs = inputs | {RIGHT: made["per_example"]}
        losses = np.sum([c * _value(term, params, inputs) for c, term in sum_of], axis=0)
        grads = {name: np.zeros(len(losses)) for name in made["grads"]}
        for constant, term in sum_of:
            for name, slope in _slopes(term, params, inputs):
                if name == RIGHT:
                    grads = {n: g + constant * slope * made["grads"][n] for n, g in grads.items()}
                elif name in grads and name not in REFERENCE:
                    grads[name] = grads[name] + constant * slope / len(losses)
        return made | {"loss": np.mean(losses), "per_example": losses, "grads": grads}

    return function


def _quantity(term: Term, params: Values, inputs: Values) -> np.ndarray:
    by_beta, plain = QUANTITIES[term.quantity]
    if term.quantity == "1":
        return np.ones(size(inputs))
    sums = [sum(sign * inputs[name] for name, sign in part.items()) for part in (by_beta, plain)]
    value = (params["beta"] * sums[0] if by_beta else 0.0) + sums[1]
    if np.ndim(value) != 1:
        raise KeyError("there are several reward models")
    return np.asarray(value)


def _value(term: Term, params: Values, inputs: Values) -> np.ndarray:
    value, _ = FUNCTIONS[term.function]
    return FACTORS[term.factor](params) * value(_quantity(term, params, inputs))


def _slopes(term: Term, params: Values, inputs: Values) -> Iterator[tuple[str, np.ndarray]]:
    """The slopes of a term in the inputs that it is made of."""
    _, slope = FUNCTIONS[term.function]
    slopes = FACTORS[term.factor](params) * slope(_quantity(term, params, inputs))
    by_beta, plain = QUANTITIES[term.quantity]
    yield from ((name, params["beta"] * sign * slopes) for name, sign in by_beta.items())
    yield from ((name, sign * slopes) for name, sign in plain.items())
