"""What is varied between the studies, and the study of one variation."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minipref import section6
from minipref.methods import METHODS, Method
from minipref.section6 import Outcome, World
from reference.worlds import Settings, draw_world, stacked

RHOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # section 6.1
BETAS = (0.03, 0.1, 0.3, 1.0, 3.0)
CONSTANT = "e-dpo, gamma constant"  # Figure B.5
CONSTANT_METHOD = METHODS["e-dpo"]._replace(gamma=(1e-2, 1e-2))
TOGETHER = 200  # worlds in one call, a multiple of `BATCH`: all studies call the same programs


class Variation(NamedTuple):
    """One study.

    Attributes:
        name: What differs from the first study.
        settings: Those of the worlds.
        methods: Name -> row of `METHODS`.
        features: The features of a world [W, X, Y, F] -> what its reward models see.
        rhos: The length biases.
        worlds: The number of worlds. The first half chooses beta, the second half is reported.
    """

    name: str
    settings: Settings = Settings()
    methods: dict[str, Method] = METHODS
    features: Callable[[np.ndarray], np.ndarray] = np.asarray
    rhos: tuple[float, ...] = (0.2, 0.5, 0.8)
    worlds: int = 200


class Cell(NamedTuple):
    """One method at one rho, on the worlds that did not choose its beta.

    Attributes:
        best: The index in `BETAS` of the beta that the other worlds chose.
        outcomes: At every beta [W/2, T, ...].
    """

    best: int
    outcomes: Outcome

    @property
    def beta(self) -> float:
        return BETAS[self.best]

    def values(self, field: str, best: int | None = None) -> np.ndarray:
        """A field of the outcome for each world, at the chosen beta or at another one."""
        return getattr(self.outcomes, field)[:, self.best if best is None else best]


Cells = dict[tuple[float, str], Cell]  # by rho and method


class Margins(NamedTuple):
    """What reward models make of the pairs of D_rho.

    Attributes:
        labels, single, mean: The share of pairs that the labels, the single reward model and the
            ensemble's mean order as the true reward does [W].
        smallest: The model of the ensemble with the least mean square margin [W].
    """

    labels: jax.Array
    single: jax.Array
    mean: jax.Array
    smallest: jax.Array


class Study(NamedTuple):
    """The results of a variation.

    Attributes:
        cells: By rho and method.
        margins: What each rho's reward models make of D_rho.
    """

    cells: Cells
    margins: dict[float, "Margins"]


def with_gamma(gamma: float) -> dict[str, Method]:
    """The table with another last gamma in the place of 1e-2; the first one is 1e-2 times it."""
    schedule = (gamma / 100, gamma)
    return {n: m._replace(gamma=schedule) if m.gamma else m for n, m in METHODS.items()}


def per_response(features: np.ndarray) -> np.ndarray:
    """One column for each response: a tabular reward model."""
    worlds, prompts, responses, _ = features.shape
    columns = np.eye(prompts * responses).reshape(prompts, responses, -1)
    return np.broadcast_to(columns, (worlds, *columns.shape))


def with_per_response(features: np.ndarray) -> np.ndarray:
    """The features, and one column for each response."""
    return np.concatenate([features, per_response(features)], axis=-1)


def without_length(features: np.ndarray) -> np.ndarray:
    """The qualities alone."""
    return features[..., :-1]


VARIATIONS = (
    Variation(
        "the main study", methods=METHODS | {CONSTANT: CONSTANT_METHOD}, rhos=RHOS, worlds=1000
    ),
    *(
        Variation(f"weight of length {c:g}", Settings(length_weight=c))
        for c in (-0.6, 0.0, 1.2, 2.4)
    ),
    *(Variation(f"idiosyncratic reward {s:g}", Settings(idiosyncrasy=s)) for s in (0.0, 1.0, 2.0)),
    *(Variation(f"{n} pairs", Settings(pairs=n)) for n in (40, 320)),
    *(Variation(f"gamma to {g:g}", methods=with_gamma(g)) for g in (0.0, 1e-1)),
    Variation("reward models see no length", features=without_length),
    Variation("reward models see the response too", features=with_per_response),
    Variation("reward models see the response alone", features=per_response),
)


def run(variation: Variation) -> Study:
    """Draw the worlds, and train and evaluate every method at every beta."""
    cells: Cells = {}
    margins = {}
    for rho in variation.rhos:
        worlds, rewards = worlds_at(rho, variation)
        margins[rho] = margins_of(worlds, rewards)
        cells |= {(rho, name): cell for name, cell in trained(variation, worlds, rewards)}
    return Study(cells, margins)


def worlds_at(rho: float, variation: Variation) -> tuple[World, jax.Array]:
    """The worlds of one rho in float32, and the rewards of their reward models."""
    drawn = [draw_world(seed, rho, variation.settings) for seed in range(variation.worlds)]
    worlds = stacked(drawn)
    worlds = worlds._replace(features=variation.features(worlds.features))
    on_device = World(*(jnp.asarray(a, "float32" if a.dtype == float else None) for a in worlds))
    return on_device, reward_models(on_device)


@jax.jit
def reward_models(worlds: World) -> jax.Array:
    return jax.lax.map(section6.reward_models, worlds, batch_size=section6.BATCH)


def trained(variation: Variation, worlds: World, rewards: jax.Array) -> Iterator[tuple[str, Cell]]:
    """Each method and its results; two methods train at a time."""
    half = variation.worlds // 2
    with ThreadPoolExecutor(2) as threads:
        swept = threads.map(partial(outcomes, worlds, rewards), variation.methods.values())
        for name, outcome in zip(variation.methods, swept, strict=True):
            best = int(np.argmax(np.mean(outcome.advantage[:half], axis=0)))
            yield name, Cell(best, Outcome(*(values[half:] for values in outcome)))


def outcomes(worlds: World, rewards: jax.Array, method: Method) -> Outcome:
    """The study of all worlds, some at a time, without the features, which it does not read."""
    case = worlds._replace(features=worlds.rewards[..., None]), rewards
    parts = [
        compiled_study(
            method._replace(gamma=None),
            method.gamma,
            *jax.tree.map(lambda array, i=start: array[i : i + TOGETHER], case),
        )
        for start in range(0, len(rewards), TOGETHER)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@partial(jax.jit, static_argnums=0)
def compiled_study(
    row: Method, gamma: tuple[float, float] | None, worlds: World, rewards: jax.Array
) -> Outcome:
    """One program for each row of the table (given without its gamma), whatever its gamma."""
    return section6.study(worlds, rewards, row._replace(gamma=gamma), jnp.array(BETAS))


@jax.jit
def margins_of(worlds: World, rewards: jax.Array) -> Margins:
    """How the labels and the reward models order the pairs, and how large their margins are."""
    [true] = jnp.moveaxis(pair_margins(worlds.rewards[:, None], worlds.pairs), 1, 0)
    models = pair_margins(rewards, worlds.pairs)
    single, ensemble = models[:, 0], models[:, 1:]
    orders = jnp.stack([jnp.ones_like(true), single, jnp.mean(ensemble, axis=1)])
    labels, by_single, by_mean = jnp.mean(orders * true > 0, axis=-1)
    smallest = jnp.argmin(jnp.mean(ensemble**2, axis=-1), axis=1)
    return Margins(labels, by_single, by_mean, smallest)


@jax.vmap
def pair_margins(rewards: jax.Array, pairs: jax.Array) -> jax.Array:
    """r(chosen) - r(rejected) of each pair: [K, X, Y], [B, 3] -> [K, B]."""
    prompts, chosen, rejected = pairs.T
    return rewards[:, prompts, chosen] - rewards[:, prompts, rejected]
