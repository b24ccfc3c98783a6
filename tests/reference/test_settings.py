"""The settings, against values by hand, closed forms, brute force and fifty digits."""

import math

import mpmath
import numpy as np
import pytest

from reference import bag_of_words, bandit, loglinear, objectives, simplex, tabular
from reference.methods import METHODS

LN2, LN3 = math.log(2), math.log(3)
EVEN = np.log([[0.5, 0.5]])
PAIR = np.array([[0, 0, 1]])  # prompt 0: response 0 beats response 1
NOTHING = np.zeros((0, 1, 2))  # no reward models


def close(actual, expected, rel=1e-12, abs=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rel, atol=abs)


# loglinear


def test_log_softmax_against_fifty_digits():
    logits = [1000.0, 0.0, 999.0, -1e4]
    with mpmath.workdps(50):
        total = mpmath.log(sum(mpmath.exp(x) for x in logits))
        exact = [float(x - total) for x in logits]
    close(loglinear.log_softmax(np.array(logits)), exact, rel=1e-15)


def test_a_pair_by_hand():
    """theta = (ln 3, 0) from a uniform reference: h = ln 3, the policy (3/4, 1/4)."""
    problem = tabular.problem(EVEN, PAIR, np.array([[[5.0, 3.0]], [[1.0, 4.0]]]))
    close(problem.differences, [[[1, -1]]])
    close(problem.reward_margins, [[2], [-3]])
    theta = np.array([[LN3, 0.0]])
    close(loglinear.margins(problem, theta), [LN3])
    close(
        loglinear.kls(problem, theta), [LN2 - LN3 / 2 + LN2 - LN2]
    )  # ln(1/2) - (ln(3/4) + ln(1/4)) / 2
    # -log sigmoid(ln 3) + 1e-2 KL at the end of annealing, for three draws 3 KL.
    close(
        loglinear.loss(problem, METHODS["p-dpo"], theta, 1.0),
        2 * LN2 - LN3 + 0.01 * (LN2 - LN3 / 2),
    )
    thrice = problem._replace(draws=3)
    close(
        loglinear.loss(thrice, METHODS["p-dpo"], theta, 1.0), 2 * LN2 - LN3 + 0.03 * (LN2 - LN3 / 2)
    )
    # Slopes: DPO -1/4; IPO 2 (ln 3 - 1); d-DPO against the mean -1/2: -2 (-1/2 - ln 3); e-DPO: 2 is
    # nearer than -3.
    close(
        loglinear.margin_slopes(METHODS["dpo"], np.array([LN3]), problem.reward_margins, 1.0),
        [-0.25],
    )
    close(
        loglinear.margin_slopes(METHODS["ipo"], np.array([LN3]), problem.reward_margins, 1.0),
        [2 * LN3 - 2],
    )
    close(
        loglinear.margin_slopes(METHODS["mean"], np.array([LN3]), problem.reward_margins, 1.0),
        [1 + 2 * LN3],
    )
    close(
        loglinear.margin_slopes(METHODS["e-dpo"], np.array([LN3]), problem.reward_margins, 1.0),
        [2 * LN3 - 4],
    )


def test_margin_from_a_reference_by_hand():
    """Logits (ln 3, 0) where the reference says (1/4, 3/4): ln 3 less -ln 3."""
    problem = tabular.problem(np.log([[0.25, 0.75]]), PAIR, NOTHING)
    close(loglinear.margins(problem, np.array([[LN3, 0.0]])), [2 * LN3])


def test_descent_by_hand():
    """Two DPO steps, rate 2, beta 1: h = 0, then 2 (1/2) in each logit, then 2 sigmoid(-2) more."""
    path = loglinear.descend(tabular.problem(EVEN, PAIR, NOTHING), METHODS["dpo"], 1.0, 2.0, 2)
    second = 1 + 2 / (1 + math.exp(2))
    close(path - EVEN, [[[0, 0]], [[1, -1]], [[second, -second]]])


