"""`python -m benchmarks.mutations`: which claims notice which mistake in `reference/`, as a table.

A mutation replaces one expression in a copy of the package. A claim notices it where its verdict
changes, on ten random instances. A claim that raises an error notices it too.
"""

import importlib
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

REFERENCE = Path(__file__).parents[1] / "reference"


class Mutation(NamedTuple):
    """A deliberate mistake.

    Attributes:
        name: What the mistake is.
        module: The module of `reference/` that has it.
        before: An expression that occurs once in the module.
        after: What replaces the expression.
    """

    name: str
    module: str
    before: str
    after: str


EDITS = {
    "objectives": [
        ("mask ignored", "np.where(mask, token_logps, 0.0)", "token_logps"),
        ("mean over tokens", "np.sum(np.where(mask", "np.mean(np.where(mask"),
        ("margin's sign", "(policy_chosen - ref_chosen) -", "-(policy_chosen - ref_chosen) +"),
        ("margin without reference", "(policy_rejected - ref_rejected)", "policy_rejected"),
        ("preference's sign", "logaddexp(0.0, -reward_margin)", "logaddexp(0.0, reward_margin)"),
        ("DPO without beta", "bradley_terry(beta * margin)", "bradley_terry(margin)"),
        ("tau for 1/tau", "(margin - 1.0 / tau)", "(margin - tau)"),
        ("IPO's own tau", "(margin - 1.0 / tau)", "(margin - 0.5 / tau)"),
        (
            "distillation without beta",
            "(reward_margin - beta * margin)",
            "(reward_margin - margin)",
        ),
        (
            "distillation's sign",
            "(reward_margin - beta * margin)",
            "(reward_margin + beta * margin)",
        ),
        (
            "mean -> best of models",
            "np.mean(reward_margins, axis=0)",
            "np.max(reward_margins, axis=0)",
        ),
        ("min -> mean of models", "np.min(_model_losses", "np.mean(_model_losses"),
        (
            "hull -> first model",
            "weights = hull_weights(margins, reward_margins, beta)",
            "weights = np.eye(len(reward_margins))[0]",
        ),
        ("KL reversed", "np.exp(ref) * (ref - policy)", "np.exp(policy) * (policy - ref)"),
        ("sampled KL's sign", "return ref_logp - policy_logp", "return policy_logp - ref_logp"),
        ("pessimism's sign", "loss + gamma * kl", "loss - gamma * kl"),
        ("gamma dropped", "loss + gamma * kl", "loss + kl"),
        (
            "RLHF with forward KL",
            "forward_kl(policy_logps, ref_logps)",
            "forward_kl(ref_logps, policy_logps)",
        ),
        ("RLHF without beta", "- beta * reverse_kl", "- reverse_kl"),
        ("best reward model", "np.min(np.mean(advantages", "np.max(np.mean(advantages"),
        ("no baseline", " - ref_values", ""),
    ],
    "weights": [
        ("mean's weights", "1.0 / len(reward_margins))", "1.0)"),
        ("farthest model", "np.argmin(np.mean", "np.argmax(np.mean"),
        ("shares summed", "return np.mean(weights", "return np.sum(weights"),
        ("hull's residuals", "reward_margins - beta * np.asarray", "reward_margins - np.asarray"),
    ],
    "simplex": [
        ("hull of two", "range(1, len(vertices) + 1)", "range(1, 3)"),
        ("hull of one", "_faces(models)", "[[model] for model in models]"),
        ("simplex stays", "point, state = step", "break"),
        (
            "simplex without curvature",
            "_quadratic_minimum(slope - curvature @ point, curvature)",
            "_quadratic_minimum(-slope, curvature)",
        ),
    ],
    "loglinear": [
        ("softmax unnormalised", "np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))", "0.0"),
        ("margins without reference", "theta - problem.ref, 2)", "theta, 2)"),
        ("KL of one draw", "problem.draws * forward_kl", "0 * problem.draws + forward_kl"),
        (
            "policy KL reversed",
            "log_softmax(problem.ref), log_softmax(theta))",
            "log_softmax(theta), log_softmax(problem.ref))",
        ),
        (
            "loss without KL",
            "margins(problem, theta), kls(problem, theta)\n",
            "margins(problem, theta), 0 * kls(problem, theta)\n",
        ),
        (
            "gradient's pull negated",
            "np.exp(log_softmax(theta)) - np.exp(log_softmax(problem.ref))",
            "np.exp(log_softmax(problem.ref)) - np.exp(log_softmax(theta))",
        ),
        ("slopes summed over pairs", "(pair_margins, beta) / batch", "(pair_margins, beta)"),
        ("DPO's slope", "np.logaddexp(0.0, beta * h)", "np.logaddexp(0.0, -beta * h)"),
        ("IPO's slope", "2 * (h - 1 / tau)", "2 * (h - tau)"),
        ("distillation's slope", "-2 * beta * (reward_margins", "-2 * (reward_margins"),
        ("ascent", "path[-1] - rate * gradient", "path[-1] + rate * gradient"),
    ],
    "tabular": [
        ("pairs swapped", "prompts, rejected] -= 1", "prompts, rejected] += 1"),
        ("half the pairs", "grid[:, 1] != grid[:, 2]", "grid[:, 1] + 1 == grid[:, 2]"),
        (
            "log Z without beta",
            "tilted = ref_logps + rewards / beta",
            "tilted = ref_logps + rewards",
        ),
        ("Eq. 3 without beta", "return ref_logps + rewards / beta", "return ref_logps + rewards"),
        ("Eq. 3 without reference", "return ref_logps + rewards / beta", "return rewards / beta"),
        (
            "Eq. 4 without beta",
            "return beta * (policy_logps - ref_logps)",
            "return policy_logps - ref_logps",
        ),
        (
            "Eq. 5's sign",
            "rewards[..., None, :] - rewards[..., :, None]",
            "rewards[..., :, None] - rewards[..., None, :]",
        ),
        (
            "advantage over nothing",
            "np.exp(policy_logps) - np.exp(ref_logps)",
            "np.exp(policy_logps)",
        ),
        ("farthest policy of S", "return min(policies", "return max(policies"),
        (
            "KL of S reversed",
            "np.mean(forward_kl(ref_logps, policy)))",
            "np.mean(forward_kl(policy, ref_logps)))",
        ),
        (
            "maximin -> corner",
            "weights = minimise_on_simplex(dual, len(rewards))\n    return weights,",
            "weights = np.eye(len(rewards))[0]\n    return weights,",
        ),
        ("distil without KL", "kl_gradient = gamma * (", "kl_gradient = 0 * gamma * ("),
        (
            "distil's fit doubled",
            "kl_gradient - 4 * beta / len(ref)",
            "kl_gradient - 8 * beta / len(ref)",
        ),
        (
            "distil's first prompt",
            "prompts = zip(ref_logps, rewards, strict=True)",
            "prompts = [(ref_logps[0], rewards[0])] * len(rewards)",
        ),
        (
            "hull -> mean",
            "weights = minimise_on_simplex(dual, len(rewards))\n    return distil",
            "weights = np.full(len(rewards), 1 / len(rewards))\n    return distil",
        ),
    ],
    "bag_of_words": [
        (
            "counts -> presence",
            "return np.bincount(tokens, minlength=vocabulary)",
            "return np.minimum(np.bincount(tokens, minlength=vocabulary), 1)",
        ),
        (
            "bags swapped",
            "np.asarray(chosen) - np.asarray(rejected)",
            "np.asarray(rejected) - np.asarray(chosen)",
        ),
        ("bag unnormalised", "count @ log_softmax(theta)", "count @ theta"),
        ("bound by the least", "theta - np.max(theta)", "theta - np.min(theta)"),
    ],
    "bandit": [
        (
            "chain reversed",
            "[np.arange(arms - 1), np.arange(1, arms)]",
            "[np.arange(1, arms), np.arange(arms - 1)]",
        ),
        ("closure -> chain", "np.stack(np.triu_indices(arms, 1), axis=1)", "chain(arms)"),
        (
            "spread from the mean",
            "np.max(weights) - np.min(weights)",
            "np.max(weights) - np.mean(weights)",
        ),
        (
            "IPO of losers",
            "weights[better] - weights[worse], tau)",
            "weights[worse] - weights[better], tau)",
        ),
        ("IPO's target", "np.full(len(pairs), 1 / tau)", "np.full(len(pairs), tau)"),
        ("p-DPO's alpha", "pair_loss) - beta / alpha", "pair_loss) - alpha / beta"),
        ("p-DPO's pull", "pull = -beta * rows.T", "pull = beta * rows.T"),
        ("p-DPO uphill", "ahead - rate * (slope", "ahead + rate * (slope"),
    ],
}
"""Module -> (name, before, after) of its mutations."""

