"""Level 1: writes and checks the vectors of losses from sequence log-probabilities and rewards."""

import random
from itertools import combinations

import mpmath as mp
import numpy as np
import pytest

from tests.conformance.vectors import (
    DIGITS,
    SCALAR,
    case,
    dyadic,
    exact,
    nearest,
    slopes,
    vector_file,
)

POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
E = 0.125
MORE_SMOOTHING = {"label_smoothing": 0.375}


def softplus(x):
    return mp.log1p(mp.exp(x))


def mean(values):
    values = list(values)
    return mp.fsum(values) / len(values)


def margins(inputs):
    return [
        (a - b) - (c - d)
        for a, b, c, d in pairs(
            inputs,
            "policy_chosen_logps",
            "ref_chosen_logps",
            "policy_rejected_logps",
            "ref_rejected_logps",
        )
    ]


def pairs(inputs, *names):
    return zip(*(inputs[name] for name in names), strict=True)


def token_means(inputs):
    def lengths(name):
        return inputs["chosen_lengths" if "chosen" in name else "rejected_lengths"]

    return inputs | {
        name: [v / n for v, n in zip(inputs[name], lengths(name), strict=True)]
        for name in POLICY + REFERENCE
    }


def rho(inputs):
    """[K, B] or [B]: rewards of chosen less those of rejected."""

    def less(a, b):
        return [less(x, y) for x, y in zip(a, b, strict=True)] if isinstance(a, list) else a - b

    return less(inputs["score_chosen"], inputs["score_rejected"])


def dpo(p, x):
    return [softplus(-p["beta"] * h) for h in margins(x)]


def conservative(p, x):
    e = p["label_smoothing"]
    return [(1 - e) * softplus(-p["beta"] * h) + e * softplus(p["beta"] * h) for h in margins(x)]


def robust(p, x):
    e = p["label_smoothing"]
    return [
        ((1 - e) * softplus(-p["beta"] * h) - e * softplus(p["beta"] * h)) / (1 - 2 * e)
        for h in margins(x)
    ]


def ipo(target, p, x):
    return [(h - target / p["beta"]) ** 2 for h in margins(x)]


def squares(p, x):
    return [(r - p["beta"] * h) ** 2 for h, r in zip(margins(x), rho(x), strict=True)]


def scaled_squares(p, x):
    return [
        (p["beta"] * h - p["reward_scale"] * r) ** 2
        for h, r in zip(margins(x), rho(x), strict=True)
    ]


def rebel(p, x):
    return [(h - r / p["beta"]) ** 2 for h, r in zip(margins(x), rho(x), strict=True)]


def residuals(p, x):
    return [
        [r - p["beta"] * h for h, r in zip(margins(x), member, strict=True)] for member in rho(x)
    ]


def batch_min(p, x):
    return min(mean(e**2 for e in member) for member in residuals(p, x))


def example_min(p, x):
    return [min(e**2 for e in column) for column in zip(*residuals(p, x), strict=True)]


def member_mean(p, x):
    return mean(mean(column) ** 2 for column in zip(*residuals(p, x), strict=True))


def hull(p, x):
    """The least of the constrained minima on all faces.

    A linear solve of the Lagrange conditions gives each.
    """
    return min(value for value in map(_on_face, _faces(residuals(p, x))) if value is not None)


def _faces(members):
    return (face for size in range(1, len(members) + 1) for face in combinations(members, size))


def _on_face(face):
    """min_w mean (sum_k w_k e_k)^2 with sum w = 1, by bordered normal equations.

    None where a weight is negative, or with more members than B pairs tell apart: then a smaller
    face has the minimum.
    """
    k = len(face)
    if k - 1 > len(face[0]):
        return None
    gram = [[mean(a * b for a, b in zip(u, v, strict=True)) for v in face] for u in face]
    system = mp.matrix([[*row, mp.mpf(1)] for row in gram] + [[mp.mpf(1)] * k + [mp.mpf(0)]])
    weights = list(mp.lu_solve(system, mp.matrix([mp.mpf(0)] * k + [mp.mpf(1)])))[:k]
    if min(weights) < 0:
        return None
    return mean(
        mp.fsum(w * e for w, e in zip(weights, column, strict=True)) ** 2
        for column in zip(*face, strict=True)
    )


