"""Calibration: never above the target, close below it, quick, clear when it fails."""

import inspect
import math
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dp_ilg
from dp_ilg.accounting import accountants, calibration, schedules, search
from dp_ilg.accounting.calibration import (
    batch_size_for_epsilon,
    plan_privacy,
    steps_for_epsilon,
)
from tests.accounting.test_plan import PlainPlan, without_type_checks

ACCOUNTANTS = list(accountants.ACCOUNTANTS)
RELATIONS = list(accountants.NEIGHBORING_RELATIONS)
MNIST: dict[str, Any] = dict(
    delta=1e-5, num_examples=60_000, batch_size=1024, num_steps=600
)
SCHEDULES = {
    "constant": schedules.constant(),
    "inverse_time": schedules.inverse_time(0.1, floor=0.5),
    "linear": schedules.linear(0.3),
    "exponential": schedules.exponential(0.05),
    "cosine": schedules.cosine(0.3),
    "stages": schedules.stages([1.0, 3.0]),
    "array": schedules.array(np.linspace(2.0, 1.0, 600)),
}


def without(facts, *names):
    return {key: value for key, value in facts.items() if key not in names}


# --- On target ----------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("epsilon", [0.1, 2, 20.0])
def test_within_half_a_percent_below_the_target(epsilon, accountant, relation):
    plan = plan_privacy(
        epsilon=epsilon, accountant=accountant, neighboring_relation=relation, **MNIST
    )
    assert 0.995 * epsilon <= plan.epsilon() <= epsilon
    assert plan.target_epsilon == epsilon
    assert (plan.accountant, plan.neighboring_relation) == (accountant, relation)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_whole_schedule_is_scaled(name):
    schedule = SCHEDULES[name]
    tight = "pld" if name == "linear" else "rdp"  # as exact in shape, and quicker
    plan = plan_privacy(
        epsilon=2.0, schedule=schedule, num_stages=4, accountant=tight, **MNIST
    )
    assert 0.995 * 2.0 <= plan.epsilon() <= 2.0
    values = schedule.multipliers(600, 60_000 / 1024)
    expected = schedules.to_stages(values, 4)
    shape = np.repeat([z for _, z in expected], [count for count, _ in expected])
    ratio = plan.noise_multipliers / shape
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
    assert len(plan.stages) <= 4


def test_more_noise_for_less_epsilon_more_steps_and_bigger_batches():
    def noise(**changes):
        return plan_privacy(**{"epsilon": 2.0, **MNIST, **changes}).stages[0][1]

    base = noise()
    assert noise(epsilon=1.0) > base < noise(num_steps=1200)
    assert noise(delta=1e-6) > base
    assert noise(batch_size=2048) > base > noise(batch_size=512)
    assert noise(accountant="rdp") > base
    assert noise(neighboring_relation="replace_one") > base


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    epsilon=st.floats(0.01, 500.0),
    log_delta=st.floats(-9, -3),
    log_rate=st.floats(-4, 0),
    log_steps=st.floats(0, 5),
    accountant=st.sampled_from(ACCOUNTANTS),
    relation=st.sampled_from(RELATIONS),
)
def test_any_setting_ends_on_target(
    epsilon, log_delta, log_rate, log_steps, accountant, relation
):
    check_on_target(epsilon, log_delta, log_rate, log_steps, accountant, relation)


@settings(max_examples=12, deadline=None)
@given(
    epsilon=st.floats(0.1, 50.0),
    log_delta=st.floats(-8, -4),
    log_rate=st.floats(-3, 0),
    log_steps=st.floats(0, 3.5),
    accountant=st.sampled_from(ACCOUNTANTS),
    relation=st.sampled_from(RELATIONS),
)
def test_some_settings_end_on_target(
    epsilon, log_delta, log_rate, log_steps, accountant, relation
):
    check_on_target(epsilon, log_delta, log_rate, log_steps, accountant, relation)


