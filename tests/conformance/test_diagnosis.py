"""The kit names what an implementation computes, or says that it does not know."""

import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.diagnosis import CLIENTS as BUGS
from benchmarks.diagnosis import ROWS, said_of, said_of_client
from reference.conformance import load_cases, run
from reference.conformance.diagnosis import Diagnosis, Part
from reference.conformance.dialects import DIALECTS
from reference.conformance.evidence import REFUSALS, evaluated
from reference.conformance.features import shared
from reference.conformance.fitting import _roots as roots
from reference.conformance.flags import FLAGS, is_note
from reference.conformance.formulas import Term
from reference.conformance.hypotheses import Hypothesis
from reference.conformance.lookalikes import LOOKALIKES
from reference.conformance.mistakes import DATA, KL, PAIRS, TOKENS, TRAINING
from reference.conformance.sentences import sentences, together
from reference.conformance.text import table
from scale.files import read_csv
from tests.conformance.faults import FAULTS, NAMES, UNKNOWN
from tests.conformance.faults import LATER as LATER_FAULTS

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def client(function, dtype="float64"):
    """An implementation that answers every dialect by this function of params and inputs."""

    def evaluate(objective, dialect, params, inputs):
        return function(params, inputs)

    return SimpleNamespace(dtype=dtype, supports=lambda o, d: True, evaluate=evaluate)


def diagnosis(claimed, function, dtype="float64"):
    (found,) = run(client(function, dtype), load_cases(*claimed.split("/"))).diagnoses
    return found


def named(claimed, function, dtype="float64"):
    """What the outputs are, whatever is refused."""
    parts = diagnosis(claimed, function, dtype).parts
    return [[h.name for h in p.hypotheses] for p in parts if p.outputs != (REFUSALS,)]


def of_margin(loss, slope):
    """A loss written here, of h and the params, and not with the kit's own functions."""

    def function(p, x):
        h = x[POLICY[0]] - x[REFERENCE[0]] - x[POLICY[1]] + x[REFERENCE[1]]
        d = slope(h, p) / len(h)
        return {"loss": loss(h, p).mean(), "grads": {POLICY[0]: d, POLICY[1]: -d}}

    return function


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


SMOOTHED_ON_THE_WRONG_SIDE = of_margin(
    lambda h, p: (
        p["label_smoothing"] * softplus(-p["beta"] * h)
        + (1 - p["label_smoothing"]) * softplus(p["beta"] * h)
    ),
    lambda h, p: p["beta"] * (sigmoid(p["beta"] * h) - p["label_smoothing"]),
)


def test_label_smoothing_on_the_wrong_side_is_named():
    """Without metrics it is the same function as the loss of swapped responses."""
    found = diagnosis("dpo/conservative", SMOOTHED_ON_THE_WRONG_SIDE)
    first, accepted = found.parts
    assert found.whole and accepted.outputs == (REFUSALS,)
    assert {h.name for h in first.hypotheses} == {
        "dpo/conservative at label_smoothing 1 - e",
        "dpo/conservative with chosen and rejected swapped",
    }
    said = table(run(client(SMOOTHED_ON_THE_WRONG_SIDE), load_cases("dpo", "conservative")))
    assert "is in fact computed" in said and "label-smoothing-ignored" not in said


