"""Mistakes in a loss have the gradient of that loss, and are found in code written elsewhere."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from reference.conformance import load_cases, pairs
from reference.conformance.dialects import DIALECTS
from reference.conformance.mistakes import DATA, KL, TOKENS, TRAINING
from reference.conformance.mistakes.columns import COLUMNS
from reference.conformance.mistakes.ensembles import ENSEMBLES
from reference.conformance.mistakes.links import LINKS
from reference.conformance.mistakes.quantities import OF_QUANTITIES
from reference.conformance.mistakes.reductions import ODD, REDUCTIONS
from reference.conformance.mistakes.scores import SCORES_OF_TOKENS
from reference.conformance.mistakes.smoothing import SMOOTHING
from reference.conformance.training import train
from tests.conformance.test_diagnosis import POLICY, REFERENCE, named, of_margin, sigmoid, softplus

PAIR = ("dpo", "conservative"), ("ipo", "sum"), ("distillation", "rpo-sq")
BATCHES = (*PAIR, ("ensemble", "example-min"), ("reward", "margin"))
OF_BATCHES = [
    row for row in REDUCTIONS + ODD if row.name.endswith(("(B x B)", "root of the batch's loss"))
]
STEP = 1e-5
DETACHED = (
    "which its gradient ignores",
    "detached",
    "gradients weighed",
    "exchanged in the loss and its gradients",
    "with rewards standardised over the batch",
    "in place of the reference's log-probability",
    "standard deviation",
    "to integers",
    "divided by their sum",
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


@pytest.mark.parametrize(
    "row",
    [*LINKS, *ENSEMBLES, *OF_QUANTITIES, *COLUMNS, *SMOOTHING, *OF_BATCHES],
    ids=lambda row: row.name,
)
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
@pytest.mark.parametrize(
    "row",
    [row for row in SCORES_OF_TOKENS if "float16" not in row.name],  # a step function
    ids=lambda row: row.name,
)
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


def row_named(rows, name):
    (row,) = (row for row in rows if row.name == name)
    return row


def training_case(dialect, name):
    (case,) = (c for c in load_cases("training", dialect) if c.id.endswith(f"/{name}"))
    return case


def run_with(optimizer, params, x):
    """A run of Optax on the gradients that one step of plain descent gives."""
    function = DIALECTS["training", "dpo"]
    table, losses, state = x["table"], [], optimizer.init(x["table"])
    for batch in x["batches"]:
        made = function(params, x | {"batches": batch[None], "table": table})
        losses.append(made["losses"][0])
        gradient = (table - made["parameters"]) / params["learning_rate"]
        updates, state = optimizer.update(gradient, state, table)
        table = table - params["learning_rate"] * np.asarray(updates)
    return {"losses": np.array(losses), "parameters": table}


def scheduled(first, then, steps):
    return optax.scale_by_schedule(optax.join_schedules([first, then], [steps]))


@pytest.mark.parametrize(
    ("name", "constant", "optimizer"),
    [
        ("with momentum {c}", 0.9, optax.trace(0.9)),
        ("with gradients that are not zeroed between the steps", None, optax.trace(1.0)),
        ("with Adam (0.9, 0.999)", None, optax.scale_by_adam(0.9, 0.999)),
        (
            "with Adam (0.9, 0.95) and weight decay 0.01",
            None,
            optax.chain(optax.scale_by_adam(0.9, 0.95), optax.add_decayed_weights(0.01)),
        ),
        ("with weight decay {c}", 0.1, optax.add_decayed_weights(0.1)),
        ("with gradients clipped to norm {c}", 1.0, optax.clip_by_global_norm(1.0)),
        ("at {c} times the learning_rate", 0.3, optax.scale(0.3)),
        (
            "with a learning_rate that rises from 0 over 1 step and falls to 0 linearly",
            None,
            scheduled(optax.linear_schedule(0, 1, 1), optax.linear_schedule(1, 0, 9), 1),
        ),
        (
            "with a learning_rate that rises from 1/3 over 3 steps",
            None,
            scheduled(optax.linear_schedule(1 / 3, 1, 2), optax.constant_schedule(1), 3),
        ),
        (
            "with a learning_rate that rises from 0 over 3 steps and falls to 0 as a cosine",
            None,
            optax.scale_by_schedule(optax.warmup_cosine_decay_schedule(0, 1, 3, 10)),
        ),
        (
            "with a learning_rate that each step multiplies by {c}",
            0.9,
            optax.scale_by_schedule(optax.exponential_decay(1, 1, 0.9)),
        ),
        ("with the first step skipped", None, scheduled(lambda n: 0, lambda n: 1, 1)),
        ("with the gradient's sign alone", None, optax.scale_by_sign()),
        ("with the gradient over its norm", None, optax.normalize_by_update_norm(eps=0.0)),
    ],
)
def test_optimizers_are_those_of_optax(name, constant, optimizer):
    """In the case whose gradients are large enough for all of them."""
    case = training_case("dpo", "steep")
    right, row = DIALECTS["training", "dpo"], row_named(TRAINING, name)
    mistaken = (row if constant is None else row.known(constant)).change(right)
    made = mistaken(case.params, case.inputs)
    with jax.enable_x64(True):
        due = run_with(optimizer, case.params, case.inputs)
    near = 1e-6 if "learning_rate that" in name else 1e-9  # Optax's schedules are float32
    for output, values in due.items():
        np.testing.assert_allclose(made[output], values, rtol=near, atol=near)
    plain = right(case.params, case.inputs)
    assert not np.allclose(made["parameters"], plain["parameters"], rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "each_time"),
    [
        ("with the gradient of each micro-batch clipped to norm {c}", False),
        ("with the gradient so far, after each micro-batch, clipped to norm {c}", True),
    ],
)
def test_gradients_that_are_clipped_in_the_accumulation(name, each_time):
    """Where the loop over micro-batches clips what Optax would clip after it."""
    case, right = training_case("dpo", "steep-8x1"), DIALECTS["training", "dpo"]
    made = row_named(TRAINING, name).known(1.0).change(right)(case.params, case.inputs)
    x, rate = case.inputs, case.params["learning_rate"]
    clip, table = optax.clip_by_global_norm(1.0), x["table"]
    with jax.enable_x64(True):
        for batch in x["batches"]:
            total = np.zeros_like(table)
            for rows in batch:
                one = right(case.params, x | {"batches": rows[None, None], "table": table})
                part = (table - one["parameters"]) / rate
                part = part / len(batch) if each_time else clip.update(part, None)[0] / len(batch)
                total = clip.update(total + part, None)[0] if each_time else total + part
            table = table - rate * np.asarray(total)
    np.testing.assert_allclose(made["parameters"], table, rtol=1e-9, atol=1e-9)


def sft_with(smoothing, loss, params, x):
    """A run on `loss(cross-entropy of each label, mask)`, by Optax and JAX."""

    def of_rows(table, rows):
        ids = x["chosen_ids"][rows]
        labels = optax.smooth_labels(jax.nn.one_hot(ids[:, 1:], table.shape[1]), smoothing)
        logits = jax.numpy.asarray(table)[ids[:, :-1]]
        return loss(optax.softmax_cross_entropy(logits, labels), x["chosen_mask"][rows])

    table, losses = x["table"], []
    with jax.enable_x64(True):
        for batch in x["batches"].reshape(len(x["batches"]), -1):
            value, gradient = jax.value_and_grad(of_rows)(table, batch)
            losses.append(float(value))
            table = table - params["learning_rate"] * np.asarray(gradient)
    return {"losses": np.array(losses), "parameters": table}


def test_label_smoothing_over_the_vocabulary():
    """Optax smooths the labels, and JAX has the gradient."""
    case = training_case("sft", "away-from-reference-1x8")
    x = case.inputs
    row = row_named(TRAINING, "with label smoothing {c} over the vocabulary").known(0.1)
    made = row.change(DIALECTS["training", "sft"])(case.params, x)

    def loss(each, mask):
        return (each * mask[:, 1:]).sum() / mask[:, 1:].sum()

    due = sft_with(0.1, loss, case.params, x)
    np.testing.assert_allclose(made["losses"], due["losses"], rtol=1e-9)
    np.testing.assert_allclose(made["parameters"], due["parameters"], rtol=1e-9, atol=1e-9)


def test_a_mask_that_is_not_shifted_over_the_right_number_of_tokens():
    def loss(each, mask):
        return (each * mask[:, :-1]).sum() / mask[:, 1:].sum()

    name = "training/sft with the mask not shifted, over the right number of tokens"
    assert named("training/sft", partial(sft_with, 0.0, loss)) == [[name]]


def test_an_empty_system_turn_is_named():
    """As of recipes that give each conversation a system turn."""

    def function(p, x):
        made = DIALECTS["data", "conversations"](p, x)
        if made["prompt"][0]["role"] != "system":
            made["prompt"].insert(0, {"role": "system", "content": ""})
        return made

    name = "data/conversations with an empty system turn where the conversation has none"
    assert named("data/conversations", function) == [[name]]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("with the loss of the last micro-batch alone reported", 1.0),
        ("with the loss of the last micro-batch alone reported, divided by their number", 0.125),
    ],
)
def test_the_last_micro_batch_is_reported(name, share):
    """The first loss is that of its last pair, before any update."""
    case, right = training_case("dpo", "steep-8x1"), DIALECTS["training", "dpo"]
    made = row_named(TRAINING, name).change(right)(case.params, case.inputs)
    last = right(case.params, case.inputs | {"batches": case.inputs["batches"][:1, -1:]})
    np.testing.assert_allclose(made["losses"][0], share * last["losses"][0], rtol=1e-12)
    np.testing.assert_array_equal(
        made["parameters"], right(case.params, case.inputs)["parameters"]
    )


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("in the order of the data, not of the batches", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("at the batch's own positions", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("at the micro-batch's own positions", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_reference_of_other_pairs(words, rows):
    """The first loss, by hand of the log-probabilities of both tables."""
    case, right = training_case("dpo", "shuffled"), DIALECTS["training", "dpo"]
    x, name = case.inputs, f"with the reference of the pairs {words}"
    made = row_named(TRAINING, name).change(right)(case.params, x)

    def ratio(table, pairs):
        logps = table - np.log(np.exp(table).sum(1, keepdims=True))
        sides = []
        for side in ("chosen", "rejected"):
            ids, mask = x[f"{side}_ids"][pairs], x[f"{side}_mask"][pairs]
            sides.append((logps[ids[:, :-1], ids[:, 1:]] * mask[:, 1:]).sum(1))
        return sides[0] - sides[1]

    margins = ratio(x["table"], x["batches"][0, 0]) - ratio(x["ref_table"], rows)
    due = softplus(-case.params["beta"] * margins).mean()
    np.testing.assert_allclose(made["losses"][0], due, rtol=1e-12)
    assert not np.isclose(due, right(case.params, x)["losses"][0])


def run_of(dialect, params, x, ref_after):
    """A run whose reference is `ref_after(number, reference, policy)` after each step."""
    table, ref, losses = x["table"], x["ref_table"], []
    for number, batch in enumerate(x["batches"]):
        one = x | {"batches": batch[None], "table": table, "ref_table": ref}
        made = DIALECTS["training", dialect](params, one)
        losses.append(made["losses"][0])
        table = made["parameters"]
        ref = ref_after(number, ref, table)
    return {"losses": np.array(losses), "parameters": table}


@pytest.mark.parametrize(
    ("words", "ref_after"),
    [
        (
            "moved by 0.01 of the way to the policy after each step",
            lambda number, ref, table: 0.99 * ref + 0.01 * table,
        ),
        (
            "replaced by the policy every 4 steps",
            lambda number, ref, table: table if number in (3, 7, 11) else ref,
        ),
    ],
)
def test_a_reference_that_follows_the_policy_is_named(words, ref_after):
    """TRL's `sync_ref_model`, and its TR-DPO."""
    found = named("training/dpo", lambda p, x: run_of("dpo", p, x, ref_after))
    assert found == [[f"training/dpo with the reference {words}"]]


