"""How often somebody can be right about one example: bounds against the best attack."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statements import membership

FACTS = dict(delta=1e-5, l2_clip_norm=1.0, score_budget=0.0, exact_noise=True)


def a_plan(z, *, batch_size=10, steps=10, **changes):
    sizes = dict(num_examples=100, batch_size=batch_size, num_steps=steps)
    return PrivacyPlan(**FACTS, **sizes, stages=((steps, z),), **changes)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 1e-3), (3.0, 0.2)])
def test_the_two_numbers_alone_allow_what_a_mechanism_reaches(epsilon, delta):
    # with probability delta it tells; else randomised response, which is tight
    reached = delta + (1 - delta) * math.exp(epsilon) / (1 + math.exp(epsilon))
    assert membership.right_guesses(epsilon, delta) == pytest.approx(reached, rel=1e-12)
    assert membership.right_guesses(math.inf, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("relation", "moved"), [("add_or_remove_one", 1), ("replace_one", 2)]
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_without_sampling_the_best_attack_is_known(relation, moved, accountant):
    plan = a_plan(
        4.0,
        batch_size=100,
        steps=3,
        neighboring_relation=relation,
        accountant=accountant,
    )
    exact = stats.norm.cdf(moved * math.sqrt(3) / (2 * 4.0))
    found = membership.right_guesses_of(plan)
    assert exact <= found < exact + 1e-9
    assert found < membership.right_guesses(plan.epsilon(), plan.delta)


def best_attack(z, q, steps, trials=100_000, seed=0):
    """Share of right guesses of the likelihood ratio test, simulated."""
    rng = np.random.default_rng(seed)
    loss = {}
    for member in (0, 1):
        took_part = rng.random((trials, steps)) < q * member
        seen = took_part + z * rng.normal(size=(trials, steps))
        ratio = np.exp((2 * seen - 1) / (2 * z * z))
        loss[member] = np.log1p(q * (ratio - 1)).sum(1)
    return 0.5 * np.mean(loss[1] > 0) + 0.5 * np.mean(loss[0] <= 0)


@pytest.mark.parametrize("steps", [None, 4])
def test_no_attack_is_right_more_often_and_the_best_one_nearly_as_often(steps):
    plan = a_plan(0.8)
    found = membership.right_guesses_of(plan, steps)
    reached = best_attack(0.8, 0.1, steps or 10)
    deviation = 0.5 / math.sqrt(100_000)  # at most, of the mean of two shares
    assert (
        reached - 4 * deviation < found < reached + 4 * deviation + 1e-3
    )  # level 6e-5
    assert found < membership.right_guesses(plan.epsilon(steps), plan.delta) - 0.05


def test_cut_draws_and_stages_are_no_less_than_what_they_contain():
    plain = membership.right_guesses_of(a_plan(1.0))
    cut = membership.right_guesses_of(a_plan(1.0, max_batch_size=12, accountant="rdp"))
    more = membership.right_guesses_of(a_plan(1.0, prior_releases=(("sum", 5.0),)))
    assert plain < cut < 1 and plain < more < 1


def test_nothing_released_and_no_noise_are_the_two_ends():
    assert membership.right_guesses_of(a_plan(1.0), 0) == pytest.approx(0.5, abs=1e-5)
    assert membership.right_guesses_of(a_plan(0.0)) == 1.0