def test_descent_anneals_gamma():
    """At h = 0 the pull is 0, so the second of three steps first sees gamma, halfway: 0.00505."""
    problem = tabular.problem(EVEN, PAIR, NOTHING)
    path = loglinear.descend(problem, METHODS["p-dpo"], 1.0, 2.0, 3)
    pull = 0.00505 * (1 / (1 + math.exp(-2)) - 0.5)
    close(path[2, 0, 0] - path[1, 0, 0], 2 / (1 + math.exp(2)) - 2 * pull)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_against_central_differences(name):
    rng = np.random.default_rng(1)
    ref, theta = rng.normal(size=(2, 2, 4))
    pairs = np.array([[0, 0, 1], [0, 2, 1], [1, 3, 0], [1, 1, 2], [1, 1, 3]])
    problem = tabular.problem(ref, pairs, rng.normal(size=(3, 2, 4)) + theta - ref)._replace(
        draws=3
    )
    units = 1e-5 * np.eye(8).reshape(8, 2, 4)

    def loss(point):
        return loglinear.loss(problem, METHODS[name], point, 0.7, 0.3)

    slopes = [(loss(theta + unit) - loss(theta - unit)) / 2e-5 for unit in units]
    close(
        loglinear.gradient(problem, METHODS[name], theta, 0.7, 0.3).ravel(),
        slopes,
        rel=1e-6,
        abs=1e-8,
    )


# tabular


def test_all_pairs_by_hand():
    expected = [[x, i, j] for x in range(2) for i in range(3) for j in range(3) if i != j]
    assert tabular.all_pairs(2, 3).tolist() == expected


def test_closed_forms_by_hand():
    """r = (2 ln 3, 0) at beta 2 from uniform gives Z = (3 + 1) / 2 and the policy (3/4, 1/4)."""
    rewards, beta = np.array([[2 * LN3, 0.0]]), 2.0
    policy = tabular.optimal_policy(EVEN, rewards, beta)
    close(tabular.log_partition(EVEN, rewards, beta), [LN2])
    close(policy, [[LN3 - 2 * LN2, -2 * LN2]])
    close(tabular.implicit_rewards(policy, EVEN, beta), [[2 * LN3 - 2 * LN2, -2 * LN2]])
    close(
        tabular.preference_probability(policy, EVEN, beta), [[[0.5, 0.9], [0.1, 0.5]]]
    )  # 9 = exp(2 ln 3)
    close(tabular.advantages(policy, EVEN, np.array([[[4.0, 0.0]], [[1.0, 3.0]]])), [1, -0.5])


@pytest.mark.parametrize("beta", [1e-3, 0.1, 100.0])
def test_partition_against_fifty_digits(beta):
    rewards, ref = [3.0, -700.0, 2.9], [-1.0, -2.0, -0.7]
    with mpmath.workdps(50):
        beta_ = mpmath.mpf(beta)
        exact = mpmath.log(
            sum(mpmath.exp(p + r / beta_) for p, r in zip(ref, rewards, strict=True))
        )
    close(tabular.log_partition(np.array(ref), np.array(rewards), beta), float(exact), rel=1e-15)


def test_finite_minimum_is_the_nearest_in_forward_kl():
    """From (1/2, 1/2): forward KLs of (3/4, 1/4) and (1/10, 9/10) are 0.14 and 0.51."""
    rewards = np.array([[[0.0, math.log(9)]], [[LN3, 0.0]]])
    close(np.exp(tabular.finite_minimum(EVEN, rewards, 1.0)), [[0.75, 0.25]])
    # Losing the rare outcome costs 0.0100 ln 1e6 = 0.14 of forward KL and next to no reverse KL;
    # evening out costs 0.5 ln 5/4 + 0.49 ln 49/50 - 0.01 ln 10 = 0.08, and 0.15 of reverse KL.
    ref = np.log([[0.5, 0.49, 0.01]])
    policies = np.log([[[0.505, 0.495 - 1e-8, 1e-8]], [[0.4, 0.5, 0.1]]])
    close(np.exp(tabular.finite_minimum(ref, policies - ref, 1.0)), [[0.4, 0.5, 0.1]])


