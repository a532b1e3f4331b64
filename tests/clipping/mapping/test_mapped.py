"""Clipped sums in mapped coordinates: every engine against maps by hand."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.bookkeeping.engine import find_paths
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.clipping.row_check import rows_are_independent
from dp_ilg.geometry.coordinates import Coordinates
from dp_ilg.geometry.maps import AxisMaps
from tests.helpers.mapped import (
    compare_mapped,
    entered_by_hand,
    random_axes,
    random_maps,
)
from tests.helpers.models import (
    mlp_batch,
    mlp_loss,
    mlp_params,
    per_example,
    trees_close,
)
from tests.zoo.cases import TWINS, ZOO

FAST = [
    "dense_sequence",
    "conv_grouped",
    "conv_bias",
    "embedding_take",
    "tied_with_loss",
]
LOW = sorted(name for name in ZOO if "bf16" in name or "float16" in name)
MORE = ["dense_left", "shared_transposed", "slices_disjoint", "bias_whole"]
REST = sorted(set(ZOO) - set(LOW) - set(FAST) - TWINS)


@pytest.mark.parametrize(
    "name", [*FAST, *[pytest.param(n, marks=pytest.mark.slow) for n in MORE]]
)
def test_equals_maps_by_hand(name):
    case = ZOO[name]()
    compare_mapped(case, random_maps(case.params))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matrices", "scales"])
@pytest.mark.parametrize("name", REST[::3])
def test_equals_maps_by_hand_on_more_of_the_zoo(name, kind):
    case = ZOO[name]()
    compare_mapped(case, random_maps(case.params, kind))


@pytest.mark.parametrize(
    "name", [LOW[0], *[pytest.param(n, marks=pytest.mark.slow) for n in LOW[1:]]]
)
def test_low_precision_is_mapped_in_float32(name):
    case = ZOO[name]()
    compare_mapped(case, random_maps(case.params), tolerance=2e-2)


def mlp_case(dtype=jnp.float32):
    params, batch = mlp_params(dtype=dtype), mlp_batch(dtype=dtype)
    return params, batch, random_maps(params, "mixed", seed=1)


def clipped_by_hand(params, batch, geometry, bound, mask):
    """The definition, in NumPy: map, weigh, clip, add."""
    mapped = entered_by_hand(per_example(params, batch), geometry.coordinates)
    leaves, treedef = jax.tree.flatten(mapped)
    weights = [np.asarray(w) for w in geometry.groups.expand(geometry.weights)]
    total = 0.0
    for x, w in zip(leaves, weights, strict=True):
        total = total + np.sum((x / w) ** 2, axis=tuple(range(1, x.ndim)))
    factors = np.minimum(1, bound / np.sqrt(total)) * ~np.asarray(mask)
    return jax.tree.unflatten(treedef, [np.tensordot(factors, x, 1) for x in leaves])


WAYS = list(
    itertools.product(
        [("bookkeeping", None), ("bookkeeping", 5), ("vmap", 5)],
        [jnp.float32, jnp.bfloat16],
        ["leaf", "cut"],
    )
)


@pytest.mark.parametrize(
    "way, dtype, layers",
    [
        w if k == 7 else pytest.param(*w, marks=pytest.mark.slow)
        for k, w in enumerate(WAYS)
    ],
)
def test_clipped_sums_are_those_by_hand(way, dtype, layers):
    engine, size = way
    params, batch, maps = mlp_case(dtype)
    cut = dp_ilg.layers.by_leaf(dp_ilg.layers.blocks("d1/kernel", axis=1, edges=[2]))
    axes = random_axes(params, "matrices", seed=1)
    axes["d1/kernel"] = (axes["d1/kernel"][0], np.linspace(0.5, 2, 7))
    if layers == "cut":
        maps, layers = AxisMaps.of(params, axes), cut
    groups = dp_ilg.layers.group(params, layers)
    weights = jnp.asarray(np.linspace(0.5, 2, len(groups.names)), jnp.float32)
    geometry = dp_ilg.Geometry(weights, groups, maps)
    mask = jnp.arange(12) > 9
    run = dp_ilg.clipped_grad(
        mlp_loss, l2_clip_norm=2.0, engine=engine, microbatch_size=size
    )
    got = jax.jit(run)(params, batch, geometry=geometry, is_padding_example=mask)
    want = clipped_by_hand(params, batch, geometry, 2.0, mask)
    coarse = 2e-5 if dtype == jnp.float32 else 3e-2
    trees_close(got.gradients, want, rtol=coarse, atol=coarse)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got.gradients))
    plain = dataclasses.replace(geometry, coordinates=None)
    other = run(params, batch, geometry=plain, is_padding_example=mask)
    far = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), other.gradients, want)
    assert max(jax.tree.leaves(far)) > 0.1, "the maps change nothing"


def test_calls_outside_of_jit_and_per_example_gradients_agree():
    params, batch, maps = mlp_case()
    groups = dp_ilg.layers.group(params)
    geometry = dp_ilg.Geometry(jnp.array([0.5, 2.0]), groups, maps)
    run = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=2.0)
    clip = dp_ilg.clip_per_example(2.0)
    want = clipped_by_hand(params, batch, geometry, 2.0, np.zeros(12, bool))
    found = clip.update(
        per_example(params, batch), clip.init(params), geometry=geometry
    )[0]
    for got in (run(params, batch, geometry=geometry), found):
        trees_close(got.gradients, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_one_bad_example_removes_itself_through_a_matrix(engine):
    params, (x, y), maps = mlp_case()
    geometry = dp_ilg.Geometry(jnp.ones(2), dp_ilg.layers.group(params), maps)
    run = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=2.0, engine=engine)
    mask = jnp.arange(12) == 3
    want = run(params, (x, y), geometry=geometry, is_padding_example=mask)
    for bad in (np.nan, np.inf, 1e38):
        got = run(params, (x.at[3].set(bad), y), geometry=geometry)
        if bad < np.inf:
            continue  # finite, so it may count
        trees_close(got.gradients, want.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_maps_of_any_size_neither_over_nor_underflow(size):
    params, batch, maps = mlp_case()
    groups = dp_ilg.layers.group(params, "leaf")
    norms = jax.jit(
        lambda maps: ENGINES["bookkeeping"](mlp_loss, params, batch, groups, maps).norms
    )
    times = np.array([size ** sum(f is not None for f in x) for x in maps.into])
    assert len(set(times.tolist())) > 1
    large = jax.tree.map(lambda x: x * jnp.float32(size), maps)
    np.testing.assert_allclose(norms(large) / norms(maps) / times, 1, rtol=1e-5)


def test_rows_keep_their_bits_among_others():
    params, batch, maps = mlp_case()
    geometry = dp_ilg.Geometry(jnp.ones(2), dp_ilg.layers.group(params), maps)
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=2.0)
    found = rows_are_independent(grad_fn, params, batch, geometry=geometry, trials=4)
    assert found.independent and found.compared == 4


def reasons(loss, params, batch, maps, layers="leaf"):
    groups = dp_ilg.layers.group(params, layers)
    return find_paths(loss, params, batch, groups, maps)


def test_maps_keep_the_fast_path_and_explain_says_so():
    params, batch, _ = mlp_case()
    maps = random_maps(params, "matrices")
    geometry = dp_ilg.Geometry(jnp.ones(4), dp_ilg.layers.group(params, "leaf"), maps)
    run = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    rows = {row.leaf: row for row in run.explain(params, batch, geometry)}
    plain = {row.leaf: row for row in run.explain(params, batch, "leaf")}
    for name in ("d1/kernel", "d2/kernel"):
        assert rows[name].path == plain[name].path == "gram"
        assert "mapped by a matrix on axis 0 and a matrix on axis 1" in rows[name].why
        assert rows[name].flops > plain[name].flops
        assert rows[name].added == plain[name].added
    assert run.sum_error(params, batch, geometry) == run.sum_error(
        params, batch, "leaf"
    )


def embed(params, ids):
    return jnp.sum(jnp.tanh(params["table"][ids] @ params["w"]))


def test_an_embedding_keeps_its_rows_under_a_scale_and_not_under_a_matrix():
    rng = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32),
        "w": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    }
    ids = jnp.asarray(rng.integers(0, 9, (6, 12)))
    rows, square = rng.uniform(0.5, 2, 9), np.eye(4) + 0.2
    good = AxisMaps.of(params, {"table": (rows, square)})
    assert not reasons(embed, params, ids, good).spoiled
    bad = AxisMaps.of(params, {"table": (np.eye(9) + 0.1, None)})
    assert "axis of its rows" in reasons(embed, params, ids, bad).spoiled[0]
    bands = dp_ilg.layers.blocks("table", axis=0, edges=[2, 5])
    groups = dp_ilg.layers.group(params, bands)
    geometry = dp_ilg.Geometry(jnp.linspace(1, 2, len(groups.names)), groups, good)
    both = [
        dp_ilg.clipped_grad(embed, l2_clip_norm=0.5, engine=engine)(
            params, ids, geometry=geometry
        )
        for engine in ("bookkeeping", "vmap")
    ]
    trees_close(both[0].gradients, both[1].gradients, rtol=1e-5, atol=1e-6)
    trees_close(both[0].layer_shares, both[1].layer_shares, rtol=1e-5, atol=1e-6)


def test_what_has_no_form_in_factors_is_formed_for_a_reason():
    def halves(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"][:2])) + jnp.sum(x @ p["w"][2:])

    params = {"w": jnp.ones((4, 3)) / 3}
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    over = AxisMaps.of(params, {"w": (np.eye(4) + 0.2, None)})
    assert "as a whole" in reasons(halves, params, x, over).spoiled[0]
    beside = AxisMaps.of(params, {"w": (np.linspace(1, 2, 4), np.eye(3) + 0.2)})
    assert not reasons(halves, params, x, beside).spoiled

    def split(p, x):
        return jnp.sum(jnp.tanh(x @ p["v"].reshape(2, 3)))

    params = {"v": jnp.ones(6)}
    along = AxisMaps.of(params, {"v": np.linspace(1, 2, 6)})
    assert "both of its factors share" in reasons(split, params, x, along).spoiled[0]
    dense = Coordinates((jnp.full(6, 2.0),))
    assert "one by one" in reasons(split, params, x, dense).spoiled[0]