@pytest.mark.parametrize(
    ("claimed", "function", "name"),
    [
        (
            "dpo/plain",
            of_margin(
                lambda h, p: softplus(-3 * p["beta"] * h),
                lambda h, p: -3 * p["beta"] * sigmoid(-3 * p["beta"] * h),
            ),
            "dpo/plain at 3 beta",
        ),
        (
            "dpo/plain",
            of_margin(
                lambda h, p: np.maximum(0, 1 - p["beta"] * h),
                lambda h, p: -p["beta"] * (p["beta"] * h < 1),
            ),
            "dpo/hinge",
        ),
        (
            "ipo/paper",
            of_margin(lambda h, p: (h - 0.5 / p["beta"]) ** 2, lambda h, p: 2 * h - 1 / p["beta"]),
            "ipo/sum",
        ),
        (
            "dpo/plain",
            of_margin(lambda h, p: softplus(-0.25 * h), lambda h, p: -0.25 * sigmoid(-0.25 * h)),
            "dpo/plain at beta 0.25, whatever the case says",
        ),
        (
            "dpo/plain",
            of_margin(
                lambda h, p: softplus(-10 * p["beta"] * h),
                lambda h, p: -10 * p["beta"] * sigmoid(-10 * p["beta"] * h),
            ),
            "dpo/plain at 10 beta",
        ),
    ],
)
def test_a_loss_that_is_written_elsewhere_is_named(claimed, function, name):
    assert named(claimed, function) == [[name]]
    rounded = lambda p, x: {  # noqa: E731
        "loss": np.float32(function(p, x)["loss"]),
        "grads": {n: g.astype(np.float32) for n, g in function(p, x)["grads"].items()},
    }
    assert named(claimed, rounded, "float32") == [[name]]


def simpo_by_hand(p, x):
    lengths = [x.get(f"{name}_lengths", 1) for name in ("chosen", "rejected")]
    margin = p["beta"] * (x[POLICY[0]] / lengths[0] - x[POLICY[1]] / lengths[1]) - 0.5
    d = -p["beta"] * sigmoid(-margin) / len(margin)
    grads = {POLICY[0]: d / lengths[0], POLICY[1]: -d / lengths[1]}
    return {"loss": softplus(-margin).mean(), "grads": grads}


def test_this_is_simpo():
    assert named("dpo/plain", simpo_by_hand) == [["dpo/simpo at gamma 0.5"]]


def slopes_of(function, p, x):
    """Central differences of the loss in the policy's log-probabilities."""
    grads = {}
    for name in POLICY:
        steps = 1e-6 * np.eye(len(x[name]))
        ahead, behind = (
            [function(p, x | {name: x[name] + sign * step})["loss"] for step in steps]
            for sign in (1, -1)
        )
        grads[name] = (np.array(ahead) - np.array(behind)) / 2e-6
    return grads


PAIRS_OF_DPO = next(case for case in load_cases("dpo", "plain") if case.id.endswith("/batch"))
LENGTHS = {f"{name}_lengths": np.array([3, 4, 5, 6, 7]) for name in ("chosen", "rejected")}


@pytest.mark.parametrize("key", LOOKALIKES, ids="/".join)
def test_a_lookalikes_gradient_is_its_slope(key):
    look = LOOKALIKES[key]
    function = partial(look.function, **({} if not look.free else {CONSTANT[key[1]]: 0.5}))
    (case,) = [PAIRS_OF_DPO] if key[0] == "dpo" else load_cases("ensemble", "mean")[8:9]
    x = case.inputs | (LENGTHS if key[0] == "dpo" else {})
    for name, slope in slopes_of(function, case.params, x).items():
        np.testing.assert_allclose(function(case.params, x)["grads"][name], slope, atol=1e-6)


CONSTANT = {"simpo": "gamma", "positive": "penalty"}


def test_lookalikes_by_hand():
    """One pair: log-ratios ln 2 and -ln 2, so h = 2 ln 2; lengths 2 and 1; beta 1."""
    two = np.log(2.0)
    logps = np.array([[two - 4], [-two - 3], [-4.0], [-3.0]])
    x = dict(zip(POLICY + REFERENCE, logps, strict=True))
    x |= {"chosen_lengths": np.array([2]), "rejected_lengths": np.array([1])}
    p = {"beta": 1.0}
    loss = {key[1]: look.function for key, look in LOOKALIKES.items()}
    assert loss["hinge"](p, x)["loss"] == 0 and loss["hinge"]({"beta": 0.1}, x)["loss"] > 0
    assert np.isclose(loss["length-normalised"](p, x)["loss"], np.log(1 + 2**-1.5))
    assert np.isclose(loss["simpo"](p, x, 0.0)["loss"], np.log1p(np.exp(2 - 3 - 1.5 * two)))
    assert np.isclose(loss["forward-kl-link"](p, x)["loss"], np.log1p(np.exp(-(2 - 0.5))))
    assert np.isclose(loss["positive"](p, x, 9.0)["loss"], np.log1p(1 / 4))
    x[POLICY[0]] = np.array([-4 - two])
    assert np.isclose(loss["positive"](p, x, 9.0)["loss"], np.log1p(np.exp(9 * two)))


