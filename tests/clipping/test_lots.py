"""Abadi et al. 2016, by name: lots, momentum, and clip and noise that change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.clipping.clip_schedule import clip_by_schedule
from dp_ilg.clipping.lots import clipped_lot, sum_lot
from tests.helpers.models import (
    CLIP_MODES,
    mlp_batch,
    mlp_loss,
    mlp_params,
    noiseless,
    plan,
    trees_close,
)

KEY = jax.random.key(11)


def uniform_chain(plan, *tail, clip_mode="joint", clip=None):
    return dp_ilg.chain(
        clip or dp_ilg.clip_per_example(plan.l2_clip_norm, clip_mode=clip_mode),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(plan, key=KEY),
        *tail,
    )


# --- Lots ---------------------------------------------------------------------------


@pytest.mark.parametrize("clip_mode", CLIP_MODES)
def test_a_lot_of_several_batches_is_the_single_big_batch(clip_mode):
    params, lot = mlp_params(), mlp_batch(12)
    padding = jnp.arange(12) % 5 == 3
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=0.7, clip_mode=clip_mode)
    geometry = dp_ilg.Geometry.uniform(params)

    def clipped(rows):
        batch = jax.tree.map(lambda x: x[rows], lot)
        mask = padding[rows]
        return grad_fn(params, batch, geometry=geometry, is_padding_example=mask)

    @jax.jit
    def three_ways():
        facts: dict = dict(geometry=geometry, is_padding_example=padding)
        whole = clipped(slice(None))
        at_once = clipped_lot(grad_fn, params, lot, 4, **facts)
        parts = sum_lot(clipped(slice(i, i + 4)) for i in (0, 4, 8))
        return whole, at_once, parts

    whole, at_once, parts = three_ways()
    for found in (at_once, parts):
        trees_close(found, whole)
        assert found.sensitivity() == whole.sensitivity()


def test_a_lot_has_one_noise_and_one_step():
    """Its release is the big batch's bit for bit in noise; two updates are not."""
    params, lot = mlp_params(), mlp_batch(12)
    private = plan(score_budget=0.0)
    tx = uniform_chain(private)
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=private.l2_clip_norm)
    state = tx.init(params)
    geometry = tx.geometry(state)
    halves = [jax.tree.map(lambda x, h=h: x[h::2], lot) for h in (0, 1)]

    @jax.jit
    def releases(state):
        whole, after = tx.update(grad_fn(params, lot, geometry=geometry), state, params)
        parts = [grad_fn(params, half, geometry=geometry) for half in halves]
        release, once = tx.update(sum_lot(parts), state, params)
        first, middle = tx.update(parts[0], state, params)
        second, twice = tx.update(parts[1], middle, params)
        apart = jax.tree.map(jnp.add, first, second)
        steps = [chain_state[2].step for chain_state in (after, once, twice)]
        return whole, release, apart, steps

    whole, release, apart, steps = releases(state)
    trees_close(release, whole)
    assert [int(step) for step in steps] == [1, 1, 2]
    gap = jnp.abs(apart["d1"]["kernel"] - whole["d1"]["kernel"]).max()
    assert gap > 0.01  # noise was added twice


def test_lots_that_do_not_divide_are_one_sentence():
    params = mlp_params()
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    geometry = dp_ilg.Geometry.uniform(params)

    def lot(size, batch_size, **more):
        batch = mlp_batch(size)
        return clipped_lot(
            grad_fn, params, batch, batch_size, geometry=geometry, **more
        )

    with pytest.raises(ValueError, match="12 examples, which batches of 5 do not div"):
        lot(12, 5)
    with pytest.raises(ValueError, match="batch_size is 0, but must be a whole"):
        lot(12, 0)
    with pytest.raises(ValueError, match=r"shape \(3,\), but the lot has 12"):
        lot(12, 4, is_padding_example=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="common leading axis"):
        clipped_lot(grad_fn, params, (1.0, 2), 1, geometry=geometry)
    with pytest.raises(ValueError, match="The lot has no examples"):
        lot(0, 1)


def test_sum_lot_takes_clipped_sums_of_one_kind_only():
    params, batch = mlp_params(), mlp_batch(4)
    geometry = dp_ilg.Geometry.uniform(params)
    one, other = (
        jax.jit(dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=c))(
            params, batch, geometry=geometry
        )
        for c in (1.0, 2.0)
    )
    with pytest.raises(ValueError, match="clipped with different weights"):
        sum_lot([one, other])
    with pytest.raises(ValueError, match="The lot has no batches"):
        sum_lot([])
    with pytest.raises(TypeError, match="holds dict, which is not clipped"):
        sum_lot([params])


# --- Momentum -----------------------------------------------------------------------


def test_momentum_behind_the_noise_is_sgd_with_momentum_on_the_release():
    params = mlp_params()
    private = plan(score_budget=0.0)
    plain, moving = (
        uniform_chain(private),
        uniform_chain(private, optax.sgd(0.1, momentum=0.9)),
    )
    reference = optax.sgd(0.1, momentum=0.9)
    states = plain.init(params), moving.init(params), reference.init(params)
    for t in range(3):
        gradients = jax.vmap(jax.grad(mlp_loss), (None, 0))(params, mlp_batch(6, t))
        release, first = plain.update(gradients, states[0], params)
        update, second = moving.update(gradients, states[1], params)
        expected, third = reference.update(release, states[2], params)
        trees_close(update, expected)
        states = first, second, third