def sampled_kl(p, x):
    kl = mean(r - q for r, q in pairs(x, "ref_sample_logps", "policy_sample_logps"))
    return mean(dpo(p, x)) + p["gamma"] * kl


def exact_kl(p, x):
    rows = pairs(x, "ref_distribution_logps", "policy_distribution_logps")
    kl = mean(
        mp.fsum(mp.exp(r) * (r - q) for r, q in zip(*row, strict=True) if r > -mp.inf)
        for row in rows
    )
    return mean(dpo(p, x)) + p["gamma"] * kl


def bradley_terry(p, x):
    return [
        softplus(-(d - m)) for d, m in zip(rho(x), x.get("margins", [0] * len(rho(x))), strict=True)
    ]


def implicit_rewards(p, x):
    h = margins(x)
    return {
        "rewards/chosen": mean(p["beta"] * (a - b) for a, b in pairs(x, POLICY[0], REFERENCE[0])),
        "rewards/rejected": mean(p["beta"] * (a - b) for a, b in pairs(x, POLICY[1], REFERENCE[1])),
        "rewards/margins": mean(p["beta"] * value for value in h),
        "rewards/accuracies": mean(mp.mpf(value > 0) for value in h),
    }


def reward_metrics(p, x):
    d = rho(x)
    return {
        "rewards/margins": mean(d),
        "rewards/accuracies": mean(mp.mpf(value > 0) for value in d),
    }


def sampled_metrics(p, x):
    return {"kl": mean(r - q for r, q in pairs(x, "ref_sample_logps", "policy_sample_logps"))}


def exact_metrics(p, x):
    rows = pairs(x, "ref_distribution_logps", "policy_distribution_logps")
    return {
        "kl": mean(
            mp.fsum(mp.exp(r) * (r - q) for r, q in zip(*row, strict=True) if r > -mp.inf)
            for row in rows
        )
    }


def expected(oracle, metrics, wanted, params, inputs, grads=True):
    """Loss, pairs' values, metrics and gradients; the reference's gradients are 0 by definition."""
    p, x = exact(params), exact(inputs)
    value = oracle(p, x)
    made = {"loss": nearest(mean(value) if isinstance(value, list) else value)}
    if isinstance(value, list):
        made["per_example"] = nearest(value)
    if grads:
        made["grads"] = {
            name: nearest(slopes(lambda x: _loss(oracle, p, x), x, name)) for name in wanted
        }
        if POLICY[0] in wanted:
            made["grads"] |= {name: np.zeros(len(inputs[name])) for name in REFERENCE}
    if metrics:
        made["metrics"] = {name: nearest(number) for name, number in metrics(p, x).items()}
    return made


def _loss(oracle, p, x):
    value = oracle(p, x)
    return mean(value) if isinstance(value, list) else value


def logps(size, seed, low=-60.0, spread=4.0):
    """Policy near reference, as in training; chosen and rejected of different lengths."""
    rng = random.Random(seed)
    made = {}
    for name in ("chosen", "rejected"):
        made[f"ref_{name}_logps"] = dyadic(rng, low, -4.0, (size,))
        made[f"policy_{name}_logps"] = made[f"ref_{name}_logps"] + dyadic(
            rng, -spread, spread, (size,)
        )
    return {name: made[name] for name in POLICY + REFERENCE}


def one(h_chosen, h_rejected, ref_chosen=-20.0, ref_rejected=-30.0):
    return {
        "policy_chosen_logps": np.array([ref_chosen + h_chosen]),
        "policy_rejected_logps": np.array([ref_rejected + h_rejected]),
        "ref_chosen_logps": np.array([ref_chosen]),
        "ref_rejected_logps": np.array([ref_rejected]),
    }


def at(inputs, **values):
    return inputs | {name: np.array(value, float) for name, value in values.items()}


