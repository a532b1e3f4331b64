"""Lower bounds on epsilon: against a formula, jax_privacy, and the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_ilg.auditing import bounds
from dp_ilg.auditing.bounds import epsilon_lower_bound

REPEATS = 300
LEVEL = 1e-3  # of the statistical tests here


def gaussian_epsilon(mu, delta):
    """The epsilon of a Gaussian mechanism of distance mu (Balle and Wang 2018)."""
    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        at = stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(
            -mu / 2 - e / mu
        )
        low, high = (e, high) if at > delta else (low, e)
    return low


def test_a_perfect_test_gives_the_formula_of_clopper_and_pearson():
    found = epsilon_lower_bound(np.ones(1000), np.zeros(1000), threshold=0.5)
    never = 1 - 0.025 ** (1 / 1000)  # largest rate that shows 0 of 1000 at 2.5 %
    assert found.epsilon == pytest.approx(math.log((1 - never) / never), rel=1e-12)
    assert (found.true_positive_rate, found.false_positive_rate) == (1, 0)
    halved = epsilon_lower_bound(np.ones(1000), np.zeros(1000))
    assert halved.in_trials == halved.out_trials == 500
    assert halved.epsilon < found.epsilon


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.05])
@pytest.mark.parametrize("mu", [0.5, 2.0, 20.0])
def test_agrees_with_jax_privacy(mu, delta):
    theirs = pytest.importorskip("jax_privacy.auditing")
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(mu, 1, 600), rng.normal(0, 1, 500)
    strategy = theirs.Explicit(mu / 2)
    expected = theirs.CanaryScoreAuditor(inside, outside).epsilon_clopper_pearson(
        0.05, delta, one_sided=False, threshold_strategy=strategy
    )
    found = epsilon_lower_bound(inside, outside, delta=delta, threshold=mu / 2)
    assert found.epsilon == pytest.approx(expected, abs=1e-9)
    assert found.epsilon > 0 or mu == 0.5


def exceeded(bound, mu=1.0, delta=0.1, trials=120):
    """How often a way of bounding says more than the truth."""
    truth = gaussian_epsilon(mu, delta)
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(REPEATS, 2, trials))
    return sum(bound(a + mu, b, delta) > truth for a, b in draws)


def test_the_bound_is_too_high_in_at_most_five_percent_of_audits():
    """Level 0.001; the same test refuses a threshold chosen on the tested scores."""
    most = stats.binom.isf(LEVEL, REPEATS, 0.05)
    low = lambda a, b, delta: epsilon_lower_bound(a, b, delta=delta).epsilon  # noqa: E731

    def wrong(a, b, delta):
        cut, _ = bounds._best_test(a, b, delta, 0.05)
        return epsilon_lower_bound(a, b, delta=delta, threshold=cut).epsilon

    # without the confidence bounds: what the rates themselves say
    def rates(a, b, delta):
        found = epsilon_lower_bound(a, b, delta=delta)
        false = max(found.false_positive_rate, 1 / found.out_trials)
        ratio = (found.true_positive_rate - delta) / false
        return math.log(max(ratio, 1))

    assert exceeded(low) <= most
    assert exceeded(rates) > most
    assert exceeded(wrong) > exceeded(low)


def test_many_trials_come_near_the_truth_from_below():
    mu, delta = 1.0, 1e-2
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(mu, 1, 200_000), rng.normal(0, 1, 200_000)
    found = epsilon_lower_bound(inside, outside, delta=delta)
    truth = gaussian_epsilon(mu, delta)
    assert 0.8 * truth < found.epsilon < truth


def test_lower_scores_with_the_canary_tell_as_much():
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(3, 1, 400), rng.normal(0, 1, 400)
    up, down = (
        epsilon_lower_bound(sign * inside, sign * outside) for sign in (1.0, -1.0)
    )
    assert up.higher_is_in and not down.higher_is_in
    assert up.epsilon == pytest.approx(down.epsilon) and up.epsilon > 1


def test_equal_scores_tell_nothing():
    assert epsilon_lower_bound(np.ones(50), np.ones(50)).epsilon == 0
    assert epsilon_lower_bound(np.zeros(50), np.ones(50), delta=0.999).epsilon == 0


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        ([[1.0]], {}, "in_scores has shape"),
        ([], {}, "in_scores has shape"),
        ([1.0, np.nan, 2.0], {}, "1 scores that are not finite"),
        ([1.0], {}, "in_scores has 1 scores, too few"),
        ([1.0, 2.0], {"delta": -1}, "delta is -1"),
        ([1.0, 2.0], {"significance": 1}, "significance is 1"),
        ([1.0, 2.0], {"choosing_fraction": 0}, "choosing_fraction is 0"),
    ],
)
def test_mistakes_are_one_sentence(scores, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        epsilon_lower_bound(scores, [0.0, 1.0], **options)
    assert ". " not in str(caught.value)
