"""Releases before training, such as a DP-PCA, share the plan's budget."""

from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld

import dp_ilg
from tests.accounting.test_plan import PlainPlan, plan

PCA = (("DP-PCA", 8.0),)
FACTS: dict[str, Any] = dict(
    delta=1e-5, num_examples=60_000, batch_size=600, num_steps=50
)


def parts(one, steps=None) -> list:
    return list(one.event(steps).events)


def test_prior_releases_are_in_the_event_whatever_the_steps():
    one = plan(prior_releases=PCA)
    gaussian = dp_accounting.GaussianDpEvent(8.0)
    for steps in (0, 1, 100):
        assert parts(one, steps)[0] == gaussian
        assert parts(one, steps)[1:] == parts(plan(), steps)
    assert one.epsilon(0) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(8.0, 1e-5), rel=1e-6
    )
    assert one.epsilon(0) < one.epsilon(1) < one.epsilon()
    assert plan().epsilon(0) == 0.0 and plan().epsilon() < one.epsilon()


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_epsilon_is_that_of_dp_accountings_own_composition(relation):
    one = plan(prior_releases=PCA, neighboring_relation=relation)
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation[relation.upper()])
    # An unsampled Gaussian moves by 2 C where one example is replaced.
    accountant.compose(dp_accounting.GaussianDpEvent(8.0))
    accountant.compose(dp_accounting.ComposedDpEvent(parts(one)[1:]))
    assert one.epsilon() == pytest.approx(accountant.get_epsilon(1e-5), rel=3e-3)


def test_calibration_leaves_room_for_prior_releases():
    both = dp_ilg.plan_privacy(epsilon=1.0, prior_releases=PCA, **FACTS)
    alone = dp_ilg.plan_privacy(epsilon=1.0, **FACTS)
    assert 0.995 < both.epsilon() <= 1.0
    assert both.noise_multipliers[0] > 1.01 * alone.noise_multipliers[0]
    shorter = dp_ilg.steps_for_epsilon(
        epsilon=1.0,
        noise_multiplier=alone.noise_multipliers[0],
        prior_releases=PCA,
        **{k: v for k, v in FACTS.items() if k != "num_steps"},
    )
    assert shorter.num_steps < 50 and 0.99 < shorter.epsilon() <= 1.0


@pytest.mark.parametrize("verb", ["noise", "steps"])
def test_a_budget_too_small_for_one_step_is_one_sentence(verb):
    facts: dict[str, Any] = dict(FACTS, epsilon=0.3, prior_releases=PCA)
    with pytest.raises(ValueError, match=r"DP-PCA alone costs 0\.\d+, so the budget"):
        if verb == "noise":
            dp_ilg.plan_privacy(**facts)
        else:
            del facts["num_steps"]
            dp_ilg.steps_for_epsilon(noise_multiplier=1.0, **facts)


def test_json_and_digest_hold_prior_releases_and_old_plans_are_as_before():
    one = plan(prior_releases=PCA)
    assert type(one).from_json(one.to_json()) == one
    assert one.digest() != plan().digest()
    assert "prior_releases" not in plan().to_json()
    same = PlainPlan(
        **{k: getattr(one, k) for k in one.__dataclass_fields__}
        | {"prior_releases": [["DP-PCA", np.float64(8)]]}
    )
    assert same.to_json() == one.to_json() and hash(same) == hash(
        PlainPlan(**vars(one))
    )


@pytest.mark.parametrize(
    "bad",
    ["DP-PCA", (("DP-PCA", 0.0),), (("DP-PCA", -1),), (("", 1.0),), ((1.0, 1.0),)],
)
def test_bad_prior_releases_are_one_sentence(bad):
    with pytest.raises(ValueError, match="prior.release|noise multiplier of 'DP-PCA'"):
        PlainPlan(**{k: v for k, v in vars(plan()).items()} | {"prior_releases": bad})


def test_statement_names_prior_releases():
    statement = plan(prior_releases=PCA).statement()
    assert "DP-PCA (noise multiplier 8); epsilon includes them" in str(statement)
    assert statement.as_dict()["prior_releases"] == [("DP-PCA", 8.0)]
    assert "DP-PCA" not in str(plan().statement())


def test_ledger_charges_prior_releases_before_the_first_step(tmp_path):
    one = plan(prior_releases=PCA)
    with dp_ilg.PrivacyLedger(tmp_path / "ledger.jsonl", one) as ledger:
        assert ledger.epsilon() == one.epsilon(0) > 0.4
        ledger.record(0)
        assert ledger.epsilon() == one.epsilon(1)
    assert b"DP-PCA" in (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(ValueError, match="belongs to the plan"):
        dp_ilg.PrivacyLedger(tmp_path / "ledger.jsonl", plan())