def pair_cases(extra=None):
    """Every loss of a margin is asked these (name, flags, comment, inputs).

    `extra` gives further inputs of a batch.
    """
    more = extra or (lambda inputs, seed: inputs)
    long = one(0.375, -0.6875, -412.0, -391.25)
    asked = [
        (
            "one-pair",
            "sign",
            "h = 3: the policy has moved towards the chosen response",
            one(2.0, -1.0),
        ),
        (
            "reference",
            "swapped-reference",
            "h = 2 only if each response has its own reference",
            one(1.5, -0.5, -10.0, -40.0),
        ),
        (
            "policy-is-reference",
            "accuracy-tie reference-gradient",
            "h = 0: where training starts",
            one(0.0, 0.0),
        ),
        (
            "batch",
            "batch-sum per-example sign beta-dropped beta-changed reference-gradient gradient-lost "
            "accuracy-of-means",
            "five pairs",
            logps(5, 1),
        ),
        (
            "ties",
            "accuracy-tie",
            "two of four margins are exactly 0",
            at(
                logps(4, 2),
                policy_chosen_logps=[-8, -9, -10, -11],
                policy_rejected_logps=[-8, -9, -7, -12],
                ref_chosen_logps=[-8, -9.5, -10, -13],
                ref_rejected_logps=[-8, -9.5, -8, -13],
            ),
        ),
        (
            "long-responses",
            "half-precision-sums",
            "near 400 nats bfloat16 is spaced 2 apart, float16 1/4",
            long,
        ),
        (
            "orders",
            "swapped-reference",
            "policy and reference, chosen and rejected have their log-ratios in other orders",
            at(
                logps(3, 5),
                policy_chosen_logps=[-9, -20.5, -32],
                policy_rejected_logps=[-12.5, -22.75, -33.5],
                ref_chosen_logps=[-10, -20, -30],
                ref_rejected_logps=[-11, -22, -33],
            ),
        ),
    ]
    return [
        (name, flags, comment, more(inputs, 40 + i))
        for i, (name, flags, comment, inputs) in enumerate(asked)
    ]


BETAS = {"one-pair": 0.5, "reference": 0.75, "policy-is-reference": 0.1}
REPEATED = (
    "one-for-four",
    "broadcast",
    "one chosen, four rejected: array libraries repeat it silently",
)
MISMATCH = ("mismatch", "broadcast", "three chosen, four rejected: no batch")


def lengths(inputs, seed):
    rng = random.Random(seed)
    size = len(inputs[POLICY[0]])
    return inputs | {
        f"{name}_lengths": np.array([3 + int(20 * rng.random()) for _ in range(size)])
        for name in ("chosen", "rejected")
    }


def rewards(members, inputs, seed):
    rng = random.Random(seed)
    shape = (members, len(inputs[POLICY[0]])) if members else (len(inputs[POLICY[0]]),)
    return inputs | {
        name: dyadic(rng, -3.0, 3.0, shape) for name in ("score_chosen", "score_rejected")
    }


def shorter(inputs):
    """The same without the last chosen policy log-probability."""
    return inputs | {POLICY[0]: inputs[POLICY[0]][:-1]}


def without(asked, *flags):
    """The same cases without flags of what their dialect does not have."""
    return [
        (name, " ".join(f for f in own.split() if f not in flags), *rest)
        for name, own, *rest in asked
    ]


def cases_of(oracle, metrics, asked, params, wanted=POLICY, without_grads=()):
    made = []
    for name, flags, comment, inputs, *own in asked:
        values = params | {"beta": BETAS.get(name, 0.1)} | (own[0] if own else {})
        grads = name not in without_grads
        made.append(
            case(
                name,
                flags,
                comment,
                values,
                inputs,
                expected(oracle, metrics, wanted, values, inputs, grads),
            )
        )
    return made


def refused(params, inputs):
    one = inputs | {POLICY[0]: inputs[POLICY[0]][:1]}
    values = params | {"beta": 0.1}
    return [
        case(*MISMATCH, values, shorter(inputs), result="reject"),
        case(*REPEATED, values, one, result="reject"),
    ]


