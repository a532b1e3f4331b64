"""Accounting against dp_accounting, closed forms and published figures."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from dp_ilg.accounting import accountants, renyi

RELATIONS = list(accountants.NEIGHBORING_RELATIONS)
ACCOUNTANTS = list(accountants.ACCOUNTANTS)
ADD, REPLACE = RELATIONS
NEIGHBOURS = {
    ADD: dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    REPLACE: dp_accounting.NeighboringRelation.REPLACE_ONE,
}


def gaussian(z):
    return dp_accounting.GaussianDpEvent(z)


def sampled(q, z, count=1):
    event = dp_accounting.PoissonSampledDpEvent(q, gaussian(z))
    return dp_accounting.SelfComposedDpEvent(event, count)


def composed(*events):
    return dp_accounting.ComposedDpEvent(list(events))


def eps(event, accountant="pld", relation=ADD, delta=1e-5):
    return accountants.epsilon(
        event, delta, accountant=accountant, neighboring_relation=relation
    )


# --- Published figures --------------------------------------------------------------

MNIST_60_EPOCHS = sampled(256 / 60_000, 1.1, round(60 * 60_000 / 256))


def classic_conversion(event, delta):
    """epsilon = D_a + log(1 / delta) / (a - 1), Mironov 2017."""
    accountant = rdp.RdpAccountant()
    accountant.compose(event)
    orders = accountant.orders
    return float(np.min(accountant.rdp + math.log(1 / delta) / (orders - 1)))


def test_tutorial_epsilon_by_both_conversions():
    assert classic_conversion(MNIST_60_EPOCHS, 1e-5) == pytest.approx(3.01, abs=0.005)
    assert eps(MNIST_60_EPOCHS, "rdp") == pytest.approx(2.60, abs=0.005)
    assert 2.3 < eps(MNIST_60_EPOCHS, "pld") < 2.60


def test_abadi_moments_accountant():
    event = sampled(0.01, 4.0, 10_000)
    assert classic_conversion(event, 1e-5) == pytest.approx(1.26, abs=0.01)
    assert eps(event, "pld") < eps(event, "rdp") < 1.26


def test_abadi_strong_composition():
    """9.34: a step is (q e, q d)-private; half of delta goes to the composition."""
    q, sigma, steps, delta = 0.01, 4.0, 10_000, 1e-5
    step_delta = delta / 2 / (q * steps)
    step = q * math.sqrt(2 * math.log(1.25 / step_delta)) / sigma
    spread = math.sqrt(2 * steps * math.log(2 / delta))
    assert spread * step + steps * step**2 == pytest.approx(9.34, abs=0.005)


# --- Renyi curves -------------------------------------------------------------------


@pytest.mark.parametrize("q", [1e-4, 0.004, 0.1, 0.9])
@pytest.mark.parametrize("z", [0.4, 1.1, 5.0, 50.0])
def test_renyi_curve_agrees_with_dp_accounting(q, z):
    orders = (2.0, 3.0, 5.0, 17.0, 64.0, 256.0)
    oracle = rdp.RdpAccountant(orders)
    oracle.compose(sampled(q, z))
    ours = renyi.step_divergences(q, z, orders)
    bound = np.minimum(oracle.rdp, np.array(orders) / (2 * z**2))
    np.testing.assert_allclose(ours, bound, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize(("q", "z"), [(0.004, 1.1), (0.01, 0.8), (0.02, 4.0)])
def test_fractional_orders_agree_with_the_series(q, z):
    """dp_accounting's series adds absolute values: never below, close from 2.5 on."""
    orders = (1.1, 1.5, 2.5, 4.25, 9.75)
    oracle = rdp.RdpAccountant(orders)
    oracle.compose(sampled(q, z))
    ours = renyi.step_divergences(q, z, orders)
    assert np.all(ours <= oracle.rdp * (1 + 1e-9) + 1e-13)
    np.testing.assert_allclose(ours[2:], oracle.rdp[2:], rtol=1e-2)


