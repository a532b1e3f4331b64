"""Scores: whatever they return, one example moves their sum by at most 1."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.clip import as_clip_mode, clip_sum
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.clipping.scores.bounding import ROUNDING_SLACK
from dp_ilg.clipping.scores.statistics import inner_products
from dp_ilg.clipping.scores.table import SCORES, Score, as_score
from dp_ilg.geometry.coordinates import Coordinates
from dp_ilg.geometry.facts import ClipFacts
from dp_ilg.geometry.groups import weighted_norm
from dp_ilg.geometry.maps import AxisMaps
from dp_ilg.geometry.rounding import weighted_norm_rounding
from tests.helpers.mapped import entered_by_hand, random_axes

PARAMS = {
    "emb": jnp.linspace(-1, 1, 24).reshape(6, 4),
    "kernel": jnp.linspace(0.5, -1, 12).reshape(4, 3),
    "bias": jnp.linspace(0, 0.2, 3),
}
BLOCKS = dp_ilg.layers.blocks("emb", edges=[2])
RELEASE = jax.tree.map(lambda x: jnp.cos(3 * x), PARAMS)


def not_a_number(one):
    return jnp.where(one.norms > 1, jnp.nan, one.norms)


HOSTILE = {
    "five": lambda one: jnp.full_like(one.norms, 5.0),
    "huge": lambda one: jnp.full_like(one.norms, 3e38),
    "infinite": lambda one: one.norms / 0,
    "not a number": not_a_number,
    "negative": lambda one: -one.norms,
    "a hair above one": lambda one: jnp.zeros_like(one.norms).at[0].set(1 + 1e-6),
    "tiny": lambda one: 1e-42 * one.norms,
    "inner": lambda one: one.inner(one.params) * one.inner(RELEASE),
    "wide": lambda one: jnp.square(one.norms.astype(jnp.bfloat16)),
}
ALL = {**SCORES, **HOSTILE}


def geometry_for(score, params=PARAMS, layers: Any = BLOCKS):
    plain = dp_ilg.Geometry.uniform(params, layers)
    facts = ClipFacts(score=as_score(score))
    release = RELEASE if as_score(score).reads_release else None
    return dataclasses.replace(plain, facts=facts, release=release)


@functools.cache
def summed(score):
    """Compiled: the sum of scores of some gradients, as float32 and its remainder."""
    geometry = geometry_for(score)

    @jax.jit
    def total(gradients, mask):
        found = from_gradients(gradients, geometry.groups)._replace(params=PARAMS)
        sums = clip_sum(found, geometry, 1.0, as_clip_mode("joint"), mask)
        return sums.layer_shares, sums.shares_remainder

    return total


def scores_of(score, gradients, mask=None):
    """The exact sum of scores, in float64; batches are filled up to nine."""
    count = len(gradients["bias"])
    mask = np.zeros(count, bool) if mask is None else mask
    fill = 9 - count
    gradients = {
        k: np.pad(g, [(0, fill)] + [(0, 0)] * (g.ndim - 1))
        for k, g in gradients.items()
    }
    mask = np.pad(mask, (0, fill), constant_values=True)
    high, low = summed(score)(gradients, mask)
    return np.asarray(high, np.float64) + np.asarray(low, np.float64)


def random_gradients(seed, count, spread=3):
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-spread, spread, count)
    return {
        k: np.asarray(
            rng.normal(size=(count, *x.shape)) * sizes.reshape(-1, *[1] * x.ndim),
            np.float32,
        )
        for k, x in PARAMS.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_one_example_moves_the_sum_by_at_most_one(name):
    gradients = random_gradients(0, 9)
    mask, alone = np.zeros(9, bool), []
    whole = scores_of(ALL[name], gradients, mask)
    for k in range(9):
        without = np.arange(9) == k
        alone.append(whole - scores_of(ALL[name], gradients, without))
    lengths = np.linalg.norm(alone, axis=1)
    assert lengths.max() <= 1
    if name in SCORES or name in ("five", "negative", "a hair above one"):
        assert lengths.max() > 0.4  # the budget is used
    np.testing.assert_array_equal(np.sum(alone, 0), whole)  # nothing rounds


@pytest.mark.parametrize("name", ALL)
def test_padding_and_what_is_no_number_are_absent(name):
    gradients = random_gradients(1, 4)
    present = scores_of(ALL[name], jax.tree.map(lambda g: g[:2], gradients))
    gradients["bias"][2] = np.nan
    gradients["emb"][3] = np.inf
    mask = np.array([False] * 4)
    np.testing.assert_array_equal(scores_of(ALL[name], gradients, mask), present)
    spoiled = random_gradients(1, 4)
    padded = np.array([False, False, True, True])
    np.testing.assert_array_equal(scores_of(ALL[name], spoiled, padded), present)


def test_what_is_not_finite_counts_as_nothing():
    gradients = random_gradients(2, 3)
    assert not scores_of(HOSTILE["infinite"], gradients).any()
    assert not scores_of(HOSTILE["huge"], gradients).any()


def test_a_negative_score_is_rounded_towards_zero():
    one = random_gradients(3, 1)
    up, down = scores_of("l2", one), scores_of(HOSTILE["negative"], one)
    assert np.all(down <= 0)
    scale = min(1.0, float(from_norm(one)))
    np.testing.assert_allclose(down, -scale * up, rtol=1e-5)


def from_norm(gradients):
    return np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradients.values()))


def test_the_default_keeps_its_bits():
    """The sum that was made before there was a table."""
    gradients = random_gradients(4, 9)
    groups = dp_ilg.layers.group(PARAMS, BLOCKS)
    norms = found_in(gradients, groups).norms
    overall = weighted_norm(norms, jnp.ones(norms.shape[1]))
    slack = ROUNDING_SLACK + weighted_norm_rounding(norms.shape[1], norms.dtype)
    units = norms / overall[:, None] * np.float32(1 - slack)
    old = np.sum(np.floor(np.float64(units) * 2**24) / 2**24, 0)
    np.testing.assert_array_equal(scores_of("l2", gradients), old)


def found_in(gradients, groups):
    return from_gradients(jax.tree.map(jnp.asarray, gradients), groups)


def test_every_row_is_what_it_says():
    gradients = random_gradients(5, 1, spread=0)
    groups = dp_ilg.layers.group(PARAMS, BLOCKS)
    norms = np.asarray(found_in(gradients, groups).norms[0], np.float64)

    def inner(tree):
        one, other = (groups_of(x) for x in (gradients, tree))
        return np.array([np.sum(a * b) for a, b in zip(one, other, strict=True)])

    along = inner(RELEASE) / [np.linalg.norm(x) for x in groups_of(RELEASE)]
    taylor = np.abs(inner(PARAMS))
    expected = {
        "l2": norms / np.linalg.norm(norms),
        "l1": norms / norms.sum(),
        "weight": taylor / np.linalg.norm(taylor),
        "signal": np.sqrt(norms**2 - along**2) / np.linalg.norm(norms),
    }
    assert expected.keys() == SCORES.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scores_of(name, gradients), value, rtol=2e-5)


def groups_of(tree):
    """bias, two bands of emb, kernel: the leaves as `BLOCKS` groups them."""
    flat = {
        k: np.asarray(v, np.float64).reshape(PARAMS[k].shape) for k, v in tree.items()
    }
    names = dp_ilg.layers.group(PARAMS, BLOCKS).names
    cut = {"emb": [flat["emb"][:2], flat["emb"][2:]]}
    found = []
    for name in names:
        leaf = next(k for k in flat if k in name)
        found.append(cut[leaf].pop(0) if leaf in cut else flat[leaf])
    return found


# --- inner products ------------------------------------------------------------------


def network(params, example):
    ids, y = example
    rows = params["emb"][ids]
    hidden = jnp.tanh(rows @ params["kernel"] + params["bias"])
    tied = jnp.sum(rows @ params["emb"].T)
    return jnp.sum(jnp.square(hidden.mean(0) - y)) + 0.1 * tied


def sequence(params, example):
    """Several terms an example, and parameters read in a loop."""
    x, _ = example
    x = x.astype(jnp.float32)

    def turn(h, row):
        return jnp.tanh(h @ params["emb"].T @ params["emb"] + row), None

    h, _ = jax.lax.scan(turn, jnp.ones(4), jnp.outer(x, jnp.arange(4.0)) / 20)
    return jnp.sum(h @ params["kernel"] * params["bias"])


@pytest.mark.parametrize("loss", [network, sequence])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "exact"])
def test_inner_products_are_those_of_every_examples_gradient(engine, loss):
    rng = np.random.default_rng(6)
    batch = rng.integers(0, 6, (7, 5)), rng.normal(size=(7, 3)).astype("float32")
    geometry = dp_ilg.Geometry.uniform(PARAMS, "leaf")

    @jax.jit
    def found(batch):
        per_example = ENGINES[engine](loss, PARAMS, batch, geometry.groups)
        return inner_products(per_example, RELEASE, geometry)

    gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(PARAMS, batch)
    pairs = jax.tree.map(
        lambda g, t: jnp.sum(g * t, range(1, g.ndim)), gradients, RELEASE
    )
    expected = jnp.stack(jax.tree.leaves(pairs), 1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found(batch), expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("name", ["weight", "signal"])
def test_scores_beside_maps_are_of_the_mapped_gradients(name, whitened):
    rng = np.random.default_rng(8)
    batch = rng.integers(0, 6, (5, 5)), rng.normal(size=(5, 3)).astype("float32")
    maps = AxisMaps.of(PARAMS, random_axes(PARAMS, "mixed", seed=1), whitened=whitened)
    plain = geometry_for(name, layers="leaf")
    release = jax.tree.unflatten(  # as the chain keeps it: restored, or not
        jax.tree.structure(RELEASE), maps.restored(jax.tree.leaves(RELEASE))
    )
    release = release if name == "signal" else None
    geometry = dataclasses.replace(plain, coordinates=maps, release=release)
    grad_fn = dp_ilg.clipped_grad(network, l2_clip_norm=1.0)
    found = jax.jit(grad_fn)(PARAMS, batch, geometry=geometry)

    gradients = jax.jit(jax.vmap(jax.grad(network), (None, 0)))(PARAMS, batch)
    inside = jax.tree.leaves(entered_by_hand(gradients, maps))
    norms = np.stack([np.linalg.norm(x.reshape(5, -1), axis=1) for x in inside], 1)
    total = np.zeros(3)
    for i in range(5):
        pairs = zip(*map(jax.tree.leaves, (gradients, PARAMS)), strict=True)
        taylor = np.array([abs(np.sum(np.asarray(g[i] * w, float))) for g, w in pairs])
        mean = [np.asarray(x, float) for x in jax.tree.leaves(RELEASE)]  # L^-1 r
        along = [
            np.sum(g[i] * r) / np.linalg.norm(r)
            for g, r in zip(inside, mean, strict=True)
        ]
        rest = np.sqrt(norms[i] ** 2 - np.square(along))
        total += {
            "weight": taylor / np.linalg.norm(taylor),
            "signal": rest / np.linalg.norm(norms[i]),
        }[name]
    np.testing.assert_allclose(found.layer_shares, total, rtol=1e-4)


def test_a_length_beside_maps_bounds_the_inner_product():
    maps = AxisMaps.of(PARAMS, random_axes(PARAMS, "mixed", seed=2))
    plain = geometry_for("l2", layers="leaf")
    geometry = dataclasses.replace(plain, coordinates=maps)
    batch = np.arange(10).reshape(2, 5) % 6, np.ones((2, 3), np.float32)

    def ratio(one):
        return 0.5 * one.inner(one.params) / (one.norms * one.lengths(one.params))

    geometry = dataclasses.replace(geometry, facts=ClipFacts(score=as_score(ratio)))
    grad_fn = jax.jit(dp_ilg.clipped_grad(network, l2_clip_norm=1.0))
    found = grad_fn(PARAMS, batch, geometry=geometry).layer_shares
    gradients = jax.jit(jax.vmap(jax.grad(network), (None, 0)))(PARAMS, batch)
    inside = jax.tree.leaves(entered_by_hand(gradients, maps))
    total = np.zeros(3)
    for i in range(2):
        for j, (g, w) in enumerate(zip(inside, _paired_by_hand(maps), strict=True)):
            lengths = np.linalg.norm(g[i]) * np.linalg.norm(w)
            total[j] += 0.5 * np.sum(g[i] * w) / lengths
    np.testing.assert_allclose(found, total, atol=2e-5)


def _paired_by_hand(maps):
    """``L^T w`` of every leaf, in NumPy."""
    for w, own in zip(jax.tree.leaves(PARAMS), maps.back, strict=True):
        w = np.asarray(w, float)
        for axis, factor in enumerate(own):
            if factor is not None:
                square = np.asarray(factor, float)
                square = np.diag(square) if square.ndim == 1 else square
                w = np.moveaxis(np.tensordot(w, square, ((axis,), (0,))), -1, axis)
        yield w


def test_micro_batches_change_nothing():
    rng = np.random.default_rng(7)
    batch = rng.integers(0, 6, (8, 5)), rng.normal(size=(8, 3)).astype("float32")

    def total(size):
        grad_fn = dp_ilg.clipped_grad(network, l2_clip_norm=1.0, microbatch_size=size)
        return jax.jit(
            lambda: grad_fn(PARAMS, batch, geometry=geometry_for("signal"))
        )()

    one, other = total(8), total(2)
    np.testing.assert_allclose(one.layer_shares, other.layer_shares, rtol=1e-5)
    assert one.geometry.release is None  # the sum carries no copy of it


# --- what is refused -----------------------------------------------------------------


def refused(score, match):
    with pytest.raises(ValueError, match=match):
        scores_of(score, random_gradients(0, 2))


def test_what_is_no_score_is_said_in_a_sentence():
    refused(lambda one: one.norms[:2], r"shape \(2,\), but must be real numbers")
    refused(lambda one: one.norms > 1, "is bool of shape")
    refused(lambda one: [1.0, 2.0, 3.0, 4.0], "is list, but must be one array")
    refused(lambda one: one.release, "which the chain does not keep")
    refused(lambda one: one.inner({"w": jnp.ones(2)}), "do not fit the geometry")
    refused(branching, "branches on values of an example")
    refused(printing, "has effects .* which would show single examples")
    refused(called_back, "pure_callback.* which would show single examples")
    refused("l3", "score is 'l3', which is unknown; known are l1, l2")
    refused(3, "score is 3, but must be one of")


def printing(one):
    jax.debug.print("{}", one.norms)
    return one.norms


def called_back(one):
    return jax.pure_callback(lambda x: x, one.norms, one.norms)


def branching(one):
    return one.norms if one.norms[0] > 1 else -one.norms


def test_weights_are_asked_for_where_they_are_not_known():
    tx = dp_ilg.clip_per_example(1.0)
    gradients = jax.tree.map(jnp.asarray, random_gradients(0, 2))
    with pytest.raises(ValueError, match="was not given them; pass params"):
        tx.update(gradients, tx.init(PARAMS), geometry=geometry_for("weight"))

    @jax.jit
    def update(params):
        geometry = geometry_for("weight")
        return tx.update(gradients, tx.init(params), params, geometry=geometry)[0]

    assert update(PARAMS).geometry.facts.score is SCORES["weight"]


def test_inner_products_in_scaled_entries_are_refused():
    geometry = geometry_for("weight")
    scale = tuple(jnp.ones_like(x) for x in jax.tree.leaves(PARAMS))
    coordinates = Coordinates(scale)
    scaled = dataclasses.replace(geometry, coordinates=coordinates)
    tx = dp_ilg.clip_per_example(1.0)
    with pytest.raises(ValueError, match="a centre and scale of every entry"):
        tx.update(random_gradients(0, 2), tx.init(PARAMS), PARAMS, geometry=scaled)


def test_the_score_is_said_in_one_place():
    uniform, rows = dp_ilg.Geometry.uniform(PARAMS), np.ones((2, 3), "float32")
    bias = lambda params, x: jnp.sum(params["bias"] * x)  # noqa: E731
    clip = functools.partial(dp_ilg.clipped_grad, bias, l2_clip_norm=1.0)
    grad_fn = clip(score="l1", engine="vmap")
    found = grad_fn(PARAMS, rows, geometry=uniform)
    assert found.geometry.facts.score is SCORES["l1"]
    with pytest.raises(ValueError, match="score is 'l1' in clipped_grad, but 'weight'"):
        grad_fn(PARAMS, rows, geometry=geometry_for("weight"))
    with pytest.raises(ValueError, match="Two chunks were clipped with score"):
        _ = found + clip(engine="vmap")(PARAMS, rows, geometry=uniform)


def test_a_function_is_one_score_wherever_it_is_given():
    assert as_score(branching) == as_score(branching)
    assert as_score(Score(branching)) == as_score(branching)
    assert hash(as_score(branching)) == hash(as_score(branching))
