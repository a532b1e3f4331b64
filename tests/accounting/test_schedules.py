"""Schedules: closed forms, shapes, staging and refusals."""

import pathlib
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_ilg.accounting import schedules, shapes
from dp_ilg.accounting.calibration import plan_privacy

EXAMPLES = {
    "constant": schedules.constant(),
    "inverse_time": schedules.inverse_time(0.05, floor=0.3),
    "linear": schedules.linear(0.4),
    "exponential": schedules.exponential(0.01),
    "cosine": schedules.cosine(0.4),
    "stages": schedules.stages([2.0, 1.0, 0.5]),
    "array": schedules.array(np.linspace(1.0, 2.0, 50)),
}


def test_every_schedule_of_the_table_is_tested():
    assert set(EXAMPLES) == set(schedules.SCHEDULES)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_contract_of_every_schedule(name):
    schedule = EXAMPLES[name]
    values = schedule.multipliers(50, 10.0)
    assert values.shape == (50,) and values.dtype == np.float64
    assert np.all(values > 0) and np.all(np.isfinite(values))
    values[:] = 7.0  # the caller's own copy
    assert schedule.multipliers(50, 10.0)[0] != 7.0
    assert hash(schedule) == hash(EXAMPLES[name]) and schedule == EXAMPLES[name]
    assert schedule != schedules.linear(0.123)


def test_inverse_time_is_the_published_schedule():
    """MNIST: sigma_0 = 10, k = 0.05, 100 steps an epoch, epochs counted from 0."""
    values = 10 * schedules.inverse_time(0.05).multipliers(4600, 100.0)
    epoch = np.arange(4600) // 100
    np.testing.assert_allclose(values, 10 / (1 + 0.05 * epoch), rtol=1e-15)


