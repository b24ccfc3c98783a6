"""`python -m benchmarks.sweep`: whole sweeps as one compiled program, against NumPy's runs in turn.

- Figure B.2: p-DPO's solution in the bandit over beta x alpha, with and without transitive closure
  (2,000 steps each).
- A tabular descent: e-DPO (200 steps) over beta x gamma x seed x data set.

Every point is compared with that of the reference. The compiled times are medians of several calls.
"With compilation" is the first call, tracing included.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import reference.bandit
import reference.loglinear
import reference.methods
import reference.tabular
from benchmarks import figures
from benchmarks.machine import describe, median, timed
from minipref import bandit, loglinear
from minipref.methods import METHODS

BETAS, ALPHAS = np.array(figures.BETAS), np.array(figures.ALPHAS)
GAMMAS = np.array([[0.0, 0.0], [1e-4, 1e-2], [0.1, 1.0]])
SEEDS, DATASETS, STEPS = 32, 4, 200
REPEATS = 9


class Sweep(NamedTuple):
    """One sweep, computed in two ways.

    Attributes:
        compiled: The values of all points, as a function of `args`.
        args: The axes of the sweep.
        one_by_one: Yields the value of each point, by the reference.
    """

    compiled: Callable
    args: tuple
    one_by_one: Callable[[], Iterator[np.ndarray]]


def figure_b2() -> Sweep:
    """p-DPO over beta x alpha, on both data sets."""

    def solve(pairs, beta, alpha):
        return bandit.pessimistic_dpo_solution(pairs, 3, beta, alpha)

    def one_by_one():
        datasets = reference.bandit.chain(3), reference.bandit.closure(3)
        for pairs, beta, alpha in product(datasets, BETAS, ALPHAS):
            yield reference.bandit.pessimistic_dpo_solution(pairs, 3, beta, alpha)

    padding = np.full((1, 2), -1)
    datasets = np.stack([np.concatenate([bandit.chain(3), padding]), bandit.closure(3)])
    return Sweep(over_grid(solve, 3), (datasets, BETAS, ALPHAS), one_by_one)


def tabular() -> Sweep:
    """e-DPO's descent over beta x gamma x start x data set."""

    def descend(beta, gamma, start, data):
        method = METHODS["e-dpo"]._replace(gamma=(gamma[0], gamma[1]))
        problem = loglinear.Problem(*data)
        return loglinear.descend(problem, method, beta, 0.3 / beta**2, STEPS, start)[-1]

    def one_by_one():
        for beta, gamma, start, problem in product(BETAS, GAMMAS, starts, problems):
            method = reference.methods.METHODS["e-dpo"]._replace(gamma=tuple(gamma))
            rate = 0.3 / beta**2
            yield reference.loglinear.descend(problem, method, beta, rate, STEPS, start)[-1]

    problems = [dataset(seed) for seed in range(DATASETS)]
    starts = np.random.default_rng(0).normal(size=(SEEDS, 2, 4))
    stacked = tuple(np.stack(leaves) for leaves in zip(*(p[:3] for p in problems), strict=True))
    return Sweep(over_grid(descend, 4), (BETAS, GAMMAS, starts, stacked), one_by_one)


def dataset(seed: int) -> reference.loglinear.Problem:
    """Two prompts, four responses, three reward models, eight pairs."""
    rng = np.random.default_rng(seed)
    ref = reference.loglinear.log_softmax(rng.normal(size=(2, 4)))
    pairs = rng.permutation(reference.tabular.all_pairs(2, 4))[:8]
    return reference.tabular.problem(ref, pairs, rng.normal(size=(3, 2, 4)))


def over_grid(function: Callable, arguments: int) -> Callable:
    """The function at all combinations of its arguments' entries, the first argument outermost."""
    for i in reversed(range(arguments)):
        function = jax.vmap(function, [0 if i == j else None for j in range(arguments)])
    return function


def measure(sweep: Sweep, dtype: str, expected: np.ndarray, numpy: float) -> str:
    """One row of the table; `expected` are the points that NumPy made in `numpy` seconds."""

    def as_dtype(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array, dtype if array.dtype == float else None)

    with jax.enable_x64(dtype == "float64"):
        args = jax.tree.map(as_dtype, sweep.args)
        program = jax.jit(sweep.compiled)
        first = timed(lambda: program(*args))
        again = median([timed(lambda: program(*args)) for _ in range(REPEATS)])
        difference = np.max(np.abs(program(*args).reshape(expected.shape) - expected))
    return (
        f"{len(expected)} | {dtype} | {numpy:.2f} | {first - again:.2f} | {again * 1e3:.1f} | "
        f"{numpy / again:,.0f} x | {numpy / first:.1f} x | {difference:.0e} |"
    )


def main() -> None:
    """Print the table."""
    jax.block_until_ready(jax.jit(jnp.exp)(0.0))  # the start of JAX itself
    print(f"{describe()}\n")
    print(
        "| sweep | points | type | NumPy, s | compilation, s | compiled, ms | faster | "
        "with compilation | largest difference |\n|---|---|---|---|---|---|---|---|---|"
    )
    sweeps: dict[str, Sweep] = {"Figure B.2": figure_b2(), "tabular descent": tabular()}
    for name, sweep in sweeps.items():
        points: list[np.ndarray] = []
        numpy = timed(partial(collect, points, sweep))
        for dtype in ("float32", "float64"):
            print(f"| {name} | {measure(sweep, dtype, np.array(points), numpy)}", flush=True)


def collect(points: list[np.ndarray], sweep: Sweep) -> None:
    points.extend(sweep.one_by_one())


if __name__ == "__main__":
    main()
