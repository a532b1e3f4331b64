"""The plan: what it emits, what it refuses, and what its statement says."""

import dataclasses
import importlib.util
import inspect
import json
import math
import sys

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_ilg.accounting import accountants
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statements.statement import round_up
from dp_ilg.accounting.statements.units import UNITS

FACTS = dict(
    num_examples=60_000,
    batch_size=600,
    num_steps=100,
    delta=1e-5,
    l2_clip_norm=1.5,
    score_budget=0.04,
    stages=((60, 2.0), (40, 1.0)),
)


def plan(**changes):
    return PrivacyPlan(**{**FACTS, **changes})


def without_type_checks(module_file):
    """A second copy of a module without the tests' import hook, as users run it."""
    spec = importlib.util.spec_from_file_location("plain_copy", module_file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_copy"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PlainPlan = without_type_checks(inspect.getfile(PrivacyPlan)).PrivacyPlan


def constant(z=1.0, num_steps=100, **changes):
    return plan(stages=((num_steps, z),), num_steps=num_steps, **changes)


# --- Multipliers and events ---------------------------------------------------------


def test_multipliers_of_gradient_and_scores_combine_to_those_accounted():
    one = plan()
    assert one.sampling_prob == 0.01
    np.testing.assert_array_equal(one.noise_multipliers, [2.0] * 60 + [1.0] * 40)
    for sigma, tau, z in zip(
        one.gradient_noise_multipliers,
        one.score_noise_multipliers,
        one.noise_multipliers,
        strict=True,
    ):
        joint = accountants.effective_noise_multiplier([sigma, tau])
        assert joint == pytest.approx(z, rel=1e-14)
    np.testing.assert_allclose(one.gradient_noise_multipliers[0], 2 / math.sqrt(0.96))
    np.testing.assert_allclose(one.score_noise_multipliers[0], 2 / math.sqrt(0.04))


@pytest.mark.parametrize("scores", [0.0, 0.04])
@pytest.mark.parametrize("metrics", [0.005, 0.5])
def test_multipliers_of_all_three_parts_combine_to_those_accounted(scores, metrics):
    one = plan(score_budget=scores, metric_budget=metrics)
    parts = [
        one.gradient_noise_multipliers,
        one.score_noise_multipliers,
        one.metric_noise_multipliers,
    ]
    together = sum(x**-2.0 for x in parts) ** -0.5
    np.testing.assert_allclose(together, one.noise_multipliers, rtol=1e-15)
    np.testing.assert_allclose(parts[2][0], 2 / math.sqrt(metrics))
    assert one.epsilon() == plan(score_budget=scores).epsilon()


def test_a_row_budget_is_a_share_like_the_others():
    """Plans without one keep their JSON and digest; with one, JSON brings it back."""
    bare, paid = plan(), plan(row_budget=0.2)
    assert "row_budget" not in bare.to_json() and bare == plan(row_budget=0.0)
    assert np.all(np.isinf(bare.row_noise_multipliers))
    assert PrivacyPlan.from_json(paid.to_json()) == paid
    assert paid.digest() != bare.digest() and paid.epsilon() == bare.epsilon()
    parts = [
        paid.gradient_noise_multipliers,
        paid.score_noise_multipliers,
        paid.row_noise_multipliers,
    ]
    joint = sum(part**-2.0 for part in parts) ** -0.5
    np.testing.assert_allclose(joint, paid.noise_multipliers, rtol=1e-12)
    words = str(paid.statement())
    assert "20 % for noisy counts that choose which rows of an embedding" in words
    assert paid.statement().as_dict()["row_budget"] == 0.2
    with pytest.raises(ValueError, match="row_budget is 0.99 and metric_budget is 0"):
        plan(row_budget=0.99, score_budget=0.2)


def test_without_a_metric_budget_plans_are_what_they_were():
    one = plan()
    assert "metric_budget" not in one.to_json() and one == plan(metric_budget=0.0)
    assert np.all(np.isinf(one.metric_noise_multipliers))
    paid = plan(metric_budget=0.005)
    assert PrivacyPlan.from_json(paid.to_json()) == paid and paid != one


def test_without_a_score_budget_the_gradient_gets_all():
    one = plan(score_budget=0.0)
    np.testing.assert_array_equal(one.gradient_noise_multipliers, one.noise_multipliers)
    assert np.all(np.isinf(one.score_noise_multipliers))


def test_multipliers_cannot_be_changed_by_accident():
    one = plan()
    with pytest.raises(ValueError, match="read-only"):
        one.noise_multipliers[0] = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.delta = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    assert np.all(plan().noise_multipliers >= 1.0)


def step_events(event):
    """All single steps of a plan's event, in order."""
    for stage in event.events:
        yield from [stage.event] * stage.count


@pytest.mark.parametrize("steps", [0, 1, 60, 61, 100, None])
def test_event_is_one_poisson_event_of_one_gaussian_a_step(steps):
    """Never two Poisson events for score and gradient: that would under-report."""
    one = plan()
    events = list(step_events(one.event(steps)))
    assert len(events) == (100 if steps is None else steps)
    for event, z in zip(events, one.noise_multipliers, strict=False):
        assert event == dp_accounting.PoissonSampledDpEvent(
            0.01, dp_accounting.GaussianDpEvent(z)
        )


@pytest.mark.parametrize("relation", list(accountants.NEIGHBORING_RELATIONS))
@pytest.mark.parametrize("accountant", list(accountants.ACCOUNTANTS))
def test_a_plan_costs_what_its_steps_composed_one_by_one_cost(accountant, relation):
    one = plan(accountant=accountant, neighboring_relation=relation)
    apart = dp_accounting.ComposedDpEvent(list(step_events(one.event())))
    facts = dict(accountant=accountant, neighboring_relation=relation)
    found = accountants.epsilon(apart, one.accounted_delta, **facts)
    assert one.epsilon() == found + one.noise_charge.epsilon
    bare = accountants.epsilon(apart, one.delta, **facts)
    assert bare * (1 - 1e-6) < one.epsilon() < bare * (1 + 1e-6)


def test_epsilon_grows_with_the_steps_taken():
    one = plan()
    values = [one.epsilon(steps) for steps in range(0, 101, 10)]
    assert values[0] == 0.0 and values[-1] == one.epsilon()
    assert np.all(np.diff(values) > 0)


def test_score_budget_does_not_change_epsilon():
    assert plan(score_budget=0.0).epsilon() == plan(score_budget=0.5).epsilon()


@pytest.mark.parametrize("steps", [101, 10**9])
def test_steps_past_the_plan_are_refused(steps):
    for method in (plan().event, plan().epsilon):
        with pytest.raises(ValueError, match=f"steps is {steps}, but the plan ends"):
            method(steps)


@pytest.mark.parametrize("steps", [-1, True])
def test_steps_that_are_no_number_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="steps is .* whole number"):
        plan().epsilon(steps)