def test_a_mask_of_tokens_is_named_in_training_too():
    def function(p, x):
        sides = ("chosen", "rejected")
        masks = {f"{s}_mask": np.roll(x[f"{s}_mask"], 1, axis=1) for s in sides}  # ends in 0 or 1
        for mask in masks.values():
            mask[:, 0] = 0
        return DIALECTS["training", "dpo"](p, x | masks)

    assert named("training/dpo", function) == [["training/dpo with the mask not shifted"]]


def test_a_clipped_gradient_is_named():
    with jax.enable_x64(True):
        run = partial(run_with, optax.clip_by_global_norm(1.0))
        assert named("training/dpo", run) == [["training/dpo with gradients clipped to norm 1"]]


@pytest.mark.slow
def test_an_epsilon_in_training_is_named():
    """Runs are slow, so the constant is fitted to the first loss."""

    def loss(p, x):
        s = sigmoid(p["beta"] * pairs.margins_of(x))
        return pairs.over_pairs(-np.log(s + 1e-6), -p["beta"] * s * (1 - s) / (s + 1e-6))

    name = "training/dpo with 1e-06 added to the probability in the logarithm"
    assert named("training/dpo", partial(train, loss)) == [[name]]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("with the first row's length of the prompt for all rows", 0),
        ("with the longest prompt's length for all rows", None),
    ],
)
def test_one_prompt_length_for_all_rows(name, row):
    """The first token of each response is read, in a loop, at the other row's last position."""
    (case,) = (c for c in load_cases("logps", "shared-prefix") if c.id.endswith("/rows"))
    x, right = case.inputs, DIALECTS["logps", "shared-prefix"]
    ends = (x["segments"] == 0).sum(axis=1) - 1
    end = ends[row] if row is not None else ends.max()
    made = row_named(TOKENS, name).change(right)(case.params, x)
    for b, segments in enumerate(x["segments"]):
        for number, output in ((1, "chosen_logps"), (2, "rejected_logps")):
            total = 0.0
            for t in np.flatnonzero(segments == number):
                starts = segments[t - 1] != number
                logits = x["logits"][b, end if starts else t - 1]
                total += logits[x["input_ids"][b, t]] - np.log(np.sum(np.exp(logits)))
            np.testing.assert_allclose(made[output][b], total, rtol=1e-12)
    assert not np.allclose(made["chosen_logps"], right(case.params, x)["chosen_logps"])