MUTATIONS = [
    Mutation(name, module, *edit) for module, edits in EDITS.items() for name, *edit in edits
]


def mutated(mutation):
    """`reference.__main__` of a mutated copy of the package. The package itself stays as it is."""
    source = (REFERENCE / f"{mutation.module}.py").read_text()
    if source.count(mutation.before) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.before!r} must occur once in {mutation.module}.py"
        )
    original = {name: sys.modules.pop(name) for name in reference_modules()}
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "reference"
        shutil.copytree(REFERENCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        mutant = source.replace(mutation.before, mutation.after)
        (copy / f"{mutation.module}.py").write_text(mutant)
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("reference.__main__")
        finally:
            sys.path.remove(folder)
            for name in reference_modules():
                del sys.modules[name]
            sys.modules.update(original)


def reference_modules():
    """The names of the imported modules of `reference`."""
    return [name for name in sys.modules if name.split(".")[0] == "reference"]


def notices(main, claim, instances=10):
    """Whether the verdict of a claim is not the expected one, or there is none."""
    try:
        with np.errstate(all="ignore"):
            return main.check(claim, instances)[1] != claim.expected
    except (ArithmeticError, IndexError, TypeError, ValueError, np.linalg.LinAlgError):
        return True


def catchers(mutation, instances=10):
    """The names of the claims that notice a mutation, one by one."""
    main = mutated(mutation)
    for claim in main.CLAIMS:
        if notices(main, claim, instances):
            yield claim.function.__name__


def main():
    """Print a row for each mutation."""
    print("| mutation | module | claims that notice | which |\n|---|---|---|---|")
    for mutation in MUTATIONS:
        names = dict.fromkeys(catchers(mutation))
        cells = mutation.name, mutation.module, str(len(names)), ", ".join(names)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