# --- Equality, hash, JSON -----------------------------------------------------------


def test_equal_plans_hash_and_digest_alike():
    facts = dict(num_examples=np.int64(60_000), delta=np.float64(1e-5))
    one = PlainPlan(**FACTS)
    same = PlainPlan(**{**FACTS, **facts, "stages": [[60, 2], [40, np.float32(1)]]})
    assert one == same and hash(one) == hash(same) and one.digest() == same.digest()
    assert len({one, same, PlainPlan(**{**FACTS, "delta": 1e-6})}) == 2
    assert same.to_json() == plan().to_json()


def test_digest_is_stable_over_versions():
    """A ledger from last year must recognise its plan; change this only knowingly."""
    assert plan().digest() == "2741cb36d7e05337"


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(PrivacyPlan)]
)
def test_digest_depends_on_every_field(name):
    other = {
        "num_examples": 60_001,
        "batch_size": 601,
        "num_steps": 101,
        "stages": ((60, 2.0), (40, 1.0000000001)),
        "accountant": "rdp",
        "neighboring_relation": "replace_one",
        "target_epsilon": 2.0,
        "prior_releases": (("DP-PCA", 16.0),),
        "max_batch_size": 700,
        "num_parameters": 10**6,
        "exact_noise": True,
        "strategy": (1.0, 0.5),
        "unit": "user",
    }
    changes = {name: other.get(name, 1e-6)}
    if name == "num_steps":
        changes["stages"] = ((60, 2.0), (41, 1.0))
    assert plan(**changes).digest() != plan().digest()


@settings(max_examples=50, deadline=None)
@given(
    stages=st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(0, 1e9, exclude_min=True)),
        min_size=1,
        max_size=20,
    ),
    delta=st.floats(1e-300, 0.5),
    target=st.none() | st.floats(1e-6, 1e6),
)
def test_json_round_trip_is_exact(stages, delta, target):
    one = plan(
        stages=tuple(stages),
        num_steps=sum(count for count, _ in stages),
        delta=delta,
        target_epsilon=target,
    )
    again = PrivacyPlan.from_json(one.to_json())
    assert again == one and hash(again) == hash(one)
    assert again.to_json() == one.to_json()