def test_what_no_hypothesis_gives_is_unknown_with_its_smallest_case():
    odd = of_margin(lambda h, p: np.sin(h), lambda h, p: np.cos(h))
    found = diagnosis("dpo/plain", odd)
    assert not found.known and found.parts[0].hypotheses == ()
    smallest, furthest = (
        "dpo/plain/one-pair (h = 3: the policy has moved towards the chosen response)",
        "dpo/plain/far-both (two pairs with beta h = 800 and -800, where beta is 1/2)",
    )
    said = sentences(found)[0]
    assert "unknown" in said and f"; the smallest failing case is {smallest}; " in said
    assert said.endswith(f"; the largest difference is in {furthest}")


@pytest.mark.parametrize(
    ("dialect", "failing", "words"),
    [
        ("dpo/plain", ("batch", "ties", "orders", "rewards", "far-both"), "several pairs"),
        ("dpo/plain", ("batch", "ties", "orders", "rewards"), None),
        ("dpo/plain", (), None),
        (
            "training/dpo",
            ("from-reference-8x1", "away-from-reference-8x1", "steep-8x1"),
            "several micro-batches a step",
        ),
        (
            "data/tokens-keep-end",
            ("long-prompt", "limit-one"),
            "a prompt that is longer than the limit",
        ),
        ("logps/shared-prefix", ("rows",), "several rows"),
    ],
)
def test_what_failing_cases_share_is_said(dialect, failing, words):
    cases = load_cases(*dialect.split("/"))
    told = f"all failing cases have {words}, and no other case has" if words else ""
    assert shared(cases, {f"{dialect}/{name}" for name in failing}) == told
    found = Diagnosis(dialect, (Part(("loss",), ()),), False, cases[0], cases[0], common=told)
    assert sentences(found)[0].endswith(f"({cases[0].comment}); {told}" if told else ")")


def test_a_second_loss_is_an_addition_and_powers_have_their_brackets():
    added = of_margin(
        lambda h, p: softplus(-p["beta"] * h) + 0.3 * (p["beta"] * h) ** 2,
        lambda h, p: -p["beta"] * sigmoid(-p["beta"] * h) + 0.6 * p["beta"] ** 2 * h,
    )
    found = diagnosis("dpo/plain", added)
    (hypothesis,) = found.parts[0].hypotheses
    assert hypothesis.name == "dpo/plain with the loss L(beta h) + 0.3 (beta h)^2"
    assert found.flags[0] == "offset"


@pytest.mark.parametrize(
    ("constant", "term", "words"),
    [
        (0.25, Term(" / beta^2", "{q}", "1"), "0.25 / beta^2"),
        (1.0, Term(" / beta", "{q}", "1"), "1 / beta"),
        (1.0, Term("", "{q}", "1"), "1"),
        (-1.0, Term("", "{q}", "h"), "-h"),
        (1.0, Term("", "{q}^2", "beta h"), "(beta h)^2"),
        (1.0, Term("beta ", "{q}^2", "h"), "beta h^2"),
        (2.0, Term("", "{q}^2", "(r_w + r_l)"), "2 (r_w + r_l)^2"),
        (1.0, Term("", "max(0, 1 - {q})", "rho"), "max(0, 1 - rho)"),
        (-1.0, Term("label_smoothing ", "L({q})", "beta h"), "-label_smoothing L(beta h)"),
    ],
)
def test_a_term_with_its_coefficient(constant, term, words):
    assert term.times(constant) == words


def test_a_constant_without_effect_is_tried_at_few_points():
    tried = list[float]()
    assert list(roots(lambda constant: tried.append(constant) or 2.0)) == [] and len(tried) < 10
    assert list(roots(lambda constant: constant - 3.0)) == [3.0]
    assert len(list(roots(lambda constant: constant if constant > 1 else np.nan))) == 0


