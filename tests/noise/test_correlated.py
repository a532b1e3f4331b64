"""Correlated noise: exact in whole numbers, of the law that is charged, bounded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.accounting.correlated import strategies
from dp_ilg.noise import correlated
from dp_ilg.noise.add_noise import add_importance_noise, noise_stddev
from dp_ilg.noise.release import ROUNDING, Whole
from tests.helpers.models import plan

STEEP = (
    1.0,
    *(15 * 2048 // 31 / 2048 for _ in range(31)),
)  # the largest products there can be
LEVEL = 1e-4


def whole(noise):
    upper, lower = (np.asarray(x).astype(object) for x in noise)
    return upper * 2**24 + lower


def rounded_sum(strategy, rows, step):
    """round(sum of c_i m_(t-i)) by Python's integers."""
    ages = len(strategy) - 1
    units = [round(c * 2048) for c in strategy]
    total: Any = sum(units[i] * rows[(step - i) % ages] for i in range(1, ages + 1))
    return np.array([(x + 1024) >> 11 for x in total], object)


def start_of(kind, rng, shape):
    ends = {"least": -(2**31), "most": 2**31 - 1, "zero": 0}
    if kind in ends:
        return np.full(shape, ends[kind], np.int64)
    return rng.integers(-(2**31), 2**31, shape)


@pytest.mark.parametrize("start", ["zero", "least", "most", "random"])
@pytest.mark.parametrize("bands", [2, 3, 8, "steep"])
def test_noise_is_exact_whatever_is_remembered(bands, start):
    rng = np.random.default_rng(1)
    strategy = STEEP if bands == "steep" else strategies.optimal(bands, 1000)
    ages = len(strategy) - 1
    rows = start_of(start, rng, (ages, 40)).astype(object)
    memory = {"w": jnp.asarray(rows.astype(np.int64), jnp.int32)}
    step = jax.jit(lambda z, m, t: correlated.correlated([z], m, t, strategy))
    for t in range(7):
        fresh = rng.integers(-(2**31), 2**31, 40)
        (noise,), memory = step(jnp.asarray(fresh, jnp.int32), memory, t)
        want = fresh.astype(object) - rounded_sum(strategy, rows, t)
        assert (whole(noise) == want).all()
        rows[t % ages] = [min(max(x, -(2**31)), 2**31 - 1) for x in want]
        assert (np.asarray(memory["w"]).astype(object) == rows).all()


@pytest.mark.parametrize("strategy", [(1.0, 0.5), strategies.optimal(5, 300), STEEP])
def test_one_example_moves_the_fresh_draws_by_what_is_charged(strategy):
    """Adversarial: the fresh draws of two worlds with the same releases, compared."""
    rng, ages, width = np.random.default_rng(2), len(strategy) - 1, 60
    bound = ROUNDING * np.sqrt(width)  # what putting two sums on the grid may add
    charged = correlated.rounding(strategy) * np.sqrt(width)
    length, worst = strategies.length(strategy), 0.0
    for trial in range(60):
        size = 2.0 ** rng.integers(0, 31)
        moved = (rng.normal(size=width) * size / 4).astype(np.int64).astype(object)
        kind = ("random", "least", "most", "zero")[trial % 4]
        rows = start_of(kind, rng, (ages, width)).astype(object)
        other, shifts = rows.copy(), [moved]
        noise = start_of("random", rng, width).astype(object)
        pair = noise, noise - moved
        for t in range(ages):
            for memory, m in zip((rows, other), pair, strict=True):
                memory[t % ages] = [min(max(x, -(2**31)), 2**31 - 1) for x in m]
            sums = [rounded_sum(strategy, r, t + 1) for r in (rows, other)]
            shifts.append(sums[0] - sums[1])
            noise = start_of("random", rng, width).astype(object)
            pair = noise, noise  # nothing of the example in later sums
        square = sum(float(x) ** 2 for part in shifts for x in part)
        reach = float(np.sqrt(sum(float(x) ** 2 for x in moved)))
        excess = (np.sqrt(square) - length * reach) / length
        worst = max(worst, excess)
        assert excess <= charged - bound + 1e-6
    assert worst > 0  # what is charged is not nothing


def releases(the_plan, params, steps, key=0):
    """Releases of nothing but noise, in units of the fresh draw's deviation."""
    noise = add_importance_noise(the_plan, key=jax.random.key(key))
    geometry = dp_ilg.Geometry.uniform(params)
    shares = jnp.zeros(len(geometry.groups.names))
    nothing = dp_ilg.ClippedGrad(params, shares, geometry, the_plan.l2_clip_norm)
    state, update = noise.init(params), jax.jit(noise.update)
    found, states = [], []
    unit = the_plan.gradient_noise_multipliers * the_plan.l2_clip_norm
    for t in range(steps):
        release, state = update(nothing, state)
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(release)]
        found.append(np.concatenate(leaves) * the_plan.batch_size / unit[t])
        states.append(state)
    return np.stack(found), states


