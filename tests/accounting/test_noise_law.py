"""The price of the noise's law: its constants against the law itself, and its place."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.accounting.charges import noise_law
from dp_ilg.noise import table
from tests.helpers import noise_law as law
from tests.helpers.models import plan


def test_constants_bound_the_table():
    """Rounding up, the middle's deficit and what is beyond reach, from the table."""
    cells = len(table.weights())
    assert noise_law.EXCESS >= cells * 2.0**-table.TABLE_BITS
    reach = table.REACH / table.CELLS_PER_STDDEV
    assert 2 * stats.norm.sf(reach - 8 / table.CELLS_PER_STDDEV) < noise_law.BEYOND
    least = min(table.weights()[table.REACH - 127 : table.REACH + 128]) / 2**96
    assert cells / 255 * 1.1 * 2.0**-96 / least < noise_law._MIDDLE
    assert 17 * 2.0**-96 / least < noise_law._MIDDLE * 1.01


def test_the_mean_square_of_the_relative_error_is_below_its_constant():
    """Monte Carlo of exact integers under the Gaussian, to 6 deviations; and by parts.

    The parts are what the proof adds up; a table of half the cells would fail.
    """
    rng = np.random.default_rng(5)
    places = np.clip(rng.normal(size=60), -6, 6) * law.STDDEV
    errors = [law.relative_error(int(x)) for x in places]
    assert math.sqrt(np.mean(np.square(errors))) < noise_law.SMOOTH

    def part(m, bits, cells):
        width = 1 / cells / 2.0**bits / (2 * math.pi)
        return 2 * width**m * math.sqrt(math.factorial(m)) * 1.25

    rows = [(8, 0), (7, 2), (6, 4), (5, 6), (4, 9), (3, 14)]
    assert sum(part(m, b, table.CELLS_PER_STDDEV) for m, b in rows) < noise_law.SMOOTH
    assert sum(part(m, b, 64) for m, b in rows) > noise_law.SMOOTH


@pytest.mark.parametrize("draws", [1, 10**6, 10**10, 10**16])
def test_the_charge_is_what_the_page_says(draws):
    found = noise_law.charge_of(draws, 1e-6)
    factor = 1e-20 * math.sqrt(300 * draws) + 2e-12 + 1.3e-25 * draws
    assert found.epsilon == pytest.approx(2 * factor)
    rest = math.exp(60) * (draws * 1.2e-55 + math.exp(-150)) + 1.01e-6 * factor
    assert found.delta == pytest.approx(draws * 4041 * 2.0**-96 + rest)
    assert noise_law.charge_of(0, 1e-6) == (0.0, 0.0)


def test_ordinary_runs_pay_a_small_share():
    assert noise_law.charge_of(10**10, 1e-6).delta < 1e-8 * 1e-6
    assert noise_law.charge_of(10**16, 1e-6).delta < 1e-3 * 1e-6


def test_the_plan_pays_before_it_calibrates():
    tight: dict[str, Any] = dict(delta=1e-15, num_parameters=4_000_000, num_steps=2000)
    tight["accountant"] = "rdp"
    one = plan(**tight)
    assert 0.1 < one.noise_charge.delta / one.delta < 0.5
    assert one.accounted_delta == one.delta - one.noise_charge.delta
    assert one.epsilon() > plan(**tight, exact_noise=True).epsilon()
    text = str(one.statement())
    assert f"{one.noise_charge.delta:.1g} of delta" in text and "4,000,000" in text


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-16, 1e-24])
def test_a_plan_that_says_nothing_pays_at_most_a_hundredth(delta):
    one = plan(delta=delta)
    assert one.noise_charge.delta <= 0.0101 * delta
    assert one.most_parameters <= 10**9


def test_a_model_that_delta_cannot_pay_for_is_refused():
    with pytest.raises(ValueError, match=r"costs .* of the delta of 1e-18"):
        plan(delta=1e-18, num_parameters=10**7)
    with pytest.raises(ValueError, match="num_parameters is 0"):
        plan(num_parameters=0)
    assert plan(delta=1e-18, num_parameters=10**7, exact_noise=True).epsilon() > 0


def test_plans_written_before_are_read_as_they_were():
    old = plan()
    assert "num_parameters" not in old.to_json() and "exact" not in old.to_json()
    assert dp_ilg.PrivacyPlan.from_json(old.to_json()) == old
    new = plan(num_parameters=10, exact_noise=True)
    assert dp_ilg.PrivacyPlan.from_json(new.to_json()) == new


def test_prior_releases_are_paid_for():
    bare, more = plan(), plan(prior_releases=(("DP-PCA", 16.0),))
    assert more.noise_charge.delta > bare.noise_charge.delta
