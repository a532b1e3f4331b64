"""Maps of leaves: against dense matrices by hand, their refusals, and both readings."""

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.geometry.coordinates import Coordinates
from dp_ilg.geometry.maps import AxisMaps
from dp_ilg.optimizers.whitened import unwhiten_updates
from tests.helpers.mapped import fixed, matrix
from tests.helpers.models import plan

SHAPES = {"a": (3, 4), "b": (4,), "c": (2, 3, 2), "s": ()}


def params_of(shapes=SHAPES):
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def some_maps(seed=0, whitened=False):
    rng = np.random.default_rng(seed)
    axes = {
        "a": (matrix(rng, 3), rng.uniform(0.5, 2, 4)),
        "b": rng.uniform(0.5, 2, 4),
        "c": (None, matrix(rng, 3), matrix(rng, 2)),
    }
    return axes, AxisMaps.of(params_of(), axes, whitened=whitened)


def dense(entries, shape):
    """The Kronecker product of a leaf's axes, as one matrix."""
    out = np.ones((1, 1))
    for entry, size in zip(entries, shape, strict=True):
        own = np.eye(size) if entry is None else np.asarray(entry)
        out = np.kron(out, np.diag(own) if own.ndim == 1 else own)
    return out


def geometry_of(params, maps, weights=None, layers: Any = "leaf"):
    groups = dp_ilg.layers.group(params, layers)
    ones = np.ones(len(groups.names)) if weights is None else weights
    return dp_ilg.Geometry(jnp.asarray(ones, jnp.float32), groups, maps)


def test_a_map_is_the_kronecker_product_of_its_factors():
    axes, maps = some_maps()
    axes["b"] = (axes["b"],)
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in SHAPES.values()]
    inside, back = maps.entered(leaves), maps.restored(leaves)
    again, steps = maps.restored(inside), maps.steps(leaves)
    for k, (name, shape) in enumerate(SHAPES.items()):
        whole = dense(axes.get(name, (None,) * len(shape)), shape)
        flat = np.asarray(leaves[k], np.float64).reshape(-1)
        wanted = {
            "inside": (inside[k], np.linalg.solve(whole, flat)),
            "back": (back[k], whole @ flat),
            "again": (again[k], flat),
            "steps": (steps[k], np.linalg.solve(whole.T, flat)),
        }
        for word, (found, value) in wanted.items():
            assert found.shape == shape
            np.testing.assert_allclose(
                np.reshape(found, -1), value, rtol=2e-5, atol=2e-5, err_msg=word
            )


def test_a_matrix_that_is_not_symmetric_is_transposed_for_steps():
    turn = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    maps = AxisMaps(((turn,),), ((jnp.linalg.inv(turn),),))
    assert maps.entered([jnp.array([1.0, 1.0])])[0].tolist() == [3.0, 1.0]
    assert maps.steps([jnp.array([1.0, 1.0])])[0].tolist() == [1.0, 3.0]


def test_batches_and_single_gradients_are_mapped_alike():
    _, maps = some_maps()
    rng = np.random.default_rng(2)
    many = [jnp.asarray(rng.normal(size=(5, *s)), jnp.float32) for s in SHAPES.values()]
    all_at_once = maps.entered(many)
    for i in range(5):
        one = maps.entered([x[i] for x in many])
        for a, b in zip(one, all_at_once, strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-6, atol=1e-6)


