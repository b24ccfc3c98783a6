"""The settings in JAX agree with `reference/` and with values derived here.

The paper's claims hold in float32.
"""

import importlib
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import reference.bag_of_words as ref_bag
import reference.bandit as ref_bandit
import reference.loglinear as ref
import reference.methods as ref_methods
import reference.tabular as ref_tabular
from minipref import bag_of_words, bandit, loglinear, tabular
from minipref.methods import METHODS
from minipref.objectives import pessimistic_rlhf, rlhf

TOLERANCE = {
    "float32": 2e-5,
    "float64": 1e-12,
}  # some 100 rounding errors of values of size 1 to 10
BETAS, ALPHAS = [1.0, 3.0, 10.0, 30.0], [5.0, 10.0, 20.0, 50.0, 100.0, 1000.0]  # Figure B.2's grid
MEMBERS = {"none": 0, "single": 1, "ensemble": 3}
RUN = jax.jit(loglinear.descend, static_argnums=(1, 4))
LOSS_AND_GRADIENT = jax.jit(
    lambda *args: (loglinear.loss(*args), loglinear.gradient(*args)), static_argnums=1
)
COUNTS = np.array(
    [[3, 1, 0, 0], [1, 1, 1, 1], [0, 0, 4, 0], [2, 0, 2, 0], [0, 1, 1, 2], [1, 3, 0, 0]]
)
PAIRS = np.array([[0, 1], [1, 2], [3, 1], [0, 2]])
INDICES = np.array([[0, 1, 2], [1, 0, 3], [1, 2, 1], [0, 3, 0], [1, 0, 3]])


def narrow(tree, dtype):
    """Floats in the tree become JAX arrays of this dtype; integer arrays become JAX arrays."""
    leaf = lambda x: jnp.asarray(x, dtype if np.asarray(x).dtype.kind == "f" else None)  # noqa: E731
    return jax.tree.map(lambda x: x if isinstance(x, int) else leaf(x), tree)


def wide(tree):
    """The same numbers in float64, for the reference."""
    return jax.tree.map(
        lambda x: np.asarray(x, float) if np.asarray(x).dtype.kind == "f" else np.asarray(x), tree
    )


def assert_close(ours, theirs, dtype, factor=1.0):
    for mine, its in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.shape(mine) == np.shape(its)
        scale = 1 + np.max(np.abs(its), initial=0.0)
        np.testing.assert_allclose(mine, its, rtol=0, atol=factor * TOLERANCE[dtype] * scale)


def logps(rng, *shape):
    return ref.log_softmax(rng.normal(size=shape))


def cases(seed):
    """Arguments of every function outside `loglinear`; Python integers are static."""
    rng = np.random.default_rng(seed)
    policy, reference, rewards = logps(rng, 2, 4), logps(rng, 2, 4), rng.normal(size=(3, 2, 4))
    weights, beta, alpha = rng.normal(size=4), rng.uniform(0.5, 2), rng.uniform(3, 30)
    shuffled = rng.permutation(COUNTS)
    return {
        "tabular.problem": (reference, rng.permutation(INDICES), rewards),
        "tabular.all_pairs": (2, 3),
        "tabular.log_partition": (reference, rewards[0], beta),
        "tabular.optimal_policy": (reference, rewards[0], beta),
        "tabular.implicit_rewards": (policy, reference, beta),
        "tabular.preference_probability": (policy, reference, beta),
        "tabular.advantages": (policy, reference, rewards),
        "tabular.finite_minimum": (reference, rewards, beta),
        "bag_of_words.counts": (rng.integers(0, 4, 7), 5),
        "bag_of_words.problem": (weights, shuffled[:2], shuffled[2:4], rng.normal(size=(3, 2))),
        "bag_of_words.log_prob": (weights, shuffled[0]),
        "bag_of_words.log_prob_bound": (weights, shuffled[0]),
        "bandit.chain": (4,),
        "bandit.closure": (4,),
        "bandit.spread": (weights,),
        "bandit.ipo_loss": (weights, rng.permutation(PAIRS), alpha),
        "bandit.ipo_solution": (rng.permutation(PAIRS), 4, alpha),
        "bandit.pessimistic_dpo_loss": (weights, rng.permutation(PAIRS), beta, alpha),
        "bandit.pessimistic_dpo_gradient": (weights, rng.permutation(PAIRS), beta, alpha),
        "bandit.pessimistic_dpo_solution": (rng.permutation(PAIRS), 4, beta, alpha, 100),
    }