def check_on_target(epsilon, log_delta, log_rate, log_steps, accountant, relation):
    num_examples = 1_000_000
    delta, num_steps = 10**log_delta, int(10**log_steps)
    batch_size = max(1, int(num_examples * 10**log_rate))
    certain = 1 - (1 - batch_size / num_examples) ** num_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plan = plan_privacy(
                epsilon=epsilon,
                delta=delta,
                num_examples=num_examples,
                batch_size=batch_size,
                num_steps=num_steps,
                accountant=accountant,
                neighboring_relation=relation,
            )
        except ValueError as error:
            assert "holds without any noise" in str(error)
            assert certain < 10 * delta
            return
    assert plan.epsilon() <= epsilon
    if certain > 100 * delta:
        assert plan.epsilon() >= 0.995 * epsilon


# --- Given noise --------------------------------------------------------------------


def test_given_noise_is_taken_as_it_is():
    plan = plan_privacy(noise_multiplier=1.1, **MNIST)
    assert plan.stages == ((600, 1.1),) and plan.target_epsilon is None


def test_the_published_schedule_can_be_planned():
    """MNIST of DP-AdamILG: sigma_0 10, k 0.05, B 600, 12 epochs, kept exactly."""
    plan = plan_privacy(
        noise_multiplier=10,
        delta=1e-5,
        num_examples=60_000,
        batch_size=600,
        num_steps=1200,
        schedule=schedules.inverse_time(0.05),
    )
    epochs = np.arange(1200) // 100
    np.testing.assert_allclose(plan.noise_multipliers, 10 / (1 + 0.05 * epochs))


@pytest.mark.parametrize(
    ("name", "num_examples", "batch_size", "epochs", "sigma", "decay", "floor", "cost"),
    [
        ("MNIST", 60_000, 600, 46, 10.0, 0.05, True, 0.485),
        ("CIFAR-10", 50_000, 200, 101, 6.0, 0.001, False, 0.426),
    ],
)
def test_honest_cost_of_the_published_schedules(
    name, num_examples, batch_size, epochs, sigma, decay, floor, cost
):
    """PAPER.md A, had each step been Poisson-subsampled; MNIST with eps_lim = 1."""
    lowest = math.sqrt(2 * math.log(1.25 / 1e-5)) / sigma if floor else None
    plan = plan_privacy(
        noise_multiplier=sigma,
        delta=1e-5,
        num_examples=num_examples,
        batch_size=batch_size,
        num_steps=epochs * num_examples // batch_size,
        schedule=schedules.inverse_time(decay, lowest),
        num_stages=epochs,
        accountant="rdp",
    )
    assert plan.epsilon() == pytest.approx(cost, abs=0.0005), name


def test_no_noise_is_allowed_and_called_what_it_is():
    plan = plan_privacy(noise_multiplier=0, **MNIST)
    assert plan.epsilon() == math.inf
    assert str(plan.statement()).startswith("NO PRIVACY")


# --- Steps and batch size -----------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_steps_for_epsilon_is_the_most(accountant, relation):
    facts: dict[str, Any] = dict(
        noise_multiplier=1.5,
        accountant=accountant,
        neighboring_relation=relation,
        **without(MNIST, "num_steps"),
    )
    plan = steps_for_epsilon(epsilon=2, **facts)
    longer = plan_privacy(num_steps=math.ceil(1.002 * plan.num_steps), **facts)
    assert plan.epsilon() <= 2 < longer.epsilon()
    assert plan.noise_multipliers[0] == 1.5 and plan.target_epsilon == 2


def test_steps_for_epsilon_stretches_the_schedule():
    facts = without(MNIST, "num_steps")
    plan = steps_for_epsilon(
        epsilon=2.0,
        noise_multiplier=2.0,
        schedule=schedules.linear(0.5),
        num_stages=4,
        **facts,
    )
    assert 1.98 < plan.epsilon() <= 2.0
    assert plan.noise_multipliers[0] > 1.8 and plan.noise_multipliers[-1] < 1.2


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_batch_size_for_epsilon_is_the_most(accountant, relation):
    facts: dict[str, Any] = dict(
        noise_multiplier=1.5,
        accountant=accountant,
        neighboring_relation=relation,
        **without(MNIST, "batch_size"),
    )
    plan = batch_size_for_epsilon(epsilon=2.0, **facts)
    larger = plan_privacy(batch_size=math.ceil(1.002 * plan.batch_size), **facts)
    assert plan.epsilon() <= 2.0 < larger.epsilon()


