"""`python -m reference.section6`: the study of section 6 in a bandit, where every value is exact.

`worlds.py` says what a world is. A reward model is linear in the features of a response, and fitted
to D_rho or to a subset of it. A policy is tabular, so its advantage is a sum, not an estimate.

`minipref/section6.py` has the same functions. Both take the same arrays.
"""

import argparse
import sys
from typing import NamedTuple

import numpy as np

from reference import loglinear, tabular
from reference.loglinear import log_softmax
from reference.methods import METHODS
from reference.objectives import forward_kl
from reference.weights import ensemble_weights, nearest_shares
from reference.worlds import Settings, World, draw_world, stacked

MODELS = {"none": slice(0, 0), "single": slice(0, 1), "ensemble": slice(1, None)}
RIDGE, RATE, STEPS = 1.0, 0.3, 50


class Outcome(NamedTuple):
    """What a policy does, all of it exact.

    Attributes:
        advantage: Its expected true reward minus that of pi_ref, in nats.
        forward_kl, reverse_kl: KL(pi_ref || pi) and KL(pi || pi_ref), in nats.
        chosen_logp, rejected_logp: The mean log-probability of either side of D_rho, in nats.
        selected: 1 for the reward model of the ensemble that is nearest on D_rho, else 0 [K].
        nearest: The share of the pairs on which each reward model is the nearest [K].
    """

    advantage: np.ndarray
    forward_kl: np.ndarray
    reverse_kl: np.ndarray
    chosen_logp: np.ndarray
    rejected_logp: np.ndarray
    selected: np.ndarray
    nearest: np.ndarray


def fit_reward_model(differences, included, ridge=RIDGE, steps=8):
    """The linear reward model that explains preferences best, by Newton's method.

    argmin_theta sum_b included_b -log sigmoid(theta . differences_b) + ridge |theta|^2 / 2

    Args:
        differences: the features of the chosen response minus those of the rejected one [B, F].
        included: 1 for the pairs to fit, 0 for the others [B].
        ridge: the inverse of the parameters' prior variance, above 0.
        steps: the number of Newton steps.

    Returns:
        theta [F], in nats for each unit of a feature.
    Source: Eq. 2.
    """
    theta = np.zeros(differences.shape[1])
    for _ in range(steps):
        surprise = included * np.exp(-np.logaddexp(0.0, differences @ theta))
        spread = surprise * (1 - surprise)
        curvature = differences.T @ (spread[:, None] * differences) + ridge * np.eye(len(theta))
        theta = theta + np.linalg.solve(curvature, differences.T @ surprise - ridge * theta)
    return theta


def reward_models(world):
    """The rewards of the model fitted to D_rho, and of the ensemble fitted to its subsets.

    Args:
        world: a `World`.

    Returns:
        r [1 + K, X, Y], in nats: `MODELS` says which of them a method reads.
    Source: section 6.1.
    """
    prompts, chosen, rejected = world.pairs.T
    differences = world.features[prompts, chosen] - world.features[prompts, rejected]
    datasets = [np.ones(len(differences)), *world.subsets]
    return np.stack([world.features @ fit_reward_model(differences, kept) for kept in datasets])


def train(world, rewards, method, beta, rate=RATE, steps=STEPS):
    """A tabular policy, trained by Adam on all of D_rho from pi_ref on, with the exact KL.

    Args:
        world: a `World`.
        rewards: those of its `reward_models` [1 + K, X, Y], in nats.
        method: a row of `METHODS`.
        beta: the beta of the pair term, above 0.
        rate: Adam's learning rate, in nats a step.
        steps: the number of steps.

    Returns:
        log pi [X, Y], in nats.
    Source: section 6.1; Adam is Kingma and Ba's (2015), with their constants.
    """
    problem = tabular.problem(world.ref_logps, world.pairs, rewards[MODELS[method.rewards]])
    theta, mean, square = world.ref_logps, 0.0, 0.0
    for step in range(steps):
        slope = loglinear.gradient(problem, method, theta, beta, step / max(steps - 1, 1))
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        unbiased = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
        theta = theta - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    return log_softmax(theta)


