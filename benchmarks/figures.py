"""`python -m benchmarks.figures DIR`: pictures of the paper's claims, computed by `reference/`.

figure1.png       Figure 1: Theorem 2 on three responses, as printed and over the convex hull of S
bag_of_words.png  Propositions 2 and 3: what DPO does to a bag of words
figure_b2.png     Figure B.2: p-DPO (exact KL; section 7.1's on the pairs) and IPO over three arms,
                  with and without transitive closure
maximin.png       the pessimistic objective, Eq. 8: what each reading of Theorem 2 reaches
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import minimize

from reference import bag_of_words, bandit, loglinear, tabular
from reference.loglinear import descend, log_softmax
from reference.methods import METHODS
from reference.objectives import forward_kl, pessimistic_rlhf
from scale.paper.figures import bare, look, save

ORANGE, SKY, GREEN, BLUE, RED = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00"

# Figure 1. Responses are y_w, y_l and all others; S is the set of pi_1, pi_2 and pi_3.
TOY_REF = np.log([[0.3, 0.3, 0.4]])
TOY_POLICIES = np.log([[[0.75, 0.2, 0.05]], [[0.15, 0.05, 0.8]], [[0.5, 0.05, 0.45]]])
TOY_NAMES = ["$\\pi_1$", "$\\pi_2$", "$\\pi_3$, the nearest of S"]
TOY_REWARDS = tabular.implicit_rewards(TOY_POLICIES, TOY_REF, 1.0)


def figure1(path: Path) -> None:
    """Figure 1."""
    _, best = tabular.maximin(TOY_REF, TOY_REWARDS, 1.0)
    figure = Figure(figsize=(7.5, 6))
    ax = figure.subplots()
    draw_divergence(figure, ax)
    edges = [plane(mixtures(*TOY_REWARDS[list(pair)])) for pair in ([0, 1], [1, 2], [2, 0])]
    hull = np.concatenate(edges, axis=1)
    ax.fill(*hull, facecolor=SKY, edgecolor=BLUE, alpha=0.35, linewidth=1.2)
    ax.annotate("policies of\nS's convex hull", (0.53, 0.09), color=BLUE, fontsize=9)
    mark(ax, TOY_REF, "$\\pi_{ref}$", "black", "o", (8, 2))
    mark(ax, best, "the nearest of the hull,\nwhich maximises Eq. 8", RED, "*", (-125, 8))
    offsets = [(12, 6), (0, -32), (0, -32)]
    for policy, name, offset in zip(TOY_POLICIES, TOY_NAMES, offsets, strict=True):
        mark(ax, policy, name, BLUE, "s", offset)
    ax.plot(1, 0, "x", color="black", clip_on=False)
    ax.annotate("$\\pi_{MLE}$", (1, 0), (-2, 14), textcoords="offset points")
    ax.set(xlim=(0, 1), ylim=(0, 0.45), xlabel="$\\pi(y_w)$   (β = 1)", ylabel="$\\pi(y_\\ell)$")
    ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_divergence(figure: Figure, ax: Axes) -> None:
    """Draw contours of KL(pi_ref || pi) over the triangle of policies."""
    better, worse = np.meshgrid(np.linspace(0.002, 0.996, 250), np.linspace(0.002, 0.996, 250))
    other = np.where(better + worse < 0.998, 1 - better - worse, np.nan)
    divergence = forward_kl(TOY_REF, np.log(np.stack([better, worse, other], axis=-1)))
    filled = ax.contourf(
        better,
        worse,
        np.where(np.isnan(other), np.nan, divergence),
        np.arange(0, 2.1, 0.2),
        cmap="Greys",
        alpha=0.5,
        extend="max",
    )
    figure.colorbar(filled, ax=ax, label="KL($\\pi_{ref}$ || $\\pi$), nats")


def plane(policies: np.ndarray) -> np.ndarray:
    """(pi(y_w), pi(y_l)) of log-probabilities [N, 1, 3]: [2, N]."""
    return np.exp(policies[:, 0, :2]).T


def mixtures(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The optimal policies of the mixtures of two reward models, from the first to the second."""
    weights = np.linspace(0, 1, 101)
    mixed = [(1 - w) * first + w * second for w in weights]
    return np.stack([tabular.optimal_policy(TOY_REF, rewards, 1.0) for rewards in mixed])