def test_the_search_is_silent():
    """A sample of one pair has no deviation."""
    name = "with reward margins over their standard deviation of a sample"
    row = next(row for row in PAIRS if row.name == name)
    (case,) = (c for c in load_cases("distillation", "d-dpo") if c.id.endswith("/one-pair"))
    with warnings.catch_warnings(action="error"):
        evaluated(Hypothesis("", (), row.change(DIALECTS["distillation", "d-dpo"]), 1), case)


def test_a_constant_that_nothing_determines_is_no_name():
    """A loss of 0 is that of SimPO at any gamma that is negative enough, and is named as it is."""
    zero = of_margin(lambda h, p: 0 * h, lambda h, p: 0 * h)
    assert named("dpo/plain", zero) == [["dpo/plain with a loss of 0"]]


def test_two_mistakes_are_named():
    both = of_margin(
        lambda h, p: softplus(p["beta"] ** 2 * h),
        lambda h, p: p["beta"] ** 2 * sigmoid(p["beta"] ** 2 * h),
    )
    name = "dpo/plain at beta squared and with chosen and rejected swapped"
    assert named("dpo/plain", both) == [[name]]


def test_the_right_outputs_are_left_out():
    """A loss that is added where its gradient is averaged."""

    def function(p, x):
        made = DIALECTS["dpo", "plain"](p, x)
        return made | {"loss": made["loss"] * len(x[POLICY[0]])}

    found = diagnosis("dpo/plain", function)
    assert [part.outputs for part in found.parts] == [("loss",)] and not found.whole
    told = "dpo/plain: loss is in fact computed with the pairs added, not averaged"
    assert sentences(found)[0] == told


def test_the_largest_difference_is_that_of_a_failing_case():
    """The naive sigmoid is infinite at -800 alone; elsewhere it differs by its rounding."""

    def naive(h, p):
        with np.errstate(over="ignore", divide="ignore"):
            return -np.log(1 / (1 + np.exp(-p["beta"] * h)))

    function = of_margin(naive, lambda h, p: -p["beta"] * np.exp(-softplus(p["beta"] * h)))
    found = diagnosis("dpo/plain", function)
    assert found.furthest.id == "dpo/plain/far-both"
    assert "exp of a large negative margin overflowing: one above 709" in sentences(found)[0]


def test_what_several_dialects_share_is_said_once():
    """The reference is dropped in two dialects; in two others the loss alone is added."""

    def evaluate(objective, dialect, p, x):
        made = DIALECTS[objective, dialect](p, x)
        if objective == "distillation":
            return made | {"loss": made["loss"] * len(x[POLICY[0]])}
        return DIALECTS[objective, dialect](p, x | {name: 0.0 * x[name] for name in REFERENCE})

    implementation = SimpleNamespace(dtype="float64", supports=lambda o, d: True, evaluate=evaluate)
    cases = load_cases("distillation", "r*") + load_cases("dpo", "[cp]*")
    said = table(run(implementation, cases)).splitlines()
    assert [line for line in said if "in fact" in line] == [
        "2 dialects (dpo/conservative, dpo/plain) are in fact computed without the reference",
        "2 dialects (distillation/rebel, distillation/rpo-sq): loss is in fact computed with the "
        "pairs added, not averaged",
    ]
    assert sum("subtract from each response its own" in line for line in said) == 1


