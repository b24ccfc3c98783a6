"""Mistakes in a loss have the gradient of that loss, and are found in code written elsewhere."""

import numpy as np
import pytest

from reference.conformance import load_cases
from reference.conformance.dialects import DIALECTS
from reference.conformance.mistakes import KL
from reference.conformance.mistakes.columns import COLUMNS
from reference.conformance.mistakes.ensembles import ENSEMBLES
from reference.conformance.mistakes.links import LINKS
from reference.conformance.mistakes.quantities import OF_QUANTITIES
from reference.conformance.mistakes.scores import SCORES_OF_TOKENS
from tests.conformance.test_diagnosis import POLICY, REFERENCE, named, of_margin, sigmoid, softplus

PAIR = ("dpo", "conservative"), ("ipo", "sum"), ("distillation", "rpo-sq")
BATCHES = (*PAIR, ("ensemble", "example-min"), ("reward", "margin"))
STEP = 1e-5
DETACHED = (
    "which its gradient ignores",
    "detached",
    "gradients weighed",
    "with rewards standardised over the batch",
    "in place of the reference's log-probability",
    "standard deviation",
)
"""Names of mistakes whose gradient is not the slope, or not in what is a constant."""


def batch_of(objective, dialect):
    """A batch that lies on no kink: its numbers are moved by thousandths."""
    case = next(c for c in load_cases(objective, dialect) if c.id.endswith("/batch"))
    moved = {n: x + 0.013 * np.arange(x.size).reshape(x.shape) for n, x in case.inputs.items()}
    whole = {n: x for n, x in case.inputs.items() if x.dtype.kind != "f"}
    return case.params, moved | whole


def changed(row, function):
    return row.change(function, 1.3) if row.free else row.change(function)


def slope(function, params, inputs, name, direction):
    ahead, behind = (
        function(params, inputs | {name: inputs[name] + sign * STEP * direction})["loss"]
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * STEP)


def checked(row, function, params, inputs):
    """Whether the mistake goes with this loss; fails where a gradient is none."""
    mistaken = changed(row, function)
    try:
        made = mistaken(params, inputs)
    except (KeyError, ValueError, TypeError):
        return False
    generator = np.random.default_rng(0)
    for name in made["grads"].keys() - set(REFERENCE):
        direction = generator.normal(size=inputs[name].shape)
        expected = slope(mistaken, params, inputs, name, direction)
        if np.isfinite(made["loss"]) and abs(made["loss"]) < 1e6:
            got = np.sum(made["grads"][name] * direction)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    return True


@pytest.mark.parametrize("row", LINKS + ENSEMBLES + OF_QUANTITIES + COLUMNS, ids=lambda r: r.name)
def test_the_gradient_of_a_mistaken_loss_of_pairs(row):
    if not any(words in row.name for words in DETACHED):
        with np.errstate(all="ignore"):
            goes = [checked(row, DIALECTS[key], *batch_of(*key)) for key in BATCHES]
        assert any(goes)


@pytest.mark.parametrize("dialect", ["sampled-kl", "exact-kl"])
def test_the_gradient_of_a_mistaken_kl(dialect):
    function = DIALECTS["pessimistic", dialect]
    for row in KL:
        if not any(words in row.name for words in DETACHED):
            checked(row, function, *batch_of("pessimistic", dialect))


@pytest.mark.parametrize("dialect", ["sum", "mean", "shared-prefix"])
@pytest.mark.parametrize("row", SCORES_OF_TOKENS, ids=lambda row: row.name)
def test_the_gradient_of_a_mistaken_score_of_tokens(row, dialect):
    case = load_cases("logps", dialect)[1]
    mistaken = changed(row, DIALECTS["logps", dialect])

    def total(params, inputs):
        made = mistaken(params, inputs)
        return {"loss": sum(np.sum(made[name]) for name in made.keys() - {"grads"})}

    x = case.inputs
    direction = np.random.default_rng(0).normal(size=x["logits"].shape)
    expected = slope(total, case.params, x, "logits", direction)
    got = np.sum(mistaken(case.params, x)["grads"]["logits"] * direction)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def clipped_at_ten(p, x):
    h = np.clip(x[POLICY[0]] - x[REFERENCE[0]] - x[POLICY[1]] + x[REFERENCE[1]], -10, 10)
    d = -p["beta"] * sigmoid(-p["beta"] * h) * (abs(h) < 10) / len(h)
    return {"loss": softplus(-p["beta"] * h).mean(), "grads": {POLICY[0]: d, POLICY[1]: -d}}


def of_probabilities(p, x):
    """exp was called once too often: h is a difference of probabilities."""
    w, wr, l, lr = (np.exp(x[name]) for name in (POLICY[0], REFERENCE[0], POLICY[1], REFERENCE[1]))  # noqa: E741
    a = p["beta"] * (w - wr - l + lr)
    d = -p["beta"] * sigmoid(-a) / len(a)
    return {"loss": softplus(-a).mean(), "grads": {POLICY[0]: d * w, POLICY[1]: -d * l}}


def with_likelihood(p, x):
    h = x[POLICY[0]] - x[REFERENCE[0]] - x[POLICY[1]] + x[REFERENCE[1]]
    d = -p["beta"] * sigmoid(-p["beta"] * h) / len(h)
    loss = softplus(-p["beta"] * h).mean() - 0.2 * x[POLICY[0]].mean()
    return {"loss": loss, "grads": {POLICY[0]: d - 0.2 / len(h), POLICY[1]: -d}}


WRONG_WEIGHTS = of_margin(
    lambda h, p: softplus(-p["beta"] * h), lambda h, p: -p["beta"] * sigmoid(p["beta"] * h)
)
SQUARED_HINGE = of_margin(
    lambda h, p: np.maximum(0, 1 - p["beta"] * h) ** 2,
    lambda h, p: -2 * p["beta"] * np.maximum(0, 1 - p["beta"] * h),
)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (clipped_at_ten, "dpo/plain with the margin clipped at 10 and -10"),
        (of_probabilities, "dpo/plain with exp of the log-probabilities"),
        (
            with_likelihood,
            "dpo/plain plus 0.2 times the chosen response's negative log-likelihood",
        ),
        (
            WRONG_WEIGHTS,
            "dpo/plain with gradients weighed by sigmoid of x, not of -x, "
            "where x is beta h or the reward margin",
        ),
        (SQUARED_HINGE, "dpo/plain with the squared hinge for -log sigmoid"),
    ],
)
def test_a_mistake_that_is_written_elsewhere_is_named(function, name):
    assert [part[0] for part in named("dpo/plain", function)] == [name]
