"""The study of section 6 in a bandit, where every value is exact: compiled, and to be `vmap`ped.

The same functions as in `reference/section6.py`. `reference/worlds.py` says what a world is, and
draws worlds. A function takes ONE world, except `study`, which sweeps worlds (of any seeds and
rhos) and betas. Methods and numbers of steps are static.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from minipref import loglinear, tabular
from minipref.loglinear import log_softmax
from minipref.methods import Method
from minipref.objectives import Loss, Scalar, forward_kl
from minipref.tabular import Table
from minipref.weights import Weights, ensemble_weights, nearest_shares

MODELS = {"none": slice(0, 0), "single": slice(0, 1), "ensemble": slice(1, None)}
RIDGE, RATE, STEPS = 1.0, 0.3, 50
BATCH = 20  # worlds

Models = Float[Array, "models X Y"]


class World(NamedTuple):
    """A world with one D_rho, as plain arrays; stack those of several worlds to `vmap`.

    Attributes:
        ref_logps: log pi_ref [X, Y], in nats.
        rewards: The true rewards [X, Y], in nats.
        features: What reward models see of each response [X, Y, F].
        pairs: D_rho, (prompt, chosen, rejected) indices [B, 3].
        subsets: 1 for the pairs of D_{rho,b}, else 0, for each b of section 6.1 [K, B].
    """

    ref_logps: Table
    rewards: Table
    features: Float[Array, "X Y F"]
    pairs: Int[Array, "B 3"]
    subsets: Float[Array, "K B"]


class Outcome(NamedTuple):
    """What a policy does, all of it exact.

    Attributes:
        advantage: Its expected true reward minus that of pi_ref, in nats.
        forward_kl, reverse_kl: KL(pi_ref || pi) and KL(pi || pi_ref), in nats.
        chosen_logp, rejected_logp: The mean log-probability of either side of D_rho, in nats.
        selected: 1 for the reward model of the ensemble that is nearest on D_rho, else 0 [K].
        nearest: The share of the pairs on which each reward model is the nearest [K].
    """

    advantage: Loss
    forward_kl: Loss
    reverse_kl: Loss
    chosen_logp: Loss
    rejected_logp: Loss
    selected: Weights
    nearest: Weights


def fit_reward_model(
    differences: Float[Array, "B F"],
    included: Float[Array, " B"],
    ridge: Scalar = RIDGE,
    steps: int = 8,
) -> Float[Array, " F"]:
    """The linear reward model that explains preferences best, by Newton's method.

    argmin_theta sum_b included_b -log sigmoid(theta . differences_b) + ridge |theta|^2 / 2

    Args:
        differences: The features of the chosen response minus those of the rejected one [B, F].
        included: 1 for the pairs to fit, 0 for the others [B].
        ridge: The inverse of the parameters' prior variance, above 0.
        steps: The number of Newton steps.

    Returns:
        theta [F], in nats for each unit of a feature.

    Source: Eq. 2.
    """
    size = differences.shape[1]

    def update(_, theta):
        surprise = included * jax.nn.sigmoid(-(differences @ theta))
        spread = surprise * (1 - surprise)
        curvature = differences.T @ (spread[:, None] * differences) + ridge * jnp.eye(size)
        slope = differences.T @ surprise - ridge * theta
        return theta + jax.scipy.linalg.solve(curvature, slope, assume_a="pos")

    return lax.fori_loop(0, steps, update, jnp.zeros(size, differences.dtype))


def reward_models(world: World) -> Models:
    """The rewards of the model fitted to D_rho, and of the ensemble fitted to its subsets.

    Args:
        world: A `World`.

    Returns:
        r [1 + K, X, Y], in nats: `MODELS` says which of them a method reads.

    Source: section 6.1.
    """
    prompts, chosen, rejected = world.pairs.T
    differences = world.features[prompts, chosen] - world.features[prompts, rejected]
    datasets = jnp.concatenate([jnp.ones_like(world.subsets[:1]), world.subsets])
    theta = jax.vmap(fit_reward_model, (None, 0))(differences, datasets)
    return jnp.einsum("xyf,kf->kxy", world.features, theta)


def train(
    world: World,
    rewards: Models,
    method: Method,
    beta: Scalar,
    rate: Scalar = RATE,
    steps: int = STEPS,
) -> Table:
    """A tabular policy, trained by Adam on all of D_rho from pi_ref on, with the exact KL.

    Args:
        world: A `World`.
        rewards: Those of its `reward_models` [1 + K, X, Y], in nats.
        method: A row of `METHODS`.
        beta: The beta of the pair term, above 0.
        rate: Adam's learning rate, in nats a step.
        steps: The number of steps.

    Returns:
        log pi [X, Y], in nats.

    Source: section 6.1; Adam is Kingma and Ba's (2015), with their constants.
    """
    problem = tabular.problem(world.ref_logps, world.pairs, rewards[MODELS[method.rewards]])
    optimizer = optax.adam(rate)

    def update(state, step):
        theta, moments = state
        slope = loglinear.gradient(problem, method, theta, beta, step / max(steps - 1, 1))
        move, moments = optimizer.update(slope, moments)
        return (theta + move, moments), None

    start = world.ref_logps, optimizer.init(world.ref_logps)
    (theta, _), _ = lax.scan(update, start, jnp.arange(steps))
    return log_softmax(theta)


def evaluate(world: World, rewards: Models, policy_logps: Table, beta: Scalar) -> Outcome:
    """What a policy does in its world.

    Args:
        world: A `World`.
        rewards: Those of its `reward_models` [1 + K, X, Y], in nats.
        policy_logps: log pi [X, Y], in nats.
        beta: That of the policy's pair term, to compare it with the reward models.

    Returns:
        An `Outcome`.

    Source: section 6.2, Figures 2, B.1 and B.3.
    """
    prompts, chosen, rejected = world.pairs.T
    problem = tabular.problem(world.ref_logps, world.pairs, rewards[MODELS["ensemble"]])
    fit = loglinear.margins(problem, policy_logps), problem.reward_margins, beta
    return Outcome(
        tabular.advantages(policy_logps, world.ref_logps, world.rewards[None])[0],
        jnp.mean(forward_kl(world.ref_logps, policy_logps)),
        jnp.mean(forward_kl(policy_logps, world.ref_logps)),
        jnp.mean(policy_logps[prompts, chosen]),
        jnp.mean(policy_logps[prompts, rejected]),
        ensemble_weights(*fit),
        nearest_shares(*fit),
    )


def study(
    worlds: World,
    rewards: Float[Array, "W models X Y"],
    method: Method,
    betas: Float[Array, " T"],
) -> Outcome:
    """Train and evaluate a policy for each world and each beta.

    Worlds of several rhos may be stacked into one call. They go in batches that fit into a cache.
    Compile it with `jit`; the features of the worlds are not read.

    Args:
        worlds: A `World` whose arrays have a leading axis [W, ...].
        rewards: Those of the `reward_models` of each world [W, 1 + K, X, Y], in nats.
        method: A row of `METHODS`.
        betas: The betas of the pair term [T], above 0.

    Returns:
        An `Outcome` whose arrays have two leading axes [W, T, ...].
    """

    def outcome(world, models, beta):
        return evaluate(world, models, train(world, models, method, beta), beta)

    def outcomes(case):
        world, models = case
        return jax.vmap(outcome, (None, None, 0))(world, models, betas)

    return lax.map(outcomes, (worlds, rewards), batch_size=BATCH)
