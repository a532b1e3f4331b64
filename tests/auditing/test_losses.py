"""The lower bound on delta stays below closed forms, and close to them."""

import math

import pytest
from scipy import special

from dp_ilg.auditing import delta_lower_bound


def log_delta_of_gaussian(z: float, epsilon: float) -> float:
    """log of P(L > epsilon) - e^epsilon Q(L > epsilon), for one Gaussian."""
    one = special.log_ndtr(0.5 / z - epsilon * z)
    other = epsilon + special.log_ndtr(-0.5 / z - epsilon * z)
    return one + math.log(-math.expm1(other - one))


@pytest.mark.parametrize("epsilon", [0.3, 2.0, 8.0, 11.5])
@pytest.mark.parametrize("steps", [1, 25, 400])
def test_it_is_just_below_the_exact_delta_of_composed_gaussians(epsilon, steps):
    true = math.exp(log_delta_of_gaussian(1.0, epsilon))
    found = delta_lower_bound([(1.0, math.sqrt(steps), steps)], epsilon)
    assert 0.97 * true < found <= true


def test_two_kinds_of_steps_are_composed():
    true = math.exp(log_delta_of_gaussian(1.0, 3.0))
    kinds = [(1.0, math.sqrt(2), 1), (1.0, 2.0, 2)]
    assert 0.99 * true < delta_lower_bound(kinds, 3.0) <= true


def test_it_is_just_below_the_exact_delta_of_one_sampled_step():
    q, z, epsilon = 0.1, 0.8, 1.5
    cut = z * z * math.log((math.exp(epsilon) - 1 + q) / q) + 0.5
    without, there = special.ndtr(-cut / z), special.ndtr((1 - cut) / z)
    true = (1 - q) * without + q * there - math.exp(epsilon) * without
    found = delta_lower_bound([(q, z, 1)], epsilon)
    assert 0.999 * true < found <= true


def test_a_claim_that_is_three_percent_too_small_is_refuted():
    delta = 1e-12
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        above = log_delta_of_gaussian(1.0, middle) > math.log(delta)
        low, high = (middle, high) if above else (low, middle)
    assert delta_lower_bound([(1.0, 10.0, 100)], high) <= delta
    assert delta_lower_bound([(1.0, 10.0, 100)], 0.97 * high) > 1.5 * delta


@pytest.mark.parametrize(
    "steps", [[], [(0.0, 1.0, 1)], [(0.1, 0.0, 1)], [(0.1, 1.0, 0)]]
)
def test_bad_steps_are_refused(steps):
    with pytest.raises(ValueError):
        delta_lower_bound(steps, 1.0)


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, math.inf])
def test_bad_claims_are_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon is"):
        delta_lower_bound([(0.1, 1.0, 1)], epsilon)
