"""Metrics as sums of the inputs' columns, whose coefficients are fitted."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.cases import Case
from reference.conformance.evidence import Evidence
from reference.conformance.formulas import multiple, written
from reference.conformance.hypotheses import Function, Hypothesis, Key, right
from reference.conformance.mistakes.mistake import LOGPS, SCORES

Values = dict[str, Any]
Rewards = dict[str, np.ndarray]
CHOSEN, REJECTED, MARGINS = "rewards/chosen", "rewards/rejected", "rewards/margins"


class Kind(NamedTuple):
    """What metrics are made of.

    Attributes:
        columns: inputs, and how they are written.
        powers: those of beta that a sum may be multiplied by, and how they are written.
        usual: the right coefficients of the columns; of implicit rewards beta is a factor.
    """

    columns: dict[str, str]
    powers: dict[int, str]
    usual: dict[str, tuple[float, ...]]


LOG_PROBABILITIES = ("log pi(y_w)", "log pi(y_l)", "log pi_ref(y_w)", "log pi_ref(y_l)")
LOG_RATIOS = Kind(
    dict(zip(LOGPS, LOG_PROBABILITIES, strict=True)),
    {1: "beta ", 0: "", 2: "beta^2 ", -1: "1/beta "},
    {CHOSEN: (1, 0, -1, 0), REJECTED: (0, 1, 0, -1), MARGINS: (1, -1, -1, 1)},
)
REWARDS = Kind(dict(zip(SCORES, ("r_w", "r_l"), strict=True)), {0: ""}, {MARGINS: (1, -1)})
BEYOND = Kind(REWARDS.columns | {"margins": "margin"}, {0: ""}, {MARGINS: (1, -1, 0)})


class Sum(NamedTuple):
    """A power of beta times a sum of columns."""

    kind: Kind
    power: int
    coefficients: tuple[float, ...]

    def of(self, params: Values, inputs: Values) -> np.ndarray:
        """Its value for each pair."""
        terms = zip(self.coefficients, self.kind.columns, strict=True)
        factor = params.get("beta", 1.0) ** self.power
        return np.asarray(factor * sum(c * inputs[name] for c, name in terms))

    def less(self, other: "Sum") -> "Sum":
        """The difference from a sum times the same power of beta."""
        differences = zip(self.coefficients, other.coefficients, strict=True)
        return self._replace(coefficients=tuple(a - b for a, b in differences))

    @property
    def words(self) -> str:
        """As it is written."""
        names = zip(self.coefficients, self.kind.columns.values(), strict=True)
        terms = [multiple(c, name) for c, name in names if c]
        total = written(terms) or "0"
        factor = self.kind.powers[self.power]
        return f"{factor}[{total}]" if factor and len(terms) > 1 else factor + total


def sums_of_columns(key: Key, evidence: Evidence) -> Iterator[Hypothesis]:
    """The metrics of rewards as sums, where any of them is another one than it should be.

    Args:
        key: the claimed dialect.
        evidence: the answers.

    Returns:
        Hypotheses that differ in the accuracy: that of the sums, of the margins', the right one.
    """
    kind = _kind(next(one.case for one in evidence.asked if one.case.result == "value"))
    power = next(iter(kind.powers))
    usual = {name: Sum(kind, power, c) for name, c in kind.usual.items()}
    fitted = {name: found for name in usual if (found := _fitted(kind, evidence, name))}
    other = [name for name, one in fitted.items() if one != usual[name]]
    if not other:
        return
    sums = usual | fitted
    if len(other) > 1 and sums[MARGINS] == sums[CHOSEN].less(sums[REJECTED]):
        other = [name for name in other if name != MARGINS]
    words = ", ".join(f"{name} = {sums[name].words}" for name in other)
    cost = 1 if other == [MARGINS] else 2  # the rewards are right
    for accuracy in (None, _of_rewards, _of_margins):
        name = f"{'/'.join(key)} with {words}" + (", and the accuracy of these" if accuracy else "")
        yield Hypothesis(name, ("metrics",), _function(key, sums, accuracy), cost)


def _kind(case: Case) -> Kind:
    if LOGPS[0] in case.inputs:
        return LOG_RATIOS
    return BEYOND if "margins" in case.inputs else REWARDS


def _fitted(kind: Kind, evidence: Evidence, name: str) -> Sum | None:
    """A metric as a sum with short coefficients; None where it is not reported, or no such sum."""
    output = f"metrics.{name}"
    known = [
        (case, float(answer[output].item()))
        for case, answer in evidence.asked
        if case.result == "value" and answer and np.size(answer.get(output, ())) == 1
    ]
    due = np.array([value for _, value in known])
    if len(known) <= len(kind.columns) or not np.all(np.isfinite(due)):
        return None
    means = np.array([[np.mean(case.inputs[c]) for c in kind.columns] for case, _ in known])
    betas = np.array([[case.params.get("beta", 1.0)] for case, _ in known])
    for power in kind.powers:
        rows = betas**power * means
        exact = np.linalg.lstsq(rows, due)[0]
        short = tuple(float(f"{c:.3g}") if abs(c) > 1e-4 else 0.0 for c in exact)
        if np.allclose(rows @ short, due, rtol=1e-4, atol=1e-4):
            return Sum(kind, power, short)
    return None


def _of_rewards(rewards: Rewards) -> np.ndarray:
    return rewards[CHOSEN] > rewards[REJECTED]


def _of_margins(rewards: Rewards) -> np.ndarray:
    return rewards[MARGINS] > 0


def _function(key: Key, sums: dict[str, Sum], accuracy: Callable | None) -> Function:
    """The dialect with these metrics."""

    def function(params: Values, inputs: Values) -> Values:
        made = right(*key).function(params, inputs)
        rewards = {name: one.of(params, inputs) for name, one in sums.items()}
        metrics = made["metrics"] | {name: np.mean(value) for name, value in rewards.items()}
        if accuracy:
            metrics["rewards/accuracies"] = np.mean(accuracy(rewards))
        return made | {"metrics": metrics}

    return function