def mark(
    ax: Axes, policy: np.ndarray, name: str, color: str, marker: str, offset: tuple[int, int]
) -> None:
    """Draw a policy with its divergence from pi_ref and its value."""
    (x,), (y,) = plane(policy[None])
    value = pessimistic_rlhf(policy, TOY_REF, TOY_REWARDS, 1.0)
    ax.plot(x, y, marker, color=color, markersize=14 if marker == "*" else 7)
    ax.annotate(
        f"{name}\nKL {forward_kl(TOY_REF, policy)[0]:.2f}, Eq. 8 {value:+.2f}",
        (x, y),
        offset,
        textcoords="offset points",
        color=color,
        fontsize=9,
    )


# Propositions 2 and 3.
BAGS = {
    "$y_w$ = abcd, $y_\\ell$ = bbcd (dense)": ([1, 1, 1, 1], [0, 2, 1, 1]),
    "$y_w$ = addd, $y_\\ell$ = bddd (sparse)": ([1, 0, 0, 3], [0, 1, 0, 3]),
    "$y_w$ = aa, $y_\\ell$ = bb: $\\hat y = y_w$": ([2, 0], [0, 2]),
}


def bags(path: Path) -> None:
    """Propositions 2 and 3."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(BAGS), sharex=True)
    for ax, (title, counts) in zip(axes, BAGS.items(), strict=True):
        draw_bag(ax, *map(np.array, counts))
        ax.set(title=title, xlabel="step of DPO (β = 1, rate 0.1)", xscale="log")
        bare(ax)
    axes[0].set_ylabel("log-probability, nats")
    figure.legend(handles=axes[0].lines, loc="outside right center", frameon=False)
    save(figure, path)


def draw_bag(ax: Axes, chosen: np.ndarray, rejected: np.ndarray) -> None:
    """Draw four log-probabilities along gradient descent from theta = 0."""
    problem = bag_of_words.problem(np.zeros(len(chosen)), [chosen], [rejected], np.zeros((0, 1)))
    path = descend(problem, METHODS["dpo"], 1.0, 0.1, 3000)[1:, 0]
    most = np.sum(chosen) * np.eye(len(chosen), dtype=int)[np.argmax(chosen - rejected)]
    lines = {
        "log $\\pi(\\hat y)$, $\\hat y$ = aa..": (bag_of_words.log_prob, most, GREEN, "-", 4.0),
        "bound on log $\\pi(y_w)$": (bag_of_words.log_prob_bound, chosen, BLUE, "--", 1.5),
        "log $\\pi(y_w)$": (bag_of_words.log_prob, chosen, BLUE, "-", 1.5),
        "log $\\pi(y_\\ell)$": (bag_of_words.log_prob, rejected, RED, "-", 1.5),
    }
    for label, (function, count, color, style, width) in lines.items():
        steps, values = np.arange(1, len(path) + 1), [function(theta, count) for theta in path]
        ax.plot(steps, values, style, color=color, linewidth=width, label=label)


# Figure B.2.
BETAS, ALPHAS = [1.0, 3.0, 10.0, 30.0], [5.0, 10.0, 20.0, 50.0, 100.0, 1000.0]
DATASETS = {"as observed": bandit.chain(3), "with transitive closure": bandit.closure(3)}
STYLES = dict(zip(DATASETS, ["o-", "x--"], strict=True))
SHADES = [ORANGE, SKY, GREEN, RED]


def figure_b2(path: Path) -> None:
    """Figure B.2."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.subplots(3, 3, sharex=True, sharey="col")
    targets = np.geomspace(0.04, 8, 13)
    for dataset, pairs in DATASETS.items():
        shades = zip(BETAS, SHADES, strict=True)
        for (beta, shade), (row, solve) in product(shades, enumerate(P_DPO.values())):
            solutions = [solve(pairs, 3, beta, alpha) for alpha in ALPHAS]
            x = np.log(np.subtract(ALPHAS, 1)) / beta
            draw_arms(grid[row], x, solutions, dataset, shade)
        solutions = [bandit.ipo_solution(pairs, 3, 1 / target) for target in targets]
        draw_arms(grid[2], targets, solutions, dataset, "black")
    for row, method in zip(grid, [*P_DPO, "IPO"], strict=True):
        for arm, ax in enumerate(row):
            ax.set(title=f"{method}: $\\pi(y_{arm + 1})$", xscale="log")
            bare(ax)
    figure.supxlabel("effective 1/τ: log(α - 1) / β for p-DPO")
    figure.legend(handles=b2_key(grid[0, 0]), loc="outside right center", frameon=False)
    save(figure, path)