def open_question(name, comment, params, inputs):
    return case(name, "", comment, params, inputs, result="unspecified")


FAR = {
    name: np.concatenate([value, one(-800.0, 800.0)[name]])
    for name, value in one(800.0, -800.0).items()
}
FAR_BOTH = "two pairs with beta h = 800 and -800, where beta is 1/2"
OVERFLOW = [
    (
        "far-right",
        "overflow",
        "beta h = 400: finite, and no NaN",
        one(200.0, -200.0),
        {"beta": 1.0},
    ),
    (
        "far-wrong",
        "overflow sign",
        "beta h = -400: finite, though exp(400) is not",
        one(-200.0, 200.0),
        {"beta": 1.0},
    ),
    (
        "beta",
        "beta-dropped beta-changed",
        "beta 2, where most other cases have less than 1",
        one(0.5, 0.25),
        {"beta": 2.0},
    ),
]


def dpo_file(dialect, equation, source, oracle, params, flags=""):
    rewards = (
        "rewards",
        "reward-sign batch-sum beta-dropped",
        "implicit rewards of three pairs",
        logps(3, 4),
    )
    unequal = (
        "lengths",
        "sum-mean",
        "log-ratios +2 over 20 tokens and -1 over 10 are added, not averaged",
        one(2.0, -1.0) | {"chosen_lengths": np.array([20]), "rejected_lengths": np.array([10])},
    )
    asked = [*pair_cases(), rewards, unequal, *OVERFLOW]
    if params:
        smoother = ("label-smoothing", "", "e = 3/8, elsewhere 1/8", logps(3, 14), MORE_SMOOTHING)
        asked.append(smoother)
    asked.append(("far-both", "overflow", FAR_BOTH, FAR, {"beta": 0.5}))
    asked = [(name, f"{f} {flags}", *rest) for name, f, *rest in asked]
    made = cases_of(oracle, implicit_rewards, asked, params)
    zero = open_question(
        "beta-zero", "beta = 0 leaves nothing to learn", params | {"beta": 0.0}, one(2.0, -1.0)
    )
    return vector_file(
        "dpo", dialect, equation, source, [*made, *refused(params, logps(4, 3)), zero], SCALAR
    )


def ipo_file(dialect, equation, source, target, per_token):
    def oracle(p, x):
        return ipo(target, p, token_means(x) if per_token else x)

    facts = at(one(2.0, -1.0)) | {
        "chosen_lengths": np.array([20]),
        "rejected_lengths": np.array([10]),
    }
    asked = [
        (name, f"{flags} target squared", *rest)
        for name, flags, *rest in without(pair_cases(lengths), "accuracy-tie", "accuracy-of-means")
    ]
    asked.append(
        (
            "lengths",
            "sum-mean target",
            "log-ratios +2 over 20 tokens and -1 over 10, beta 0.1: summed 4.00 to "
            "the target 1/(2 beta) and 49.00 to 1/beta, averaged 23.04",
            facts,
        )
    )
    made = cases_of(oracle, None, asked, {})
    return vector_file(
        "ipo", dialect, equation, source, [*made, *refused({}, lengths(logps(4, 3), 3))], SCALAR
    )


def distillation_file(dialect, equation, source, oracle, params):
    def scored(inputs, seed):
        return rewards(0, inputs, seed)

    asked = [
        (name, f"{flags} reward-sign squared scale", *rest)
        for name, flags, *rest in pair_cases(scored)
    ]
    asked += [
        (
            "matched",
            "beta-dropped",
            "rho = beta h, where Eq. 7 has its minimum",
            at(one(6.0, -2.0), score_chosen=[3.0], score_rejected=[-1.0]),
            {"beta": 0.5},
        ),
        ("large-beta", "scale beta-dropped", "beta 2", scored(logps(3, 7), 7), {"beta": 2.0}),
        (
            "label-against-reward",
            "reward-sign",
            "the reward model prefers the rejected response",
            at(one(0.5, 0.25), score_chosen=[-1.5], score_rejected=[2.0]),
        ),
    ]
    made = cases_of(oracle, implicit_rewards, asked, params)
    return vector_file(
        "distillation",
        dialect,
        equation,
        source,
        [*made, *refused(params, scored(logps(4, 3), 3))],
        SCALAR,
    )


