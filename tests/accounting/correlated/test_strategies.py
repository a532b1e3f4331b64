"""Strategies are optimal, and what a plan says of their noise is what matrices say."""

import functools
from typing import Any

import numpy as np
import pytest
import scipy.linalg

import dp_ilg
from dp_ilg.accounting.correlated import choice, strategies
from tests.helpers.models import plan

FACTS: dict[str, Any] = dict(
    delta=1e-5, num_examples=60_000, batch_size=1024, num_steps=1000
)


def dense_error(strategy, steps):
    """Root mean square of the rows of A C^-1, times the length of a column of C."""
    column = np.zeros(steps)
    column[: len(strategy)] = strategy
    c = scipy.linalg.toeplitz(column, np.zeros(steps))
    rows = np.tril(np.ones((steps, steps))) @ np.linalg.inv(c)
    return np.sqrt((rows**2).sum(1).mean()) * np.linalg.norm(c, axis=0).max()


@pytest.mark.parametrize("bands", [2, 3, 8, 32])
def test_prefix_error_is_that_of_dense_matrices(bands):
    strategy = strategies.optimal(bands, 120)
    found = strategies.prefix_error(strategy, 120)
    assert found == pytest.approx(dense_error(strategy, 120), rel=1e-9)
    assert found != pytest.approx(dense_error(strategy[:-1], 120), rel=1e-3)


@pytest.mark.parametrize("bands", [2, 4, 16])
def test_optimum_is_that_of_jax_privacy(bands):
    toeplitz = pytest.importorskip("jax_privacy.matrix_factorization.toeplitz")
    theirs = np.asarray(toeplitz.optimize_banded_toeplitz(400, bands), np.float64)
    theirs = strategies.rounded(theirs / theirs[0])
    ours = strategies.optimal(bands, 400)
    errors = [strategies.prefix_error(x, 400) for x in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_gradient_of_the_loss_is_right():
    rng = np.random.default_rng(0)
    tail, step = rng.uniform(0.1, 0.6, 5), 1e-6
    slope = strategies._loss(tail, 50)[1]
    for place in range(5):
        ends = [tail + sign * step * np.eye(5)[place] for sign in (1, -1)]
        rise = (strategies._loss(ends[0], 50)[0] - strategies._loss(ends[1], 50)[0]) / 2
        assert slope[place] == pytest.approx(rise / step, rel=1e-5)


@pytest.mark.parametrize("steps", [50, 10_000, 1_000_000])
@pytest.mark.parametrize("bands", [2, 32])
def test_every_optimum_makes_a_plan(bands, steps):
    strategy = strategies.optimal(bands, steps)
    strategies.check(strategy)
    assert len(strategy) == min(bands, steps)


def test_growths_are_the_standard_deviations_of_the_noise():
    strategy = strategies.optimal(4, 60)
    inverse = np.linalg.inv(
        scipy.linalg.toeplitz(np.r_[strategy, np.zeros(56)], np.zeros(60))
    )
    found = strategies.growths(strategy, 60)
    np.testing.assert_allclose(found, np.linalg.norm(inverse, axis=1), rtol=1e-12)
    assert strategies.growths((), 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "strategy, words",
    [
        ((1.0,), "1 coefficients"),
        ((1.0,) + (0.5,) * 32, "33 coefficients"),
        ((1.0, 0.3), "coefficient 0.3"),
        ((1.0, -0.5), "coefficient -0.5"),
        ((1.0, float("nan")), "coefficient nan"),
        ((0.5, 0.5), "starts with 0.5"),
        ((1.0,) * 20, "the sum 20"),
        ((1.0, 1.0), "lets noise grow"),
        ("auto", "must be a tuple"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused_in_a_sentence(strategy, words):
    with pytest.raises(ValueError, match=words):
        plan(strategy=strategy)


@pytest.mark.parametrize(
    "facts, words",
    [
        (dict(bands=0), "bands is 0, but must be from 1 to 32"),
        (dict(bands=33), "bands is 33"),
        (dict(bands=True), "bands is True"),
        (dict(bands=2.0), "bands is 2.0"),
        (dict(bands="many"), "bands is 'many'"),
        (dict(bands=2, strategy=(1.0, 0.5)), "only one of them"),
        (dict(bands=32, batch_size=4096), "fewer than a batch of 4,096"),
        (dict(strategy=(1.0, 0.5), num_steps=1), "at most as many bands as steps"),
        (dict(bands=2, max_batch_size=2000), "max_batch_size is 2000"),
        (dict(bands=2, row_budget=0.1), "row_budget is 0.1"),
    ],
)
def test_what_bands_cannot_do_is_refused_in_a_sentence(facts, words):
    with pytest.raises(ValueError, match=words):
        dp_ilg.plan_privacy(noise_multiplier=1.0, **{**FACTS, **facts})


def test_auto_takes_what_leaves_least_and_says_what_it_expects():
    make = functools.partial(dp_ilg.plan_privacy, epsilon=8.0, **FACTS)
    table = choice.compared(make)
    best = make(bands="auto")
    least = min(table, key=lambda row: row.noise)
    assert best.bands == least.bands == 16 and best.epsilon() <= 8.0
    assert choice.sum_noise(best) == pytest.approx(least.noise)
    assert least.relative == pytest.approx(0.624, abs=2e-3)
    assert best == make(bands=16) == make(strategy=best.strategy)


def test_auto_takes_none_where_batches_are_large():
    facts = dict(FACTS, batch_size=8192, num_steps=100)
    assert dp_ilg.plan_privacy(epsilon=1.0, bands="auto", **facts).bands == 1


def test_a_plan_without_bands_reads_and_writes_as_before():
    one, banded = plan(), plan(bands=2)
    assert "strategy" not in one.to_json() and one.bands == 1
    assert type(one).from_json(banded.to_json()) == banded != one
    assert banded.digest() != one.digest()