def test_batch_size_is_at_most_the_data():
    facts: dict[str, Any] = dict(delta=1e-5, num_examples=1000, num_steps=2)
    plan = batch_size_for_epsilon(epsilon=8.0, noise_multiplier=5.0, **facts)
    assert plan.batch_size == 1000 and plan.epsilon() <= 8.0


def test_zcdp_allows_any_batch_or_none():
    facts: dict[str, Any] = dict(
        delta=1e-5, num_examples=1000, num_steps=10, accountant="zcdp"
    )
    plan = batch_size_for_epsilon(epsilon=8.0, noise_multiplier=5.0, **facts)
    assert plan.batch_size == 1000
    with pytest.raises(ValueError, match="cannot be reached"):
        batch_size_for_epsilon(epsilon=0.1, noise_multiplier=5.0, **facts)


# --- Bad input ----------------------------------------------------------------------

plain = without_type_checks(inspect.getfile(calibration))
setattr(plain, "PrivacyPlan", PlainPlan)  # noqa: B010 - pyright sees a module


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epsilon=-1), "epsilon is -1"),
        (dict(epsilon=0), "epsilon is 0"),
        (dict(epsilon=math.nan), "epsilon is nan"),
        (dict(epsilon=math.inf), "epsilon is inf"),
        (dict(epsilon="2"), "epsilon is '2'"),
        (dict(epsilon=None), "exactly one"),
        (dict(noise_multiplier=1.0), "exactly one"),
        (dict(epsilon=1e6), "promises nothing"),
        (dict(epsilon=None, noise_multiplier=-1.0), "noise_multiplier is -1.0"),
        (dict(epsilon=None, noise_multiplier=math.inf), "noise_multiplier is inf"),
        (dict(epsilon=None, noise_multiplier=math.nan), "noise_multiplier is nan"),
        (dict(epsilon=None, noise_multiplier="1"), "noise_multiplier is '1'"),
        (dict(delta=0), "delta is 0"),
        (dict(delta=-1e-5), "delta is -1e-05"),
        (dict(delta=1.5), "delta is 1.5"),
        (dict(delta=math.nan), "delta is nan"),
        (dict(delta=None), "delta is None"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=-3), "batch_size is -3"),
        (dict(batch_size=10.5), "batch_size is 10.5"),
        (dict(batch_size=None), "batch_size is None"),
        (dict(batch_size=70_000), "only 60000 examples"),
        (dict(num_examples=0), "num_examples is 0"),
        (dict(num_steps=0), "num_steps is 0"),
        (dict(num_steps=1e3), "num_steps is 1000.0"),
        (dict(l2_clip_norm=0), "l2_clip_norm is 0"),
        (dict(l2_clip_norm=math.nan), "l2_clip_norm is nan"),
        (dict(score_budget=1), "score_budget is 1"),
        (dict(accountant="moments"), "accountant is 'moments'"),
        (dict(neighboring_relation="swap"), "neighboring_relation is 'swap'"),
        (dict(schedule="linear"), "schedule linear lacks end"),
        (dict(schedule="steep"), "schedule is 'steep'.*constant, cosine"),
        (dict(schedule=3.0), "schedule is 3.0.*function of the step"),
        (dict(schedule=lambda t: 1.0 - t), "gives 0 at step 1"),
        (dict(schedule=lambda t, u: 1.0), "at step 0 it raises TypeError"),
        (dict(schedule=schedules.linear), "schedule is <function"),
        (dict(schedule=schedules.array([1, 2])), "2 values but the plan has 600"),
        (dict(num_stages=0), "num_stages is 0"),
        (dict(delta=1e-300, epsilon=0.01, accountant="rdp"), "cannot be reached"),
        (dict(epsilon=1e-9), "epsilon is 1e-09, .*resolve none below 1e-06"),
        (dict(delta=1e-40), "delta is 1e-40, .*accountant='rdp'"),
    ],
)
def test_bad_input_gets_one_sentence(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        plain.plan_privacy(**{"epsilon": 2.0, **MNIST, **changes})
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("name", list(MNIST))
def test_missing_facts_are_named(name):
    with pytest.raises(TypeError, match=name):
        plain.plan_privacy(epsilon=2.0, **without(MNIST, name))


class Hand:
    """A user's own schedule: anything with `multipliers`."""

    def __init__(self, values):
        self.values = values

    def multipliers(self, num_steps, steps_per_epoch):
        return self.values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(3), r"shape \(3,\).* 600 steps"),
        (np.zeros(600), "must give a finite number above 0"),
        (np.full(600, np.nan), "must give a finite number above 0"),
    ],
)
def test_a_users_own_schedule_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        plan_privacy(epsilon=2.0, schedule=Hand(values), **MNIST)


