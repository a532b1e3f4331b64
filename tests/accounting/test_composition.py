"""Strong composition, the moments accountant, and the price of choosing the best."""

import itertools
import math
from typing import Any

import dp_accounting
import jax
import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.accounting import accountants, composition

PAPER: dict[str, Any] = dict(
    noise_multiplier=4.0, sampling_prob=0.01, num_steps=10_000, delta=1e-5
)
RULES = [
    composition.strong_composition,
    composition.claimed_strong_composition,
    composition.moments_epsilon,
]


def sampled(noise_multiplier, sampling_prob, num_steps, delta=None):
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian)
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def test_the_papers_example_to_the_printed_digits():
    """Abadi et al. section 5.1: 1.26 by moments against 9.34 by strong composition."""
    assert f"{composition.moments_epsilon(**PAPER):.2f}" == "1.26"
    assert f"{composition.claimed_strong_composition(**PAPER):.2f}" == "9.34"


def test_of_the_forms_tried_only_one_gives_the_printed_number():
    """The rigorous amplification, and the theorem's own second term, do not."""
    q, z, steps, delta = 0.01, 4.0, 10_000, 1e-5

    def least(amplified, second, used):
        found = []
        for d in np.geomspace(1e-12, 0.999 * delta / (q * steps), 4000):
            rest = delta - used(d)
            if rest <= 0:
                continue
            e = amplified(math.sqrt(2 * math.log(1.25 / d)) / z)
            first = e * math.sqrt(2 * steps * math.log(1 / rest))
            found.append(first + steps * e * second(e))
        return f"{min(found):.2f}"

    amplify = {"q e": lambda e: q * e, "exact": lambda e: math.log1p(q * math.expm1(e))}
    second = {"e": float, "exp(e) - 1": math.expm1, "half": lambda e: e / 2}
    use = {"T q d": lambda d: steps * q * d, "T d": lambda d: steps * d}
    names = itertools.product(amplify, second, use)
    found = {n: least(amplify[n[0]], second[n[1]], use[n[2]]) for n in names}
    assert [n for n, printed in found.items() if printed == "9.34"] == [
        ("q e", "e", "T q d")
    ]


@pytest.mark.parametrize("z, q, steps", [(4.0, 0.01, 10_000), (1.0, 0.01, 500)])
def test_from_tight_to_loose(z, q, steps):
    facts: dict[str, Any] = dict(
        noise_multiplier=z, sampling_prob=q, num_steps=steps, delta=1e-5
    )
    event = sampled(z, q, steps)
    tight = accountants.epsilon(event, 1e-5)
    renyi = accountants.epsilon(event, 1e-5, accountant="rdp")
    moments = composition.moments_epsilon(**facts)
    strong = composition.strong_composition(**facts)
    assert tight < renyi < moments < strong


def test_strong_composition_is_a_bound_for_a_single_step():
    """At T = 1 it must not fall below the exact curve; the claimed one does."""
    facts: dict[str, Any] = dict(noise_multiplier=1.0, sampling_prob=0.5, delta=1e-5)
    exact = accountants.epsilon(sampled(1.0, 0.5, 1), 1e-5)
    assert composition.strong_composition(num_steps=1, **facts) > exact
    assert 0.5 * math.sqrt(2 * math.log(1.25e5)) < exact  # q e is no bound on a step


@pytest.mark.parametrize("rule", RULES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name, value",
    [("noise_multiplier", 0.0), ("sampling_prob", 1.0), ("num_steps", 0), ("delta", 1)],
)
def test_bad_numbers_are_one_sentence(rule, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must"):
        rule(**PAPER | {name: value})


# --- The cost of choosing the best run ----------------------------------------------


def test_search_costs_what_dp_accountings_event_costs():
    event = sampled(1.0, 0.01, 300)
    for runs, shape in (("poisson", math.inf), ("geometric", 1), ("logarithmic", 0)):
        accountant = dp_accounting.rdp.RdpAccountant()
        inner = dp_accounting.dp_event.RepeatAndSelectDpEvent(event, 10, shape)
        accountant.compose(inner)
        cost = composition.search_epsilon(event, 1e-5, expected_runs=10, runs=runs)
        assert cost == accountant.get_epsilon(1e-5)
        assert composition.search_event(event, expected_runs=10, runs=runs) == inner


def test_a_search_costs_more_than_a_run_and_less_than_showing_all_of_them():
    plan = dp_ilg.plan_privacy(
        epsilon=1.0, delta=1e-5, num_examples=60_000, batch_size=600, num_steps=100
    )
    costs = [
        composition.search_epsilon(plan.event(), 1e-5, expected_runs=k)
        for k in (1, 10, 100)
    ]
    shown = dp_accounting.SelfComposedDpEvent(plan.event(), 100)
    assert plan.epsilon() < costs[0] < costs[1] < costs[2]
    assert costs[2] < accountants.epsilon(shown, 1e-5)


@pytest.mark.parametrize("runs", composition.SELECTIONS)
def test_number_of_runs_has_the_distribution_that_is_charged(runs):
    """Pearson's test at level 1e-3 on 600 draws; a mean 60 % off is rejected."""
    keys = (jax.numpy.array([3, k], "uint32") for k in range(600))
    draws = np.array([composition.draw_num_runs(5, key=k, runs=runs) for k in keys])
    counts = np.array([*(np.sum(draws == k) for k in range(20)), np.sum(draws >= 20)])

    def p_value(mean):
        laws = {
            "poisson": stats.poisson(mean),
            "geometric": stats.geom(1 / mean),
            "logarithmic": stats.logser(composition._logarithmic(mean)),
        }
        law: Any = laws[runs]
        chances = law.pmf(np.arange(20))
        expected = 600 * np.array([*chances, 1 - chances.sum()])
        bins = np.cumsum(expected > 5)  # rare values join their neighbour to the left
        seen, wanted = np.bincount(bins, counts), np.bincount(bins, expected)
        seen, wanted = seen[wanted > 0], wanted[wanted > 0]
        statistic = np.sum((seen - wanted) ** 2 / wanted)
        return stats.chi2.sf(statistic, len(seen) - 1)

    assert p_value(5.0) > 1e-3
    assert p_value(8.0) < 1e-3 and p_value(2.0) < 1e-3


@pytest.mark.parametrize("mean", [1.001, 5.0, 300.0])
def test_logarithmic_distribution_has_the_mean_asked_for(mean):
    found = stats.logser(composition._logarithmic(mean)).mean()
    assert found == pytest.approx(mean, rel=1e-6)


def test_bad_searches_are_one_sentence():
    event = dp_accounting.GaussianDpEvent(1.0)
    with pytest.raises(ValueError, match="expected_runs is 0.5, but must be at least"):
        composition.search_epsilon(event, 1e-5, expected_runs=0.5)
    with pytest.raises(ValueError, match="runs is 'fixed', but must be one of"):
        composition.search_event(event, expected_runs=5, runs="fixed")
    with pytest.raises(ValueError, match="delta is 0, but must lie between"):
        composition.search_epsilon(event, 0, expected_runs=5)
    with pytest.raises(TypeError, match="key must be one PRNG key, not int"):
        composition.draw_num_runs(5, key=0)