def evaluate(world, rewards, policy_logps, beta):
    """What a policy does in its world.

    Args:
        world: a `World`.
        rewards: those of its `reward_models` [1 + K, X, Y], in nats.
        policy_logps: log pi [X, Y], in nats.
        beta: that of the policy's pair term, to compare it with the reward models.

    Returns:
        An `Outcome`.
    Source: section 6.2, Figures 2, B.1 and B.3.
    """
    prompts, chosen, rejected = world.pairs.T
    problem = tabular.problem(world.ref_logps, world.pairs, rewards[MODELS["ensemble"]])
    fit = loglinear.margins(problem, policy_logps), problem.reward_margins, beta
    return Outcome(
        tabular.advantages(policy_logps, world.ref_logps, world.rewards[None])[0],
        np.mean(forward_kl(world.ref_logps, policy_logps)),
        np.mean(forward_kl(policy_logps, world.ref_logps)),
        np.mean(policy_logps[prompts, chosen]),
        np.mean(policy_logps[prompts, rejected]),
        ensemble_weights(*fit),
        nearest_shares(*fit),
    )


def study(worlds, rewards, method, betas):
    """Train and evaluate a policy for each world and each beta.

    Args:
        worlds: a `World` whose arrays have a leading axis [W, ...].
        rewards: those of the `reward_models` of each world [W, 1 + K, X, Y], in nats.
        method: a row of `METHODS`.
        betas: the betas of the pair term [T], above 0.

    Returns:
        An `Outcome` whose arrays have two leading axes [W, T, ...].
    """
    outcomes = [
        [evaluate(world, models, train(world, models, method, beta), beta) for beta in betas]
        for world, models in zip(map(World._make, zip(*worlds, strict=True)), rewards, strict=True)
    ]
    return Outcome(*(np.array([[o[i] for o in row] for row in outcomes]) for i in range(7)))


WHAT = """\
Repeats the study of section 6 in a bandit: 64 random worlds, eight methods, and preference data in
which the longer response is preferred in a share rho of the pairs.

Each entry is the exact expected true reward of a policy minus that of pi_ref, in nats: the mean
over the last 32 worlds, and half of its 95% interval. Each method's beta (of .1, .3 and 1) is the
best one on the first 32 worlds. It takes a minute at most and needs NumPy alone."""
TABLE_RHOS, TABLE_BETAS, TABLE_WORLDS = (0.2, 0.5, 0.8), (0.1, 0.3, 1.0), 64


def table_cells(rho, settings):
    """The advantage of every method on worlds that did not choose its beta.

    Args:
        rho: the share of pairs whose longer response is preferred.
        settings: those of the worlds.

    Returns:
        Yields, for each row of `METHODS`, the beta and the advantages of the last 32 worlds [32].
    """
    halves = np.split(np.arange(TABLE_WORLDS), 2)
    first, last = (stacked([draw_world(i, rho, settings) for i in half]) for half in halves)
    models = [
        np.stack([reward_models(World(*arrays)) for arrays in zip(*worlds, strict=True)])
        for worlds in (first, last)
    ]
    for method in METHODS.values():
        tried = study(first, models[0], method, TABLE_BETAS)
        beta = TABLE_BETAS[np.argmax(np.mean(tried.advantage, axis=0))]
        yield beta, study(last, models[1], method, [beta]).advantage[:, 0]


def main(arguments=None):
    """Print the table, or the help.

    Args:
        arguments: the command line; None reads `sys.argv`.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("python -m reference.section6", description=WHAT)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    print(f"{'rho':>3}  {'method':15} {'beta':>4} {'advantage':>10}")
    for rho in TABLE_RHOS:
        for method, (beta, advantages) in zip(
            METHODS.values(), table_cells(rho, Settings()), strict=True
        ):
            half = 1.96 * np.std(advantages, ddof=1) / np.sqrt(len(advantages))
            mean = np.mean(advantages)
            print(
                f"{rho:3.1f}  {method.label:15} {beta:4g} {mean:+10.3f} +- {half:.3f}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