def test_a_users_own_schedule_is_used():
    values = np.repeat([1.0, 2.0], 300)
    plan = plan_privacy(noise_multiplier=1.5, schedule=Hand(values), **MNIST)
    np.testing.assert_array_equal(plan.noise_multipliers, 1.5 * values)


def test_targets_out_of_reach_say_so():
    with pytest.raises(ValueError, match="most private choice, 1; choose"):
        steps_for_epsilon(
            epsilon=0.01, noise_multiplier=0.3, **without(MNIST, "num_steps")
        )
    with pytest.raises(ValueError, match="more than 1,000,000 steps"):
        steps_for_epsilon(
            epsilon=8.0, noise_multiplier=500.0, **without(MNIST, "num_steps")
        )
    with pytest.raises(ValueError, match="holds without any noise"):
        with pytest.warns(UserWarning, match="above 1 / num_examples"):
            plan_privacy(
                epsilon=2.0, delta=1e-5, num_examples=10**7, batch_size=1, num_steps=1
            )


@pytest.mark.parametrize("function", [steps_for_epsilon, batch_size_for_epsilon])
@pytest.mark.parametrize("value", [None, 0, -1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["epsilon", "noise_multiplier"])
def test_other_functions_check_too(function, value, name):
    facts = without(MNIST, function.__name__.removesuffix("_for_epsilon"))
    facts.pop("num_steps" if function is steps_for_epsilon else "batch_size", None)
    facts = {**facts, "epsilon": 2.0, "noise_multiplier": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        getattr(plain, function.__name__)(**facts)


def test_delta_above_one_over_n_warns():
    with pytest.warns(UserWarning, match="delta is 0.01, above 1 / num_examples"):
        plan_privacy(
            noise_multiplier=1.0,
            delta=0.01,
            num_examples=1000,
            batch_size=10,
            num_steps=5,
        )


# --- The search itself --------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    root=st.floats(1e-2, 1e5),
    power=st.floats(0.3, 4.0),
    bias=st.floats(1.0, 30.0),
)
def test_search_is_safe_close_and_short(root, power, bias):
    """Epsilon = 2 at `root`; the estimate is off by a factor that itself varies."""
    calls = []

    def exact(x):
        calls.append(x)
        return 2.0 * (root / x) ** power

    def rough(x):
        return exact(x) * bias ** (1 + 0.1 * math.sin(math.log(x)))

    found = search.furthest_within(2.0, exact, rough, 1e6, 1e-3, whole=False)
    assert 1.995 <= exact(found) <= 2.0
    assert found in calls


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 999_999), power=st.floats(0.3, 2.0))
def test_search_of_whole_numbers(most, power):
    def exact(x):
        return 2.0 * (x / (most + 0.5)) ** power

    found = search.furthest_within(
        2.0, exact, lambda x: 1.5 * exact(x), 1, 10**6, whole=True
    )
    assert exact(found) <= 2.0
    assert found == most or exact(found) >= 2.0 * (1 - 2e-4)


def test_search_survives_a_jump():
    """The Renyi bound falls to 0 at some noise: no number is close to the target."""
    found = search.furthest_within(
        0.5,
        lambda x: 0.0 if x > 3.0 else 1.0,
        lambda x: 0.0 if x > 3.0 else 1.0,
        1e6,
        1e-3,
        whole=False,
    )
    assert 3.0 < found < 3.001


# --- Speed and memory ---------------------------------------------------------------