def function(layer, name):
    module, function = name.split(".")
    return getattr(importlib.import_module(f"{layer}.{module}"), function)


def static(args):
    return tuple(i for i, arg in enumerate(args) if isinstance(arg, int))


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@pytest.mark.parametrize("name", cases(0))
def test_agrees_with_the_reference_eagerly(name):
    """At the same rounded arguments; problems leaf by leaf."""
    args = narrow(cases(0)[name], "float32")
    assert_close(
        function("minipref", name)(*args), function("reference", name)(*wide(args)), "float32"
    )


@pytest.mark.parametrize("name", cases(0))
def test_agrees_with_the_reference_jitted_in_float64(name):
    with jax.enable_x64(True):
        args = narrow(cases(0)[name], "float64")
        result = jax.jit(function("minipref", name), static_argnums=static(args))(*args)
        assert {leaf.dtype for leaf in jax.tree.leaves(result) if leaf.dtype.kind == "f"} <= {
            jnp.dtype("float64")
        }
        assert_close(result, function("reference", name)(*wide(args)), "float64")


@pytest.mark.parametrize(
    "name", [name for name, args in cases(0).items() if len(static(args)) < len(args)]
)
def test_jit_and_vmap_over_everything_that_is_not_static(name):
    args = [narrow(cases(seed)[name], "float32") for seed in range(3)]
    axes = tuple(None if isinstance(arg, int) else 0 for arg in args[0])
    columns = zip(axes, zip(*args, strict=True), strict=True)
    given = [each[0] if axis is None else jnp.stack(each) for axis, each in columns]
    mapped = jax.jit(jax.vmap(function("minipref", name), axes), static_argnums=static(args[0]))(
        *given
    )
    expected = [function("reference", name)(*wide(each)) for each in args]
    assert_close(mapped, stacked(expected), "float32")


def settings(dtype, members, seed=0):
    """A tabular and a bag-of-words problem, and logits away from pi_ref to evaluate them at."""
    rng = np.random.default_rng(seed)
    table = ref_tabular.problem(logps(rng, 2, 4), INDICES, rng.normal(size=(members, 2, 4)))
    chosen, rejected = COUNTS[[0, 1, 3]], COUNTS[[1, 2, 5]]
    bag = ref_bag.problem(rng.normal(size=4), chosen, rejected, 3 * rng.normal(size=(members, 3)))
    problems = {"tabular": table, "bag of words": bag}
    points = {name: each.ref + rng.normal(size=each.ref.shape) for name, each in problems.items()}
    return {n: (narrow(tuple(problems[n]), dtype), narrow(points[n], dtype)) for n in problems}


def same_problem(leaves):
    """The problem in both layers."""
    return loglinear.Problem(*leaves), ref.Problem(*wide(leaves[:3]), leaves[3])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", METHODS)
def test_losses_gradients_and_descent_agree_with_the_reference(name, dtype):
    """jax.grad against the analytic gradient, at a point of the annealing where gamma has moved."""
    method, theirs = METHODS[name], ref_methods.METHODS[name]
    with jax.enable_x64(dtype == "float64"):
        for leaves, theta in settings(dtype, MEMBERS[method.rewards]).values():
            ours, reference = same_problem(leaves)
            expected = [
                call(reference, theirs, wide(theta), 0.7, 0.6) for call in (ref.loss, ref.gradient)
            ]
            assert_close(LOSS_AND_GRADIENT(ours, method, theta, 0.7, 0.6), expected, dtype, 10)
            path = RUN(ours, method, 0.7, 0.05, 30)
            assert path.dtype == dtype
            assert_close(path, ref.descend(reference, theirs, 0.7, 0.05, 30), dtype, 30)