def ensemble_file(dialect, equation, source, oracle, *other):
    """`other`: flags that the dialect does not have."""

    def scored(inputs, seed):
        """All members prefer a single pair's chosen response, so no mixture has a loss of 0."""
        made = rewards(3, inputs, seed)
        return made | {"score_chosen": made["score_chosen"] + 6.0 * (len(inputs[POLICY[0]]) == 1)}

    asked = [
        (name, f"{flags} min-mean" + " example-min" * (len(inputs[POLICY[0]]) > 1), comment, inputs)
        for name, flags, comment, inputs in pair_cases(scored)
    ]
    crossed = at(one(0.0, 0.0), score_chosen=[[1.0], [-4.0]], score_rejected=[[0.0], [0.0]])
    opposed = at(
        logps(2, 5),
        score_chosen=[[4.0, -4.0], [-4.0, 4.0]],
        score_rejected=[[0.0, 0.0], [0.0, 0.0]],
    )
    asked += [
        (
            "single",
            "reward-sign squared scale",
            "one reward model: all dialects are Eq. 7",
            rewards(1, logps(3, 6), 6),
        ),
        (
            "crossed",
            "min-mean hull-at-a-corner",
            "residuals 1 and -4: minimum 1, hull 0, mean 2.25",
            crossed,
        ),
        (
            "opposed",
            "sign example-min min-mean hull-at-a-corner",
            "each member is right about one of two pairs",
            opposed,
        ),
        (
            "five-members",
            "min-mean example-min hull-at-a-corner",
            "K = 5 over 8 pairs",
            rewards(5, logps(8, 8), 8),
        ),
        (
            "edge",
            "min-mean example-min hull-at-a-corner",
            "the hull's nearest mixture is of two of three members: "
            "their plane has a nearer point outside",
            rewards(3, logps(4, 36), 36),
        ),
        (
            "two-members",
            "beta-dropped min-mean example-min hull-at-a-corner",
            "K = 2 over 4 pairs",
            rewards(2, logps(4, 9), 9),
        ),
    ]
    asked = without(asked, "accuracy-tie", "accuracy-of-means", *other)
    made = cases_of(oracle, None, asked, {}, without_grads=("crossed",))
    return vector_file(
        "ensemble", dialect, equation, source, [*made, *refused({}, scored(logps(4, 3), 3))], SCALAR
    )


def with_samples(inputs, seed, samples=6):
    rng = random.Random(seed)
    ref = dyadic(rng, -60.0, -4.0, (samples,))
    return inputs | {
        "policy_sample_logps": ref + dyadic(rng, -2.0, 1.0, (samples,)),
        "ref_sample_logps": ref,
    }


def with_distributions(inputs, seed, prompts=2, outcomes=4):
    """They are normalised to float32's rounding, as KL's inputs are; exactness is not asked."""
    rng = random.Random(seed)
    made = {}
    for who in ("policy", "ref"):
        logits = dyadic(rng, -3.0, 3.0, (prompts, outcomes))
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        made[f"{who}_distribution_logps"] = np.round(logs * 2**16) / 2**16
    return inputs | made


def pessimistic_file(dialect, equation, source, oracle, metrics, extend, extra, wanted):
    flags = "gamma-dropped kl-sign"
    asked = [
        (name, f"{f} {flags}", comment, inputs, {"gamma": 0.25})
        for name, f, comment, inputs in without(pair_cases(extend), *NO_METRICS)
    ]
    asked += [
        ("strong", f"{flags} kl-reversed", "gamma 4", extend(logps(3, 11), 11), {"gamma": 4.0}),
        (
            "no-kl",
            "gamma-dropped",
            "gamma 0 is plain DPO",
            extend(logps(3, 12), 12),
            {"gamma": 0.0},
        ),
        *extra,
        *(
            (name, "overflow", comment, extend(one(h, -h), 13), {"gamma": 0.25, "beta": 0.5})
            for name, comment, h in (
                ("far-right", "beta h = 800, where beta is 1/2", 800.0),
                ("far-wrong", "beta h = -800, where beta is 1/2", -800.0),
            )
        ),
    ]
    made = cases_of(oracle, metrics, asked, {}, wanted, without_grads=("impossible",))
    params = {"gamma": 0.25}
    refusal = refused(params, extend(logps(4, 3), 3))
    return vector_file("pessimistic", dialect, equation, source, [*made, *refusal], SCALAR)