def test_published_floor_is_reached_by_dividing_it_by_sigma_0():
    floor = np.sqrt(2 * np.log(1.25 / 1e-5)) / 1.0
    schedule = schedules.inverse_time(0.05, floor=floor / 10)
    values = 10 * schedule.multipliers(4600, 100.0)
    decayed = 10 / (1 + 0.05 * (np.arange(4600) // 100))
    np.testing.assert_allclose(values, np.maximum(decayed, floor), rtol=1e-12)
    assert np.any(values > floor + 1e-9) and np.any(decayed < floor)


@pytest.mark.parametrize("num_examples", [10, 60_000, 50_000, 1797])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_epochs_change_where_whole_number_arithmetic_says(num_examples, batch_size):
    steps = 3 * num_examples // batch_size + 2
    steps = min(steps, 60_000)
    values = schedules.inverse_time(1.0).multipliers(steps, num_examples / batch_size)
    epochs = np.arange(steps) * batch_size // num_examples
    np.testing.assert_allclose(values, 1 / (1.0 + epochs))


def test_closed_forms():
    steps = np.arange(11)
    np.testing.assert_allclose(
        schedules.linear(0.5).multipliers(11, 1.0), 1 - 0.05 * steps
    )
    np.testing.assert_allclose(
        schedules.exponential(0.3).multipliers(11, 2.0), np.exp(-0.3 * (steps // 2))
    )
    np.testing.assert_allclose(
        schedules.cosine(0.5).multipliers(11, 1.0),
        0.75 + 0.25 * np.cos(np.pi * steps / 10),
    )
    np.testing.assert_array_equal(
        schedules.stages([3, 1]).multipliers(5, 1.0), [3, 3, 3, 1, 1]
    )


@pytest.mark.parametrize("schedule", [schedules.linear(0.5), schedules.cosine(0.5)])
def test_one_step_starts_at_one(schedule):
    assert schedule.multipliers(1, 1.0) == [1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(0), "end is 0"),
        (lambda: schedules.linear(float("nan")), "end is nan"),
        (lambda: schedules.cosine(-1), "end is -1"),
        (lambda: schedules.cosine(float("inf")), "end is inf"),
        (lambda: schedules.inverse_time(-0.1), "decay is -0.1"),
        (lambda: schedules.inverse_time(float("nan")), "decay is nan"),
        (lambda: schedules.inverse_time(0.1, floor=0), "floor is 0"),
        (lambda: schedules.exponential(-1), "rate is -1"),
        (lambda: schedules.stages([]), "no values"),
        (lambda: schedules.stages([1, 0]), r"values\[1\] is 0"),
        (lambda: schedules.array([1, -2]), r"values\[1\] is -2"),
        (lambda: schedules.array([float("inf")]), r"values\[0\] is inf"),
        (lambda: schedules.array([1, 2]).multipliers(3, 1.0), "2 values .* 3 steps"),
        (lambda: schedules.stages([1] * 4).multipliers(3, 1.0), "4 stages .* 3 steps"),
        (lambda: schedules.exponential(9.0).multipliers(999, 1.0), "multiplier of 0"),
        (lambda: schedules.constant().multipliers(0, 1.0), "num_steps is 0"),
        (lambda: schedules.constant().multipliers(3, 0.0), "steps_per_epoch is 0"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")


def test_few_runs_are_kept_exactly_as_stages():
    values = schedules.inverse_time(0.05).multipliers(1200, 100.0)
    staged = schedules.to_stages(values, 16)
    assert len(staged) == 12
    expanded = np.repeat([z for _, z in staged], [count for count, _ in staged])
    np.testing.assert_array_equal(expanded, values)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=60),
    num_stages=st.integers(1, 20),
)
def test_staging_keeps_length_and_zcdp_budget(values, num_stages):
    staged = schedules.to_stages(np.array(values), num_stages)
    assert len(staged) <= num_stages
    assert sum(count for count, _ in staged) == len(values)
    spent = sum(count * z**-2 for count, z in staged)
    assert spent == pytest.approx(np.sum(np.array(values) ** -2), rel=1e-9)
    assert all(min(values) * 0.999 <= z <= max(values) * 1.001 for _, z in staged)


def test_staging_refuses_no_stages():
    with pytest.raises(ValueError, match="num_stages is 0"):
        schedules.to_stages(np.ones(3), 0)


def test_any_function_of_the_step_is_a_schedule():
    """Vectorised or not, and Optax's own: one call or many give the same."""
    steps = np.arange(50)
    whole = shapes.multipliers_of(lambda t: 1 + t / 10, 50, 5.0)
    np.testing.assert_array_equal(whole, 1 + steps / 10)
    alone = shapes.multipliers_of(lambda t: 1.0 if t < 9 else 2.0, 50, 5.0)
    np.testing.assert_array_equal(alone, np.where(steps < 9, 1.0, 2.0))
    decay = optax.cosine_decay_schedule(1.0, 100, alpha=0.1)
    found = shapes.multipliers_of(decay, 50, 5.0)
    np.testing.assert_allclose(found, np.asarray([decay(t) for t in steps]), rtol=1e-6)
    constant = shapes.multipliers_of(lambda t: 2.0, 3, 5.0)
    np.testing.assert_array_equal(constant, [2.0] * 3)


def test_a_function_that_is_another_one_of_arrays_is_asked_step_by_step():
    shifted = lambda t: t + 1.0 if np.ndim(t) == 0 else t + 7.0  # noqa: E731
    found = shapes.multipliers_of(shifted, 3, 1.0)
    np.testing.assert_array_equal(found, [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: schedules.Schedule("warmup", (1.0,)), "schedule is 'warmup', .*known"),
        (lambda: schedules.Schedule("cosin"), "did you mean cosine"),
        (lambda: schedules.Schedule("linear"), "has 0 parameters.*schedules.linear"),
        (lambda: schedules.as_schedule("linear", rate=1), "has no parameter rate"),
        (lambda: schedules.as_schedule(schedules.linear), "makes schedules; call it"),
        (lambda: shapes.multipliers_of([1, 2], 3, 1.0), r"shape \(2,\).*3 steps"),
        (lambda: shapes.multipliers_of(["a"], 1, 1.0), "must give 1 numbers"),
        (lambda: shapes.multipliers_of([1, np.nan], 2, 1.0), "gives nan at step 1"),
        (lambda: shapes.multipliers_of(lambda t: 1 / t, 3, 1.0), "ZeroDivisionError"),
    ],
)
def test_what_is_no_schedule_says_so(made, message):
    with pytest.raises(ValueError, match=message) as caught:
        made()
    assert "\n" not in str(caught.value)


def test_a_plan_takes_functions_sequences_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def rises(step):\n    return 1 + step / 10\n\n\n"
    text += "def to(end):\n    return lambda step: 1 + (end - 1) * step / 3\n"
    pathlib.Path("mine.py").write_text(text)
    facts: Any = dict(noise_multiplier=2.0, delta=1e-5)
    facts |= dict(num_examples=100, batch_size=10)
    given = [lambda t: 1 + t / 10, [1, 1.1, 1.2, 1.3], "./mine.py:rises"]
    plans = [plan_privacy(**facts, num_steps=4, schedule=s) for s in given]
    for plan in plans:
        np.testing.assert_allclose(plan.noise_multipliers, [2, 2.2, 2.4, 2.6])
    ended = schedules.as_schedule("./mine.py:to", end=4.0)
    np.testing.assert_allclose(shapes.multipliers_of(ended, 4, 1.0), [1, 2, 3, 4])
