"""One contract for every row of `dp_ilg.baselines`."""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.baselines import table
from dp_ilg.baselines.table import BASELINES
from dp_ilg.geometry.rules import RULES
from tests.helpers.baseline_cases import (
    CASES,
    NAMES,
    PATHS,
    ROWS,
    bowl,
    distance,
    evolved,
    examples,
    loudness,
    make,
    nobody,
    plan_for,
    quiet_plan,
    releasing,
    zeros,
)
from tests.helpers.models import trees_close
from tests.noise.test_add_noise import chi_square_accepts

TRIALS = 40


def test_every_row_has_a_case_and_every_rule_a_row():
    assert sorted(CASES) == NAMES
    assert {f"dp_adam_ilg_{rule}" for rule in RULES} <= set(NAMES)
    for name in NAMES:
        assert BASELINES[name].spends_scores() == CASES[name].charged


# --- 1. sensitivity, and 4. what is accounted ----------------------------------


@functools.cache
def neighbours(mode: str, path: str):
    """Compiled: clipped sums with and without the last example, for many batches."""
    name = {"joint": "dp_sgd", "normalize": "automatic_clipping"}.get(
        mode, "quantile_clipping_per_layer"
    )
    run = PATHS[path](name, plan_for(name).l2_clip_norm)
    params = zeros()

    def both(batch, geometry, padding):
        masks = padding, padding.at[-1].set(True)
        return [
            run(params, batch, geometry=geometry, is_padding_example=m) for m in masks
        ]

    return jax.jit(jax.vmap(both, (0, None, 0)))


def adversaries(geometry):
    """Batches of four, the last aimed at one leaf, at all, along b, or at a."""
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(zeros())
    aimed = rng.integers(0, len(leaves) + 3, TRIALS)
    there = geometry.coordinates
    out = []
    for index, leaf in enumerate(leaves):
        value = rng.normal(size=(TRIALS, 4, *leaf.shape))
        value *= 10.0 ** rng.uniform(-4, 6, (TRIALS, 4) + (1,) * leaf.ndim)
        value[(aimed != index) & (aimed < len(leaves)), -1] = 0
        if there is not None:
            value[::2, -1] *= np.asarray(there.scale[index])
        if there is not None and there.centre is not None:
            value[::7, -1] = np.asarray(there.centre[index])
        out.append(jnp.asarray(value, jnp.float32))
    return jax.tree.unflatten(treedef, out)


def loudest(name, path, geometry, believed=None):
    """The largest distance of neighbours, in units of the noise that is accounted."""
    the_plan = plan_for(name)
    padding = np.random.default_rng(1).random((TRIALS, 4)) < 0.3
    padding[:, -1] = False
    mode = BASELINES[name].clip_mode().name
    batches = adversaries(believed or geometry)
    pair = jax.device_get(
        neighbours(mode, path)(batches, geometry, jnp.asarray(padding))
    )
    found = []
    for trial in range(TRIALS):
        one, other = (jax.tree.map(lambda x, t=trial: x[t], c) for c in pair)
        if believed:
            one = in_coordinates(one, believed)
            other = in_coordinates(other, believed)
        found.append(loudness(name, the_plan, one, other))
    return max(found) * the_plan.noise_multipliers[0]


def in_coordinates(clipped, believed):
    """What was clipped in the ordinary norm, passed off as clipped in another."""
    leaves, treedef = jax.tree.flatten(clipped.gradients)
    moved = believed.coordinates.entered(leaves)
    gradients = jax.tree.unflatten(treedef, moved)
    return dataclasses.replace(clipped, gradients=gradients, geometry=believed)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ROWS)
def test_one_example_moves_the_releases_by_what_is_accounted_and_no_more(name, path):
    """All that a step releases, in units of its noise, is within 1 / z; and reaches it.

    So the effective multiplier of everything released is the plan's.
    """
    tx, state, _ = evolved(name)
    worst = loudest(name, path, tx.geometry(state))
    assert 0.98 < worst <= 1 + 1e-6


@pytest.mark.parametrize("name", ["adaclip"])
def test_the_search_finds_a_row_that_clips_before_it_scales(name):
    """Planted fault: clipped in the ordinary norm, noised in the row's coordinates."""
    tx, state, _ = evolved(name)
    believed = tx.geometry(state)
    plain = dp_ilg.Geometry(believed.weights, believed.groups)
    assert loudest(name, "vmap", plain, believed) > 1.1