BUDGETS = """
import resource, sys, time
from dp_ilg import schedules
from dp_ilg.accounting import accountants
from dp_ilg.accounting.calibration import plan_privacy
start = time.process_time()
plan = plan_privacy({arguments})
calibrated = time.process_time() - start
accountants._epsilon.cache_clear()
start = time.process_time()
plan.epsilon()
evaluated = time.process_time() - start
# not ru_maxrss, which begins at the size of the process that forked this one
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
print(calibrated, evaluated, peak)
"""
CONSTANT = "epsilon=2.0, delta=1e-5, num_examples=60_000"
STAGED = f"{CONSTANT}, schedule=schedules.linear(0.3)"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "calibration_budget", "epsilon_budget"),
    [
        (f"{CONSTANT}, batch_size=1024, num_steps=600", 5, 1),
        pytest.param(f"{STAGED}, batch_size=1024, num_steps=600", 15, 15, marks=SLOW),
        pytest.param(
            f"{CONSTANT}, batch_size=256, num_steps=100_000", 5, 1, marks=SLOW
        ),
        pytest.param(
            f"{STAGED}, batch_size=256, num_steps=100_000", 15, 15, marks=SLOW
        ),
        pytest.param(
            f"{STAGED}, batch_size=59_000, num_steps=100_000", 15, 15, marks=SLOW
        ),
        pytest.param(
            "epsilon=5000.0, delta=1e-9, num_examples=60_000, batch_size=600, "
            "num_steps=100_000, schedule=schedules.linear(0.1)",
            15,
            15,
            marks=SLOW,
        ),
    ],
)
def test_time_and_memory_on_one_core(arguments, calibration_budget, epsilon_budget):
    """Processor seconds, which other work on the machine hardly changes."""
    script = BUDGETS.format(arguments=arguments)
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    calibrated, evaluated, kibibytes = map(float, result.stdout.split())
    assert calibrated < calibration_budget and evaluated < epsilon_budget
    assert kibibytes < 2 * 1024**2


def test_asking_again_is_free():
    plan = plan_privacy(noise_multiplier=1.0, schedule=schedules.linear(0.5), **MNIST)
    first = plan.epsilon(300)
    start = time.process_time()
    assert all(plan.epsilon(300) == first for _ in range(100))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("epochs", "batch_size", "steps"),
    [
        (10, 1024, 586),
        (3, 100, 1800),
        (0.5, 60_000, 1),
        (0.001, 1024, 1),
        (2, 1, 120_000),
    ],
)
def test_epochs_are_steps_rounded_up(epochs, batch_size, steps):
    facts: Any = dict(noise_multiplier=1.0, delta=1e-5, num_examples=60_000)
    plan = dp_ilg.plan_privacy(num_epochs=epochs, batch_size=batch_size, **facts)
    assert plan.num_steps == steps
    assert plan == dp_ilg.plan_privacy(num_steps=steps, batch_size=batch_size, **facts)
    assert epochs <= plan.num_epochs * (1 + 1e-9)
    assert plan.num_epochs < epochs + batch_size / 60_000 * (1 + 1e-9)


def test_a_batch_size_is_found_for_epochs():
    facts: Any = dict(epsilon=2.0, noise_multiplier=1.1, delta=1e-5)
    facts["num_examples"] = 60_000
    plan = dp_ilg.batch_size_for_epsilon(num_epochs=5, **facts)
    assert 1.9 < plan.epsilon() <= 2.0 and 5 <= plan.num_epochs < 5.1
    larger = dp_ilg.plan_privacy(
        noise_multiplier=1.1,
        delta=1e-5,
        num_examples=60_000,
        num_epochs=5,
        batch_size=int(plan.batch_size * 1.05),
    )
    assert larger.epsilon() > 2.0


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (dict(), "Neither num_steps nor num_epochs was given"),
        (dict(num_steps=3, num_epochs=1), "num_steps is 3 and num_epochs is 1"),
        (dict(num_epochs=0), "num_epochs is 0"),
        (dict(num_epochs=float("nan")), "num_epochs is nan"),
        (dict(num_epochs=1, batch_size=0), "batch_size is 0"),
        (dict(num_epochs=1, num_examples=0), "num_examples is 0"),
    ],
)
def test_epochs_that_cannot_be_are_refused(facts, words):
    told = dict(noise_multiplier=1.0, delta=1e-5, num_examples=100, batch_size=10)
    kind = ValueError if facts else TypeError
    with pytest.raises(kind, match=words):
        dp_ilg.plan_privacy(**(told | facts))
