"""The privacy filter: what it admits never costs more than it says."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from dp_accounting import ComposedDpEvent, GaussianDpEvent, PoissonSampledDpEvent, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import dp_ilg
from dp_ilg.accounting.filters import FilterExhausted, PrivacyFilter

FACTS: dict[str, Any] = dict(num_examples=25_000, batch_size=1_000)
STEPS: dict[str, Any] = dict(batch_size=1_000)  # the filter knows the examples
PLANNED = dp_ilg.plan_privacy(epsilon=1.0, delta=1e-5, num_steps=200, **FACTS)


def _stage(noise_multiplier: float, num_steps: int, **other) -> dp_ilg.PrivacyPlan:
    facts: dict[str, Any] = FACTS | dict(delta=1e-5) | other
    return dp_ilg.plan_privacy(
        noise_multiplier=noise_multiplier, num_steps=num_steps, **facts
    )


def test_a_charge_is_dp_accountings_divergence():
    found = PrivacyFilter(1.0, PLANNED)
    accountant = rdp.RdpAccountant([found.order])
    event = PoissonSampledDpEvent(0.04, GaussianDpEvent(2.0))
    accountant.compose(event, 7)
    expected = accountant._rdp[0]
    assert found.cost(_stage(2.0, 7)) == pytest.approx(expected, rel=1e-6)
    assert found.cost(_stage(2.0, 7)) >= expected * (1 - 1e-12)
    prior = _stage(2.0, 7, prior_releases=(("a sum", 20.0),))
    more = expected + found.order / (2 * 20.0**2)
    assert found.cost(prior) == pytest.approx(more, rel=1e-6)


def test_the_budget_is_dp_accountings_conversion():
    for epsilon in (0.3, 1.0, 8.0):
        found = PrivacyFilter(epsilon, PLANNED)
        left = PLANNED.accounted_delta
        back = rdp.compute_epsilon([found.order], [found.budget], left)[0]
        assert back == pytest.approx(epsilon - PLANNED.noise_charge.epsilon, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.3, 8.0),
    st.lists(
        st.tuples(st.floats(0.6, 12.0), st.integers(1, 80), st.integers(1, 4)),
        min_size=1,
        max_size=6,
    ),
)
def test_whatever_is_admitted_stays_below_epsilon(epsilon, wishes):
    """By loss distributions, which are tighter and know nothing of the filter."""
    found = PrivacyFilter(epsilon, PLANNED)
    admitted = []
    for noise, steps, part in wishes:
        plan = _stage(noise, steps, batch_size=1_000 * part)
        spent = found.spent
        try:
            found.admit(plan)
        except FilterExhausted:
            assert found.spent == spent and found.cost(plan) > found.left
        else:
            admitted.append(plan.event())
    if admitted:
        whole = ComposedDpEvent(admitted)
        assert dp_ilg.accounting.epsilon(whole, 1e-5) <= epsilon


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 8.0])
def test_one_stage_of_everything_costs_some_percent_of_noise(epsilon):
    """What one order instead of the whole distribution costs (README has it)."""
    facts: dict[str, Any] = STEPS | dict(num_steps=200)
    fixed = dp_ilg.plan_privacy(epsilon=epsilon, delta=1e-5, num_steps=200, **FACTS)
    found = PrivacyFilter(epsilon, fixed)
    plan = found.stage(1, **facts)
    found.admit(plan)
    ratio = plan.noise_multipliers[0] / fixed.noise_multipliers[0]
    assert 1.02 < ratio < 1.12
    assert found.left < 1e-6 * found.budget
    with pytest.raises(FilterExhausted, match=r"too little for 200 steps"):
        found.stage(0.1, **facts)


def test_ten_shares_of_a_tenth_are_admitted():
    found = PrivacyFilter(1.0, PLANNED)
    for _ in range(10):
        found.admit(found.stage(0.1, num_steps=20, **STEPS))
    assert found.left < 1e-6 * found.budget
    with pytest.raises(FilterExhausted, match="times the budget of epsilon 1"):
        found.admit(_stage(50.0, 1))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(1, 40))
def test_all_that_is_left_is_admitted(share, steps):
    found = PrivacyFilter(1.0, PLANNED)
    found.admit(found.stage(share, num_steps=steps, **STEPS))
    found.admit(found.stage(1, num_steps=steps, **STEPS))
    assert found.spent <= found.budget * (1 + 1e-12)


def test_rounding_of_tiny_rates_is_charged():
    """log(1 + tiny) keeps 16 digits of 1, not of tiny; the sum is far below the terms.

    At order 2 the moment is 1 + q^2 (exp(1 / z^2) - 1), to be had without rounding.
    """
    q, z, steps = 1e-5, 10.0, 1_000
    facts = dict(num_examples=100_000, batch_size=1)
    planned = _stage(z, steps, **facts)
    found = PrivacyFilter(1.0, planned)
    found.order = 2.0
    exact = steps * math.log1p(q**2 * math.expm1(1 / z**2))
    assert found.cost(planned) >= exact


def test_a_filter_is_not_copied():
    found = PrivacyFilter(1.0, PLANNED)
    for again in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="would spend one budget twice"):
            again(found)
    with pytest.raises(AttributeError):
        found.spent = 0.0  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(found).startswith("PrivacyFilter(epsilon=1, delta=1e-05, order=")


def _hockey_stick(epsilon: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The delta of one Gaussian of multiplier z at any epsilon, negative ones too."""
    tail = stats.norm.sf(epsilon * z - 0.5 / z)
    return tail - np.exp(epsilon) * stats.norm.sf(epsilon * z + 0.5 / z)


