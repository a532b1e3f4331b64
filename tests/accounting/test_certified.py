"""The certified accountant: never below the truth, near it, at every delta and size."""

import itertools
import math
import resource
import subprocess
import sys
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy import integrate, optimize, stats

from dp_ilg.accounting import accountants, truncation
from dp_ilg.accounting.certified import accountant, contour, moments
from dp_ilg.accounting.certified.runs import CUT, Run, best_bound
from dp_ilg.accounting.kinds import Kind, merged
from tests.helpers.exact_delta import Exact
from tests.helpers.random_plans import draw, verdict

RELATIONS = {
    1: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    2: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def fine(kinds, delta, sensitivity, interval):
    """dp_accounting's pessimistic epsilon on a fine grid."""
    oracle = pld.PLDAccountant(RELATIONS[sensitivity], interval)
    for q, z, _, count in kinds:
        gaussian = dp_accounting.GaussianDpEvent(z)
        event = dp_accounting.PoissonSampledDpEvent(q, gaussian) if q < 1 else gaussian
        oracle.compose(event, count)
    return oracle.get_epsilon(delta)


# steps, delta, and what `fine` gives at intervals of 1e-4 for both relations
CASES = {
    "one kind": ([Kind(0.01, 0.6, (), 1000)], 1e-5, (7.433616, 8.767253)),
    "two kinds": (
        [Kind(0.1, 2.0, (), 100), Kind(0.1, 3.0, (), 50)],
        1e-6,
        (2.914670, 5.469205),
    ),
    "with a release of all": (
        [Kind(1.0, 8.0, (), 1), Kind(0.02, 1.2, (), 300)],
        1e-5,
        (1.599893, 2.679875),
    ),
    "tiny delta": ([Kind(0.001, 0.5, (), 3000)], 1e-10, (8.806948, 8.972701)),
    "few steps": ([Kind(0.9, 1.0, (), 3)], 1e-5, (7.979203, 14.241704)),
    "half": ([Kind(0.5, 5.0, (), 200)], 1e-5, (6.701170, 15.357809)),
}


@pytest.mark.parametrize("sensitivity", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_never_below_a_fine_grid_and_within_a_thousandth(name, sensitivity):
    """The fine grid itself is up to 1e-5 of epsilon above the truth."""
    kinds, delta, both = CASES[name]
    known = both[sensitivity - 1]
    found = accountant.epsilon(kinds, delta, sensitivity)
    assert known * (1 - 1e-5) <= found <= known * 1.0005


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_fine_grid_is_dp_accountings(name, sensitivity):
    kinds, delta, both = CASES[name]
    known = fine(kinds, delta, sensitivity, 1e-4)
    assert known == pytest.approx(both[sensitivity - 1], abs=1e-6)


# --- the oracle -----------------------------------------------------------------------


def one_step_delta(epsilon, q, z, removed):
    """Closed form of a single step, an example added or removed."""
    odds = (math.exp(epsilon if removed else -epsilon) - 1 + q) / q
    if odds <= 0:
        return 1 - math.exp(epsilon) if removed else 0.0
    cut = z * math.log(odds) + 0.5 / z
    tail = stats.norm.sf if removed else stats.norm.cdf
    mixed = (1 - q) * tail(cut) + q * tail(cut - 1 / z)
    pair = (mixed, tail(cut)) if removed else (tail(cut), mixed)
    return pair[0] - math.exp(epsilon) * pair[1]


def gaussian_delta(epsilon, distance):
    tails = stats.norm.logcdf(
        [distance / 2 - epsilon / distance, -distance / 2 - epsilon / distance]
    )
    return math.exp(tails[0]) - math.exp(epsilon + tails[1])


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(("q", "z", "epsilon"), [(0.3, 0.9, 1.5), (0.9, 2.0, 0.6)])
def test_the_oracle_knows_one_step(q, z, epsilon, removed):
    known = one_step_delta(epsilon, q, z, removed)
    if known < 1e-12:
        return
    oracle = Exact([([(1.0, q, z)], 1)], 1, removed, epsilon, known)
    low, high = oracle.deltas(epsilon)
    assert low == pytest.approx(known, rel=3e-5) and high == pytest.approx(
        low, rel=1e-5
    )
    assert abs(high / known - 1) < 0.5 * abs(
        oracle.deltas(epsilon * 0.999)[1] / known - 1
    )


@pytest.mark.parametrize("epsilon", [0.4, 3.0, 12.0])
def test_the_oracle_knows_gaussians(epsilon):
    known = gaussian_delta(epsilon, 1.0)
    oracle = Exact([([(1.0, 1.0, 10.0)], 100)], 1, True, epsilon, known)
    assert oracle.deltas(epsilon) == pytest.approx((known, known), rel=1e-4)
    assert known > 1e-5 or epsilon > 3


def test_the_oracle_agrees_with_tilted_draws():
    """Importance sampling of the run's loss, at 5 standard errors; 1.1 is rejected."""
    q, z, steps, epsilon, tilt = 0.1, 3.0, 200, 2.5, 10.0
    rng = np.random.default_rng(1)
    x = np.linspace(-9, 16, 200_001)
    loss = np.log1p(q * np.expm1(x / z - 0.5 / z**2))
    logs = -0.5 * x * x + (1 + tilt) * loss
    weights = np.exp(logs - logs.max())
    moment = np.log(weights.sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi)) + logs.max()
    cdf = np.cumsum(weights) / weights.sum()
    total = loss[np.searchsorted(cdf, rng.random((20_000, steps)))].sum(axis=1)
    ratio = np.exp(steps * moment - tilt * total)
    draws = ratio * np.maximum(-np.expm1(epsilon - total), 0.0)
    known, error = draws.mean(), draws.std() / math.sqrt(len(draws))
    low, high = Exact([([(1.0, q, z)], steps)], 1, True, epsilon, known).deltas(epsilon)
    assert abs(low - known) < 5 * error and abs(high - known) < 5 * error
    assert abs(1.1 * low - known) > 5 * error


def check(numbers):
    """The verdict on random runs; returns how many the oracle could judge."""
    judged = 0
    for number in numbers:
        found = verdict(*draw(np.random.default_rng(number)))
        if found["above"] is not None:
            judged += 1
            assert found["above"] <= 1 + 1e-5, (number, found)
            assert found["within"] >= 1, (number, found)
    return judged


def test_random_runs_of_the_whole_domain():
    assert check(range(2000, 2004)) >= 3


@pytest.mark.slow
def test_many_random_runs_of_the_whole_domain():
    assert check(range(2000, 2200)) >= 150


def test_an_accountant_that_is_a_thousandth_too_small_is_found_out():
    kinds, delta, sensitivity = [Kind(0.01, 1.0, (), 500)], 1e-12, 1
    claimed = accountant.epsilon(kinds, delta, sensitivity) * 0.999
    oracle = Exact([([(1.0, 0.01, 1.0)], 500)], 1, True, claimed, delta)
    assert min(oracle.deltas(claimed)) > delta * 1.001


# --- closed forms and limits ----------------------------------------------------------


@pytest.mark.parametrize("delta", [1e-2, 1e-9, 1e-30])
@pytest.mark.parametrize("sensitivity", [1, 2])
def test_unsampled_gaussians_against_the_closed_form(sensitivity, delta):
    kinds = [Kind(1.0, 10.0, (), 16), Kind(1.0, 20.0, (), 64)]
    distance = sensitivity * math.sqrt(16 / 10**2 + 64 / 20**2)
    known: Any = optimize.brentq(
        lambda e: gaussian_delta(e, distance) / delta - 1, 0.1, 50, xtol=1e-12
    )
    found = accountant.epsilon(kinds, delta, sensitivity)
    assert known <= found <= 1.0005 * known


@pytest.mark.parametrize("delta", [1e-3, 1e-7, 1e-15])
@pytest.mark.parametrize("z", [0.3, 1.0, 4.0])
def test_one_step_against_the_closed_form(z, delta):
    q = 0.2
    known: Any = optimize.brentq(
        lambda e: one_step_delta(e, q, z, True) - delta, 1e-6, 600, xtol=1e-12
    )
    found = accountant.epsilon([Kind(q, z, (), 1)], delta, 1)
    assert known * (1 - 1e-9) <= found <= 1.0005 * known


@pytest.mark.parametrize("sensitivity", [1, 2])
def test_rare_participation_at_a_small_epsilon(sensitivity):
    """dp_accounting on a grid of a ten-thousandth of epsilon gives these."""
    known = (7.924641e-05, 8.105076e-05)[sensitivity - 1]
    found = accountant.epsilon([Kind(1e-6, 1.0, (), 10)], 1e-10, sensitivity)
    assert known * 0.9999 <= found <= 1.0006 * known


@pytest.mark.slow
def test_one_large_loss_among_millions_of_small_ones():
    """A single participation far out decides: terms cancel to a part in a million."""
    kinds = [Kind(1.1362295463034289e-06, 0.6335453510054788, (), 5_558_198)]
    found = accountant.epsilon(kinds, 2.839375189017937e-12, 2)
    assert 0.1963 < found < 0.1969  # it was 0.2008


def test_losses_dominate():
    """More noise, a smaller rate or a cut that is rarer never costs more."""
    laws = [truncation.cut_laws(1000, 0.1, most) for most in (100, 110, 140)]
    for sensitivity in (1, 2):
        cut = [Kind(0.1, 2.0, law, 50) for law in laws]
        ranked = [*cut, Kind(0.1, 2.0, (), 50), Kind(0.1, 2.1, (), 50)]
        found = [accountant.epsilon([kind], 1e-8, sensitivity) for kind in ranked]
        assert all(a > b * (1 - 4e-4) for a, b in itertools.pairwise(found))
        assert found[0] > 1.05 * found[-2] and found[-2] > 1.02 * found[-1]


@pytest.mark.parametrize("sensitivity", [1, 2])
def test_changes_hands_without_a_jump(sensitivity):
    """Where closed form, line and bare steps meet, within what each may add."""
    relation = list(accountants.NEIGHBORING_RELATIONS)[sensitivity - 1]
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(5.0), 10)
    whole = accountants.epsilon(event, 1e-6, neighboring_relation=relation)
    for q in (1 - 1e-9, 1 - 1e-6):
        found = accountant.epsilon([Kind(q, 5.0, (), 10)], 1e-6, sensitivity)
        assert whole * (1 - 1e-4) < found < whole * 1.0006
    near, bare = (
        accountant.epsilon([Kind(0.3, z, (), 2)], 1e-5, sensitivity)
        for z in (0.02 * (1 + 1e-7), 0.02 * (1 - 1e-7))
    )
    assert near * (1 - 1e-3) < bare
    assert bare < near * (1.02 if sensitivity == 1 else 4)  # an epsilon of thousands