def edited(**changes):
    return json.dumps({**json.loads(plan().to_json()), **changes})


def without(name):
    fields = json.loads(plan().to_json())
    del fields[name]
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("3", "must be a JSON object"),
        (edited(sigma=1.0), "unknown field 'sigma'"),
        (without("delta"), "lacks the field 'delta'"),
        (without("target_epsilon"), "lacks the field 'target_epsilon'"),
        (edited(delta="small"), "delta is 'small'"),
        (edited(delta=None), "delta is None"),
        (edited(num_steps=100.5), "num_steps is 100.5"),
        (edited(num_steps="100"), "num_steps is '100'"),
        (edited(stages=7), "stages is 7"),
        (edited(stages=[7]), "stage 7"),
        (edited(stages=[[100, "x"]]), "noise multiplier of a stage is 'x'"),
        (edited(stages=[[100]]), "must be a pair"),
        (edited(stages=[]), "0 steps but num_steps is 100"),
        (edited(accountant=3), "accountant is 3"),
        (edited(target_epsilon="2"), "target_epsilon is '2'"),
        (edited(l2_clip_norm=float("nan")), "l2_clip_norm is nan"),
    ],
)
def test_damaged_json_is_refused_in_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        PlainPlan.from_json(text)
    assert str(caught.value).endswith(".")


# --- Bad values ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_examples=0), "num_examples is 0"),
        (dict(batch_size=-5), "batch_size is -5"),
        (dict(batch_size=60_001), "only 60000 examples"),
        (dict(batch_size=True), "batch_size is True"),
        (dict(num_steps=0), "num_steps is 0"),
        (dict(delta=0.0), "delta is 0.0"),
        (dict(delta=1.0), "delta is 1.0"),
        (dict(delta=math.nan), "delta is nan"),
        (dict(l2_clip_norm=0.0), "l2_clip_norm is 0.0"),
        (dict(l2_clip_norm=math.inf), "l2_clip_norm is inf"),
        (dict(score_budget=1.0), "score_budget is 1.0"),
        (dict(score_budget=-0.1), "score_budget is -0.1"),
        (dict(metric_budget=1.0), "metric_budget is 1.0"),
        (dict(metric_budget=-0.1), "metric_budget is -0.1"),
        (dict(metric_budget=0.96), "leaves nothing for the gradient"),
        (dict(delta="1e-5"), "delta is '1e-5'"),
        (dict(num_steps=100.0), "num_steps is 100.0"),
        (dict(accountant="gdp"), "accountant is 'gdp'.*'pld', 'rdp', 'zcdp'"),
        (dict(neighboring_relation="bounded"), "'add_or_remove_one', 'replace_one'"),
        (dict(target_epsilon=-1.0), "target_epsilon is -1.0"),
        (dict(stages=((100, -1.0),)), "multiplier of a stage is -1.0"),
        (dict(stages=((100, math.nan),)), "multiplier of a stage is nan"),
        (dict(stages=((0, 1.0), (100, 1.0))), "steps of a stage is 0"),
        (dict(stages=((99, 1.0),)), "99 steps but num_steps is 100"),
        (dict(stages=None), "stages is None"),
        (dict(stages=()), "0 steps but num_steps is 100"),
    ],
)
def test_a_wrong_plan_cannot_exist(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        PlainPlan(**{**FACTS, **changes})
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("name", list(FACTS))
def test_a_missing_fact_is_named(name):
    with pytest.raises(TypeError, match=name):
        PlainPlan(**{key: value for key, value in FACTS.items() if key != name})


# --- Statement ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "certified"),
    [
        ({}, True),
        (dict(prior_releases=(("DP-PCA", 16.0),)), True),
        (dict(batch_size=60_000), False),
        (dict(batch_size=60_000, prior_releases=(("DP-PCA", 16.0),)), False),
        (dict(batch_size=50_000, max_batch_size=50_000), True),
        (dict(batch_size=60_000, max_batch_size=60_000), True),  # a neighbour has more
    ],
)
def test_statement_says_which_code_answered(changes, certified, monkeypatch):
    asked, ours = [], accountants.certified.epsilon
    monkeypatch.setattr(
        accountants.certified, "epsilon", lambda *a: asked.append(a) or ours(*a)
    )
    one = plan(delta=1.25e-5, **changes)  # asked nowhere else, so not in the cache
    named = one.statement().as_dict()["accountant_implementation"]
    assert named.startswith("dp_ilg's certified") == certified == bool(asked)