def test_an_answer_that_depends_on_earlier_questions_is_said():
    """Rewards are means over all answers so far, as of metrics that nobody clears."""
    seen = []

    def function(p, x):
        made = DIALECTS["dpo", "plain"](p, x)
        seen.append(made["metrics"]["rewards/chosen"])
        return made | {"metrics": made["metrics"] | {"rewards/chosen": np.mean(seen)}}

    told = sentences(diagnosis("dpo/plain", function))[0]
    assert " has another answer when it is asked again, so something is kept" in told
    odd = of_margin(lambda h, p: np.sin(h), lambda h, p: np.cos(h))
    right = sentences(diagnosis("dpo/plain", odd))[0]
    assert "asked again" not in right


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (
            (1, -1, 0, 0),
            (0, 0, 1, -1),
            "with the policy's log-probability of rejected and the reference's log-probability of "
            "chosen exchanged",
        ),
        (
            (1, 0, -1, -1),
            (0, 1, 0, -2),
            "with rewards/chosen = beta [log pi(y_w) - log pi_ref(y_w) - log pi_ref(y_l)], "
            "rewards/rejected = beta [log pi(y_l) - 2 log pi_ref(y_l)]",
        ),
    ],
)
def test_rewards_with_the_right_margins_are_named(chosen, rejected, words):
    """The first is f(pc, rc, pr, rr), where f(pc, pr, rc, rr) is due."""

    def function(p, x):
        made = DIALECTS["distillation", "d-dpo"](p, x)
        columns = [x[name] for name in POLICY + REFERENCE]
        rewards = {
            name: p["beta"] * np.mean(np.tensordot(of, columns, axes=1))
            for name, of in (("rewards/chosen", chosen), ("rewards/rejected", rejected))
        }
        return made | {"metrics": made["metrics"] | rewards}

    [[first, *_]] = named("distillation/d-dpo", function)
    assert first.startswith(f"distillation/d-dpo {words}")


def unknown(dialect, right=()):
    case = load_cases(*dialect.split("/"))[0]
    part = Part(("grads.policy_chosen_logps", "loss"), ())
    return Diagnosis(dialect, (part,), False, case, case, right)


def test_what_is_unknown_in_the_same_way_is_said_once():
    """In `dpo/robust` the metrics are right, in the two others there are none."""
    diagnoses = unknown("dpo/plain"), unknown("dpo/robust", ("metrics.rewards/chosen",))
    plain, robust = together([*diagnoses, unknown("ipo/sum")])  # and nothing is named below
    assert plain.startswith(
        "2 dialects (dpo/plain, ipo/sum) are unknown, no named mistake gives their "
        "grads.policy_chosen_logps, loss; the smallest failing case is dpo/plain/one-pair ("
    )
    assert robust.startswith("dpo/robust is unknown, no named mistake gives its grads.")
    assert "; right: metrics.rewards/chosen; " in robust


def test_one_mistake_in_other_outputs_of_each_dialect_is_said_once():
    """The loss has beta 1/8; the metrics of DPO, which IPO has not, have the right one."""

    def evaluate(objective, dialect, p, x):
        made = DIALECTS[objective, dialect](p, x)
        return DIALECTS[objective, dialect](p | {"beta": 0.125}, x) | {
            name: made[name] for name in ("metrics",) if name in made
        }

    implementation = SimpleNamespace(dtype="float64", supports=lambda o, d: True, evaluate=evaluate)
    cases = load_cases("dpo", "plain") + load_cases("ipo", "sum")
    said = table(run(implementation, cases)).splitlines()
    assert [line for line in said if "in fact" in line] == [
        "2 dialects (dpo/plain, ipo/sum), in all or some of their outputs, are in fact computed at "
        "beta 0.125, whatever the case says"
    ]


def repeating(p, x):
    """As PyTorch: one value beside several is repeated."""
    names = POLICY + REFERENCE
    return DIALECTS["dpo", "plain"](
        p, x | dict(zip(names, np.broadcast_arrays(*(x[n] for n in names)), strict=True))
    )


def test_broadcasting_is_a_note():
    report = run(client(repeating), load_cases("dpo", "plain"))
    noted = [r.case.id for r in report.results if r.outcome == "noted"]
    assert noted == ["dpo/plain/one-for-four"] and not report.unexpected
    (found,) = report.diagnoses
    assert found.flags == ("broadcast",)
    assert [h.name for h in found.parts[0].hypotheses] == ["dpo/plain with a lone value repeated"]