def test_no_jump_along_delta():
    """Lines, tilts and cuts change from one delta to the next; epsilon hardly does."""
    deltas = np.geomspace(1e-3, 1e-25, 45)
    kinds = [Kind(0.01, 1.0, (), 100)]
    found = np.log([accountant.epsilon(kinds, delta, 1) for delta in deltas])
    bends = np.diff(found, 2)
    assert np.all(np.diff(found) > 0)
    assert bends.max() < 8e-4  # it is concave, but for what lines add
    assert np.abs(np.diff(bends)).max() < 3e-2


def test_it_is_monotone():
    def at(q=0.01, z=1.0, steps=500, delta=1e-12):
        return accountant.epsilon([Kind(q, z, (), steps)], delta, 1)

    for name, values in (
        ("delta", [1e-30, 1e-12, 1e-8, 1e-2]),
        ("z", [0.5, 1.0, 2.0, 40.0]),
    ):
        facts: list[dict[str, Any]] = [{name: value} for value in values]
        found = [at(**one) for one in facts]
        assert found == sorted(found, reverse=True) and len(set(found)) == 4
    for name, values in (("q", [1e-5, 1e-3, 0.1, 0.9]), ("steps", [1, 30, 900, 10**7])):
        facts: list[dict[str, Any]] = [{name: value} for value in values]
        found = [at(**one) for one in facts]
        assert found == sorted(found) and len(set(found)) == 4


