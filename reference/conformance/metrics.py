"""Metrics as sums of the log-probabilities' columns, whose coefficients are fitted."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from reference.conformance.evidence import Evidence
from reference.conformance.hypotheses import Hypothesis, Key, right
from reference.conformance.mistakes.mistake import LOGPS

Values = dict[str, Any]
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/margins")
USUAL = ((1, 0, -1, 0), (0, 1, 0, -1), (1, -1, -1, 1))
"""The right coefficients of the columns `LOGPS`, each times beta."""
COLUMNS = ("log pi(y_w)", "log pi(y_l)", "log pi_ref(y_w)", "log pi_ref(y_l)")
POWERS = {1: "beta ", 0: "", 2: "beta^2 ", -1: "1/beta "}


class Sum(NamedTuple):
    """beta^power times a sum of columns."""

    power: int
    coefficients: tuple[float, ...]

    def of(self, params: Values, inputs: Values) -> np.ndarray:
        """Its value for each pair."""
        terms = zip(self.coefficients, LOGPS, strict=True)
        return params["beta"] ** self.power * sum(c * inputs[name] for c, name in terms)

    def less(self, other: "Sum") -> "Sum":
        """The difference from a sum times the same power of beta."""
        differences = zip(self.coefficients, other.coefficients, strict=True)
        return Sum(self.power, tuple(a - b for a, b in differences))

    @property
    def words(self) -> str:
        """As it is written."""
        terms = [
            ("-" if c < 0 else "") + ("" if abs(c) == 1 else f"{abs(c):g} ") + name
            for c, name in zip(self.coefficients, COLUMNS, strict=True)
            if c
        ]
        total = " + ".join(terms).replace("+ -", "- ")
        return (
            f"{POWERS[self.power]}{total}" if len(terms) < 2 else f"{POWERS[self.power]}[{total}]"
        )


def sums_of_columns(key: Key, evidence: Evidence) -> Iterator[Hypothesis]:
    """The metrics of implicit rewards as sums, where any of them is another one than it should be.

    Args:
        key: the claimed dialect.
        evidence: the answers.

    Returns:
        Hypotheses that differ in the accuracy: that of the sums, of the margins', the right one.
    """
    usual = {name: Sum(1, c) for name, c in zip(NAMES, USUAL, strict=True)}
    fitted = {name: found for name in NAMES if (found := _fitted(evidence, name))}
    if not fitted or all(usual[name] == one for name, one in fitted.items()):
        return
    sums = usual | fitted
    other = [name for name, one in fitted.items() if one != usual[name]]
    chosen, rejected, margins = sums.values()
    if margins == chosen.less(rejected) and len(other) > 1:
        other.remove(NAMES[2])
    named = [f"{name} = {sums[name].words}" for name in other]
    words = f"{'/'.join(key)} with {', '.join(named)}"
    for accuracy in (_of_rewards, _of_margins, None):
        yield Hypothesis(words, ("metrics",), _function(key, sums, accuracy), 1)


def _fitted(evidence: Evidence, name: str) -> Sum | None:
    """A metric as a sum with short coefficients; None where it is not reported, or no such sum."""
    output = f"metrics.{name}"
    known = [
        (case, float(answer[output].item()))
        for case, answer in evidence.asked
        if case.result == "value" and answer and np.size(answer.get(output, ())) == 1
    ]
    due = np.array([value for _, value in known])
    for power in POWERS if len(known) > len(LOGPS) and np.all(np.isfinite(due)) else ():
        rows = [
            [case.params["beta"] ** power * np.mean(case.inputs[column]) for column in LOGPS]
            for case, _ in known
        ]
        exact = np.linalg.lstsq(np.array(rows), due)[0]
        short = tuple(float(f"{c:.3g}") if abs(c) > 1e-4 else 0.0 for c in exact)
        if np.allclose(np.array(rows) @ short, due, rtol=1e-4, atol=1e-4):
            return Sum(power, short)
    return None


def _of_rewards(rewards: dict[str, np.ndarray]) -> np.ndarray:
    return rewards["rewards/chosen"] > rewards["rewards/rejected"]


def _of_margins(rewards: dict[str, np.ndarray]) -> np.ndarray:
    return rewards["rewards/margins"] > 0


def _function(key: Key, sums: dict[str, Sum], accuracy: Any) -> Any:
    """The dialect with these metrics."""

    def function(params: Values, inputs: Values) -> Values:
        made = right(*key).function(params, inputs)
        rewards = {name: one.of(params, inputs) for name, one in sums.items()}
        metrics = made["metrics"] | {name: np.mean(value) for name, value in rewards.items()}
        if accuracy:
            metrics["rewards/accuracies"] = np.mean(accuracy(rewards))
        return made | {"metrics": metrics}

    return function
