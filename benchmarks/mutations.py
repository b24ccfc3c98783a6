"""`python -m benchmarks.mutations`: which claims notice which mistake in `reference/`, as a Markdown table.

A mutation replaces one expression in a copy of the package. A claim notices it where its verdict changes, on ten
random instances; a claim that raises an error has noticed too.
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
    """An expression of a module, which occurs in it once, and what it becomes."""

    name: str
    module: str
    before: str
    after: str


MUTATIONS = [
    Mutation("mask ignored", "objectives", "np.where(mask, token_logps, 0.0)", "token_logps"),
    Mutation("mean over tokens", "objectives", "np.sum(np.where(mask", "np.mean(np.where(mask"),
    Mutation("margin's sign", "objectives", "(policy_chosen - ref_chosen) -", "-(policy_chosen - ref_chosen) +"),
    Mutation("margin without reference", "objectives", "(policy_rejected - ref_rejected)", "policy_rejected"),
    Mutation("preference's sign", "objectives", "logaddexp(0.0, -reward_margin)", "logaddexp(0.0, reward_margin)"),
    Mutation("DPO without beta", "objectives", "bradley_terry(beta * margin)", "bradley_terry(margin)"),
    Mutation("tau for 1/tau", "objectives", "(margin - 1.0 / tau)", "(margin - tau)"),
    Mutation("IPO's own tau", "objectives", "(margin - 1.0 / tau)", "(margin - 0.5 / tau)"),
    Mutation("distillation without beta", "objectives", "(reward_margin - beta * margin)", "(reward_margin - margin)"),
    Mutation("distillation's sign", "objectives", "(reward_margin - beta * margin)", "(reward_margin + beta * margin)"),
    Mutation(
        "mean -> best of models", "objectives",
        "np.mean(reward_margins, axis=0)",
        "np.max(reward_margins, axis=0)",
    ),
    Mutation("mean's weights", "weights", "1.0 / len(reward_margins))", "1.0)"),
    Mutation("min -> mean of models", "objectives", "np.min(_model_losses", "np.mean(_model_losses"),
    Mutation("farthest model", "weights", "np.argmin(np.mean", "np.argmax(np.mean"),
    Mutation("shares summed", "weights", "return np.mean(weights", "return np.sum(weights"),
    Mutation("hull -> first model", "objectives", "weights = hull_weights(margins, reward_margins, beta)", "weights = np.eye(len(reward_margins))[0]"),
    Mutation("hull of two", "simplex", "range(1, len(vertices) + 1)", "range(1, 3)"),
    Mutation("hull of one", "simplex", "_faces(models)", "[[model] for model in models]"),
    Mutation("hull's residuals", "weights", "reward_margins - beta * np.asarray", "reward_margins - np.asarray"),
    Mutation("KL reversed", "objectives", "np.exp(ref) * (ref - policy)", "np.exp(policy) * (policy - ref)"),
    Mutation("sampled KL's sign", "objectives", "return ref_logp - policy_logp", "return policy_logp - ref_logp"),
    Mutation("pessimism's sign", "objectives", "loss + gamma * kl", "loss - gamma * kl"),
    Mutation("gamma dropped", "objectives", "loss + gamma * kl", "loss + kl"),
    Mutation(
        "RLHF with forward KL", "objectives",
        "forward_kl(policy_logps, ref_logps)",
        "forward_kl(ref_logps, policy_logps)",
    ),
    Mutation("RLHF without beta", "objectives", "- beta * reverse_kl", "- reverse_kl"),
    Mutation("best reward model", "objectives", "np.min(np.mean(advantages", "np.max(np.mean(advantages"),
    Mutation("no baseline", "objectives", " - ref_values", ""),
    Mutation("softmax unnormalised", "loglinear", "np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))", "0.0"),
    Mutation("margins without reference", "loglinear", "theta - problem.ref, 2)", "theta, 2)"),
    Mutation("KL of one draw", "loglinear", "problem.draws * forward_kl", "0 * problem.draws + forward_kl"),
    Mutation(
        "policy KL reversed", "loglinear",
        "log_softmax(problem.ref), log_softmax(theta))",
        "log_softmax(theta), log_softmax(problem.ref))",
    ),
    Mutation(
        "loss without KL", "loglinear",
        "margins(problem, theta), kls(problem, theta)\n",
        "margins(problem, theta), 0 * kls(problem, theta)\n",
    ),
    Mutation(
        "gradient's pull negated", "loglinear",
        "np.exp(log_softmax(theta)) - np.exp(log_softmax(problem.ref))",
        "np.exp(log_softmax(problem.ref)) - np.exp(log_softmax(theta))",
    ),
    Mutation("slopes summed over pairs", "loglinear", "(pair_margins, beta) / batch", "(pair_margins, beta)"),
    Mutation("DPO's slope", "loglinear", "np.logaddexp(0.0, beta * h)", "np.logaddexp(0.0, -beta * h)"),
    Mutation("IPO's slope", "loglinear", "2 * (h - 1 / tau)", "2 * (h - tau)"),
    Mutation("distillation's slope", "loglinear", "-2 * beta * (reward_margins", "-2 * (reward_margins"),
    Mutation("ascent", "loglinear", "path[-1] - rate * gradient", "path[-1] + rate * gradient"),
    Mutation("pairs swapped", "tabular", "prompts, rejected] -= 1", "prompts, rejected] += 1"),
    Mutation("half the pairs", "tabular", "grid[:, 1] != grid[:, 2]", "grid[:, 1] + 1 == grid[:, 2]"),
    Mutation("log Z without beta", "tabular", "tilted = ref_logps + rewards / beta", "tilted = ref_logps + rewards"),
    Mutation("Eq. 3 without beta", "tabular", "return ref_logps + rewards / beta", "return ref_logps + rewards"),
    Mutation("Eq. 3 without reference", "tabular", "return ref_logps + rewards / beta", "return rewards / beta"),
    Mutation(
        "Eq. 4 without beta", "tabular",
        "return beta * (policy_logps - ref_logps)",
        "return policy_logps - ref_logps",
    ),
    Mutation(
        "Eq. 5's sign", "tabular",
        "rewards[..., None, :] - rewards[..., :, None]",
        "rewards[..., :, None] - rewards[..., None, :]",
    ),
    Mutation("advantage over nothing", "tabular", "np.exp(policy_logps) - np.exp(ref_logps)", "np.exp(policy_logps)"),
    Mutation("farthest policy of S", "tabular", "return min(policies", "return max(policies"),
    Mutation(
        "KL of S reversed", "tabular",
        "np.mean(forward_kl(ref_logps, policy)))",
        "np.mean(forward_kl(policy, ref_logps)))",
    ),
    Mutation(
        "maximin -> corner", "tabular",
        "weights = minimise_on_simplex(dual, len(rewards))\n    return weights,",
        "weights = np.eye(len(rewards))[0]\n    return weights,",
    ),
    Mutation("distil without KL", "tabular", "pull = gamma * (", "pull = 0 * gamma * ("),
    Mutation("distil's fit doubled", "tabular", "pull - 4 * beta / len(ref)", "pull - 8 * beta / len(ref)"),
    Mutation(
        "distil's first prompt", "tabular",
        "prompts = zip(ref_logps, rewards, strict=True)",
        "prompts = [(ref_logps[0], rewards[0])] * len(rewards)",
    ),
    Mutation(
        "hull -> mean", "tabular",
        "weights = minimise_on_simplex(dual, len(rewards))\n    return distil",
        "weights = np.full(len(rewards), 1 / len(rewards))\n    return distil",
    ),
    Mutation("simplex stays", "simplex", "point, state = step", "break"),
    Mutation(
        "simplex without curvature", "simplex",
        "_quadratic_minimum(slope - curvature @ point, curvature)",
        "_quadratic_minimum(-slope, curvature)",
    ),
    Mutation(
        "counts -> presence", "bag_of_words",
        "return np.bincount(tokens, minlength=vocabulary)",
        "return np.minimum(np.bincount(tokens, minlength=vocabulary), 1)",
    ),
    Mutation(
        "bags swapped", "bag_of_words",
        "np.asarray(chosen) - np.asarray(rejected)",
        "np.asarray(rejected) - np.asarray(chosen)",
    ),
    Mutation("bag unnormalised", "bag_of_words", "count @ log_softmax(theta)", "count @ theta"),
    Mutation("bound by the least", "bag_of_words", "theta - np.max(theta)", "theta - np.min(theta)"),
    Mutation(
        "chain reversed", "bandit",
        "[np.arange(arms - 1), np.arange(1, arms)]",
        "[np.arange(1, arms), np.arange(arms - 1)]",
    ),
    Mutation("closure -> chain", "bandit", "np.stack(np.triu_indices(arms, 1), axis=1)", "chain(arms)"),
    Mutation(
        "spread from the mean", "bandit",
        "np.max(weights) - np.min(weights)",
        "np.max(weights) - np.mean(weights)",
    ),
    Mutation(
        "IPO of losers", "bandit",
        "weights[better] - weights[worse], tau)",
        "weights[worse] - weights[better], tau)",
    ),
    Mutation("IPO's target", "bandit", "np.full(len(pairs), 1 / tau)", "np.full(len(pairs), tau)"),
    Mutation("p-DPO's alpha", "bandit", "pair_loss) - beta / alpha", "pair_loss) - alpha / beta"),
    Mutation("p-DPO's pull", "bandit", "pull = -beta * rows.T", "pull = beta * rows.T"),
    Mutation("p-DPO uphill", "bandit", "ahead - rate * (slope", "ahead + rate * (slope"),
]  # fmt: skip


def mutated(mutation):
    """`reference.__main__` of a copy of the package with the mutation. The package in use is left as it is."""
    source = (REFERENCE / f"{mutation.module}.py").read_text()
    if source.count(mutation.before) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.before!r} must occur once in {mutation.module}.py"
        )
    ours = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.split(".")[0] == "reference"
    }
    with TemporaryDirectory() as folder:
        shutil.copytree(
            REFERENCE, Path(folder) / "reference", ignore=shutil.ignore_patterns("__pycache__")
        )
        (Path(folder) / "reference" / f"{mutation.module}.py").write_text(
            source.replace(mutation.before, mutation.after)
        )
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("reference.__main__")
        finally:
            sys.path.remove(folder)
            for name in [name for name in sys.modules if name.split(".")[0] == "reference"]:
                del sys.modules[name]
            sys.modules.update(ours)


def notices(main, claim, instances=10):
    """Whether a claim's verdict differs from the expected one, or cannot be had."""
    try:
        with np.errstate(all="ignore"):
            return main.check(claim, instances)[1] != claim.expected
    except (ArithmeticError, IndexError, TypeError, ValueError, np.linalg.LinAlgError):
        return True


def catchers(mutation, instances=10):
    """The names of the claims that notice a mutation, one by one."""
    main = mutated(mutation)
    yield from (claim.function.__name__ for claim in main.CLAIMS if notices(main, claim, instances))


def main():
    """Prints a row a mutation."""
    print("| mutation | module | claims that notice | which |\n|---|---|---|---|")
    for mutation in MUTATIONS:
        names = dict.fromkeys(catchers(mutation))
        print(
            f"| {mutation.name} | {mutation.module} | {len(names)} | {', '.join(names)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
