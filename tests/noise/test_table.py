"""The law of a draw, exactly: against a Gaussian at points out to 15 deviations."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_ilg.noise import table
from tests.helpers import noise_law

PHASES = [0, 1, 12_345, 262_144, 524_288, 777_777, 1_048_575, 5_343_083]
BOUNDS = {0: 1e-20, 1: 1e-20, 3: 5e-20, 5: 2e-18, 6: 2e-17, 7: 4e-16}
"""Relative error of the density, as the docstring of `noise.normal` states it."""


def test_columns_hold_exactly_the_weights():
    full, mass = (1 << 96) // table.COLUMNS, [0] * table.COLUMNS
    for column, words in enumerate(zip(*table.alias_table(), strict=True)):
        first, second, third = map(int, words)
        own = (first & 0xFFFFF) << 64 | second << 32 | third
        mass[column] += own
        mass[first >> 20] += full - own
    low = table.COLUMNS // 2 - table.REACH
    assert tuple(mass[low : low + 2 * table.REACH + 1]) == table.weights()
    assert sum(table.weights()) == sum(mass) == 1 << 96


def test_no_cell_but_the_middle_is_less_likely_than_it_should_be():
    """Cells beside the middle are rounded up, by at most 2^-96; the middle pays."""
    import decimal

    with decimal.localcontext() as context:
        context.prec = 60
        exact = [x * 2**96 for x in table._densities()]
        for d, value in enumerate(exact):
            excess = table.weights()[table.REACH + d] - value
            assert excess <= 1
            assert excess > 0 if d > table._CENTRE else excess > -value / 2**82


@pytest.mark.parametrize("deviations", BOUNDS)
def test_relative_error_of_the_density(deviations):
    """Enumerated: exact integers for the draw, 40 digits for the Gaussian."""
    at = deviations * noise_law.STDDEV
    errors = [noise_law.relative_error(at + phase) for phase in PHASES]
    mirrored = [noise_law.relative_error(-1 - at - phase) for phase in PHASES]
    assert errors == mirrored
    assert max(map(abs, errors)) <= BOUNDS[deviations]


def test_a_law_of_another_scale_is_refused():
    """3 % of sigma, and what cells of 1/128 without correction would do."""
    x = 3 * noise_law.STDDEV
    assert abs(noise_law.relative_error(x)) < 1e-19
    wrong = noise_law.probability(int(x / 1.03)) / noise_law.rounded_gaussian(x)
    assert abs(float(wrong) - 1) > 0.1
    uncorrected = 8 / 24 / 128**2 * (3**2 - 1)
    assert uncorrected > 1e-4


def test_the_tail_that_float32_draws_lacked_is_there():
    """Cells from 5.25 deviations on weigh what a Gaussian does; 23 bits end before."""
    first = 5 * table.CELLS_PER_STDDEV + 32
    weights = table.weights()[table.REACH + first :]
    found = (sum(weights) - weights[0] / 2) / 2**96
    assert found == pytest.approx(stats.norm.sf(5.25), rel=1e-3)
    assert stats.norm.isf(2**-25) < 5.43  # the furthest draw of 23 bits and a sign


@pytest.mark.parametrize("deviations", [8, 9, 10, 12, 15])
def test_far_out_nothing_is_missing(deviations):
    """Beyond 7 a cell may be likelier by 2^-96, never less likely than 1 - 1e-13."""
    x = deviations * noise_law.STDDEV + 12_345
    drawn, exact = noise_law.probability(x), noise_law.rounded_gaussian(x)
    assert drawn >= exact * (1 - noise_law.decimal.Decimal("1e-13"))
    extra = float(drawn - exact)
    assert extra <= float(exact) * 1e-13 + 2.0**-96 / 2**table.CELL_BITS * 1.01


def test_smoothing_counts_are_a_law():
    """The helper's counts of V1 + ... + V8: all ways, and their known variance."""
    counts = noise_law.coarse_counts()
    assert int(counts.sum()) == 2**35
    steps = table.steps_of_smoothing()
    places = np.arange(len(counts), dtype=np.float64) * 64
    mean = float(np.average(places, weights=counts))
    spread = float(np.average((places - mean) ** 2, weights=counts))
    cell = 2.0**table.CELL_BITS
    assert spread == pytest.approx(sum((cell**2 - s**2) / 12 for s in steps[3:]))
    assert sum(table.SMOOTHING_BITS) == 95
    assert math.isclose(mean, sum((cell - s) / 2 for s in steps[3:]))
