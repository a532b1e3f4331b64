"""The statement of the steps taken so far, and the yardstick for its epsilon."""

import json
import math

import pytest

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan


def a_plan(stages=((6, 2.0), (4, 1.5)), **changes):
    fields = dict(
        num_examples=1000,
        batch_size=100,
        num_steps=sum(count for count, _ in stages),
        delta=1e-5,
        l2_clip_norm=1.0,
        score_budget=0.01,
        stages=stages,
        accountant="rdp",
    )
    return PrivacyPlan(**{**fields, **changes})


def test_steps_taken_have_their_own_epsilon_and_noise():
    plan = a_plan()
    part, whole = plan.statement(5), plan.statement()
    facts = part.as_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["epsilon"] == plan.epsilon(5) < plan.epsilon()
    assert (facts["steps"], facts["num_steps"]) == (5, 10)
    assert facts["smallest_noise_multiplier"] == 2.0  # the later stage is not begun
    assert whole.as_dict()["smallest_noise_multiplier"] == 1.5
    assert whole == plan.statement(10) and whole.as_dict()["steps"] == 10


def test_a_part_says_until_when_it_may_be_quoted():
    text = str(a_plan().statement(5))
    assert "the first 5 of 10 planned steps" in text
    assert "if nothing that the run showed decided when to stop" in text
    whole = a_plan().epsilon()
    quoted = float(text.partition("whole plan: epsilon = ")[2].partition(" ")[0])
    assert whole <= quoted <= whole * 1.0011
    assert "planned steps" not in str(a_plan().statement())


def test_no_step_and_steps_without_noise():
    nothing = a_plan().statement(0).as_dict()
    assert nothing["epsilon"] == 0.0 and nothing["private"] is True
    bare = a_plan(((5, 2.0), (5, 0.0)))
    assert bare.statement(5).as_dict()["private"] is True
    assert "epsilon = infinity" in str(bare.statement(5))
    assert str(bare.statement(6)).startswith("NO PRIVACY")
    assert "without any: 1 of 6)" in str(bare.statement(6))


@pytest.mark.parametrize("steps", [-1, 11])
def test_steps_that_the_plan_has_not_are_refused(steps):
    with pytest.raises(ValueError, match="steps is"):
        a_plan().statement(steps)


def test_a_ledger_states_what_it_holds(tmp_path):
    plan = a_plan()
    with PrivacyLedger(tmp_path / "ledger.jsonl", plan) as ledger:
        assert ledger.statement().as_dict()["epsilon"] == 0.0
        for step in range(3):
            ledger.record(step)
        assert ledger.statement() == plan.statement(3)
        assert math.isclose(
            ledger.statement().as_dict()["epsilon"], ledger.epsilon(), rel_tol=0
        )