def test_powers_and_traced_values_give_the_same_maps():
    axes, _ = some_maps()
    known = AxisMaps.of(params_of(), axes, power=0.5)
    traced = jax.jit(lambda axes: AxisMaps.of(params_of(), axes, power=0.5))(axes)
    plain = AxisMaps.of(params_of(), axes)
    for one, two in zip(*map(jax.tree.leaves, (known, traced)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    for half, whole in zip(known.back, plain.back, strict=True):
        for a, b in zip(half, whole, strict=True):
            if a is not None:
                square = a * a if a.ndim == 1 else a @ a
                np.testing.assert_allclose(square, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [0.0, 0.0], [-1.0, 1.0], [np.inf, 1.0]])
def test_traced_values_that_are_no_scale_are_raised(bad):
    make = jax.jit(lambda b: AxisMaps.of({"w": jnp.ones(2)}, {"w": b}))
    both = make(jnp.array(bad))
    for factor in (both.into[0][0], both.back[0][0]):
        assert np.all(np.isfinite(factor)) and np.all(np.asarray(factor) > 0)
        assert np.max(factor) / np.min(factor) <= 1e4 * (1 + 1e-5)
    square = jax.jit(lambda m: AxisMaps.of({"w": jnp.ones(2)}, {"w": m}))
    both = square(jnp.diag(jnp.array(bad)))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(both))


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"z": np.ones(3)}, "No parameter matches 'z'"),
        ({"b": np.ones(3)}, r"b, axis 0, has shape \(3,\), but the axis has 4"),
        ({"a": np.ones(3)}, "a has 1 entries, but the leaf has 2 axes"),
        ({"a": (np.ones((3, 4)), None)}, r"has shape \(3, 4\), but the axis has 3"),
        ({"b": [np.ones(4), None]}, "b has 2 entries, but the leaf has 1 axes"),
        ({"b": np.array([1, 1, 1, 0.0])}, "has the entry 0, but all must be positive"),
        ({"b": np.array([1, 1, 1, -2.0])}, "has the entry -2, but all must"),
        ({"b": np.array([1, 1, 1, np.nan])}, "no finite numbers"),
        ({"b": np.array([1, 1, 1, 1e-5])}, r"factors that are 1e\+05 apart"),
        ({"b": np.diag([1, 1, 1, -1.0])}, "has the eigenvalue -1, but all must"),
        ({"b": np.triu(np.ones((4, 4)))}, "unlike its transpose"),
        ({"b": "word"}, "must be an array of numbers"),
    ],
)
def test_bad_maps_are_refused_in_one_sentence(axes, words):
    with pytest.raises(ValueError, match=words) as raised:
        AxisMaps.of(params_of(), axes)
    assert "\n" not in str(raised.value)


def test_maps_of_another_model_or_across_groups_are_refused():
    params = {"w": jnp.ones((4, 2))}
    loss = lambda p, x: jnp.sum(p["w"] @ x)  # noqa: E731
    run = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    clip = dp_ilg.clip_per_example(1.0)
    bands = dp_ilg.layers.blocks("w", axis=0, edges=[1])
    square = AxisMaps.of(params, {"w": (np.eye(4) + 0.1, None)})
    other = AxisMaps.of({"w": jnp.ones((2, 2))}, {"w": (np.ones(2), None)})
    more = AxisMaps.of({"v": jnp.ones(2), "w": jnp.ones((4, 2))}, {"v": np.ones(2)})
    gradients = {"w": jnp.ones((3, 4, 2))}
    cases = [
        (square, bands, "matrix along axis 0 of w would mix the groups"),
        (other, "leaf", "but the leaf has"),
        (more, "leaf", "maps of 2 leaves, but the model has 1"),
    ]
    for maps, layers, words in cases:
        geometry = geometry_of(params, maps, layers=layers)
        with pytest.raises(ValueError, match=words):
            run(params, jnp.ones((3, 2)), geometry=geometry)
        with pytest.raises(ValueError, match=words):
            clip.update(gradients, clip.init(params), geometry=geometry)
    across = AxisMaps.of(params, {"w": (np.ones(4), np.eye(2) + 0.1)})
    run(params, jnp.ones((3, 2)), geometry=geometry_of(params, across, layers=bands))


@pytest.mark.parametrize("whitened", [False, True])
def test_the_noise_scale_is_the_root_mean_square_of_the_draws(whitened):
    params = params_of()
    cut = dp_ilg.layers.by_leaf(dp_ilg.layers.blocks("a", axis=1, edges=[1]))
    _, maps = some_maps(whitened=whitened)
    groups = dp_ilg.layers.group(params, cut)
    weights = np.array([0.5, 2.0, 1.0, 3.0, 1.5])
    geometry = geometry_of(params, maps, weights, cut)
    keys = jax.random.split(jax.random.key(0), 4000)

    def draw(key):
        parts = [
            w * jax.random.normal(jax.random.fold_in(key, k), leaf.shape)
            for k, (leaf, w) in enumerate(
                zip(groups.leaves, groups.expand(geometry.weights), strict=True)
            )
        ]
        return jnp.square(groups.norms(geometry.restored(parts)))

    mean = jnp.mean(jax.vmap(draw)(keys), 0) / jnp.array(groups.sizes)
    np.testing.assert_allclose(geometry.noise_scale(), jnp.sqrt(mean), rtol=0.03)
    if whitened:
        np.testing.assert_allclose(geometry.noise_scale(), weights)