@pytest.mark.parametrize("relation", list(accountants.NEIGHBORING_RELATIONS))
@pytest.mark.parametrize("accountant", list(accountants.ACCOUNTANTS))
def test_statement_names_every_condition(accountant, relation):
    one = plan(accountant=accountant, neighboring_relation=relation)
    statement = one.statement()
    text = str(statement)
    assert text == statement.text and "\n" not in text
    for phrase in (
        f"({round_up(one.epsilon())}, 1e-05)-differential privacy",
        "unit of privacy is one training example",
        UNITS["example"].relations[relation],
        "Poisson sampling",
        "probability 0.01 ",
        "60,000 examples",
        "100 steps",
        "between 1 and 2",
        {
            "pld": "with dp_ilg's certified accountant (dp-ilg ",
            "rdp": "with dp-accounting ",
            "zcdp": "with dp-ilg ",
        }[accountant],
        "hyper-parameters",
        "vocabulary",
        "preprocessing",
        "test data",
        "costs add up",
        "a computer that is not as assumed",
    ):
        assert phrase in text
    assert ("takes no advantage of the random sampling" in text) == (
        accountant == "zcdp"
    )


def test_statement_record_is_json_of_the_same_facts():
    one = plan(target_epsilon=1.0)
    record = one.statement().as_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["epsilon"] == one.epsilon() and record["delta"] == 1e-5
    assert record["private"] is True and record["target_epsilon"] == 1.0
    assert record["sampling_probability"] == 0.01
    assert record["score_budget"] == 0.04
    assert record["plan_digest"] == one.digest()
    assert record["neighboring_relation"] == "add_or_remove_one"
    record["not_covered"].clear()  # the caller's own copy
    assert one.statement().as_dict()["not_covered"]


@pytest.mark.parametrize("stages", [((100, 0.0),), ((99, 1.0), (1, 0.0))])
def test_one_step_without_noise_means_no_privacy(stages):
    one = plan(stages=stages)
    assert one.epsilon() == math.inf
    record = one.statement().as_dict()
    assert record["text"].startswith("NO PRIVACY") and "infinite" in record["text"]
    assert record["private"] is False and record["epsilon"] is None
    assert "satisfies" not in record["text"] and "guarantee does" not in record["text"]
    assert f"without any: {stages[-1][0]} of 100)" in record["text"]
    assert PrivacyPlan.from_json(one.to_json()) == one


def test_statement_of_metrics():
    both = str(plan(metric_budget=0.005).statement())
    assert "pays 4 % for noisy measurements of how important" in both
    assert "0.5 % for noisy metrics of the training examples" in both
    alone = str(plan(score_budget=0.0, metric_budget=0.005).statement())
    assert "pays 0.5 % for noisy metrics" in alone and "important" not in alone
    assert "metrics" not in str(plan().statement())
    assert plan(metric_budget=0.005).statement().as_dict()["metric_budget"] == 0.005


def test_statement_of_scores():
    assert "Nothing is spent on" in str(plan(score_budget=0.0).statement())
    assert "4 % of each step's privacy budget" in str(plan().statement())


def test_statement_calls_a_large_epsilon_weak():
    assert "weak promise" in str(constant(0.3).statement())
    assert "weak promise" not in str(constant(2.0).statement())


def test_statement_of_one_step_is_grammatical():
    assert "takes 1 step." in str(constant(num_steps=1).statement())


@given(st.floats(1e-12, 1e12))
def test_shown_numbers_are_never_below_the_true_ones(value):
    shown = float(round_up(value))
    assert value * (1 - 1e-8) <= shown <= value * 1.0011


def test_the_wrapped_class_is_a_dataclass_of_keywords_only():
    parameters = inspect.signature(PrivacyPlan).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_jitted_step_may_close_over_the_plan():
    jax = pytest.importorskip("jax")
    one = plan()

    @jax.jit
    def noise_scale(step):
        return jax.numpy.asarray(one.gradient_noise_multipliers)[step]

    assert noise_scale(99) == pytest.approx(1 / math.sqrt(0.96))
    static = jax.jit(lambda p, x: x * p.l2_clip_norm, static_argnums=0)
    assert static(one, 2.0) == 3.0
