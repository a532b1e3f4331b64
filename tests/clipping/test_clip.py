"""Clipping against its definition, for every mode, layering, dtype and chunking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.clip import CLIP_MODES as MODE_TABLE
from dp_ilg.clipping.clip import as_clip_mode, clip_sum
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.geometry.grid import grid_steps
from dp_ilg.geometry.groups import scaled_norms
from tests.helpers.models import (
    CLIP_MODES,
    LAYERINGS,
    mlp_batch,
    mlp_loss,
    mlp_params,
    naive_clipped_sum,
    per_example,
    trees_close,
)


def weighted_geometry(params, layers, seed=3):
    names = dp_ilg.layers.group(params, layers).names
    weights = np.random.default_rng(seed).lognormal(sigma=1.0, size=len(names))
    return dp_ilg.Geometry.of(params, weights.tolist(), layers)


def median_norm(gradients, geometry):
    engine = from_gradients(gradients, geometry.groups)
    return float(jnp.median(geometry.norm(engine.norms)))


def test_the_table_is_the_tested_one():
    assert sorted(MODE_TABLE) == sorted(CLIP_MODES)


@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_engine_equals_the_definition_without_jit(engine, mode):
    equals_the_definition(engine, "leaf", mode, jit=False)


@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("layers", LAYERINGS)
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_engine_equals_the_definition(engine, layers, mode):
    equals_the_definition(engine, layers, mode, jit=True)


def equals_the_definition(engine, layers, mode, jit):
    params, batch = mlp_params(), mlp_batch()
    geometry = weighted_geometry(params, LAYERINGS[layers])
    gradients = per_example(params, batch)
    bound = median_norm(gradients, geometry)
    grad_fn = dp_ilg.clipped_grad(
        mlp_loss, l2_clip_norm=bound, clip_mode=mode, engine=engine
    )
    run = jax.jit(grad_fn) if jit else grad_fn
    padding = np.arange(12) % 5 == 4
    got = run(params, batch, geometry=geometry, is_padding_example=jnp.array(padding))
    sums, shares = naive_clipped_sum(gradients, geometry, bound, mode, padding)
    cut = 12 * float(grid_steps(geometry, bound).max()) if engine == "exact" else 0
    trees_close(got.gradients, sums, rtol=1e-5, atol=1e-6 * bound + cut)
    np.testing.assert_allclose(got.layer_shares, shares, rtol=1e-5)


@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("microbatch", [1, 3, 5, 12, 50])
def test_microbatches_change_rounding_only(microbatch, mode):
    params, batch = mlp_params(), mlp_batch()
    geometry = weighted_geometry(params, "leaf")
    whole = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=0.5, clip_mode=mode)
    parts = dp_ilg.clipped_grad(
        mlp_loss, l2_clip_norm=0.5, clip_mode=mode, microbatch_size=microbatch
    )
    a = jax.jit(whole)(params, batch, geometry=geometry)
    b = jax.jit(parts)(params, batch, geometry=geometry)
    trees_close(a.gradients, b.gradients, atol=2e-6)
    trees_close(a.layer_shares, b.layer_shares, atol=2e-6)


def test_chunks_add_up_to_the_whole():
    params, (x, y) = mlp_params(), mlp_batch()
    geometry = weighted_geometry(params, "module")
    grad_fn = jax.jit(dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=0.5))
    whole = grad_fn(params, (x, y), geometry=geometry)
    parts = grad_fn(params, (x[:5], y[:5]), geometry=geometry) + grad_fn(
        params, (x[5:], y[5:]), geometry=geometry
    )
    trees_close(whole.gradients, parts.gradients)
    trees_close(whole.layer_shares, parts.layer_shares)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_gradients_are_summed_in_float32(dtype):
    params, batch = mlp_params(dtype=dtype), mlp_batch()
    gradients = per_example(params, batch)
    geometry = weighted_geometry(params, "leaf")
    engine = from_gradients(gradients, geometry.groups)
    clipped = clip_sum(engine, geometry, 0.3, as_clip_mode("joint"))
    sums, _ = naive_clipped_sum(gradients, geometry, 0.3, "joint")
    assert {x.dtype for x in jax.tree.leaves(clipped.gradients)} == {
        np.dtype("float32")
    }
    trees_close(clipped.gradients, sums, rtol=1e-4, atol=1e-6)


def test_per_example_gradients_and_clipped_grad_agree():
    params, batch = mlp_params(), mlp_batch()
    geometry = weighted_geometry(params, "leaf")
    clip = dp_ilg.clip_per_example(0.5)
    a, _ = clip.update(per_example(params, batch), clip.init(params), geometry=geometry)
    b = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=0.5)(
        params, batch, geometry=geometry
    )
    trees_close(a.gradients, b.gradients)
    same, _ = clip.update(b, clip.init(params))
    assert same is b


def test_half_precision_norm_does_not_underflow():
    gradients = {"w": jnp.full((1, 400_000), 1e-4, jnp.float16)}
    geometry = dp_ilg.Geometry.uniform({"w": gradients["w"][0]})
    clip = dp_ilg.clip_per_example(0.01)
    clipped, _ = clip.update(gradients, clip.init(gradients), geometry=geometry)
    norm = float(scaled_norms([clipped.gradients["w"][None]])[0, 0])
    assert 0.0099 < norm <= 0.01


def test_per_layer_lies_inside_the_joint_ball():
    params, batch = mlp_params(), mlp_batch()
    geometry = weighted_geometry(params, "leaf")
    gradients = per_example(params, batch)
    engine = from_gradients(gradients, geometry.groups)
    bound = jnp.float32(median_norm(gradients, geometry))
    each = MODE_TABLE["per_layer"]().coefficients(engine.norms, geometry.weights, bound)
    kept = np.asarray(engine.norms * each)
    box = np.asarray(bound * geometry.weights) / np.sqrt(len(geometry.weights))
    assert np.all(kept <= box * 1.000001) and np.any(kept >= box * 0.999)
    assert np.all(np.asarray(geometry.norm(engine.norms * each)) <= bound * 1.000001)


def test_explain_names_every_leaf_and_its_cost():
    def rows(engine):
        grad_fn = dp_ilg.clipped_grad(
            mlp_loss, l2_clip_norm=1.0, microbatch_size=4, engine=engine
        )
        return grad_fn.explain(mlp_params(), mlp_batch())

    names = ["d1/bias", "d1/kernel", "d2/bias", "d2/kernel"]
    assert [r.leaf for r in rows("vmap")] == names
    assert rows("vmap")[1].bytes == 4 * 5 * 7 * 4
    kept = rows("auto")
    assert [r.leaf for r in kept] == names
    assert [r.path for r in kept] == ["per-example gradient", "gram"] * 2
    assert kept[1].bytes < 4 * 5 * 7 * 4 and "dot_general" in kept[1].why
    table, legend = str(kept).split("\n\n")
    assert "d1/kernel" in table and len(table.splitlines()) == 5
    words = ["gram", "per-example gradient", "MFLOP/example", "MiB"]
    assert [line.split(":")[0] for line in legend.splitlines()] == words


def test_padding_rows_may_be_keys():
    """Dropout keys are part of an example; micro-batches pad them too."""

    def loss(params, example):
        key, x = example
        return jnp.sum(params["w"] * x * jax.random.bernoulli(key, 0.5, x.shape))

    batch = (jax.random.split(jax.random.key(0), 5), jnp.ones((5, 4)))
    params = {"w": jnp.ones(4)}
    geometry = dp_ilg.Geometry.uniform(params)
    grad_fns = [
        jax.jit(dp_ilg.clipped_grad(loss, l2_clip_norm=1.0, microbatch_size=size))
        for size in (None, 2)
    ]
    whole, parts = (f(params, batch, geometry=geometry) for f in grad_fns)
    trees_close(whole.gradients, parts.gradients)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_parameters_without_a_number_have_a_norm_of_zero(engine):
    grad_fn = dp_ilg.clipped_grad(
        lambda p, x: jnp.sum(x @ p["w"]) + jnp.sum(x), l2_clip_norm=1.0, engine=engine
    )
    params = {"w": jnp.ones((4, 0))}
    found = grad_fn(params, jnp.ones((5, 4)), geometry=dp_ilg.Geometry.uniform(params))
    assert found.gradients["w"].shape == (4, 0)
    np.testing.assert_array_equal(found.layer_shares, 0)