LN2 = float(np.log(2.0))
ZERO = [
    (
        "zero-probability",
        "zero-probability kl-reversed",
        "the reference never says outcome 2: it adds 0",
        at(
            one(2.0, -1.0),
            policy_distribution_logps=[[-2 * LN2, -LN2, -2 * LN2]],
            ref_distribution_logps=[[-LN2, -LN2, -np.inf]],
        ),
        {"gamma": 0.5},
    ),
    (
        "impossible",
        "kl-reversed",
        "the policy never says what the reference says half the time: an infinite KL",
        at(
            one(2.0, -1.0),
            policy_distribution_logps=[[0.0, -np.inf]],
            ref_distribution_logps=[[-LN2, -LN2]],
        ),
        {"gamma": 0.5},
    ),
]
NEGATIVE = [
    (
        "negative-estimate",
        "kl-sign",
        "one sample's estimate may be negative; it is not clipped",
        at(one(2.0, -1.0), policy_sample_logps=[-10.0], ref_sample_logps=[-13.0]),
        {"gamma": 0.5},
    )
]


def reward_file(dialect, equation, source, margin):
    def scored(chosen, rejected, own):
        inputs = {
            "score_chosen": np.array(chosen, float),
            "score_rejected": np.array(rejected, float),
        }
        return inputs | ({"margins": np.array(own, float)} if margin else {})

    flags = " margin-dropped" if margin else ""
    rng = random.Random(21)
    asked = [
        ("one-pair", "sign reward-sign" + flags, "r = 2 against -1", scored([2], [-1], [0.5])),
        (
            "batch",
            "batch-sum per-example" + flags,
            "five pairs",
            scored(*(dyadic(rng, -3.0, 3.0, (5,)) for _ in range(2)), dyadic(rng, 0.0, 2.0, (5,))),
        ),
        (
            "tie",
            "accuracy-tie",
            "equal rewards: the loss is log 2 without a margin, and it is not accurate",
            scored([1, 0.5], [1, 0.25], [0, 0]),
        ),
        ("far-right", "overflow", "r = 500 against -500", scored([500], [-500], [1])),
        ("far-wrong", "overflow sign", "r = -500 against 500", scored([-500], [500], [1])),
        (
            "large-rewards",
            "half-precision-sums",
            "a difference of 1/8 near 400",
            scored([400.125], [400], [0]),
        ),
    ]
    made = []
    for name, own, comment, inputs in asked:
        values = expected(
            bradley_terry, reward_metrics, ("score_chosen", "score_rejected"), {}, inputs
        )
        made.append(case(name, own, comment, {}, inputs, values))
    odd = scored([1, 2, 3], [1, 2, 3, 4], [0, 0, 0, 0])
    made.append(case(*MISMATCH, {}, odd, result="reject"))
    return vector_file("reward", dialect, equation, source, made, SCALAR)


NO_METRICS = ("accuracy-tie", "accuracy-of-means", "per-example")
SAMPLES = (*POLICY, "policy_sample_logps")
DISTRIBUTIONS = (*POLICY, "policy_distribution_logps")
SMOOTH = {"label_smoothing": E}