def fresh_of(found, strategy):
    """The fresh draws of a run's releases: C times them."""
    return np.stack(
        [
            sum(c * found[t - i] for i, c in enumerate(strategy) if i <= t)
            for t in range(len(found))
        ]
    )


@pytest.mark.parametrize("bands", [2, 5])
def test_the_fresh_draws_are_independent_normals_of_the_planned_length(bands):
    the_plan = plan(l2_clip_norm=3.0, bands=bands, batch_size=20)
    found, _ = releases(the_plan, {"a": jnp.zeros(3000), "b": jnp.zeros((7, 300))}, 12)
    draws = fresh_of(found, the_plan.strategy)
    statistic, size = np.sum(draws**2), draws.size
    low, high = scipy.stats.chi2.ppf([LEVEL / 2, 1 - LEVEL / 2], size)
    assert low <= statistic <= high
    assert not low <= statistic * 1.03**2 <= high
    assert scipy.stats.kstest(draws.ravel(), "norm").pvalue > LEVEL
    products = draws[1:] * draws[:-1]
    assert abs(products.mean()) < 4.5 / np.sqrt(products.size)
    raw = found[1:] * found[:-1]  # and the noise itself is not independent
    assert abs(raw.mean()) > 20 / np.sqrt(raw.size)


def test_sums_of_steps_have_the_noise_that_the_plan_expects():
    the_plan = plan(bands=4, num_steps=20)
    found, _ = releases(the_plan, {"w": jnp.zeros(8000)}, 20)
    sums = np.cumsum(found, 0)
    expected = strategies.prefix_error(the_plan.strategy, 20)
    expected /= strategies.length(the_plan.strategy)
    assert np.sqrt((sums**2).mean()) == pytest.approx(expected, rel=0.01)
    alone = strategies.prefix_error((), 20)
    assert expected * strategies.length(the_plan.strategy) < 0.7 * alone


def test_stddev_of_a_step_is_what_the_noise_amounts_to():
    the_plan = plan(bands=3, num_steps=20, l2_clip_norm=2.0)
    params = {"w": jnp.zeros(40_000)}
    found, _ = releases(the_plan, params, 9)
    unit = the_plan.gradient_noise_multipliers * 2.0
    for t in (0, 1, 8):
        said = noise_stddev(the_plan, t, dp_ilg.Geometry.uniform(params), 2.0)
        assert found[t].std() * unit[t] == pytest.approx(float(said[0]), rel=0.02)


def test_noise_of_a_step_is_a_function_of_the_state_before_it():
    the_plan, params = plan(bands=3), {"w": jnp.zeros(5)}
    first, states = releases(the_plan, params, 6)
    noise = add_importance_noise(the_plan, key=jax.random.key(0))
    geometry = dp_ilg.Geometry.uniform(params)
    nothing = dp_ilg.ClippedGrad(params, jnp.zeros(1), geometry, 1.0)
    again, _ = jax.jit(noise.update)(nothing, states[3])
    unit = the_plan.gradient_noise_multipliers[4]
    again = np.asarray(again["w"], np.float64) * the_plan.batch_size / unit
    np.testing.assert_array_equal(again, first[4])


def test_past_the_plan_the_release_is_nan():
    the_plan = plan(bands=2, num_steps=3)
    found, _ = releases(the_plan, {"w": jnp.zeros(5)}, 3)
    assert np.isfinite(found).all()
    noise = add_importance_noise(the_plan, key=jax.random.key(0))
    params = {"w": jnp.zeros(5)}
    geometry = dp_ilg.Geometry.uniform(params)
    nothing = dp_ilg.ClippedGrad(params, jnp.zeros(1), geometry, 1.0)
    state = noise.init(params)._replace(step=jnp.int32(3))
    assert np.isnan(np.asarray(noise.update(nothing, state)[0]["w"])).all()


def test_weights_may_change_from_step_to_step():
    """Fresh draws, each in the unit of its own step, are normal all the same."""
    the_plan = plan(bands=3, schedule=dp_ilg.schedules.linear(0.5))
    params = {"a": jnp.zeros(2000), "b": jnp.zeros(2000)}
    noise = add_importance_noise(the_plan, key=jax.random.key(5))
    state, found = noise.init(params), []
    for t in range(8):
        geometry = dp_ilg.Geometry.of(params, [0.5 + 0.2 * t, 2.0 - 0.2 * t])
        nothing = dp_ilg.ClippedGrad(params, jnp.zeros(2), geometry, 1.0)
        release, state = noise.update(nothing, state)
        unit = the_plan.gradient_noise_multipliers[t] * np.asarray(geometry.weights)
        scaled = zip(jax.tree.leaves(release), unit, strict=True)
        found.append(np.concatenate([np.asarray(x) / u for x, u in scaled]))
    draws = fresh_of(np.stack(found) * the_plan.batch_size, the_plan.strategy)
    assert draws.std() == pytest.approx(1.0, rel=0.02)
    assert scipy.stats.kstest(draws.ravel(), "norm").pvalue > LEVEL


