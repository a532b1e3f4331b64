"""The public grid: sums that do not round, in any order."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.geometry import grid

PARAMS = {"a": jnp.zeros(5), "b": jnp.zeros((3, 4))}


def exact(parts):
    """The value of three limbs as a fraction."""
    return sum(fractions.Fraction(float(x)) for x in parts)


def random_sums(seed, step, largest=2.0**41):
    """Limbs of sums of every size, multiples of the fine unit below ``2^45`` steps."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.uniform(-20, np.log2(largest), 64) * rng.choice([-1, 1], 64)
    with jax.enable_x64(True):
        return grid.limbs(jnp.asarray(sizes) * step, jnp.full(64, step, jnp.float32))


@pytest.mark.parametrize("step", [1.0, 2.0**-40, 2.0**60])
def test_adding_limbs_is_exact_in_any_order(step):
    add = jax.jit(lambda a, b: grid.add_limbs(a, b, jnp.float32(step)))
    sums = [random_sums(seed, step) for seed in range(12)]
    totals = []
    for order in (
        range(12),
        range(11, -1, -1),
        np.random.default_rng(0).permutation(12),
    ):
        total = sums[order[0]]
        for k in order[1:]:
            total = add(total, sums[k])
        totals.append(jax.tree.map(np.asarray, total))
    for k in range(64):
        want = sum(exact([x[k] for x in parts]) for parts in sums)
        assert exact([x[k] for x in totals[0]]) == want
        pair = exact([x[k] for x in totals[0][:2]]) / fractions.Fraction(step)
        assert (
            pair.denominator == 1 and abs(want / fractions.Fraction(step) - pair) <= 0.5
        )
    for other in totals[1:]:
        for one, two in zip(totals[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_float32_itself_would_not_do():
    sums = [np.asarray(x.high) for x in (random_sums(s, 1.0) for s in range(12))]
    assert not np.array_equal(sum(sums), sum(sums[::-1]))


def test_nan_stays_in_every_sum():
    bad = grid.Limbs(*[jnp.float32(x) for x in (np.nan, 0, 0)])
    good = grid.Limbs(*[jnp.float32(x) for x in (1, 0, 0)])
    assert np.isnan(grid.add_limbs(bad, good, jnp.float32(1)).high)


@pytest.mark.parametrize("bound", [1e-3, 0.7, 1.0, 3.0, 1e6])
def test_steps_are_powers_of_two_below_the_formula(bound):
    geometry = dp_ilg.Geometry.of(PARAMS, [0.3, 50.0])
    steps = np.asarray(jax.jit(grid.grid_steps)(geometry, bound), np.float64)
    most = bound * np.array([0.3, 50.0]) * 2.0**-grid.STEP_BITS / np.sqrt(17)
    assert (np.frexp(steps)[0] == 0.5).all()
    assert (steps <= most).all() and (steps > most / 2.0001).all()


@pytest.mark.parametrize("bound", [0.0, -1.0, np.nan, np.inf, 1e-30])
def test_no_step_without_a_bound(bound):
    geometry = dp_ilg.Geometry.uniform(PARAMS, layers="leaf")
    assert np.isnan(grid.grid_steps(geometry, bound)).all()


def test_hand_made_sums_are_put_on_the_grid():
    geometry = dp_ilg.Geometry.uniform(PARAMS)
    thirds = jax.tree.map(lambda x: x + 1 / 3, PARAMS)
    made = dp_ilg.ClippedGrad(thirds, jnp.zeros(1), geometry, jnp.float32(1.0))
    step = float(grid.grid_steps(geometry, 1.0)[0])
    for parts in grid.of_clipped(made):
        assert (np.asarray(parts.high) / step % 1 == 0).all()
        assert np.abs(np.asarray(parts.high) - 1 / 3).max() <= step / 2 + 1e-7