def test_the_search_finds_counts_that_are_not_charged():
    """Planted fault: the gradient's noise as if the counts were free."""
    name = "quantile_clipping_per_layer"
    tx, state, _ = evolved(name)
    the_plan = plan_for(name)
    honest = loudest(name, "vmap", tx.geometry(state))
    free = the_plan.noise_multipliers[0] / the_plan.gradient_noise_multipliers[0]
    assert honest / free > 1.1


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_accounts_the_step_that_is_released(name):
    the_plan = plan_for(name)
    z, s = the_plan.noise_multipliers, the_plan.gradient_noise_multipliers
    t = the_plan.score_noise_multipliers
    assert np.all(np.isfinite(t)) == CASES[name].charged
    np.testing.assert_allclose((s**-2.0 + t**-2.0) ** -0.5, z, rtol=1e-12)


# --- 2. the noise --------------------------------------------------------------


BIG = {"a": (200, 100), "b": (200, 100), "c": (2, 3)}


@pytest.mark.parametrize("name", ROWS)
def test_the_noise_of_a_release_is_the_planned_one(name):
    """Chi-square of 40,000 draws in an evolved geometry; 3 % either way is seen.

    Level 1e-4 a row.
    """
    the_plan = plan_for(name, l2_clip_norm=3.0)
    tx, params = make(name, the_plan), zeros(BIG)
    step, state, batch = releasing(tx), tx.init(params), examples(0, 2, BIG)
    _, state = step(batch, state, params)
    geometry = tx.geometry(state)
    release, _ = step(nobody(batch), state, params)
    sigma = the_plan.gradient_noise_multipliers[1]
    stddev = sigma * 3.0 * np.asarray(geometry.weights) / the_plan.batch_size
    scale, centre = [1.0] * 3, [0.0] * 3
    if geometry.coordinates is not None:
        scale = geometry.coordinates.scale
        centre = geometry.coordinates.centre or centre
    draws = []
    for index, leaf in enumerate(jax.tree.leaves(release)[:2]):
        gap = np.asarray(leaf, np.float64) - np.asarray(centre[index])
        draws.append((gap / np.asarray(scale[index]) / stddev[index]).ravel())
    sample = np.concatenate(draws)
    assert sample.size == 40_000 and chi_square_accepts(sample)
    assert not chi_square_accepts(sample, 0.97)
    assert not chi_square_accepts(sample, 1.03)


# --- 3. limits -----------------------------------------------------------------


@functools.cache
def descend(tx, steps=4, mean=False):
    """A few steps on a bowl; by per-example gradients or, for `mean`, by their mean."""

    def step(carry, seed):
        params, state = carry
        batch = jax.tree.map(lambda x: x[seed], batches)
        grads = jax.vmap(jax.grad(bowl), (None, 0))(params, batch)
        if mean:
            grads = jax.tree.map(lambda g: g.mean(0), grads)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params

    drawn = [examples(seed) for seed in range(steps)]
    batches = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
    params = jax.tree.map(jnp.ones_like, zeros())
    start = params, tx.init(params)
    return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(start)


@pytest.mark.parametrize("name", ROWS)
def test_no_noise_and_no_clip_is_the_ordinary_optimizer(name):
    tx = make(name, quiet_plan(name), **CASES[name].options)
    private, ordinary = descend(tx)[0][0], descend(CASES[name].limit, mean=True)[0][0]
    trees_close(private, ordinary, rtol=1e-5, atol=2e-6)
    start = jax.tree.map(jnp.ones_like, zeros())
    assert distance(dp_ilg.Geometry.uniform(start), ordinary, start) > 1e-2


# --- 4. past the plan; 6. jit, scan, state; 7. keyed by step -------------------


@pytest.mark.parametrize("name", ROWS)
def test_scanned_steps_are_keyed_stable_and_nan_past_the_plan(name):
    the_plan = plan_for(name, num_steps=3)
    tx = make(name, the_plan)
    (params, state), before = descend(tx, steps=4)
    kinds = lambda s: [(x.shape, x.dtype) for x in jax.tree.leaves(s)]  # noqa: E731
    fresh = tx.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    assert kinds(state) == kinds(fresh)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    for leaf in jax.tree.leaves(before):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    for leaf in jax.tree.leaves(params):
        assert bool(jnp.all(jnp.isnan(leaf)))


@pytest.mark.parametrize("name", ROWS)
def test_a_resumed_step_repeats_the_release_and_the_next_draws_anew(name):
    _, state, step = evolved(name)
    params, batch = zeros(), examples(5)
    first, after = step(batch, state, params)
    again, _ = step(batch, jax.tree.map(jnp.copy, state), params)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    one, _ = step(nobody(batch), state, params)
    other, _ = step(nobody(batch), after, params)
    seen = [np.ravel(x) for r in (one, other) for x in jax.tree.leaves(r)]
    assert len(np.unique(np.concatenate(seen))) == 2 * 22