def test_a_convention_of_a_metric_is_a_note_in_cases_of_other_flags_too():
    def function(p, x):
        made = DIALECTS["dpo", "plain"](p, x)
        h = x[POLICY[0]] - x[REFERENCE[0]] - x[POLICY[1]] + x[REFERENCE[1]]
        return made | {"metrics": made["metrics"] | {"rewards/accuracies": np.mean(h >= 0)}}

    report = run(client(function), load_cases("dpo", "plain"))
    noted = {r.case.id.rpartition("/")[2] for r in report.results if r.outcome == "noted"}
    assert noted == {"ties", "policy-is-reference"} and not report.unexpected


def test_a_note_beside_an_error_is_still_one():
    def function(p, x):
        return repeating(p | {"beta": 2 * p["beta"]}, x)

    report = run(client(function), load_cases("dpo", "plain"))
    outcomes = {r.case.id.rpartition("/")[2]: r.outcome for r in report.results}
    assert outcomes["one-for-four"] == "noted" and outcomes["batch"] == "failed"
    assert report.unexpected


@pytest.mark.parametrize(
    ("names", "accepted", "note"),
    [
        (("broadcast",), True, True),
        (("broadcast",), False, False),
        (("last-turn",), True, True),
        (("last-turn",), False, False),
        (("accuracy-tie",), False, True),
        (("accuracy-tie", "sign"), False, False),
        (("missing-field",), True, False),
        ((), True, False),
    ],
)
def test_severity(names, accepted, note):
    assert is_note(names, accepted) == note


def test_every_mistake_has_a_flag_and_a_name_of_its_own():
    for table_of in (PAIRS, KL, TOKENS, DATA, TRAINING):
        assert {mistake.flag for mistake in table_of} <= set(FLAGS)
        names = [mistake.name for mistake in table_of]
        assert len(set(names)) == len(names)


def test_every_bug_has_names():
    assert set(NAMES) == set(FAULTS) and set(LATER_FAULTS) <= set(FAULTS)


FEW = (
    "preference's sign",
    "references swapped",
    "IPO without beta",
    "KL reversed",
    "last token not scored",
    "cut at the first mark",
)


def verdict(name):
    return "unknown" if name in UNKNOWN else "named"


@pytest.mark.parametrize("name", FEW)
def test_a_few_seeded_bugs(name):
    assert said_of(name).verdict == verdict(name)


def test_nine_of_ten_seeded_bugs_have_names():
    assert len(UNKNOWN) <= 0.1 * len(FAULTS)


@pytest.mark.slow
def test_seeded_bugs_are_named():
    """A few, and those written later; benchmarks.diagnosis asks about all."""
    names = dict.fromkeys([*list(FAULTS)[5::15], *LATER_FAULTS])
    assert {name: said_of(name).verdict for name in names} == {n: verdict(n) for n in names}


def says(name):
    """Whether the kit says what is right of a bug: words of its name, or nothing."""
    return said_of_client(BUGS[name]).verdict == ("named" if BUGS[name].now else "unknown")


@pytest.mark.parametrize("name", ["beta twice (AI-Hypercomputer/maxtext#1530)", "weights 1 and e"])
def test_a_few_bugs_of_others(name):
    assert says(name)


@pytest.mark.slow
def test_bugs_of_others_have_names():
    """A few; benchmarks.diagnosis asks about all."""
    assert [name for name in list(BUGS)[3::6] if not says(name)] == []


def test_what_was_said_of_all_bugs():
    """What `benchmarks.diagnosis` wrote down is what the lists of bugs expect."""
    rows = {row["bug"]: row for row in read_csv(ROWS)}
    assert rows.keys() == FAULTS.keys() | BUGS.keys()
    assert len({row["code"] for row in rows.values()}) == 1
    assert {name: rows[name]["verdict"] for name in FAULTS} == {n: verdict(n) for n in FAULTS}
    assert {name for name, bug in BUGS.items() if bug.now not in rows[name]["names"]} == set()
    unknown = {name for name in BUGS if rows[name]["verdict"] == "unknown"}
    assert unknown == {name for name, bug in BUGS.items() if not bug.now}
    assert len(unknown) <= 0.1 * len(BUGS)