def _adaptive_delta(epsilon: float, first: float, second) -> float:
    """Delta of a Gaussian, then of one whose multiplier follows from what it gave."""
    x = np.linspace(-12 * first, 1 + 12 * first, 200_001)
    loss = (2 * x - 1) / (2 * first**2)
    density = stats.norm.pdf(x, 1, first)
    # p1 H(e - loss): E_p1[max(...)] of both stages together
    both = density * _hockey_stick(epsilon - loss, second(x))
    return float(np.sum(both) * (x[1] - x[0]))


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 3.0])
def test_stages_that_follow_a_release_keep_delta(threshold):
    """An adversary spends all the rest or next to nothing, by the first release.

    Exact, by integration; with twice the budget delta is exceeded.
    """
    everyone: dict[str, Any] = dict(batch_size=10, num_steps=1, score_budget=0.0)
    planned = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=10, **everyone)
    for factor, holds in ((1, True), (2, False)):
        found = PrivacyFilter(2.0, planned)
        found.budget *= factor
        first = found.stage(0.4, **everyone).noise_multipliers[0]
        found.admit(found.stage(0.4, **everyone))
        rest = found.stage(1, **everyone).noise_multipliers[0]

        def second(x, first=first, rest=rest):
            return np.where(x > threshold * first, rest, 1e4)

        delta = _adaptive_delta(2.0, first, second)
        assert (delta <= 1e-5) == holds, (factor, delta)


def test_what_is_refused_in_one_sentence():
    found = PrivacyFilter(1.0, PLANNED)
    cases = [
        (TypeError, lambda: PrivacyFilter(1.0, None), "planned is NoneType"),
        (ValueError, lambda: PrivacyFilter(-1, PLANNED), "epsilon is -1"),
        (ValueError, lambda: PrivacyFilter(math.nan, PLANNED), "epsilon is nan"),
        (ValueError, lambda: PrivacyFilter(1e-9, PLANNED), "too small for Renyi"),
        (TypeError, lambda: found.admit("plan"), "plan is str"),
        (ValueError, lambda: found.stage(0, num_steps=1, **STEPS), "share is 0"),
        (ValueError, lambda: found.stage(1.5, num_steps=1, **STEPS), "share is 1.5"),
        (
            TypeError,
            lambda: found.stage(0.5, num_steps=1, epsilon=3, **STEPS),
            "got epsilon, which is the filter's",
        ),
        (
            ValueError,
            lambda: found.admit(_stage(2.0, 3, neighboring_relation="replace_one")),
            "planned for neighboring_relation 'replace_one', but",
        ),
        (FilterExhausted, lambda: found.admit(_stage(0, 1)), "costs inf times"),
        (
            ValueError,
            lambda: found.admit(_stage(9.0, 3, num_examples=50_000)),
            "planned for num_examples 50000, but the filter for 25000",
        ),
        (
            FilterExhausted,
            lambda: found.stage(
                0.1, num_steps=3, prior_releases=(("PCA", 1.0),), **STEPS
            ),
            "too little for 3 steps and the release of PCA",
        ),
        (TypeError, lambda: found.stage(0.5, **STEPS), "lacks num_steps"),
        (TypeError, lambda: found.stage(0.5, steps=1, **STEPS), "got steps, which is"),
        (ValueError, lambda: found.stage([1, 1], num_steps=1, **STEPS), "share is"),
        (ValueError, lambda: PrivacyFilter(1, _stage(1e-200, 1)), "hardly any noise"),
    ]
    for kind, call, words in cases:
        with pytest.raises(kind) as caught:
            call()
        text = str(caught.value)
        assert words in text and text.endswith(".") and ". " not in text, text
    assert found.spent == 0
