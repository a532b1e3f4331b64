"""Cyclic Poisson sampling: parts that take turns, dealt so that none moves another."""

import jax
import numpy as np
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.sampling.poisson import PoissonSampler

LEVEL = 1e-4
N, Q, PARTS, CYCLES = 300, 0.06, 4, 1500


@pytest.fixture(scope="module")
def sampler():
    return PoissonSampler(N, Q, key=jax.random.key(7), parts=PARTS)


@pytest.fixture(scope="module")
def cycles(sampler):
    """How often each example was drawn in each cycle."""
    found = np.zeros((CYCLES, N), int)
    for step in range(CYCLES * PARTS):
        np.add.at(found[step // PARTS], sampler.indices(step), 1)
    return found


def test_an_example_takes_part_once_a_cycle_at_most_at_b_times_the_rate(cycles):
    assert cycles.max() == 1
    rate = PARTS * Q
    each = cycles.sum(0)
    squares = ((each - CYCLES * rate) ** 2).sum() / (CYCLES * rate * (1 - rate))
    p = scipy.stats.chi2.sf(squares, N)
    assert LEVEL < p < 1 - LEVEL
    count, wrong = CYCLES * N, 0.97 * rate
    found = [
        (each.sum() - count * q) / np.sqrt(count * q * (1 - q)) for q in (rate, wrong)
    ]
    assert abs(found[0]) < 4 < 8 < abs(found[1])


def test_sizes_of_cycles_vary_as_binomial_ones(cycles):
    rate = PARTS * Q
    sizes, variance = cycles.sum(1), N * rate * (1 - rate)
    squares = ((sizes - N * rate) ** 2).sum() / variance
    p = scipy.stats.chi2.sf(squares, CYCLES)
    assert LEVEL < p < 1 - LEVEL


def test_steps_draw_from_their_own_part(sampler):
    for step in range(3 * PARTS):
        parts = set(sampler.part_of(sampler.indices(step)).tolist())
        assert parts <= {step % PARTS}


def test_parts_are_dealt_evenly_and_differently_by_key():
    dealt = [PoissonSampler(40_000, 0.01, key=k, parts=8) for k in (0, 1)]
    first, second = (s.part_of(np.arange(40_000)) for s in dealt)
    counts = np.bincount(first, minlength=8)
    assert scipy.stats.chisquare(counts).pvalue > LEVEL
    assert abs((first == second).mean() - 1 / 8) < 5 * np.sqrt(7 / 64 / 40_000)


def test_one_example_more_moves_no_other():
    """Law: add or remove one. The last example's coming leaves all others in place."""
    few = PoissonSampler(N, Q, key=3, parts=PARTS)
    more = PoissonSampler(N + 1, Q, key=3, parts=PARTS)
    for step in range(40):
        both = more.indices(step)
        np.testing.assert_array_equal(few.indices(step), both[both < N])


def test_a_step_is_the_same_whenever_it_is_asked_for(sampler):
    other = PoissonSampler(N, Q, key=jax.random.key(7), parts=PARTS)
    later = [other.indices(step) for step in (9, 2, 9)]
    np.testing.assert_array_equal(later[0], sampler.indices(9))
    np.testing.assert_array_equal(later[0], later[2])
    np.testing.assert_array_equal(later[1], sampler.indices(2))


def test_full_parts_come_whole():
    whole = PoissonSampler(100, 0.25, key=0, parts=4)
    drawn = [whole.indices(step) for step in range(4)]
    assert sorted(np.concatenate(drawn).tolist()) == list(range(100))
    np.testing.assert_array_equal(whole.indices(5), drawn[1])


def test_plans_with_bands_make_samplers_with_parts():
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=1000, batch_size=50,
        num_steps=10, bands=4,
    )  # fmt: skip
    found = PoissonSampler.for_plan(plan, key=0)
    assert found.parts == 4 and found.sampling_prob == 0.05
    assert "parts=4" in repr(found)
    assert PoissonSampler.for_plan(plan, key=0).chunk_size >= 50


def test_chunks_hold_every_draw(sampler):
    for step in range(8):
        rows = np.concatenate([c.indices for c in sampler.chunks(step)])
        np.testing.assert_array_equal(rows[rows >= 0], sampler.indices(step))


@pytest.mark.parametrize(
    "facts, words",
    [
        (dict(parts=0), "parts is 0"),
        (dict(parts=20), "parts is 20, but a part would have to give 1.2 times"),
        (dict(parts=2, max_batch_size=9), "max_batch_size is 9"),
    ],
)
def test_parts_that_cannot_be_are_refused(facts, words):
    with pytest.raises((ValueError, TypeError), match=words):
        PoissonSampler(N, Q, key=0, **facts)