def test_hardly_any_noise_is_whole_or_never_met():
    assert accountant.epsilon([Kind(1e-9, 1e-3, (), 10)], 1e-5, 1) == 0.0
    assert accountant.epsilon([Kind(0.5, 1e-3, (), 10)], 1e-5, 1) > 1e6
    assert accountant.epsilon([], 1e-5, 1) == 0.0


# --- the parts ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3, 7])
def test_moments_are_those_of_the_binomial_sum(order):
    q, z = 0.05, 1.2
    terms = [
        math.comb(order, k)
        * q**k
        * (1 - q) ** (order - k)
        * math.exp(k * (k - 1) / (2 * z * z))
        for k in range(order + 1)
    ]
    found = moments.tilted_loss(
        [(1.0, q, z)], moments.Order(1, True, order - 1.0), -200.0
    )
    assert found is not None
    assert found.log_moment == pytest.approx(math.log(sum(terms)), abs=1e-12)
    assert found.log_error < 1e-12


@pytest.mark.parametrize(("sensitivity", "removed"), [(1, True), (1, False), (2, True)])
@pytest.mark.parametrize("frequency", [0.7, 40.0])
def test_complex_moments_agree_with_adaptive_quadrature(
    sensitivity, removed, frequency
):
    q, z, tilt = 0.1, 0.8, 2.0
    order = moments.Order(sensitivity, removed, tilt, frequency)
    found = moments.tilted_loss([(1.0, q, z)], order, -200.0)
    assert found is not None
    mean = found.weights @ np.exp(1j * frequency * found.losses)

    def tilted(t):
        ours, theirs = (np.log1p(q * np.expm1(s * t / z - 0.5 / z**2)) for s in (1, -1))
        loss = ours - theirs if sensitivity == 2 else ours if removed else -ours
        base = ours if sensitivity == 2 or removed else 0.0
        return np.exp(base + tilt * loss - 0.5 * t * t), loss

    def part(function):
        edges = np.linspace(-12, 14, 105)
        return sum(
            integrate.quad(function, a, b, epsabs=1e-14)[0]
            for a, b in zip(edges[:-1], edges[1:], strict=True)
        )

    total = part(lambda t: tilted(t)[0])
    real = part(lambda t: tilted(t)[0] * math.cos(frequency * tilted(t)[1]))
    imaginary = part(lambda t: tilted(t)[0] * math.sin(frequency * tilted(t)[1]))
    assert mean == pytest.approx(complex(real, imaginary) / total, abs=1e-9)