def test_losses_and_gradients_are_the_same_eagerly():
    leaves, theta = settings("float32", 3)["bag of words"]
    args = loglinear.Problem(*leaves), METHODS["dp-dpo"], theta, 0.7, 0.6
    assert_close(
        (loglinear.loss(*args), loglinear.gradient(*args)), LOSS_AND_GRADIENT(*args), "float32"
    )


@pytest.mark.parametrize("steps", [0, 1])
def test_descent_of_no_step_and_of_one(steps):
    """One step is taken with gamma's first value, as in the reference."""
    leaves, theta = settings("float32", 3)["tabular"]
    ours, reference = same_problem(leaves)
    path = RUN(ours, METHODS["e-dpo"], 1.0, 0.1, steps, theta)
    expected = ref.descend(reference, ref_methods.METHODS["e-dpo"], 1.0, 0.1, steps, wide(theta))
    assert_close(path, expected, "float32")
    np.testing.assert_array_equal(path[0], theta)


def test_one_compiled_descent_sweeps_betas_gammas_starts_and_datasets():
    """Against the reference run by run, and traced once for whatever values."""
    traces = []

    def run(leaves, theta, beta, gamma):
        traces.append(None)
        method = METHODS["e-dpo"]._replace(gamma=(gamma[0], gamma[1]))
        return loglinear.descend(loglinear.Problem(*leaves), method, beta, 0.05, 20, theta)

    datasets = [settings("float32", 3, seed)["tabular"] for seed in (0, 1)]
    leaves = (*stacked([leaves[:3] for leaves, _ in datasets]), 1)
    thetas = jnp.stack([theta for _, theta in datasets])
    by_dataset = jax.vmap(run, ((0, 0, 0, None), None, None, None))
    by_start = jax.vmap(by_dataset, (None, 0, None, None))
    sweep = jax.jit(jax.vmap(jax.vmap(by_start, (None, None, None, 0)), (None, None, 0, None)))
    betas, gammas = np.array([0.5, 2.0]), np.array([[0.0, 0.0], [0.1, 2.0], [3.0, 0.5]])
    paths = sweep(leaves, thetas, jnp.float32(betas), jnp.float32(gammas))
    assert paths.shape == (2, 3, 2, 2, 21, 2, 4)
    for b, g, s, d in np.ndindex(paths.shape[:4]):
        method = ref_methods.METHODS["e-dpo"]._replace(gamma=tuple(gammas[g]))
        _, reference = same_problem(datasets[d][0])
        expected = ref.descend(reference, method, betas[b], 0.05, 20, wide(datasets[s][1]))
        assert_close(paths[b, g, s, d], expected, "float32", 30)
    other = sweep(leaves, thetas, jnp.float32(betas + 1), jnp.float32(gammas + 1))
    assert len(traces) == 1 and not np.allclose(other, paths)


def padded(arms):
    """The chain and its closure as one array: (-1, -1) fills the shorter."""
    chain, closure = bandit.chain(arms), bandit.closure(arms)
    return jnp.stack(
        [jnp.pad(chain, ((0, len(closure) - len(chain)), (0, 0)), constant_values=-1), closure]
    )


