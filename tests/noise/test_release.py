"""Sum and noise meet as integers: exact, bounded, and NaN where no bound is known."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.noise.release import (
    ROUNDING,
    allowed_stddev,
    check_multiplier,
    grid_of,
    largest_multiplier,
    noised,
    on_host,
)
from tests.helpers.models import plan

SIZE = 4096


def integers(high, low, grid):
    """The whole number of steps a sum is put on, from the public function alone."""
    from dp_ilg.noise.release import _on_grid

    upper, lower = jax.jit(_on_grid)(jnp.asarray(high), jnp.asarray(low), grid.step)
    return [int(u) * 2**24 + int(v) for u, v in zip(upper, lower, strict=True)]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 50.0, 1e4, 4e5, 4e7])
@pytest.mark.parametrize("stddev", [0.7, 1.0, 3.1e-9, 8.8e7])
def test_a_sum_is_put_within_its_bound_of_where_it_was(scale, stddev):
    """In exact fractions, for sums from a millionth to a million deviations."""
    rng = np.random.default_rng(int(scale * 7 + 1))
    high = (rng.normal(size=200) * scale * stddev).astype(np.float32)
    low = (high * rng.uniform(-1, 1, 200) * 2.0**-25).astype(np.float32)
    ties = np.float32(np.round(high / stddev) + 0.5) * np.float32(stddev)
    high = np.concatenate([high, ties, -ties, [0, stddev, -stddev]]).astype(np.float32)
    low = np.concatenate([low, np.zeros(len(high) - len(low))]).astype(np.float32)
    grid = grid_of(jnp.float32(stddev), 1.0, 100)
    step = Fraction(float(grid.step))
    worst = max(
        abs(q - (Fraction(float(h)) + Fraction(float(v))) / step)
        for q, h, v in zip(integers(high, low, grid), high, low, strict=True)
    )
    assert worst <= Fraction(ROUNDING) / 2
    assert worst > Fraction(1, 4)  # the search does look at ties


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 40.0])
def test_the_multiplier_holds_after_rounding(multiplier):
    """The allowance covers the bound; without it, noise would be too small."""
    for count in (1, 10**4, 10**8):
        grid = grid_of(jnp.float32(1.0), multiplier, count)
        used = Fraction(float(grid.stddev))
        moved = 1 + Fraction(ROUNDING) * used / 2**27 * Fraction(count**0.5)
        assert used >= Fraction(multiplier) * moved
        assert used <= Fraction(multiplier) * moved * Fraction(10006, 10000)
    assert Fraction(multiplier) < Fraction(multiplier) * moved


def test_the_release_is_a_function_of_the_integer_alone():
    """Two sums that go to one integer, with the draws that make up the difference."""
    grid = grid_of(jnp.float32(1.0), 1.0, SIZE)
    rng = np.random.default_rng(0)
    one = np.float32(rng.normal(size=SIZE) * 30)
    other = np.float32(rng.normal(size=SIZE) * 30)
    zeros = np.zeros(SIZE, np.float32)
    apart = np.array(integers(one, zeros, grid)) - integers(other, zeros, grid)
    fits = np.abs(apart) < 2**30
    draws = rng.integers(-(2**30), 2**30, SIZE)
    first = noised(jnp.asarray(one), None, grid, jnp.asarray(draws, jnp.int32))
    moved = jnp.asarray(np.where(fits, draws + apart, 0), jnp.int32)
    second = noised(jnp.asarray(other), None, grid, moved)
    assert fits.sum() > 100
    np.testing.assert_array_equal(np.asarray(first)[fits], np.asarray(second)[fits])


def test_sum_and_draw_add_up():
    grid = grid_of(jnp.float32(2.0), 0.5, 10)
    steps = jnp.asarray(
        np.random.default_rng(0).integers(-(2**31) + 2**25, 2**31 - 2**25, SIZE)
    )
    steps = steps.astype(jnp.int32)
    value = jnp.linspace(-1e4, 1e4, SIZE)
    found = noised(value, None, grid, steps)
    expected = np.asarray(value, np.float64) + (
        np.asarray(steps, np.float64) + 0.5
    ) * float(grid.step)
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7)
    host = on_host(np.asarray(value, np.float64), float(grid.stddev), steps)
    np.testing.assert_allclose(host, expected, atol=2 * float(grid.step))


@pytest.mark.parametrize("bad", [0.0, -1.0, jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["clip norm", "weight", "multiplier"])
def test_no_sum_without_noise_is_released_whatever_came_before(bad, where):
    """optax.zero_nans in front turns a poisoned clip norm into 0; NaN all the same."""
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    clip, weights = jnp.float32(1.0), jnp.ones(2)
    if where == "clip norm":
        clip = jnp.float32(bad)
    if where == "weight":
        weights = jnp.array([1.0, bad])
    geometry = dp_ilg.Geometry(weights, dp_ilg.Geometry.uniform(params).groups)
    clipped = dp_ilg.ClippedGrad(params, jnp.zeros(2), geometry, clip)
    noise = dp_ilg.add_importance_noise(plan(score_budget=0.0), key=jax.random.key(0))
    tx = optax.chain(optax.zero_nans(), noise)
    state = tx.init(params)
    if where == "multiplier":
        if bad == 0.0:
            return  # a plan without noise says NO PRIVACY
        from dp_ilg.noise.add_noise import gaussian_noise

        traced = jax.jit(lambda s: gaussian_noise(clipped, s, jax.random.key(0)))
        release = traced(jnp.float32(bad))
    else:
        release, _ = jax.jit(noise.update)(clipped, noise.init(params))
        del state
    assert all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(release))


def test_a_plan_without_noise_releases_the_sum_itself():
    params = {"a": jnp.array([1.5, -2.25, 1e7])}
    clipped = dp_ilg.ClippedGrad(
        params, jnp.zeros(1), dp_ilg.Geometry.uniform(params), jnp.float32(1.0)
    )
    bare = plan(epsilon=None, noise_multiplier=0.0, score_budget=0.0)
    noise = dp_ilg.add_importance_noise(bare, key=jax.random.key(0))
    release, _ = noise.update(clipped, noise.init(params))
    np.testing.assert_array_equal(release["a"] * bare.batch_size, params["a"])


def test_sums_beyond_reach_are_cut_and_what_is_not_finite_is_nan():
    grid = grid_of(jnp.float32(1.0), 1.0, 1)
    value = jnp.array([1e12, -1e30, jnp.nan, jnp.inf])
    found = noised(value, None, grid, jnp.zeros(4, jnp.int32))
    assert 2.6e8 < float(found[0]) < 2.8e8 and -2.8e8 < float(found[1]) < -2.6e8
    assert bool(jnp.isnan(found[2:]).all())


def test_more_noise_than_the_grid_allows_is_refused():
    with pytest.raises(ValueError, match=r"noise multiplier is 1e\+06"):
        check_multiplier(1e6, 10**6)
    loud = plan(noise_multiplier=1e6, score_budget=0.0)
    params = {"a": jnp.zeros(100)}
    clipped = dp_ilg.ClippedGrad(
        params, jnp.zeros(1), dp_ilg.Geometry.uniform(params), jnp.float32(1.0)
    )
    noise = dp_ilg.add_importance_noise(loud, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"noise multiplier is 1e\+06"):
        jax.jit(noise.update)(clipped, noise.init(params))
    assert largest_multiplier(10**6) > 5000
    assert allowed_stddev(2.0, 5.0, 1000) > 2.0


def test_a_model_larger_than_the_plan_pays_for_is_refused():
    params = {"a": jnp.zeros(100)}
    small = plan(score_budget=0.0, num_parameters=50)
    noise = dp_ilg.add_importance_noise(small, key=jax.random.key(0))
    clipped = dp_ilg.ClippedGrad(
        params, jnp.zeros(1), dp_ilg.Geometry.uniform(params), jnp.float32(1.0)
    )
    with pytest.raises(ValueError, match="draws 101 numbers .* pays for 50"):
        noise.update(clipped, noise.init(params))