def test_without_noise_and_clip_it_is_sgd_with_momentum():
    params, batch = mlp_params(), mlp_batch(12)
    tx = uniform_chain(noiseless(), optax.sgd(0.1, momentum=0.9))
    reference = optax.sgd(0.1, momentum=0.9)
    state, other = tx.init(params), reference.init(params)
    gradients = jax.vmap(jax.grad(mlp_loss), (None, 0))(params, batch)
    mean = jax.tree.map(lambda g: g.mean(0), gradients)
    for _ in range(2):
        update, state = tx.update(gradients, state, params)
        expected, other = reference.update(mean, other, params)
        trees_close(update, expected, rtol=1e-4)


# --- Clip and noise over steps, clip by layer ---------------------------------------


def norms(private, tx, clip_norms, batch):
    """The clipped sum's norm with one example, and the noise's, step by step."""
    params = mlp_params()
    state, found = tx.init(params), []

    @jax.jit
    def step(state, clip_norm):
        grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=clip_norm)
        clipped = grad_fn(params, batch, geometry=tx.geometry(state))
        release, state = tx.update(clipped, state, params)
        noise = jax.tree.map(
            lambda r, s: r * private.batch_size - s, release, clipped.gradients
        )
        return [optax.tree.norm(x) for x in (clipped.gradients, noise)], state

    for t in range(3):
        sizes, state = step(state, clip_norms(t))
        found.append([float(x) for x in sizes])
    return np.array(found)


def test_time_dependent_clip_scales_the_noise_and_leaves_the_multiplier_alone():
    """A public schedule of C: noise follows the clip each step, epsilon does not."""
    private = plan(score_budget=0.0, noise_multiplier=5.0, l2_clip_norm=0.01)
    tx = uniform_chain(private)
    batch = jax.tree.map(lambda x: 100 * x[:1] if x.ndim > 1 else x[:1], mlp_batch(1))

    def falling(t):
        return 0.01 / 2**t

    constant = norms(private, tx, lambda t: 0.01, batch)
    moving = uniform_chain(private, clip=clip_by_schedule(falling))
    scheduled = norms(private, moving, falling, batch)
    assert np.isnan(norms(private, tx, falling, batch)[1:, 1]).all()
    np.testing.assert_allclose(scheduled[:, 0], [falling(t) for t in range(3)], 1e-4)
    np.testing.assert_allclose(scheduled[:, 1] / constant[:, 1], [1, 0.5, 0.25], 1e-3)


def test_time_dependent_clip_in_a_chain_is_an_optax_schedule():
    private = plan(score_budget=0.0, l2_clip_norm=0.02)
    schedule = optax.linear_schedule(0.02, 0.01, 2)
    clip = clip_by_schedule(schedule)
    tx = uniform_chain(private, clip=clip)
    fixed = dp_ilg.Geometry.uniform(mlp_params())
    params = mlp_params()
    gradients = jax.vmap(jax.grad(mlp_loss), (None, 0))(params, mlp_batch(1))
    state, whole = clip.init(params), tx.init(params)
    clip_step, whole_step = jax.jit(clip.update), jax.jit(tx.update)
    for expected in (0.02, 0.015, 0.01, 0.01):
        clipped, state = clip_step(gradients, state, params, geometry=fixed)
        assert clipped.sensitivity() == pytest.approx(expected)
        norm = optax.tree.norm(clipped.gradients)
        assert float(norm) == pytest.approx(expected, rel=1e-4)
        release, whole = whole_step(gradients, whole, params)
        assert np.isfinite(float(optax.tree.norm(release)))
    poisoned, _ = jax.jit(clip_by_schedule(lambda t: 1.0 - t).update)(
        gradients, state._replace(step=1), params, geometry=fixed
    )
    assert bool(jnp.isnan(poisoned.gradients["d1"]["kernel"]).all())


@pytest.mark.parametrize(
    "schedule, error", [(1.0, TypeError), (lambda t: -1.0, ValueError)]
)
def test_bad_clip_schedules_are_one_sentence(schedule, error):
    with pytest.raises(error, match="clip (schedule|norm at step 0) is"):
        clip_by_schedule(schedule)


def test_time_dependent_noise_is_the_plans_schedule():
    private = plan(score_budget=0.0, schedule=dp_ilg.schedules.linear(0.5))
    tx = uniform_chain(private)
    params = {"w": jnp.zeros(40_000)}
    state, stds = tx.init(params), []
    step = jax.jit(tx.update)
    for _ in range(private.num_steps):
        update, state = step({"w": jnp.zeros((1, 40_000))}, state, params)
        stds.append(float(update["w"].std()) * private.batch_size)
    expected = private.noise_multipliers * private.l2_clip_norm
    np.testing.assert_allclose(stds, expected, rtol=0.02)
    assert expected[0] > 1.8 * expected[-1]


def test_per_layer_clipping_bounds_every_layer_and_the_whole():
    params, private = mlp_params(), noiseless(l2_clip_norm=0.01)
    tx = uniform_chain(private, clip_mode="per_layer")
    gradients = jax.vmap(jax.grad(mlp_loss), (None, 0))(params, mlp_batch(1))
    update, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    layer_norms = [
        float(optax.tree.norm(update[name])) * private.batch_size for name in update
    ]
    np.testing.assert_allclose(layer_norms, 0.01 / np.sqrt(2), rtol=1e-4)
    assert np.linalg.norm(layer_norms) <= 0.01
