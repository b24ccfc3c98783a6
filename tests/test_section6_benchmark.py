"""The benchmark of the bandit study: verdicts on made-up differences, and one small study."""

import numpy as np
import pytest

from benchmarks.section6.__main__ import interval
from benchmarks.section6.variations import BETAS, Variation, run
from benchmarks.section6.verdicts import Claim, at, between_methods, verdicts
from minipref.methods import METHODS
from reference.worlds import Settings
from scale.paper import claims

NOISE = np.random.default_rng(0).normal(size=100)
NOISE -= NOISE.mean()


def claim(*tests):
    """A claim of these tests, given as (mean difference, at least)."""
    made = [at(0.2, f"{i}", NOISE + mean, least) for i, (mean, least) in enumerate(tests)]
    return Claim("made up", lambda cells, rhos: iter(made))


@pytest.mark.parametrize(
    "tests, word",
    [
        ([(1.0, 0.0), (2.0, 0.0)], "confirmed"),
        ([(1.0, 0.0), (0.1, 0.0)], "undecided"),
        ([(1.0, 0.0), (-1.0, 0.0)], "refuted"),
        ([(-0.1, -1.0)], "confirmed"),  # within 1 of 0
        ([(0.5, 1.0)], "refuted"),
    ],
)
def test_a_claim_is_confirmed_by_all_of_its_tests_and_refuted_by_one(tests, word):
    [verdict] = verdicts({}, (), [claim(*tests)])
    assert verdict.word == word
    found = [contrast.mean for contrast in verdict.contrasts]
    np.testing.assert_allclose(found, [mean for mean, _ in tests])


def test_holm_adjusts_over_the_tests_of_all_claims():
    """p = .0023 alone; beside 9 others it is .023, which is not below .01."""
    barely = claim((0.305, 0.0))
    assert verdicts({}, (), [barely])[0].word == "confirmed"
    others = [claim((0.0, 0.0))] * 9
    assert verdicts({}, (), [barely, *others])[0].word == "undecided"


def test_a_study_reports_the_worlds_that_did_not_choose_beta():
    small = Settings(prompts=4, responses=3, qualities=2, pairs=20)
    methods = {name: METHODS[name] for name in ("dpo", "d-dpo")}
    study = run(Variation("small", small, methods, rhos=(0.5,), worlds=6))
    cell = study.cells[0.5, "d-dpo"]
    assert cell.outcomes.advantage.shape == (3, len(BETAS))
    np.testing.assert_array_equal(cell.values("advantage"), cell.outcomes.advantage[:, cell.best])
    claim = claims.Claim("distillation helps", ("d-dpo",), ("dpo", "d-dpo"))
    [one, *others] = between_methods(claim).differences(study.cells, (0.5,))
    assert one.what == "d-dpo - dpo at 0.5" and not others
    assert str(interval(np.array([1.0, 3.0]))) == "+2.000 ±12.706"  # Student's, one degree
