"""Composition as spectra: an upper bound, near dp_accounting's, at any size."""

import math
import resource
import subprocess
import sys

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy import integrate, stats

from dp_ilg.accounting import accountants, loss_pairs, spectra
from dp_ilg.accounting.spectra import Kind

RELATIONS = {
    1: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    2: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def fine(kinds, delta, sensitivity, interval):
    """dp_accounting's pessimistic epsilon on a fine grid."""
    accountant = pld.PLDAccountant(RELATIONS[sensitivity], interval)
    for q, z, _, count in kinds:
        gaussian = dp_accounting.GaussianDpEvent(z)
        event = dp_accounting.PoissonSampledDpEvent(q, gaussian) if q < 1 else gaussian
        accountant.compose(event, count)
    return accountant.get_epsilon(delta)


# steps, delta, and what `fine` gives at intervals of 1e-4 for both relations
CASES = {
    "one kind": ([Kind(0.01, 0.6, 0.0, 1000)], 1e-5, (7.433616, 8.767253)),
    "two kinds": (
        [Kind(0.1, 2.0, 0.0, 100), Kind(0.1, 3.0, 0.0, 50)],
        1e-6,
        (2.914670, 5.469205),
    ),
    "with a release of all": (
        [Kind(1.0, 8.0, 0.0, 1), Kind(0.02, 1.2, 0.0, 300)],
        1e-5,
        (1.599893, 2.679875),
    ),
    "tiny delta": ([Kind(0.001, 0.5, 0.0, 3000)], 1e-10, (8.806948, 8.972701)),
    "few steps": ([Kind(0.9, 1.0, 0.0, 3)], 1e-5, (7.979203, 14.241704)),
    "half": ([Kind(0.5, 5.0, 0.0, 200)], 1e-5, (6.701170, 15.357809)),
}


@pytest.mark.parametrize("sensitivity", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_never_below_a_fine_grid_and_within_a_thousandth(name, sensitivity):
    """The fine grid itself is up to 1e-5 of epsilon above the truth."""
    kinds, delta, both = CASES[name]
    known = both[sensitivity - 1]
    found = spectra.epsilon(kinds, delta, sensitivity, 1.5 * known)
    assert known * (1 - 1e-5) <= found <= known * 1.001


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_fine_grid_is_dp_accountings(name, sensitivity):
    kinds, delta, both = CASES[name]
    known = fine(kinds, delta, sensitivity, 1e-4)
    assert known == pytest.approx(both[sensitivity - 1], abs=1e-6)


def test_coarser_grids_only_round_up(monkeypatch):
    kinds = [Kind(0.01, 1.0, 0.0, 500), Kind(0.01, 0.8, 0.0, 500)]
    found = []
    for error in (1e-5, 1.5e-4, 3e-3, 5e-2):
        monkeypatch.setattr(spectra, "_RELATIVE_ERROR", error)
        found.append(spectra.epsilon(kinds, 1e-5, 1, 10.0))
    assert found == sorted(found)
    assert found[1] < 1.001 * found[0] and found[-1] > 1.002 * found[0]


def test_unsampled_gaussians_against_the_closed_form():
    kinds = [Kind(1.0, 10.0, 0.0, 16), Kind(1.0, 20.0, 0.0, 64)]
    z = (16 / 10**2 + 64 / 20**2) ** -0.5
    for sensitivity in (1, 2):
        known = dp_accounting.get_epsilon_gaussian(z / sensitivity, 1e-6)
        found = spectra.epsilon(kinds, 1e-6, sensitivity, 2 * known)
        assert known <= found <= 1.001 * known


def divergence(epsilon, kind, sensitivity, removed):
    """Hockey-stick divergence of one step's dominating pair, by the trapezoid rule."""
    q, z = kind.sampling_prob, kind.noise_multiplier
    x = np.linspace(-10 * z - 1, 10 * z + 1, 400_001)

    def mixture(mean):
        return (1 - q) * stats.norm.pdf(x, 0, z) + q * stats.norm.pdf(x, mean, z)

    pair = mixture(1.0), mixture(-1.0 if sensitivity == 2 else 0.0)
    ours, theirs = pair if removed else pair[::-1]
    return integrate.trapezoid(np.maximum(ours - math.exp(epsilon) * theirs, 0.0), x)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("sensitivity", [1, 2])
def test_losses_on_the_grid_dominate_those_of_the_step(sensitivity, removed):
    kind = Kind(0.3, 0.9, 0.0, 1)
    points = loss_pairs.grid(0.05, 12.0) * 0.05
    steps = np.array([[kind.sampling_prob, kind.noise_multiplier]])
    losses, infinite = loss_pairs.step_losses(points, steps, sensitivity, removed)
    assert losses.min() >= 0 and losses.sum() + infinite[0] == pytest.approx(1)
    for epsilon in (-0.9, -0.21, 0.0, 0.13, 0.5, 1.7):
        gain = np.maximum(-np.expm1(epsilon - points), 0)
        known = divergence(epsilon, kind, sensitivity, removed)
        found = float(losses[0] @ gain + infinite[0])
        assert known - 1e-9 <= found <= known + 1e-3


def test_many_kinds_are_rounded_to_less_noise():
    kinds = [Kind(0.01, z, 0.0, 3) for z in np.linspace(0.7, 1.4, 50).tolist()]
    few = spectra.merged(kinds, 8)
    assert len(few) <= 8 and sum(k.count for k in few) == 150
    for kind in kinds:
        below = [k for k in few if k.noise_multiplier <= kind.noise_multiplier]
        assert sum(k.count for k in below) >= sum(
            k.count for k in kinds if k.noise_multiplier <= kind.noise_multiplier
        )
    exact = spectra.epsilon(kinds, 1e-5, 1, 10.0)
    assert exact < spectra.epsilon(few, 1e-5, 1, 10.0) < 1.2 * exact
    assert spectra.merged(kinds, 50) == sorted(kinds)


def test_the_accountant_changes_hands_without_a_jump(monkeypatch):
    """The same steps by dp_accounting and, as if they were many, by spectra."""
    step = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0))
    known = accountants.epsilon(dp_accounting.SelfComposedDpEvent(step, 300), 1e-5)
    monkeypatch.setattr(accountants, "_FEW_STEPS", 0)
    accountants._epsilon.cache_clear()
    found = accountants.epsilon(dp_accounting.SelfComposedDpEvent(step, 300), 1e-5)
    accountants._epsilon.cache_clear()
    assert found != known and found == pytest.approx(known, rel=1e-3)


def test_losses_beyond_any_grid_are_left_to_the_bound():
    assert spectra.epsilon([Kind(0.01, 0.01, 0.0, 1)], 1e-5, 1, 777.0) == 777.0


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
    few = [Kind(0.001, 4.0 * x, 0.0, 100_000) for x in np.linspace(1, 0.5, 10)]
    assert found == pytest.approx(spectra.epsilon(few, 1e-7, 1, 50.0), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1000, 1_000_000])
def test_calibration_of_a_thousand_stages_ends(steps):
    _, found, seconds, gib = big("epsilon=4.0", steps)
    assert 3.98 < found <= 4.0 and seconds < 120 and gib < 2
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0