def test_grid_pays_for_rounding_at_every_step():
    assert correlated.rounding(()) == ROUNDING
    for strategy in ((1.0, 0.5), STEEP):
        extra = np.sqrt(len(strategy) - 1) / strategies.length(strategy)
        assert correlated.rounding(strategy) == pytest.approx(ROUNDING + extra)


def test_frozen_leaves_have_no_memory_and_no_noise():
    params = {"head": jnp.ones(3), "base": jnp.ones((4, 5))}
    layers = dp_ilg.layers.by_module(frozen=["base"])
    tx = dp_ilg.dp_adam_ilg(
        0.1, plan(bands=4), key=jax.random.key(0), layers=layers, importance="uniform"
    )
    state = tx.init(params)
    (memory,) = [s.memory for s in state if hasattr(s, "memory")]
    assert memory["base"].shape == (0, 4, 5) and memory["head"].shape == (3, 3)
    grads = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), params)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert not updates["base"].any() and np.isfinite(updates["head"]).all()


def test_a_memory_of_other_layers_is_refused():
    params = {"head": jnp.ones(3), "base": jnp.ones((4, 5))}
    layers = dp_ilg.layers.by_module(frozen=["base"])
    the_plan = plan(bands=4)
    noise = add_importance_noise(the_plan, key=jax.random.key(0), layers=layers)
    geometry = dp_ilg.Geometry.uniform(params)
    nothing = dp_ilg.ClippedGrad(params, jnp.zeros(2), geometry, 1.0)
    with pytest.raises(ValueError, match="give add_importance_noise the layers"):
        noise.update(nothing, noise.init(params))


def test_rules_that_drop_groups_are_refused():
    params = {"a": jnp.ones(3), "b": jnp.ones(4)}
    tx = dp_ilg.dp_adam_ilg(
        0.1, plan(bands=2), key=jax.random.key(0), importance="top_k:1"
    )
    grads = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), params)
    with pytest.raises(ValueError, match="drops groups"):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("kind", ["secure", "exact"])
def test_draws_from_outside_cancel_as_well(kind):
    from dp_ilg.noise.exact import ExactNoise
    from dp_ilg.noise.secure import SecureNoise

    source = (SecureNoise if kind == "secure" else ExactNoise)(secret=bytes(32))
    the_plan, params = plan(bands=2, exact_noise=kind == "exact"), {"w": jnp.zeros(400)}
    tx = dp_ilg.dp_adam_ilg(0.1, the_plan, key=jax.random.key(0), importance="uniform")
    noise = add_importance_noise(the_plan, key=jax.random.key(0))
    state, found = noise.init(params), []
    geometry = dp_ilg.Geometry.uniform(params)
    nothing = dp_ilg.ClippedGrad(params, jnp.zeros(1), geometry, 1.0)
    for t in range(4):
        draws = source.draws(t, params, tx.geometry(tx.init(params)))
        release, state = noise.update(nothing, state, noise=draws)
        unit = the_plan.gradient_noise_multipliers[t] / the_plan.batch_size
        found.append(np.asarray(release["w"], np.float64) / unit)
        own = np.asarray(draws.gradient["w"]) * 2.0**-27
        fresh = fresh_of(np.stack(found), the_plan.strategy)[t]
        np.testing.assert_allclose(fresh, own, rtol=1e-3, atol=1e-5)


def test_whole_numbers_of_more_than_32_bits_are_added():
    from dp_ilg.noise.release import grid_of, noised

    grid = grid_of(jnp.ones(1), 1.0, 1)
    many = Whole(jnp.array([300], jnp.int32), jnp.array([5], jnp.int32))
    found = float(noised(jnp.zeros(1), None, grid, many)[0])
    assert found == pytest.approx((300 * 2**24 + 5.5) * 2.0**-27 * 1.0003, rel=1e-3)


def test_a_memory_that_was_cast_is_refused():
    """Cast, as mixed precision casts a tree, it is refused."""
    noise = add_importance_noise(plan(bands=2), key=jax.random.key(0))
    state = noise.init({"w": jnp.ones(3)})
    cast = optax.tree.cast(state.memory, jnp.bfloat16)
    geometry = dp_ilg.Geometry.uniform({"w": jnp.ones(3)})
    nothing = dp_ilg.ClippedGrad({"w": jnp.zeros(3)}, jnp.zeros(1), geometry, 1.0)
    with pytest.raises(ValueError, match="must be int32"):
        noise.update(nothing, state._replace(memory=cast))