@pytest.mark.parametrize("sensitivity", [1, 2])
@pytest.mark.parametrize("order", [1.1, 1.75, 3.0, 6.5])
@pytest.mark.parametrize(("q", "z"), [(0.1, 0.5), (0.5, 1.0), (0.02, 3.0)])
def test_integral_agrees_with_adaptive_quadrature(q, z, order, sensitivity):
    def log_density(x, mean):
        return -(((x - mean) / z) ** 2) / 2 - math.log(z * math.sqrt(2 * math.pi))

    def log_mixture(x, mean):
        without = math.log(1 - q) + log_density(x, 0)
        return np.logaddexp(without, math.log(q) + log_density(x, mean))

    def integrand(x):
        other = -1 if sensitivity == 2 else 0
        logs = order * log_mixture(x, 1) + (1 - order) * log_mixture(x, other)
        return math.exp(logs)

    edges = np.linspace(-9 * z, 2 * order + 9 * z, 40)
    total = sum(
        integrate.quad(integrand, low, high, epsabs=0)[0]
        for low, high in itertools.pairwise(edges)
    )
    (ours,) = renyi.step_divergences(q, z, (order,), sensitivity)
    truth = min(math.log(total) / (order - 1), sensitivity**2 * order / (2 * z**2))
    assert ours == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize("z", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("q", [0.001, 0.1, 0.5])
def test_replace_one_is_within_the_triangle_inequality(q, z):
    """Replace = remove, then add (Mironov 2017, Corollary 4), proven independently.

    D_a(P||Q) <= (a - 1/2) / (a - 1) D_2a(P||R) + D_(2a-1)(R||Q).
    """
    a = np.array([1.5, 2.0, 3.0, 6.0, 12.0, 24.0])
    remove = renyi.step_divergences(q, z, tuple(2 * a))
    add = renyi.step_divergences(q, z, tuple(2 * a - 1))
    replace = renyi.step_divergences(q, z, tuple(a), 2)
    assert np.all(replace <= (a - 0.5) / (a - 1) * remove + add)
    assert np.all(replace >= renyi.step_divergences(q, z, tuple(a)))


@pytest.mark.parametrize("z", [0.03, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.99])
def test_quadrature_fits_between_whole_orders(q, z):
    """(a - 1) D_a is convex in a and D_a grows: whole orders enclose the others."""
    orders = np.arange(2.0, 10.0, 0.5)
    curve = renyi.step_divergences(q, z, tuple(orders.tolist()))
    moments = (orders - 1) * curve
    assert np.all(np.diff(curve) >= -1e-12 * curve.max())
    assert np.all(np.diff(moments, 2) >= -1e-9 * moments.max())


@pytest.mark.parametrize("order", [2, 5, 9, 64])
@pytest.mark.parametrize("z", [0.1, 0.5, 3.0])
def test_integral_of_whole_orders_is_the_binomial_sum(z, order):
    integral = renyi._integral_moment(0.03, z, order, 1)
    binomial = renyi._binomial_moment(0.03, z, order)
    assert integral == pytest.approx(binomial, rel=1e-9, abs=1e-13)


def test_curves_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        renyi.step_divergences(0.1, 1.0, (2.0,))[0] = 0


# --- Neighbouring relations ---------------------------------------------------------


def test_replace_one_doubles_the_sensitivity_of_an_unsampled_gaussian():
    oracle = pld.PLDAccountant(NEIGHBOURS[REPLACE])
    oracle.compose(gaussian(4.0))
    half = dp_accounting.get_epsilon_gaussian(2.0, 1e-5)
    assert oracle.get_epsilon(1e-5) == pytest.approx(half, rel=1e-3)
    for accountant in ACCOUNTANTS:
        doubled = eps(gaussian(4.0), accountant, REPLACE)
        assert doubled == pytest.approx(eps(gaussian(2.0), accountant), rel=1e-9)


def test_dp_accountings_rdp_ignores_the_relation_where_ours_does_not():
    """The trap: the same epsilon for both relations."""
    answers = []
    for relation in NEIGHBOURS.values():
        oracle = rdp.RdpAccountant(neighboring_relation=relation)
        oracle.compose(gaussian(4.0))
        answers.append(oracle.get_epsilon(1e-5))
    assert answers[0] == answers[1]
    assert eps(gaussian(4.0), "rdp", REPLACE) > 1.9 * eps(gaussian(4.0), "rdp")


@pytest.mark.parametrize("q", [0.001, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("z", [0.6, 1.0, 3.0])
@pytest.mark.parametrize("relation", RELATIONS)
def test_pld_is_below_rdp_is_below_zcdp(q, z, relation):
    event = sampled(q, z, 200)
    tight, loose, loosest = (eps(event, a, relation) for a in ACCOUNTANTS)
    assert 0 < tight <= loose * (1 + 1e-9) <= loosest * (1 + 5e-3)


@pytest.mark.parametrize(("q", "z"), [(0.005, 0.9), (0.02, 1.0), (0.3, 2.0)])
def test_rdp_for_replace_one_bounds_dp_accountings_pld(q, z):
    oracle = pld.PLDAccountant(NEIGHBOURS[REPLACE], 1e-3)
    oracle.compose(sampled(q, z, 300))
    exact = oracle.get_epsilon(1e-5)
    assert exact <= eps(sampled(q, z, 300), "rdp", REPLACE) < 2 * exact


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_replace_one_costs_more_and_at_most_a_group_of_two(accountant):
    event = sampled(0.02, 1.0, 300)
    one, two = eps(event, accountant), eps(event, accountant, REPLACE)
    assert 1.2 * one < two < 4.1 * one


# --- Exactness and speed of PLD -----------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    ("q", "z", "steps"), [(0.0171, 0.9, 600), (0.0043, 1.1, 3000), (0.5, 8.0, 200)]
)
def test_coarse_discretisation_is_above_fine_and_close(q, z, steps, relation):
    fine = pld.PLDAccountant(NEIGHBOURS[relation], 2e-4)
    fine.compose(sampled(q, z, steps))
    truth, ours = fine.get_epsilon(1e-5), eps(sampled(q, z, steps), "pld", relation)
    assert truth * (1 - 1e-4) <= ours <= truth * (1 + 5e-4)  # its grid rounds up, too


def test_full_batches_are_one_gaussian():
    """q = 1 composes in closed form: 100 steps at 20 are one at 2."""
    exact = dp_accounting.get_epsilon_gaussian(2.0, 1e-5)
    assert eps(sampled(1.0, 20.0, 100)) == pytest.approx(exact, rel=1e-9)


def test_zcdp_conversion():
    """One Gaussian of rho = 1/8: above the exact epsilon, below the textbook bound."""
    rho, exact = 0.125, dp_accounting.get_epsilon_gaussian(2.0, 1e-5)
    textbook = rho + 2 * math.sqrt(rho * math.log(1e5))
    assert exact < eps(gaussian(2.0), "zcdp") < textbook
    orders = np.linspace(1.01, 200, 200_000)
    grid = rho * orders + np.log(1 / (1e-5 * orders)) / (orders - 1)
    best = float(np.min(grid + np.log1p(-1 / orders)))
    assert eps(gaussian(2.0), "zcdp") == pytest.approx(best, rel=1e-6)


def test_zcdp_takes_no_advantage_of_sampling():
    assert eps(sampled(0.01, 3.0, 10), "zcdp") == eps(sampled(1.0, 3.0, 10), "zcdp")


# --- Composition --------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("step", [sampled(0.02, 1.0), sampled(1.0, 5.0), gaussian(5.0)])
def test_compose_with_count_equals_single_composes(step, accountant, relation):
    """dp_accounting 0.6.0 loses the count of RandomizedResponse; we emit none."""
    at_once = eps(dp_accounting.SelfComposedDpEvent(step, 7), accountant, relation)
    one_by_one = eps(composed(*[step] * 7), accountant, relation)
    assert at_once == one_by_one > eps(step, accountant, relation)


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_same_law_for_dp_accountings_own_accountant(relation):
    neighbours = NEIGHBOURS[relation]
    counted, repeated = (pld.PLDAccountant(neighbours, 1e-3) for _ in range(2))
    step = dp_accounting.PoissonSampledDpEvent(0.02, gaussian(1.0))
    counted.compose(step, 7)
    for _ in range(7):
        repeated.compose(step)
    assert counted.get_epsilon(1e-5) == pytest.approx(
        repeated.get_epsilon(1e-5), rel=1e-6
    )


def test_order_and_grouping_of_stages_do_not_matter():
    one, two = sampled(0.02, 1.0, 30), sampled(0.02, 2.0, 20)
    assert eps(composed(one, two)) == eps(composed(two, composed(one)))
    nothing = dp_accounting.NoOpDpEvent()
    assert eps(composed(nothing, one)) == eps(one)
    assert eps(nothing) == eps(composed()) == 0.0


def test_a_charged_preprocessing_step_adds_up():
    """DP-PCA: one unsampled Gaussian beside the run."""
    run = sampled(0.01, 1.0, 500)
    both = eps(composed(gaussian(16.0), run))
    assert eps(run) < both < eps(run) + eps(gaussian(16.0))


# --- Two statistics of one sample ---------------------------------------------------


def test_score_and_gradient_on_one_sample_are_one_gaussian():
    """RdpAccountant accepts the nested event, an independent check of the formula."""
    z, share, orders = 1.3, 0.01, [2, 4, 8, 16, 32]
    parts = [z / math.sqrt(1 - share), z / math.sqrt(share)]
    assert accountants.effective_noise_multiplier(parts) == pytest.approx(z, rel=1e-14)
    nested = dp_accounting.PoissonSampledDpEvent(0.01, composed(*map(gaussian, parts)))
    together, single = rdp.RdpAccountant(orders), rdp.RdpAccountant(orders)
    together.compose(nested)
    single.compose(sampled(0.01, z))
    np.testing.assert_allclose(together.rdp, single.rdp, rtol=1e-9)
    unsampled = eps(composed(*map(gaussian, parts)))
    assert unsampled == pytest.approx(eps(gaussian(z)), rel=1e-9)


def test_two_poisson_events_for_one_sample_under_report():
    """Figures of PEERS.md: 0.744 would be reported where 0.793 is true."""
    q, z, steps = 0.01, 1.3, 1000
    half = z * math.sqrt(2)  # two parts of equal cost
    wrong = eps(composed(sampled(q, half, steps), sampled(q, half, steps)))
    assert wrong < 0.97 * eps(sampled(q, z, steps))


def test_nested_events_are_rejected_by_pld_and_by_us():
    nested = dp_accounting.PoissonSampledDpEvent(
        0.01, composed(gaussian(2.0), gaussian(2.0))
    )
    with pytest.raises(dp_accounting.UnsupportedEventError):
        pld.PLDAccountant().compose(nested)
    with pytest.raises(ValueError, match="effective_noise_multiplier"):
        eps(nested)


def test_effective_noise_multiplier_of_layers_and_limits():
    """Ten layers each clipped to C and noised with z: z / sqrt(10), PEERS.md."""
    combine = accountants.effective_noise_multiplier
    assert combine([1.0] * 10) == pytest.approx(10**-0.5)
    assert combine([3.0, math.inf]) == 3.0
    assert combine([3.0, 0.0]) == 0.0
    assert combine([math.inf]) == math.inf
    with pytest.raises(ValueError, match="0 or above"):
        combine([1.0, -1.0])


# --- Monotone -----------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    q=st.floats(1e-3, 0.5),
    z=st.floats(0.5, 20.0),
    steps=st.integers(1, 2000),
    factor=st.floats(1.05, 3.0),
    accountant=st.sampled_from(ACCOUNTANTS),
    relation=st.sampled_from(RELATIONS),
)
def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise(
    q, z, steps, factor, accountant, relation
):
    def at(q, z, steps):
        return eps(sampled(min(q, 1.0), z, steps), accountant, relation)

    base = at(q, z, steps) * (1 - 1e-3)  # the discretisation moves with the event
    assert base <= at(q, z, math.ceil(steps * factor))
    assert base <= at(q * factor, z, steps)
    assert base <= at(q, z / factor, steps)


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_falls_with_delta(accountant):
    event = sampled(0.02, 1.0, 300)
    values = [eps(event, accountant, delta=10.0**-k) for k in range(2, 10)]
    assert np.all(np.diff(values) > 0)


# --- Extremes -----------------------------------------------------------------------


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_extreme_settings_end_with_an_honest_number(accountant, relation):
    for q, z, steps in [
        (1e-7, 1e4, 1),
        (1.0, 0.01, 10),
        (0.5, 0.01, 100_000),
        (1e-4, 0.03, 10),
        (0.999, 5.0, 1000),
        (1e-3, 1e-4, 1),
    ]:
        value = eps(sampled(q, z, steps), accountant, relation)
        assert value >= 0 and not math.isnan(value)
        if q * steps > 1e-3 and z < 0.1:
            assert value > 100


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_no_noise_is_infinite(accountant):
    assert eps(sampled(0.01, 0.0), accountant) == math.inf
    assert eps(composed(gaussian(0.0), gaussian(9.0)), accountant) == math.inf
    assert eps(sampled(0.01, 1e-300), accountant) == math.inf
    assert eps(sampled(0.0, 0.0), accountant) == 0.0  # nobody ever takes part


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: eps(gaussian(1), "moments"), "accountant is 'moments'"),
        (lambda: eps(gaussian(1), relation="bounded"), "relation is 'bounded'"),
        (lambda: eps(gaussian(1), delta=0.0), "delta is 0.0"),
        (lambda: eps(gaussian(1), delta=1.0), "delta is 1.0"),
        (lambda: eps(gaussian(1), delta=math.nan), "delta is nan"),
        (lambda: eps(dp_accounting.LaplaceDpEvent(1.0)), "not supported"),
        (lambda: eps(dp_accounting.NonPrivateDpEvent()), "not supported"),
        (lambda: eps(dp_accounting.RandomizedResponseDpEvent(0.5, 2)), "not supp"),
    ],
)
def test_unknown_raises_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert str(caught.value).endswith(".") and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("z", [0.5, 1.0, 10.0])
def test_estimate_is_an_upper_bound(z, accountant, relation):
    event = sampled(0.02, z, 300)
    bound = accountants.estimate(
        event, 1e-5, accountant=accountant, neighboring_relation=relation
    )
    assert eps(event, accountant, relation) <= bound * (1 + 1e-9)
    assert bound < 2 * eps(event, accountant, relation)