# --- 5. absent examples --------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ROWS)
def test_padding_and_broken_examples_are_absent(name, path):
    tx, state, _ = evolved(name)
    geometry = tx.geometry(state)
    mode = BASELINES[name].clip_mode().name
    batch = jax.tree.map(lambda x: x[:TRIALS], adversaries(geometry))
    nothing = jnp.zeros((TRIALS, 4), bool)
    spoiled = jax.tree.map(lambda x: x, batch)
    spoiled["b"] = batch["b"].at[:, -1, 2].set(jnp.array([jnp.nan, jnp.inf] * 20))
    _, without = neighbours(mode, path)(batch, geometry, nothing)
    broken, padded = neighbours(mode, path)(spoiled, geometry, nothing)
    for got in (broken, padded):
        trees_close(got.gradients, without.gradients, rtol=1e-6, atol=0)
        trees_close(got.layer_shares, without.layer_shares, rtol=1e-6, atol=0)
        np.testing.assert_array_equal(got.fits, without.fits)


def test_an_empty_batch_of_adaclip_releases_its_centre():
    """Absent examples add exactly 0 to the centred sum, not minus the centre."""
    the_plan = quiet_plan("adaclip")
    tx, params = make("adaclip", the_plan), zeros()
    state, update, batch = tx.init(params), jax.jit(tx.update), examples(0)
    _, state = update(batch, state, params)
    updates, _ = update(nobody(batch), state, params)
    centre = tx.geometry(state).coordinates.centre
    assert max(float(jnp.max(jnp.abs(a))) for a in centre) > 0
    for update, a in zip(jax.tree.leaves(updates), centre, strict=True):
        np.testing.assert_allclose(update, -1e-2 * a, rtol=1e-6)


# --- both update paths; other methods ------------------------------------------


@pytest.mark.parametrize("name", ["adaclip"])
def test_chunks_of_a_step_add_up_in_both_paths(name):
    tx, state, _ = evolved(name)
    params, batch = zeros(), examples(9)
    bound = plan_for(name).l2_clip_norm
    halves = [
        jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(6), slice(6, 12))
    ]
    geometry = tx.geometry(state)
    whole = jax.jit(PATHS["vmap"](name, bound))(params, batch, geometry=geometry)
    for path in PATHS:
        run = jax.jit(PATHS[path](name, bound))
        one, other = (run(params, half, geometry=geometry) for half in halves)
        both = one + other
        trees_close(both.gradients, whole.gradients, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(both.fits, whole.fits)


@pytest.mark.slow
def test_dp_adam_is_dp_adam_ilg_with_equal_weights():
    one = descend(make("dp_adam"))[0][0]
    other = descend(make("dp_adam_ilg_uniform"))[0][0]
    trees_close(one, other, rtol=1e-6, atol=1e-7)


# --- what is refused -----------------------------------------------------------


def test_an_unknown_method_is_one_sentence():
    with pytest.raises(ValueError, match="method is 'x', which is unknown; known") as e:
        table.baseline("x")
    assert str(e.value).count(". ") == 0 and all(n in str(e.value) for n in BASELINES)
    with pytest.raises(ValueError, match="dp_sgd has no option b1; it takes layers"):
        make("dp_sgd", b1=0.5)
    with pytest.raises(ValueError, match="no option importance"):
        make("dp_adam_ilg_paper", importance="uniform")


@pytest.mark.parametrize("name", NAMES)
def test_a_score_budget_that_would_be_wasted_or_is_missing_is_refused(name):
    if not CASES[name].charged:
        with pytest.raises(ValueError, match="would be wasted; make it with score_bu"):
            make(name, plan_for(name, score_budget=0.1))
    elif "quantile" in name:
        with pytest.raises(ValueError, match="the plan's score_budget is 0; make"):
            make(name, plan_for(name, score_budget=0.0))
    else:
        make(name, plan_for(name, score_budget=0.0))  # law: that is no scorer


@pytest.mark.parametrize("name", NAMES)
def test_every_row_states_its_claim_and_needs_a_key(name):
    function: Any = BASELINES[name].make
    function = getattr(function, "func", function)
    for section in ("Args:", "Raises:", "Privacy:", "Example:", "Reference:"):
        assert section in (function.__doc__ or "")
    key = inspect.signature(function).parameters["key"]
    assert key.default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="PRNG key"):
        BASELINES[name](1e-2, plan_for(name), key=0)
    with pytest.raises(ValueError, match="learning_rate is -1"):
        BASELINES[name](-1, plan_for(name), key=jax.random.key(0))


def test_decay_needs_a_falling_plan():
    rising = dp_ilg.schedules.stages([1.0, 2.0])
    for changes in ({"schedule": dp_ilg.schedules.constant()}, {"schedule": rising}):
        with pytest.raises(ValueError, match="constant or rises"):
            make("dp_sgd_decay", plan_for("dp_sgd_decay", **changes))
