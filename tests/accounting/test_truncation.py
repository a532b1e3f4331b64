"""Truncated Poisson batches: the draw, its event and what it costs."""

import math
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import pld
from scipy import stats

import dp_ilg
from dp_ilg.accounting import accountants, renyi, truncation
from dp_ilg.sampling.poisson import PoissonSampler

N, B, MOST = 400, 40, 48


def plan(**changes):
    facts: dict[str, Any] = dict(
        num_examples=N,
        batch_size=B,
        num_steps=30,
        delta=1e-5,
        noise_multiplier=1.5,
        max_batch_size=MOST,
    )
    return dp_ilg.plan_privacy(**facts | changes)


# --- the draw ---------------------------------------------------------------------


def sizes_and_counts(sampler, steps):
    counts, sizes = np.zeros(N), []
    for step in range(steps):
        drawn = sampler.indices(step)
        counts[drawn] += 1
        sizes.append(len(drawn))
    return np.array(sizes), counts


def test_a_large_draw_is_cut_and_others_are_the_plain_ones():
    cut = PoissonSampler(N, B / N, key=1, max_batch_size=MOST)
    plain = PoissonSampler(N, B / N, key=1)
    were_cut = 0
    for step in range(200):
        ours, theirs = cut.indices(step), plain.indices(step)
        if len(theirs) <= MOST:
            assert np.array_equal(ours, theirs)
        else:
            were_cut += 1
            assert len(ours) == MOST and set(ours) < set(theirs)
            assert (np.diff(ours) > 0).all()
    share = stats.binom.sf(MOST, N, B / N)  # 0.08
    assert abs(were_cut - 200 * share) < 5 * math.sqrt(200 * share)


def test_every_batch_is_one_chunk_of_one_size():
    sampler = PoissonSampler.for_plan(plan(), key=2)
    assert sampler.chunk_size == MOST and "max_batch_size=48" in repr(sampler)
    assert all(len(sampler.chunks(step)) == 1 for step in range(30))


def test_who_is_cut_is_uniform_at_level_1e_6():
    """Chi-square over examples; keeping the first drawn instead is found out."""
    sampler = PoissonSampler(N, B / N, key=3, max_batch_size=B)  # cuts every other draw
    steps = 1000
    _, counts = sizes_and_counts(sampler, steps)
    mean = counts.mean()
    kept = np.minimum(np.arange(N + 1), B) @ stats.binom.pmf(np.arange(N + 1), N, B / N)
    assert abs(mean - steps * kept / N) < 5 * math.sqrt(steps * B / N / N)

    def p_value(found):
        spread = np.sum((found - found.mean()) ** 2) / (steps * B / N)
        return stats.chi2.sf(spread, N - 1)

    assert p_value(counts) > 1e-6
    plain = PoissonSampler(N, B / N, key=3)
    first = np.zeros(N)
    for step in range(steps):
        first[plain.indices(step)[:B]] += 1
    assert p_value(first) < 1e-6


def test_everybody_drawn_and_cut():
    sampler = PoissonSampler(N, 1.0, key=4, max_batch_size=B)
    sizes, counts = sizes_and_counts(sampler, 100)
    assert set(sizes) == {B} and 0 < counts.min() + 5 and counts.max() < 40


# --- the event --------------------------------------------------------------------


def test_the_plan_has_its_own_event_and_digest():
    ours, plain = plan(), plan(max_batch_size=None)
    event: Any = ours.event()
    step = event.events[0].event
    kind = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent
    assert step == kind(N, B / N, MOST, 1.5)
    assert ours.digest() != plain.digest()
    assert dp_ilg.PrivacyPlan.from_json(ours.to_json()) == ours
    assert "max_batch_size" not in plain.to_json()
    assert "is cut to that number" in str(ours.statement())
    assert ours.statement().as_dict()["sampling"] == "truncated poisson"
    assert "cut" not in str(plain.statement())


