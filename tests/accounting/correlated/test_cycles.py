"""Correlated noise is charged as one Gaussian a cycle, at b times the rate."""

from typing import Any

import dp_accounting
import numpy as np
import pytest

import dp_ilg
from dp_ilg.accounting.correlated import cycles
from dp_ilg.auditing import delta_lower_bound
from dp_ilg.training.certificate import _MOST_STEPS


def banded(**facts):
    given = dict(noise_multiplier=1.0, delta=1e-5, num_examples=1000, batch_size=50)
    return dp_ilg.plan_privacy(**{**given, "num_steps": 10, "bands": 4, **facts})


def test_event_composes_cycles_at_b_times_the_rate():
    gaussian = dp_accounting.GaussianDpEvent(1.0)
    step = dp_accounting.PoissonSampledDpEvent(0.2, gaussian)
    one = dp_accounting.SelfComposedDpEvent
    assert banded().event() == dp_accounting.ComposedDpEvent([one(step, 3)])
    for steps, count in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        event: Any = banded().event(steps)
        assert event.events[0].count == count


def test_a_cycle_is_charged_with_its_least_noise():
    plan = banded(schedule=[3.0, 3, 3, 2, 5, 5, 5, 5, 1, 7], num_stages=10)
    found = [(z, count) for _, z, count in cycles.samples(plan)]
    np.testing.assert_allclose(found, [(2, 1), (5, 1), (1, 1)], rtol=1e-12)
    assert cycles.samples(plan, 3)[0].noise_multiplier == pytest.approx(3.0)


def test_full_parts_are_not_sampled():
    plan = banded(batch_size=250)
    assert cycles.sampling_rate(plan) == 1.0
    alone = dp_accounting.pld.PLDAccountant().compose(plan.event())
    assert plan.epsilon() == pytest.approx(alone.get_epsilon(1e-5), rel=2e-3)


def test_epsilon_is_between_that_of_the_cycles_and_an_independent_lower_bound():
    plan = banded(num_steps=400)
    epsilon = plan.epsilon()
    least = delta_lower_bound(cycles.samples(plan), epsilon)
    assert 0.9 * plan.delta < least <= plan.delta
    wrong = [(s.rate, s.noise_multiplier * 0.97, s.count) for s in cycles.samples(plan)]
    assert delta_lower_bound(wrong, epsilon) > plan.delta
    assert plan.num_steps < _MOST_STEPS


def test_two_steps_of_two_bands_are_one_gaussian_of_that_multiplier():
    """Integrated in the plane: both fresh draws, an example in the first part."""
    plan = banded(num_steps=2, bands=2, batch_size=250, noise_multiplier=1.5)
    sigma = plan.gradient_noise_multipliers[0] * np.sqrt(1 - plan.score_budget)
    shift = np.array(plan.strategy) / sigma  # where it is drawn, probability 2 q = 1/2
    axis = np.linspace(-9, 9, 1201)
    x, y = np.meshgrid(axis, axis)
    without = np.exp(-(x**2 + y**2) / 2) / (2 * np.pi) * (axis[1] - axis[0]) ** 2
    drawn = np.exp(x * shift[0] + y * shift[1] - shift @ shift / 2)
    for epsilon in (0.1, 0.3):
        excess = without * ((1 + drawn) / 2 - np.exp(epsilon))
        found = delta_lower_bound(cycles.samples(plan), epsilon)
        assert found == pytest.approx(np.maximum(excess, 0).sum(), rel=2e-3)


def test_statement_says_parts_bands_and_how_often():
    text = str(banded(num_steps=400, noise_multiplier=2.0).statement())
    for words in ("one of 4 parts", "probability 0.2", "of the 3 before", "4 steps"):
        assert words in text, words
    facts = banded().statement().as_dict()
    assert facts["sampling"] == "cyclic poisson" and facts["bands"] == 4