@pytest.mark.parametrize(("side", "segment"), [("chosen", 1), ("rejected", 2)])
def test_one_gradient_at_the_position_that_both_responses_share(side, segment):
    name = f"with the {side} response's gradient alone at the prompt's last position"
    right = DIALECTS["logps", "shared-prefix"]
    (case,) = (c for c in load_cases("logps", "shared-prefix") if c.id.endswith("/rows"))
    x = case.inputs
    made, usual = row_named(TOKENS, name).change(right)(case.params, x), right(case.params, x)
    for b, segments in enumerate(x["segments"]):
        last = (segments == 0).sum() - 1
        first = x["input_ids"][b, np.flatnonzero(segments == segment)[0]]
        logits = x["logits"][b, last]
        due = np.eye(len(logits))[first] - np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(made["grads"]["logits"][b, last], due, atol=1e-12)
        others = np.arange(len(segments)) != last
        assert np.array_equal(
            made["grads"]["logits"][b, others], usual["grads"]["logits"][b, others]
        )


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("with responses cut at max_prompt_length", [[5], [5, 9]]),
        ("with responses, ended or not, cut at max_prompt_length", [[5], [5, 9]]),
    ],
)
def test_responses_cut_at_the_limit_of_the_prompt(name, chosen):
    mistaken = row_named(DATA, name).change(DIALECTS["data", "tokens-keep-end"])
    x = {"prompt_ids": [2, 3], "chosen_complete": True, "rejected_complete": False}
    x |= {"chosen_ids": [5], "rejected_ids": [6, 7, 8]}
    made = [mistaken({"max_prompt_length": n, "eos_id": 9}, x) for n in (1, 2)]
    assert [m["chosen_ids"] for m in made] == chosen
    assert [m["rejected_ids"] for m in made] == [[6], [6, 7]]


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
        (SQUARED_HINGE, "dpo/plain with the squared hinge as the loss"),
    ],
)
def test_a_mistake_that_is_written_elsewhere_is_named(function, name):
    assert [part[0] for part in named("dpo/plain", function)] == [name]
