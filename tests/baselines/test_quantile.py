"""Clip norms that follow a quantile: formula, noise law, charge, convergence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.baselines.quantile import adapt_clip_norm
from dp_ilg.noise.add_noise import noise_stddev
from tests.helpers.models import noiseless, plan
from tests.noise.test_add_noise import DRAWS, chi_square_accepts

PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}


def batch(size=40, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(size=(size, 1))
    flat = rng.normal(size=(size, 7))
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True) * lengths
    parts = {"a": flat[:, :3], "b": flat[:, 3:].reshape(size, 2, 2)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts)


def norms(gradients):
    own = [np.asarray(x, np.float64).reshape(len(x), -1) for x in gradients.values()]
    each = np.stack([np.linalg.norm(x, axis=1) for x in own], 1)
    return np.linalg.norm(each, axis=1), each


def clipped_in(geometry, gradients, bound):
    clip = dp_ilg.clip_per_example(bound)
    return clip.update(gradients, clip.init(PARAMS), geometry=geometry)[0]


@pytest.mark.parametrize("each_group", [False, True])
def test_one_step_is_the_formula(each_group):
    """Against NumPy in float64, without noise and with padding left out."""
    the_plan = noiseless(score_budget=0.1, l2_clip_norm=1.5, batch_size=50)
    adapt = adapt_clip_norm(
        the_plan, key=jax.random.key(0), quantile=0.7, each_group=each_group
    )
    state, gradients = adapt.init(PARAMS), batch()
    clipped = clipped_in(adapt.geometry(state), gradients, 1.5)
    _, state = adapt.update(clipped, state)
    whole, each = norms(gradients)
    within = each <= 1.5 / np.sqrt(2) if each_group else whole <= 1.5
    share = 0.5 + (np.sum(within, axis=0) - 20) / 50
    want = np.exp(-0.2 * (share - 0.7)) * np.ones(2)
    np.testing.assert_allclose(adapt.geometry(state).weights, want, rtol=1e-6)
    np.testing.assert_allclose(state.fitting, share, rtol=1e-6)
    assert 0.1 < np.mean(within) < 0.9


def test_a_threshold_is_a_weight():
    """Clipping and noise at weight C_t / C are those of a plan with C_t."""
    gradients = batch()
    geometry = dp_ilg.Geometry.of(PARAMS, [0.25, 0.25])
    one = clipped_in(geometry, gradients, 2.0)
    other = clipped_in(dp_ilg.Geometry.uniform(PARAMS), gradients, 0.5)
    for a, b in zip(
        jax.tree.leaves(one.gradients), jax.tree.leaves(other.gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_array_equal(one.fits[0], other.fits[0])
    mine = noise_stddev(plan(), 0, geometry, 2.0)
    want = noise_stddev(plan(), 0, other.geometry, 0.5)
    np.testing.assert_allclose(mine, want, rtol=1e-6)


@pytest.mark.parametrize("each_group", [False, True])
def test_the_noise_of_the_counts_is_the_charged_one(each_group):
    """Chi-square of 40,000 released counts; level 1e-4, and 3 % is seen."""
    count = 2 if each_group else 1
    steps = DRAWS // count
    the_plan = plan(score_budget=0.3, num_steps=steps, num_stages=1)
    adapt = adapt_clip_norm(the_plan, key=jax.random.key(5), each_group=each_group)
    state = adapt.init(PARAMS)
    empty = jax.tree.map(lambda p: jnp.zeros((0, *p.shape)), PARAMS)
    clipped = clipped_in(adapt.geometry(state), empty, 1.0)

    def fitting(step):
        return adapt.update(clipped, state._replace(step=step))[1].fitting

    found: Any = jax.jit(jax.vmap(fitting))(jnp.arange(steps))
    found = np.asarray(found, np.float64)
    tau = the_plan.score_noise_multipliers[0]
    sample = (found - 0.5).ravel() * the_plan.batch_size / (tau * np.sqrt(count) / 2)
    assert sample.size == DRAWS and chi_square_accepts(sample)
    assert not chi_square_accepts(sample, 0.97)
    assert not chi_square_accepts(sample, 1.03)
    if each_group:
        assert abs(np.corrcoef(found.T)[0, 1]) < 0.03


@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_thresholds_settle_at_the_quantile_from_above_and_below(quantile):
    """Through noise; the count's error at B = 400 is about 3 % of the examples."""
    the_plan = plan(score_budget=0.1, batch_size=400, num_steps=200)
    gradients = batch(400)
    whole, _ = norms(gradients)
    for start in (0.02, 50.0):
        adapt = adapt_clip_norm(the_plan, key=jax.random.key(1), quantile=quantile)
        state = adapt.init(PARAMS)
        weights = jnp.full(2, start)
        state = state._replace(geometry=dp_ilg.Geometry(weights, state.geometry.groups))

        def step(state, _, adapt=adapt):
            clipped = clipped_in(adapt.geometry(state), gradients, 1.0)
            return adapt.update(clipped, state)[1], state.geometry.weights[0]

        path: Any = jax.jit(lambda s, f=step: jax.lax.scan(f, s, None, 200))(state)[1]
        share = np.mean(whole <= float(np.mean(path[-50:])))
        assert abs(share - quantile) < 0.06


def test_counts_ignore_what_is_absent():
    gradients = batch(6)
    gradients["a"] = gradients["a"].at[2, 0].set(jnp.nan)
    geometry = dp_ilg.Geometry.uniform(PARAMS)
    mask = jnp.arange(6) == 4
    clip = dp_ilg.clip_per_example(1.0)
    got, _ = clip.update(
        gradients, clip.init(PARAMS), geometry=geometry, is_padding_example=mask
    )
    keep = np.array([0, 1, 3, 5])
    whole, each = norms(jax.tree.map(lambda x: x[keep], gradients))
    inside = np.column_stack([whole <= 1, each <= 1 / np.sqrt(2)])
    want = np.sum(inside - 0.5, axis=0)
    np.testing.assert_allclose(got.fits, want)


def test_what_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="score_budget is 0"):
        adapt_clip_norm(plan(score_budget=0.0), key=key)
    with pytest.raises(ValueError, match="quantile is 1.5"):
        adapt_clip_norm(plan(), key=key, quantile=1.5)
    the_plan = plan()
    with pytest.raises(ValueError, match="same key"):
        dp_ilg.chain(
            dp_ilg.clip_per_example(1.0),
            adapt_clip_norm(the_plan, key=key),
            dp_ilg.add_importance_noise(the_plan, key=key),
        )
    adapt = adapt_clip_norm(the_plan, key=key)
    state = adapt.init(PARAMS)
    with pytest.raises(TypeError, match="not a ClippedGrad"):
        adapt.update(PARAMS, state)
    other = dp_ilg.Geometry.uniform(PARAMS, "leaf")
    bare = dp_ilg.ClippedGrad(PARAMS, jnp.zeros(2), adapt.geometry(state), 1.0)
    with pytest.raises(ValueError, match="no counts"):
        adapt.update(bare, state)
    by_path = dp_ilg.layers.by_path(lambda path: "all")
    other = dp_ilg.Geometry.uniform(PARAMS, by_path)
    with pytest.raises(ValueError, match="groups of the thresholds are"):
        adapt.update(dp_ilg.ClippedGrad(PARAMS, jnp.zeros(1), other, 1.0), state)