@pytest.mark.parametrize("relation", list(accountants.NEIGHBORING_RELATIONS))
@pytest.mark.parametrize("most", [44, 50, 60, 80])
def test_near_dp_accountings_own(relation, most):
    ours = plan(max_batch_size=most, neighboring_relation=relation)
    kind = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent
    neighbors = dp_accounting.NeighboringRelation[relation.upper()]
    oracle = pld.PLDAccountant(neighbors, 1e-3)
    oracle.compose(kind(N, B / N, most, 1.5), 30)
    known = oracle.get_epsilon(1e-5)
    if relation == "replace_one":  # the same pair at the same rate
        assert known * (1 - 2e-3) <= ours.epsilon() <= 1.0005 * known
    else:  # there it takes the pair of the other relation, which is looser
        least = {44: 0.905, 50: 0.949, 60: 0.979, 80: 0.9995}[most]
        assert least * known <= ours.epsilon() <= 1.001 * known


@pytest.mark.parametrize("relation", list(accountants.NEIGHBORING_RELATIONS))
def test_frequent_cuts_cost_no_more_than_dp_accounting_says(relation):
    """Every other draw is cut, of ten: q for the rate would cost a third more."""
    ours = plan(max_batch_size=10, batch_size=10, neighboring_relation=relation)
    kind = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent
    oracle = pld.PLDAccountant(
        dp_accounting.NeighboringRelation[relation.upper()], 1e-3
    )
    oracle.compose(kind(N, 10 / N, 10, 1.5), 30)
    assert ours.epsilon() <= 1.001 * oracle.get_epsilon(1e-5)


@pytest.mark.parametrize("accountant", list(accountants.ACCOUNTANTS))
def test_cutting_costs_and_less_if_it_is_rare(accountant):
    found = [
        plan(max_batch_size=most, accountant=accountant).epsilon()
        for most in (B, 50, 60, 100)
    ]
    plain = plan(max_batch_size=None, accountant=accountant).epsilon()
    if accountant == "zcdp":  # takes no notice of how rare
        assert len(set(found)) == 1 and found[0] > 2 * plain
    else:
        assert found == sorted(found, reverse=True)
        assert found[0] > 1.5 * plain and found[-1] == pytest.approx(plain, rel=2e-3)


def test_pld_is_below_rdp_below_zcdp():
    for most in (B, 50, 70):
        found = [
            plan(max_batch_size=most, accountant=a).epsilon()
            for a in accountants.ACCOUNTANTS
        ]
        assert found == sorted(found)


def test_never_below_half_the_noise_and_always_cut():
    always = plan(max_batch_size=B, batch_size=B).epsilon()
    assert always <= plan(max_batch_size=None, noise_multiplier=0.75).epsilon() * 1.001


def exact_delta(epsilon, others, most, q, z, removed):
    """Delta of one step in which all push one way and one example the other way.

    Below the cut the number of others drawn is known. Above it any set that is kept has
    the same sum, so that the rate is the mean over that number, and a cut swaps the one
    for another, which moves the sum by 2. Both are threshold tests, in closed form.
    """
    m = np.arange(others + 1)
    weights = stats.binom.pmf(m, others, q)
    cut = weights[most:].sum()
    rate = weights[most:] @ (q * most / (m[most:] + 1)) / cut
    shift, p = np.array([1.0, 2.0]), np.array([q, rate])
    odds = (math.exp(epsilon) - 1 + p) / p
    if not removed:  # P is the side without the example
        odds = (math.exp(-epsilon) - 1 + p) / p
    with np.errstate(invalid="ignore", divide="ignore"):
        x = z**2 / shift * np.log(odds) + shift / 2
    x = np.where(odds > 0, x, -np.inf)
    tail = stats.norm.sf if removed else stats.norm.cdf
    mixed = (1 - p) * tail(x / z) + p * tail((x - shift) / z)
    pure = tail(x / z)
    ours, theirs = (mixed, pure) if removed else (pure, mixed)
    gain = np.maximum(ours - math.exp(epsilon) * theirs, 0)
    return float(np.array([1 - cut, cut]) @ gain)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("most", [30, 36, 45])