def test_scales_are_those_of_coordinates():
    params = params_of({"a": (3, 4)})
    b = np.random.default_rng(0).uniform(0.5, 2, 3).astype(np.float32)
    maps = AxisMaps.of(params, {"a": (b, None)})
    full = Coordinates((jnp.broadcast_to(jnp.asarray(b)[:, None], (3, 4)),))
    value = [jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)]
    for name in ("entered", "restored"):
        one, two = (getattr(x, name)(value)[0] for x in (maps, full))
        np.testing.assert_allclose(one, two, rtol=1e-6)
    scales = [geometry_of(params, x).noise_scale() for x in (maps, full)]
    np.testing.assert_allclose(*scales, rtol=1e-6)


def linear_loss(params, example):
    x, y = example
    return jnp.square(x @ params["w"] - y)


def steps_of(tx, geometry, params, batch, count=4):
    run = dp_ilg.clipped_grad(linear_loss, l2_clip_norm=1.0)

    @jax.jit
    def step(params, state):
        clipped = run(params, batch, geometry=tx.geometry(state))
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(count):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.3, momentum=0.9),
        pytest.param(optax.adam(0.1), marks=pytest.mark.slow),
    ],
)
def test_whitened_maps_are_a_linear_model_on_scaled_features(optimizer):
    """In every bit of the noise: z is trained on x / b, and w = z / b."""
    own = plan(score_budget=0.0)
    rng = np.random.default_rng(0)
    b = jnp.asarray(rng.uniform(0.2, 5, 6), jnp.float32)
    x, y = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32), jnp.ones(12)
    params = {"w": jnp.zeros(6)}

    def trained(maps, batch, *tail):
        geometry = geometry_of(params, maps)
        noise = dp_ilg.add_importance_noise(own, key=jax.random.key(1))
        links = dp_ilg.clip_per_example(1.0), fixed(geometry), noise, optimizer, *tail
        return steps_of(dp_ilg.chain(*links), geometry, params, batch)["w"]

    maps = AxisMaps.of(params, {"w": b}, whitened=True)
    scaled = trained(None, (x / b, y)) / b
    there = trained(maps, (x, y), unwhiten_updates())
    np.testing.assert_allclose(there, scaled, rtol=1e-4, atol=1e-6)
    plain = trained(dataclasses.replace(maps, whitened=False), (x, y))
    assert np.max(np.abs(plain - scaled)) > 0.01, "both readings are the same"


def test_whitened_updates_are_turned_back_or_refused():
    params = {"w": jnp.ones(2)}
    maps = AxisMaps.of(params, {"w": np.array([2.0, 4.0])}, whitened=True)
    geometry = geometry_of(params, maps)
    own = plan(score_budget=0.0)
    noise = dp_ilg.add_importance_noise(own, key=jax.random.key(0))
    start = dp_ilg.clip_per_example(1.0), fixed(geometry), noise
    gradients = {"w": jnp.ones((3, 2))}
    bare = dp_ilg.chain(*start, optax.sgd(1.0))
    with pytest.raises(ValueError, match="put unwhiten_updates"):
        bare.update(gradients, bare.init(params), params)
    link = unwhiten_updates()
    with pytest.raises(ValueError, match="got no geometry"):
        link.update(params, link.init(params))
    early = dp_ilg.chain(*start[:2], unwhiten_updates(), noise)
    with pytest.raises(TypeError, match="behind the noise"):
        early.update(gradients, early.init(params), params)
    nested = dp_ilg.chain(dp_ilg.chain(*start, link), optax.sgd(1.0))
    nested.update(gradients, nested.init(params), params)


def test_maps_survive_pickling_and_tree_maps():
    _, maps = some_maps(whitened=True)
    again = pickle.loads(pickle.dumps(maps))
    same = jax.tree.map(lambda x: x, maps)
    for other in (again, same):
        assert other.whitened
        assert jax.tree.structure(other) == jax.tree.structure(maps)
        pairs = zip(*map(jax.tree.leaves, (other, maps)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)


def test_maps_are_made_under_strict_promotion():
    axes, maps = some_maps()
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        traced = jax.jit(lambda axes: AxisMaps.of(params_of(), axes, power=0.5))(axes)
        traced.entered(jax.tree.leaves(params_of()))
        geometry_of(params_of(), maps).noise_scale()