def test_opposite_rewards_leave_the_reference():
    rewards = np.array([[[1.0, -1.0]], [[-1.0, 1.0]]])
    weights, policy = tabular.maximin(EVEN, rewards, 1.0)
    close(weights, [0.5, 0.5])
    close(policy, EVEN)
    close(tabular.hull_policy(EVEN, rewards, 1.0, 0.3), EVEN)
    close(
        objectives.pessimistic_rlhf(tabular.finite_minimum(EVEN, rewards, 1.0), EVEN, rewards, 1.0),
        math.log(math.cosh(1)) - 2 * math.tanh(1),
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("beta", [0.05, 1.0, 20.0])
def test_maximin_against_a_grid_of_policies(seed, beta):
    """No policy of a grid over the triangle does better, and the grid's best is near."""
    rng = np.random.default_rng(seed)
    ref, rewards = loglinear.log_softmax(rng.normal(size=(1, 3))), rng.normal(size=(3, 1, 3))
    side = np.linspace(0, 1, 101)
    grid = np.array([(a, b, 1 - a - b) for a in side for b in side if a + b < 1 + 1e-9])
    grid = np.log(np.maximum(grid, 1e-300))
    advantages = objectives.rlhf(grid, ref, rewards, beta) - objectives.rlhf(
        ref, ref, rewards, beta
    )
    best = objectives.pessimistic_rlhf(tabular.maximin(ref, rewards, beta)[1], ref, rewards, beta)
    most = np.max(np.min(advantages, axis=0))
    assert most <= best + 1e-12
    assert best - most < 0.03 + 0.01 * beta


def test_maximin_has_no_duality_gap():
    """The value at the optimum is known to rounding, though values next to it differ by less."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        shape = rng.integers(1, 4), rng.integers(2, 6)
        ref, rewards = (
            loglinear.log_softmax(rng.normal(size=shape)),
            10 * rng.normal(size=(rng.integers(2, 5), *shape)),
        )
        beta = 10 ** rng.uniform(-2, 1)
        _, policy = tabular.maximin(ref, rewards, beta)
        dual = beta * np.mean(objectives.forward_kl(ref, policy))
        close(objectives.pessimistic_rlhf(policy, ref, rewards, beta), dual, rel=0, abs=1e-10)


EASY = [(1.0, 1.0, 2.0), (0.05, 3.0, -7.0), (30.0, 0.01, 0.5), (2.0, 1e-9, 1.0)]
HARD = [(0.0125, 70.0, 2.06), (0.01, 100.0, 10.0)]  # the KL outweighs the fit


@pytest.mark.parametrize(("beta", "gamma", "gap"), EASY + HARD)
def test_distil_two_outcomes_against_fifty_digits(beta, gamma, gap):
    """With d = theta_1 - theta_2 less the reference's: min (gap - beta d)^2 / 2 + gamma KL."""
    ref = [0.3, 0.7]
    with mpmath.workdps(50):

        def slope(d):
            first = ref[0] * mpmath.exp(d) / (ref[0] * mpmath.exp(d) + ref[1])
            return -beta * (gap - beta * d) + gamma * (first - ref[0])

        d = mpmath.findroot(
            slope, (0, gap / mpmath.mpf(beta)), solver="anderson", tol=1e-60, maxsteps=1000
        )
        exact = [float(mpmath.log(p)) for p in (ref[0] * mpmath.exp(d), ref[1])]
        total = float(mpmath.log(ref[0] * mpmath.exp(d) + ref[1]))
    policy = tabular.distil(np.log([ref]), np.array([[gap, 0.0]]), beta, gamma)
    close(policy, [np.array(exact) - total], rel=1e-9)


def test_distil_converges_where_the_kl_outweighs_the_fit():
    """Where the fit is weak, 300 nats and more lie between the start and the minimiser."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ref, rewards = loglinear.log_softmax(rng.normal(size=5)), rng.normal(size=5) * 10
        policy = tabular.distil(ref[None], rewards[None], 0.01, 100.0)[0]
        error = rewards - 0.01 * (policy - ref)
        slope = -4 * 0.01 / 5 * (error - np.mean(error)) + 100 * (np.exp(policy) - np.exp(ref))
        close(slope, 0, abs=1e-10)


def test_hull_policy_against_a_grid_of_mixtures():
    rng = np.random.default_rng(3)
    ref, rewards, beta, gamma = (
        loglinear.log_softmax(rng.normal(size=(2, 3))),
        rng.normal(size=(2, 2, 3)),
        0.5,
        0.4,
    )

    def objective(policy, weight):
        residuals = weight * rewards[0] + (1 - weight) * rewards[1] - beta * (policy - ref)
        fit = 2 * np.mean(np.var(residuals, axis=-1))
        return fit + gamma * np.mean(objectives.forward_kl(ref, policy))

    side = np.linspace(0, 1, 201)
    values = [
        objective(tabular.distil(ref, w * rewards[0] + (1 - w) * rewards[1], beta, gamma), w)
        for w in side
    ]
    reached = tabular.hull_policy(ref, rewards, beta, gamma)
    assert min(objective(reached, w) for w in np.linspace(0, 1, 20001)) == pytest.approx(
        min(values), abs=1e-6
    )


def test_minimise_on_simplex_by_hand():
    """|w - target|^2: the projection of (0.5, 0.3, -1) is (0.6, 0.4, 0)."""
    target = np.array([0.5, 0.3, -1.0])
    quadratic = lambda w: (np.sum((w - target) ** 2), 2 * (w - target), 2 * np.eye(3))  # noqa: E731
    close(simplex.minimise_on_simplex(quadratic, 3), [0.6, 0.4, 0])


# bags of words


def test_bags_by_hand():
    """abb of the alphabet abc, with logits (ln 2, ln 3, ln 5): 2/10 (3/10)^2."""
    theta, count = np.log([2.0, 3.0, 5.0]), bag_of_words.counts([0, 1, 1], 3)
    assert count.tolist() == [1, 2, 0]
    close(bag_of_words.log_prob(theta, count), math.log(0.018))
    close(bag_of_words.log_prob_bound(theta, count), math.log(18 / 125))
    problem = bag_of_words.problem(theta, [count], [[0, 0, 3]], np.zeros((0, 1)))
    close(problem.differences, [[[1, 2, -3]]])
    assert problem.draws == 3 and problem.ref.shape == (1, 3)
    uniform = loglinear.kls(problem, np.zeros((1, 3)))  # three draws of sum p ln 3p
    close(uniform, [3 * (LN3 + 0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.5 * math.log(0.5))])


def test_bags_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"one length, not \[1, 2\]"):
        bag_of_words.problem(np.zeros(2), [[1, 1]], [[0, 1]], np.zeros((0, 1)))


# the bandit


def test_pairs_of_arms_by_hand():
    assert bandit.chain(4).tolist() == [[0, 1], [1, 2], [2, 3]]
    assert bandit.closure(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert bandit.spread(np.array([1.0, -2.0, 0.5])) == 3.0


@pytest.mark.parametrize("arms", [2, 3, 4, 9])
def test_ipo_solution_in_closed_form(arms):
    """Equal steps of 1 / tau on the chain, of 2 / (n tau) on its closure."""
    centred = (arms - 1) / 2 - np.arange(arms)
    close(bandit.ipo_solution(bandit.chain(arms), arms, 0.5), 2 * centred)
    close(bandit.ipo_solution(bandit.closure(arms), arms, 0.5), 4 / arms * centred)


def test_ipo_loss_by_hand():
    """Steps 1 and 2, targets 2: 1 + 0; the closure's third step is 3: 1 more."""
    weights = np.array([3.0, 2.0, 0.0])
    assert bandit.ipo_loss(weights, bandit.chain(3), 0.5) == 1.0
    assert bandit.ipo_loss(weights, bandit.closure(3), 0.5) == 2.0


def test_pessimistic_dpo_loss_by_hand():
    """(3/4, 1/4) at beta 1, alpha 2: 2 ln 2 - ln 3 - (ln 3/4 + ln 1/4) / 2."""
    expected = 2 * LN2 - LN3 - (LN3 - 4 * LN2) / 2
    close(bandit.pessimistic_dpo_loss(np.array([LN3, 0.0]), bandit.chain(2), 1.0, 2.0), expected)


def test_pessimistic_dpo_gradient_against_central_differences():
    weights, pairs = np.array([0.3, -1.0, 0.4, 2.0]), bandit.closure(4)[:-1]
    losses = [
        [
            bandit.pessimistic_dpo_loss(weights + sign * 1e-5 * unit, pairs, 3.0, 7.0)
            for unit in np.eye(4)
        ]
        for sign in (1, -1)
    ]
    gradient = bandit.pessimistic_dpo_gradient(weights, pairs, 3.0, 7.0)
    close(gradient, np.subtract(*losses) / 2e-5, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 5.0), (0.1, 1.2), (30.0, 50.0), (3.0, 1000.0)])
