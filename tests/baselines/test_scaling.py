"""Scales of single entries: the published formulas, both paths, one geometry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.baselines.scaling import scale_coordinates
from dp_ilg.geometry.coordinates import Coordinates
from tests.helpers.baseline_cases import make
from tests.helpers.models import (
    mlp_batch,
    mlp_loss,
    mlp_params,
    noiseless,
    per_example,
    plan,
    trees_close,
)

STEPS = 5


def rows(params, gradients):
    """Per-example gradients as one float64 matrix."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)


def run(tx, gradient=per_example):
    """Five steps; the parameters after each, and what the gradients were."""
    params: Any = mlp_params()
    seen = []
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(STEPS):
        grads = gradient(params, mlp_batch(seed=seed))
        seen.append(rows(params, grads))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state, seen


def flat(params):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)]
    return np.concatenate(leaves)


def clipped_mean(gradients, scale, centre, bound):
    """The definition, example by example."""
    inside = (gradients - centre) / scale
    lengths = np.linalg.norm(inside, axis=1, keepdims=True)
    total = np.sum(inside * np.minimum(1, bound / lengths), 0)
    return total / 12 * scale + centre


def test_adaclip_is_the_published_formula():
    """Against NumPy: centre, spread, fourth root, its factor, and the release."""
    the_plan = noiseless(l2_clip_norm=0.4)
    params, _, seen = run(make("adaclip", the_plan))
    mean, variance = np.zeros(66), np.zeros(66)
    want = flat(mlp_params())
    assert want.size == 66
    for gradients in seen:
        spread = np.sqrt(np.maximum(variance, 1e-12))
        scale = np.sqrt(spread * spread.sum() / np.sum(spread**2))
        release = clipped_mean(gradients, scale, mean, 0.4)
        variance = 0.9 * variance + 0.1 * np.minimum((release - mean) ** 2, 10)
        mean = 0.99 * mean + 0.01 * release
        want = want - 1e-2 * release
    np.testing.assert_allclose(flat(params), want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_adadp_is_rmsprop_on_releases_in_the_scale_of_past_ones():
    the_plan = noiseless(l2_clip_norm=0.4)
    params, _, seen = run(make("adadp", the_plan))
    squares, want = np.zeros(66), flat(mlp_params())
    for gradients in seen:
        scale = np.sqrt(squares + 1e-12)
        scale = scale * np.sqrt(66 / np.sum(scale**2))
        scale = np.maximum(scale, scale.max() / 1e4)
        release = clipped_mean(gradients, scale, 0.0, 0.4)
        squares = 0.9 * squares + 0.1 * release**2
        want = want - 1e-2 * release / np.sqrt(squares + 1e-8)
    np.testing.assert_allclose(flat(params), want, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, of Optax
def test_scale_then_privatize_is_jax_privacys():
    """Theirs clips what a function makes of each gradient; the rest is Adam."""
    clipping = pytest.importorskip("jax_privacy.clipping")
    bound, eps_s, b2 = 3.0, 0.05, 0.99
    options: dict[str, Any] = dict(scale_eps=eps_s, b2=b2, eps=1e-3)
    ours, _, _ = run(
        make("scale_then_privatize", noiseless(l2_clip_norm=bound), **options)
    )
    adam = optax.adam(1e-2, b2=b2, eps=1e-3)

    @jax.jit
    def step(params, state, second, batch):
        scale = jax.tree.map(lambda v: jnp.sqrt(v) + eps_s, second)
        divide = lambda g: jax.tree.map(jnp.divide, g, scale)  # noqa: E731
        theirs = clipping.clipped_grad(
            mlp_loss,
            l2_clip_norm=bound,
            keep_batch_dim=False,
            normalize_by=12,
            pre_clipping_transform=divide,
        )
        release = jax.tree.map(jnp.multiply, theirs(params, batch), scale)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, second, release)
        updates, state = adam.update(release, state, params)
        return optax.apply_updates(params, updates), state, second

    params = mlp_params()
    state, second = adam.init(params), jax.tree.map(jnp.zeros_like, params)
    for seed in range(STEPS):
        params, state, second = step(params, state, second, mlp_batch(seed=seed))
    trees_close(ours, params, rtol=1e-4, atol=1e-6)
    unclipped, _, _ = run(make("scale_then_privatize", noiseless(), **options))
    assert np.max(np.abs(flat(ours) - flat(unclipped))) > 1e-3, "nothing was clipped"


@pytest.mark.parametrize(
    "engine, dtype",
    [
        ("bookkeeping", jnp.float32),
        pytest.param("bookkeeping", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("vmap", jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_engines_and_per_example_gradients_agree_in_coordinates(engine, dtype):
    params, batch = mlp_params(dtype=dtype), mlp_batch(dtype=dtype)
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(rng.lognormal(size=p.shape), jnp.float32)  # noqa: E731
    scale = tuple(map(draw, jax.tree.leaves(params)))
    centre = tuple(x - 1 for x in map(draw, jax.tree.leaves(params)))
    groups = dp_ilg.layers.group(params)
    there = dp_ilg.Geometry(jnp.array([0.5, 2.0]), groups, Coordinates(scale, centre))
    mask = jnp.arange(12) > 9
    run = dp_ilg.clipped_grad(
        mlp_loss, l2_clip_norm=2.0, engine=engine, microbatch_size=5
    )
    got = jax.jit(run)(params, batch, geometry=there, is_padding_example=mask)
    clip = dp_ilg.clip_per_example(2.0)
    want, _ = clip.update(
        per_example(params, batch),
        clip.init(params),
        geometry=there,
        is_padding_example=mask,
    )
    coarse = 1e-5 if dtype == jnp.float32 else 3e-2
    trees_close(got.gradients, want.gradients, rtol=coarse, atol=coarse)
    trees_close(got.layer_shares, want.layer_shares, rtol=coarse, atol=coarse)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got.gradients))


def test_chunks_in_unlike_coordinates_are_refused():
    params = {"w": jnp.zeros(2)}
    groups = dp_ilg.layers.group(params)
    clip = dp_ilg.clip_per_example(1.0)
    there = [None, Coordinates((jnp.ones(2),)), Coordinates((jnp.full(2, 2.0),))]
    within = [dp_ilg.Geometry(jnp.ones(1), groups, c) for c in there]
    grads, state = {"w": jnp.ones((1, 2))}, clip.init(params)
    parts = [clip.update(grads, state, geometry=geometry)[0] for geometry in within]
    for one, other in ((0, 1), (1, 2)):
        with pytest.raises(ValueError, match="different weights, coordinates or clip"):
            _ = parts[one] + parts[other]
        mixed = jax.jit(lambda a, b: (a + b).l2_clip_norm)
        if one:
            assert np.isnan(mixed(parts[one], parts[other]))


def test_frozen_parameters_stay_as_they_are():
    layers = dp_ilg.layers.by_module(frozen=["d1"])
    params, _, _ = run(make("adaclip", layers=layers))
    jax.tree.map(np.testing.assert_array_equal, params["d1"], mlp_params()["d1"])
    assert not np.array_equal(params["d2"]["bias"], mlp_params()["d2"]["bias"])


@pytest.mark.parametrize("rule", ["adaclip", "adadp"])
@pytest.mark.slow
def test_an_example_of_the_believed_profile_keeps_its_norm(rule):
    name = rule
    tx = make(name, plan(score_budget=0.0, noise_multiplier=0.3))
    _, state, _ = run(tx)
    scale = flat(tx.geometry(state).coordinates.scale)
    power = {"adaclip": 4, "adadp": 2}[rule]
    shares = scale**power / np.sum(scale**power)
    np.testing.assert_allclose(np.sum(shares / scale**2), 1.0, rtol=1e-4)
    assert scale.max() / scale.min() > 1.2


def test_what_is_refused():
    the_plan = plan(score_budget=0.0)
    with pytest.raises(ValueError, match="rule is 'best'"):
        scale_coordinates("best", the_plan)
    with pytest.raises(ValueError, match="decay is 2"):
        scale_coordinates("adadp", the_plan, decay=2)
    with pytest.raises(ValueError, match="floor is 0"):
        scale_coordinates("adadp", the_plan, floor=0)
    scale = scale_coordinates("adadp", the_plan)
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match="behind add_importance_noise"):
        scale.update(params, scale.init(params))
    tx = dp_ilg.chain(
        dp_ilg.clip_per_example(1.0),
        dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0)),
        scale,
        dp_ilg.scale_by_noise_corrected_adam(the_plan),
    )
    with pytest.raises(ValueError, match="knows the noise by layer"):
        tx.update({"w": jnp.ones((3, 2))}, tx.init(params), params)