@pytest.mark.parametrize("z", [0.8, 2.0])
def test_one_step_against_its_worst_case_and_the_plain_claim_is_refuted(
    z, most, removed
):
    facts: dict[str, Any] = dict(
        num_steps=1, batch_size=30, noise_multiplier=z, delta=1e-4
    )
    ours = plan(max_batch_size=most, **facts)
    q = ours.sampling_prob
    for others in (N - 1, N):  # one example removed, one added
        assert exact_delta(ours.epsilon(), others, most, q, z, removed) <= 1e-4
    if removed:
        if most == 45:  # cuts are rare: the bound is not far away
            assert exact_delta(0.93 * ours.epsilon(), N, most, q, z, True) > 1e-4
        lied = plan(max_batch_size=None, **facts)
        assert exact_delta(lied.epsilon(), N - 1, most, q, z, True) > 1.05e-4


def test_a_mixture_of_divergences():
    orders = (2.0, 8.0)
    one, other = np.array([0.1, 0.2]), np.array([0.5, 3.0])
    for share, known in ((1.0, other), (1e-300, one)):
        np.testing.assert_allclose(renyi.mixture(one, other, share, orders), known)
    half = renyi.mixture(one, other, 0.5, orders)
    assert (one < half).all() and (half < other).all()


def test_the_rate_of_a_cut_is_that_of_a_simulation():
    """At 5 standard errors; the sampling rate instead is rejected."""
    n, q, most = 60, 0.2, 13
    rng = np.random.default_rng(0)
    drawn = rng.random((200_000, n)) < q  # the last one is the example looked at
    others = drawn[:, :-1].sum(axis=1)
    met = others >= most
    kept = drawn[met, -1] & (rng.random(met.sum()) < most / (others[met] + 1))
    cut, rate = truncation.cut_laws(n, q, most)[0]
    spread = math.sqrt(met.mean() * (1 - met.mean()) / len(met))
    assert abs(met.mean() - cut) < 5 * spread
    error = math.sqrt(rate * (1 - rate) / met.sum())
    assert abs(kept.mean() - rate) < 5 * error
    assert abs(kept.mean() - q) > 5 * error


def test_both_sizes_of_the_data_are_covered():
    for most in (B, MOST, 70):
        laws = truncation.cut_laws(N, B / N, most)
        for (cut, rate), others in zip(laws, (N - 1, N), strict=True):
            assert cut == pytest.approx(stats.binom.sf(most - 1, others, B / N))
            assert 0.5 * B / N < rate < B / N
    assert truncation.cut_laws(N, B / N, N + 1) == ()


# --- plans ------------------------------------------------------------------------


def test_calibration_reaches_the_target_with_more_noise():
    ours = plan(noise_multiplier=None, epsilon=2.0)
    plain = plan(noise_multiplier=None, epsilon=2.0, max_batch_size=None)
    assert 1.98 < ours.epsilon() <= 2.0
    assert ours.noise_multipliers[0] > plain.noise_multipliers[0]


def test_the_largest_batch_stays_within_the_cut():
    facts: dict[str, Any] = dict(
        epsilon=50.0, noise_multiplier=2.0, delta=1e-5, num_examples=N
    )
    found = dp_ilg.batch_size_for_epsilon(**facts, num_steps=3, max_batch_size=MOST)
    assert found.batch_size == MOST and found.max_batch_size == MOST


@pytest.mark.parametrize("value", [B - 1, 0, -3, True])
def test_a_cut_below_the_expected_size_is_refused(value):
    with pytest.raises(ValueError, match="max_batch_size"):
        plan(max_batch_size=value)


def test_an_optimizer_takes_the_plan_as_any_other():
    ours = plan(num_steps=2)
    tx = dp_ilg.dp_adam_ilg(1e-2, ours, key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(
        lambda w, x: (w * x).sum(), l2_clip_norm=ours.l2_clip_norm
    )
    params = jnp.ones(3)
    state = tx.init(params)
    (chunk,) = PoissonSampler.for_plan(ours, key=0).chunks(0)
    x = jnp.ones((N, 3))[chunk.indices]
    clipped = grad_fn(
        params,
        x,
        geometry=tx.geometry(state),
        is_padding_example=jnp.asarray(chunk.is_padding_example),
    )
    updates, _ = tx.update(clipped, state, params)
    assert np.isfinite(np.asarray(updates)).all()