# fmt: off
FILES = {
    "dpo/plain": lambda: dpo_file("plain", "mean_b -log sigmoid(beta h_b)", "Eq. 6", dpo, {}),
    "dpo/conservative": lambda: dpo_file(
        "conservative",
        "mean_b -(1 - e) log sigmoid(beta h_b) - e log sigmoid(-beta h_b), e = label_smoothing",
        "Mitchell (2023), cDPO", conservative, SMOOTH,
        "label-smoothing-ignored label-smoothing-misused"),
    "dpo/robust": lambda: dpo_file(
        "robust",
        "mean_b [-(1 - e) log sigmoid(beta h_b) + e log sigmoid(-beta h_b)] / (1 - 2e),"
        " e = label_smoothing",
        "Chowdhury et al. (2024)", robust, SMOOTH,
        "label-smoothing-ignored label-smoothing-misused"),
    "ipo/paper": lambda: ipo_file(
        "paper", "mean_b (h_b - 1/beta)^2; the paper calls beta tau", "section 7.1", 1, False),
    "ipo/sum": lambda: ipo_file(
        "sum", "mean_b (h_b - 1/(2 beta))^2", "Azar et al. (2024), Eq. 17, whose tau is beta",
        mp.mpf("0.5"), False),
    "ipo/token-mean": lambda: ipo_file(
        "token-mean",
        "mean_b (h_b - 1/(2 beta))^2, every log-probability divided by its response's tokens",
        "TRL, LLaMA-Factory", mp.mpf("0.5"), True),
    "distillation/d-dpo": lambda: distillation_file(
        "d-dpo", "mean_b (rho_b - beta h_b)^2, rho = score_chosen - score_rejected", "Eq. 7",
        squares, {}),
    "distillation/rebel": lambda: distillation_file(
        "rebel", "mean_b (h_b - eta rho_b)^2, eta = 1/beta: d-dpo over beta^2",
        "the code of REBEL's authors (Gao et al., 2024); their paper has it times 1/eta^2, which is"
        " d-dpo", rebel, {}),
    "distillation/rpo-sq": lambda: distillation_file(
        "rpo-sq", "mean_b (beta h_b - reward_scale rho_b)^2",
        "NeMo-Aligner, preference_loss rpo_sq", scaled_squares, {"reward_scale": 1.5}),
    "ensemble/batch-min": lambda: ensemble_file(
        "batch-min", "min_k mean_b (rho_kb - beta h_b)^2", "Eq. 11, footnote 5", batch_min,
        "per-example", "hull-at-a-corner"),
    "ensemble/example-min": lambda: ensemble_file(
        "example-min", "mean_b min_k (rho_kb - beta h_b)^2",
        "Eq. 11 with the minimum inside the mean", example_min, "hull-at-a-corner"),
    "ensemble/hull": lambda: ensemble_file(
        "hull", "min_{w in simplex} mean_b (sum_k w_k rho_kb - beta h_b)^2",
        "the corrected Theorem 2", hull, "per-example"),
    "ensemble/mean": lambda: ensemble_file(
        "mean", "mean_b (mean_k rho_kb - beta h_b)^2", "Eq. 7 on the ensemble's average",
        member_mean, "per-example", "example-min", "hull-at-a-corner"),
    "pessimistic/sampled-kl": lambda: pessimistic_file(
        "sampled-kl",
        "mean_b -log sigmoid(beta h_b) + gamma mean_s [log pi_ref(y_s) - log pi(y_s)],"
        " y_s ~ pi_ref",
        "Eq. 13, second term of Eq. 11",
        sampled_kl, sampled_metrics, with_samples, NEGATIVE, SAMPLES),
    "pessimistic/exact-kl": lambda: pessimistic_file(
        "exact-kl", "mean_b -log sigmoid(beta h_b) + gamma mean_x KL(pi_ref(x) || pi(x))",
        "Eq. 9, 13", exact_kl, exact_metrics, with_distributions, ZERO, DISTRIBUTIONS),
    "reward/bradley-terry": lambda: reward_file(
        "bradley-terry", "mean_b -log sigmoid(r_w - r_l)", "Eq. 2", False),
    "reward/margin": lambda: reward_file(
        "margin", "mean_b -log sigmoid(r_w - r_l - margin_b)",
        "Touvron et al. (2023), Llama 2, Eq. 2", True),
}
# fmt: on


@pytest.mark.parametrize("name", FILES)
def test_vectors(name, check_vectors):
    with mp.workdps(DIGITS):
        check_vectors(FILES[name]())