def test_any_line_gives_an_upper_bound():
    """However coarse: few frequencies and a large imagined release only round up."""
    delta, kinds = 1e-8, [Kind(0.02, 1.0, (), 300)]
    known = accountant.epsilon(kinds, delta, 1)
    run = Run.of(kinds, 1, True, 0).cut(math.log(delta), 1.0)
    bound, tilt = best_bound(run, math.log(delta))
    left = math.log(delta) + math.log1p(-CUT)
    line = contour.fitted(run, tilt, math.log(delta), known, 1e-4)
    assert line is not None
    for period, factor in ((1.0, 1.0), (0.7, 0.7), (0.5, 0.6), (0.4, 1.3), (2.0, 1.0)):
        other = contour.fitted(run, factor * tilt, math.log(delta), known, 1e-4)
        assert other is not None
        other = other._replace(
            period=period * other.period, terms=math.ceil(other.terms * period)
        )
        terms = contour.summed(run, other)
        assert terms is not None
        assert contour.solve(terms, left, bound) >= known * (1 - 2e-4)


def test_many_kinds_are_rounded_to_less_noise():
    kinds = [Kind(0.01, z, (), 3) for z in np.linspace(0.7, 1.4, 20).tolist()]
    few = merged(kinds, 8)
    assert len(few) <= 8 and sum(k.count for k in few) == 60
    for kind in kinds:
        below = [k for k in few if k.noise_multiplier <= kind.noise_multiplier]
        assert sum(k.count for k in below) >= sum(
            k.count for k in kinds if k.noise_multiplier <= kind.noise_multiplier
        )
    exact = accountant.epsilon(kinds, 1e-5, 1)
    assert exact < accountant.epsilon(few, 1e-5, 1) < 1.2 * exact
    assert merged(kinds, 20) == sorted(kinds)


BIG = """
import resource, time
from dp_ilg import schedules
from dp_ilg.accounting.calibration import plan_privacy
start = time.process_time()
plan = plan_privacy({how}, delta=1e-7, num_examples=1_000_000, batch_size=1000,
                    num_steps={steps}, schedule=schedules.linear(0.5),
                    num_stages=1000)
found = plan.epsilon()
seconds = time.process_time() - start
print(len(plan.stages), found, seconds,
      int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20)
"""


def big(how, steps):
    code = BIG.format(how=how, steps=steps)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return map(float, out.stdout.split())


def test_a_million_steps_in_a_thousand_stages_within_30_seconds_and_2_gib():
    stages, found, seconds, gib = big("noise_multiplier=4.0", 1_000_000)
    assert stages == 1000 and seconds < 30 and gib < 2
    few = [Kind(0.001, 4.0 * x, (), 100_000) for x in np.linspace(1, 0.5, 10)]
    assert found == pytest.approx(accountant.epsilon(few, 1e-7, 1), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1000, 1_000_000])
def test_calibration_of_a_thousand_stages_ends(steps):
    _, found, seconds, gib = big("epsilon=4.0", steps)
    assert 3.98 < found <= 4.0 and seconds < 120 and gib < 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