def test_pessimistic_dpo_on_two_arms_against_fifty_digits(beta, alpha):
    """With d = psi_1 - psi_2 the slope vanishes where sigmoid(-beta d) = tanh(d / 2) / alpha."""
    with mpmath.workdps(50):
        slope = lambda d: 1 / (1 + mpmath.exp(beta * d)) - mpmath.tanh(d / 2) / alpha  # noqa: E731
        d = mpmath.findroot(slope, (0, 100), solver="bisect", maxsteps=300)
    weights = bandit.pessimistic_dpo_solution(bandit.chain(2), 2, beta, alpha)
    close(weights, [float(d) / 2, -float(d) / 2], rel=1e-8)


def test_pessimistic_dpo_on_three_arms_against_a_grid():
    pairs, side = bandit.chain(3), np.linspace(-2, 2, 81)
    grid = [np.array([a, b, -a - b]) for a in side for b in side]
    best = min(grid, key=lambda weights: bandit.pessimistic_dpo_loss(weights, pairs, 1.0, 5.0))
    close(bandit.pessimistic_dpo_solution(pairs, 3, 1.0, 5.0), best, abs=0.06)


@pytest.mark.parametrize(("beta", "alpha"), [(3.0, 20.0), (30.0, 5.0)])
def test_the_closure_moves_p_dpo_unless_its_kl_is_to_the_reference(beta, alpha):
    """Section 7.2's "imperceptible" holds for summed losses and KL(uniform || pi).

    It does not hold for section 7.1's on pairs.
    """

    def moved(solve):
        chain, closure = (
            np.exp(loglinear.log_softmax(solve(pairs(3))))
            for pairs in (bandit.chain, bandit.closure)
        )
        return np.max(np.abs(chain - closure))

    def exact_kl(pairs):
        problem = tabular.problem(
            np.zeros((1, 3)), np.insert(pairs, 0, 0, axis=1), np.zeros((0, 1, 3))
        )
        weight = beta / alpha / len(pairs)
        method = METHODS["p-dpo"]._replace(gamma=(weight, weight))
        return loglinear.descend(problem, method, beta, 1 / (beta**2 + weight), 2000)[-1, 0]

    assert moved(exact_kl) < 0.002
    assert moved(lambda pairs: bandit.pessimistic_dpo_solution(pairs, 3, beta, alpha)) > 0.02