def exact_kl_solution(pairs: np.ndarray, arms: int, beta: float, alpha: float) -> np.ndarray:
    """The logits [arms] of p-DPO with the exact KL.

    They minimise the sum of the pairs' losses plus (beta / alpha) KL(uniform || pi).
    """
    ref, no_rewards = np.zeros((1, arms)), np.zeros((0, 1, arms))
    problem = tabular.problem(ref, np.insert(pairs, 0, 0, axis=1), no_rewards)
    weight = beta / alpha / len(pairs)  # of the mean loss
    method = METHODS["p-dpo"]._replace(gamma=(weight, weight))

    def value(theta: np.ndarray) -> float:
        return loglinear.loss(problem, method, theta[None], beta)

    def slope(theta: np.ndarray) -> np.ndarray:
        return loglinear.gradient(problem, method, theta[None], beta)[0]

    return minimize(value, np.zeros(arms), jac=slope, options={"gtol": 1e-9}).x


P_DPO = {
    "p-DPO, exact KL": exact_kl_solution,
    "p-DPO, KL on pairs": bandit.pessimistic_dpo_solution,
}


def draw_arms(
    axes: np.ndarray, x: np.ndarray, weights: list[np.ndarray], dataset: str, color: str
) -> None:
    """Draw the learned probability of each arm in its own panel."""
    for ax, probabilities in zip(axes, np.exp(log_softmax(np.array(weights))).T, strict=True):
        ax.plot(x, probabilities, STYLES[dataset], color=color, markersize=5, linewidth=1.2)


def b2_key(ax: Axes) -> list[Line2D]:
    """Lines without points, for the legend."""
    labels = {f"β = {beta:g}": shade for beta, shade in zip(BETAS, SHADES, strict=True)}
    betas = [ax.plot([], [], color=shade, label=label) for label, shade in labels.items()]
    datasets = [ax.plot([], [], style, color="0.3", label=name) for name, style in STYLES.items()]
    return [line for (line,) in (*betas, *datasets)]


# The pessimistic objective.
INSTANCES = 60
GAMMA = 1e-2  # of the loss of hull, Eq. 11
CANDIDATES = {
    "e-dpo": "e-DPO's limit (Theorem 2 as printed)",
    "mean": "mean of the reward models",
    "hull": f"hull (ours), $\\gamma$ = {GAMMA:g}",
}


def maximin(path: Path) -> None:
    """The values of Eq. 8 by instance, and the sorted shortfalls of each policy."""
    generators = [np.random.default_rng(seed) for seed in range(INSTANCES)]
    table = np.array(sorted(values_of_eq_8(rng) for rng in generators))
    maximum, *reached = table.T
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(maximum, color="0.4", linewidth=1, label="best policy (maximum of Eq. 8)")
    left.axhline(0, color="0.4", linestyle="--", linewidth=1, label="$\\pi_{ref}$")
    for (name, label), values in zip(CANDIDATES.items(), reached, strict=True):
        _, color, marker = look(name)
        left.plot(values, marker, color=color, markersize=5, label=label)
        right.plot(np.sort(maximum - values), marker, color=color, markersize=5)
    left.set(xlabel="random problem, sorted by the best value")
    left.set(ylabel="value under the worst reward model, nats")
    right.set(xlabel="rank of the shortfall", ylabel="shortfall from the best value, nats")
    right.set(yscale="log")
    for ax in (left, right):
        bare(ax)
    figure.legend(handles=left.lines, loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def values_of_eq_8(rng: np.random.Generator) -> list[float]:
    """The maximum of Eq. 8, and its values at the candidates, in a random instance.

    An instance has four responses, three reward models and a beta of 1.
    """
    ref, rewards = log_softmax(rng.normal(size=(1, 4))), rng.normal(size=(3, 1, 4))
    policies = [
        tabular.maximin(ref, rewards, 1.0)[1],
        tabular.finite_minimum(ref, rewards, 1.0),
        tabular.optimal_policy(ref, np.mean(rewards, axis=0), 1.0),
        tabular.hull_policy(ref, rewards, 1.0, GAMMA),
    ]
    return [float(pessimistic_rlhf(policy, ref, rewards, 1.0)) for policy in policies]


FIGURES = {
    "figure1.png": figure1,
    "bag_of_words.png": bags,
    "figure_b2.png": figure_b2,
    "maximin.png": maximin,
}


def main(folder: Path) -> None:
    """Write the four pictures."""
    for name, draw in FIGURES.items():
        draw(folder / name)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]))