@cache
def reference_grid():
    datasets = [ref_bandit.chain(3), ref_bandit.closure(3)]
    return [
        [[ref_bandit.pessimistic_dpo_solution(d, 3, b, a) for a in ALPHAS] for b in BETAS]
        for d in datasets
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_whole_of_figure_b2_is_one_program(dtype):
    """Each point is the reference solver's; float32's stops where slopes vanish in rounding."""
    traces = []

    def solve(pairs, beta, alpha):
        traces.append(None)
        return bandit.pessimistic_dpo_solution(pairs, 3, beta, alpha)

    by_alpha = jax.vmap(solve, (None, None, 0))
    grid = jax.jit(jax.vmap(jax.vmap(by_alpha, (None, 0, None)), (0, None, None)))
    with jax.enable_x64(dtype == "float64"):
        weights = grid(padded(3), jnp.asarray(BETAS, dtype), jnp.asarray(ALPHAS, dtype))
        grid(padded(3), jnp.asarray(BETAS, dtype) + 1, jnp.asarray(ALPHAS, dtype) + 1)
    assert len(traces) == 1
    np.testing.assert_allclose(
        weights, reference_grid(), rtol=0, atol={"float32": 5e-4, "float64": 1e-10}[dtype]
    )


def test_padding_adds_nothing():
    weights, pairs = jnp.array([0.3, -1.0, 2.0]), padded(3)[0]
    for loss, strengths in [(bandit.ipo_loss, (0.5,)), (bandit.pessimistic_dpo_loss, (2.0, 7.0))]:
        ours, slope = jax.value_and_grad(loss)(weights, pairs, *strengths)
        expected, its_slope = jax.value_and_grad(loss)(weights, bandit.chain(3), *strengths)
        assert_close((ours, slope), (expected, its_slope), "float32")
    assert_close(bandit.ipo_solution(pairs, 3, 0.5), np.array([2.0, 0.0, -2.0]), "float32")


def test_solutions_are_differentiable():
    """d psi / d tau = -psi / tau; p-DPO's slope in alpha is the central difference in float64."""
    slope = jax.jacobian(bandit.ipo_solution, argnums=2)(bandit.closure(3), 3, jnp.float32(0.5))
    assert_close(slope, -bandit.ipo_solution(bandit.closure(3), 3, 0.5) / 0.5, "float32")
    solution = partial(bandit.pessimistic_dpo_solution, bandit.chain(3), 3, 1.0)
    slope = jax.jit(jax.jacobian(solution))(jnp.float32(10.0))
    up, down = (
        ref_bandit.pessimistic_dpo_solution(ref_bandit.chain(3), 3, 1.0, 10 + d)
        for d in (1e-4, -1e-4)
    )
    np.testing.assert_allclose(slope, (up - down) / 2e-4, atol=1e-4)


def test_lengths_that_differ_are_an_error_even_when_compiled():
    args = jnp.zeros(3), jnp.array([[2, 1, 0]]), jnp.array([[1, 1, 0]]), jnp.zeros((0, 1))
    with pytest.raises(RuntimeError, match="one length"):
        bag_of_words.problem(*args)
    with pytest.raises(RuntimeError, match="one length"):
        jax.block_until_ready(jax.jit(bag_of_words.problem)(*args))


# The paper's claims, in float32 and without the reference.


def bag_run(chosen, rejected, beta=1.0, rate=0.1, steps=400):
    """Logits [steps + 1, V] of DPO on one pair from theta = 0."""
    chosen, rejected = jnp.array([chosen]), jnp.array([rejected])
    problem = bag_of_words.problem(jnp.zeros(chosen.shape[1]), chosen, rejected, jnp.zeros((0, 1)))
    return RUN(problem, METHODS["dpo"], beta, rate, steps)[:, 0]


def along(function, path, count):
    return np.asarray(jax.vmap(function, (0, None))(path, jnp.array(count)))


BAGS = [
    ([1, 0, 1, 1, 1], [0, 1, 1, 1, 1]),
    ([1, 0, 3, 0, 0], [0, 1, 3, 0, 0]),
    ([2, 1, 1, 0, 0], [0, 0, 1, 2, 1]),
]


@pytest.mark.parametrize(("chosen", "rejected"), BAGS)
def test_proposition_2_the_bound_falls(chosen, rejected):
    """It falls strictly: yw has a token outside the difference's argmax; log pi(yw) is below it."""
    path = bag_run(chosen, rejected)
    bound, exact = (
        along(bag_of_words.log_prob_bound, path, chosen),
        along(bag_of_words.log_prob, path, chosen),
    )
    assert bound[0] == 0 and np.all(np.diff(bound) < 0)
    assert np.all(exact <= bound)
    assert exact[0] == pytest.approx(-4 * np.log(5))


def test_proposition_2_is_not_strict_for_aa_against_bb():
    """theta = (s, -s), so log pi(aa) = 2 log sigmoid(2 s), which rises; the bound stays at 0."""
    path = bag_run([2, 0], [0, 2])
    exact = along(bag_of_words.log_prob, path, [2, 0])
    np.testing.assert_array_equal(along(bag_of_words.log_prob_bound, path, [2, 0]), np.zeros(401))
    np.testing.assert_allclose(exact, -2 * np.log1p(np.exp(-2 * np.asarray(path)[:, 0])), atol=1e-6)
    assert np.all(np.diff(exact) > 0)


@pytest.mark.parametrize(("chosen", "rejected"), BAGS)
def test_proposition_3_the_probability_goes_to_the_count_difference(chosen, rejected):
    """theta = tau(t) Delta with tau rising, so log pi(yw) / pi(yhat) = tau k.

    Here k = (c(yw) - c(yhat)) . Delta <= 0.
    """
    path, difference = bag_run(chosen, rejected), np.array(chosen) - rejected
    most = sum(chosen) * np.eye(5, dtype=int)[np.argmax(difference)]
    gap = along(bag_of_words.log_prob, path, chosen) - along(bag_of_words.log_prob, path, most)
    scale = np.asarray(path) @ difference / (difference @ difference)
    k = (chosen - most) @ difference
    assert k < 0 and np.all(np.diff(scale) > 0)
    np.testing.assert_allclose(gap, scale * k, atol=2e-5)


def test_corollary_1_dpo_pushes_the_dispreferred_response_to_0():
    """Only the margin of one pair over three responses counts (Eq. 6): it has no finite optimum."""
    reference = jnp.full((1, 3), -jnp.log(3.0))
    problem = tabular.problem(reference, jnp.array([[0, 0, 1]]), jnp.zeros((0, 1, 3)))
    path = loglinear.log_softmax(RUN(problem, METHODS["dpo"], 1.0, 1.0, 2000))[:, 0]
    assert np.all(np.diff(path[:, 1]) < 0) and path[-1, 1] < -7


def test_theorem_1_distillation_ends_at_the_optimum_of_rlhf():
    """d-DPO over all pairs ends at pi_ref exp(r / beta) / Z, where Eq. 1 has slope 0.

    This optimum is written here again.
    """
    rng, beta = np.random.default_rng(3), 0.7
    reference, rewards = jnp.float32(logps(rng, 2, 4)), jnp.float32(rng.normal(size=(1, 2, 4)))
    problem = tabular.problem(reference, tabular.all_pairs(2, 4), rewards)
    start = jnp.float32(rng.normal(size=(2, 4)))
    theta = RUN(problem, METHODS["d-dpo"], beta, 1.0, 500, start)[-1]
    tilted = np.exp(reference) * np.exp(rewards[0] / beta)
    policy = loglinear.log_softmax(theta)
    np.testing.assert_allclose(np.exp(policy), tilted / tilted.sum(1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(
        tabular.optimal_policy(reference, rewards[0], beta), policy, atol=2e-5
    )
    value = lambda logits: rlhf(loglinear.log_softmax(logits), reference[0], rewards[0, 0], beta)  # noqa: E731
    np.testing.assert_allclose(jax.grad(value)(theta[0]), np.zeros(4), atol=1e-5)


def test_equations_3_to_5_invert_each_other():
    rng, beta = np.random.default_rng(5), 0.3
    reference, rewards = jnp.float32(logps(rng, 2, 3)), jnp.float32(rng.normal(size=(2, 3)))
    policy = tabular.optimal_policy(reference, rewards, beta)
    implicit = tabular.implicit_rewards(policy, reference, beta)
    shift = beta * tabular.log_partition(reference, rewards, beta)
    np.testing.assert_allclose(implicit + shift[:, None], rewards, atol=2e-6)
    wins = 1 / (1 + np.exp(rewards[:, None, :] - rewards[:, :, None]))
    np.testing.assert_allclose(
        tabular.preference_probability(policy, reference, beta), wins, atol=1e-6
    )


def test_theorem_2_as_printed_is_worse_than_the_reference():
    """With r1 = (1, -1) = -r2 both policies' worst case is -(2p - 1) - beta KL; pi_ref's is 0.

    Here p = sigmoid(2 / beta).
    """
    beta, reference = 0.8, jnp.log(jnp.full((1, 2), 0.5))
    rewards = jnp.array([[[1.0, -1.0]], [[-1.0, 1.0]]])
    printed = tabular.finite_minimum(reference, rewards, beta)
    p = 1 / (1 + np.exp(-2 / beta))
    divergence = np.log(2) + p * np.log(p) + (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(np.exp(printed), [[p, 1 - p]], rtol=1e-5)
    assert float(pessimistic_rlhf(printed, reference, rewards, beta)) == pytest.approx(
        -(2 * p - 1) - beta * divergence
    )
    assert float(pessimistic_rlhf(reference, reference, rewards, beta)) == 0


def test_finite_minimum_takes_the_nearest_in_forward_kl():
    """It takes (.8, .1, .1), 0.51 from uniform and 0.46 in the reverse KL.

    The other, (.495, .495, .01), is 0.91 away and 0.36 in the reverse KL.
    """
    reference = jnp.log(jnp.full((1, 3), 1 / 3))
    policies = jnp.log(jnp.array([[[0.495, 0.495, 0.01]], [[0.8, 0.1, 0.1]]]))
    rewards = jnp.concatenate([2 * (policies - reference), 4 * (policies[1:] - reference)])
    np.testing.assert_allclose(
        tabular.finite_minimum(reference, rewards, 2.0), policies[1], rtol=1e-5
    )


@pytest.mark.parametrize("arms", [3, 6])
def test_proposition_7_ipo_is_compressed_by_transitive_closure(arms):
    """The spread is (n - 1) / tau over the chain and 2 (n - 1) / (n tau) over its closure.

    The arms are evenly spaced and the slope is 0.
    """
    tau = jnp.float32(0.4)
    for pairs, spread in [
        (bandit.chain(arms), arms - 1),
        (bandit.closure(arms), 2 * (arms - 1) / arms),
    ]:
        weights = bandit.ipo_solution(pairs, arms, tau)
        assert float(bandit.spread(weights)) == pytest.approx(spread / 0.4, rel=1e-5)
        np.testing.assert_allclose(
            np.diff(weights), np.full(arms - 1, -spread / 0.4 / (arms - 1)), rtol=1e-5
        )
        np.testing.assert_allclose(
            jax.grad(bandit.ipo_loss)(weights, pairs, tau), np.zeros(arms), atol=1e-4
        )


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 5.0), (3.0, 100.0), (0.5, 20.0)])
def test_p_dpo_over_two_arms_by_a_root_finder(beta, alpha):
    """Its slope along psi_1 - psi_2 = d is 0 where alpha sigmoid(-beta d) = tanh(d / 2)."""
    gap = brentq(lambda d: alpha / (1 + np.exp(beta * d)) - np.tanh(d / 2), 0, 50)
    weights = bandit.pessimistic_dpo_solution(bandit.chain(2), 2, beta, alpha)
    np.testing.assert_allclose(weights, [gap / 2, -gap / 2], rtol=1e-4)


def test_p_dpo_minds_transitive_closure_less_than_ipo():
    """Figure B.2 is at beta 1, alpha 100 and tau 1.

    The closure moves no arm's probability by 0.01, and IPO's by 0.1.
    """
    p_dpo = [bandit.pessimistic_dpo_solution(pairs, 3, 1.0, 100.0) for pairs in padded(3)]
    ipo = [bandit.ipo_solution(pairs, 3, 1.0) for pairs in padded(3)]
    policies = np.exp(loglinear.log_softmax(jnp.array([p_dpo, ipo])))
    moved = np.max(np.abs(policies[:, 0] - policies[:, 1]), axis=-1)
    by_hand = np.exp(1) / np.sum(np.exp([1, 0, -1])) - np.exp(2 / 3) / np.sum(
        np.exp([2 / 3, 0, -2 / 3])
    )
    assert moved[0] < 0.01 and moved[1] == pytest.approx(by_hand, abs=1e-6)
