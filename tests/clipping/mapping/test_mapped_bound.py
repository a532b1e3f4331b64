"""Searches for a mapped example that exceeds C, and the noise in mapped coordinates.

The measure is always that of the proof: the length of ``L^-1 g``, as it is added up.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.clipping.bookkeeping import factors
from dp_ilg.geometry.maps import AxisMaps
from tests.clipping.bookkeeping.test_bound import KINDS, LAYERS, search, weighted_norm
from tests.helpers.mapped import fixed, random_axes, random_maps
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params, plan

LIMIT = 1 + 1e-6
LEVEL = 1e-4  # of every test of noise


@pytest.mark.parametrize("layer", ["short sequence", "embedding"])
def test_no_mapped_example_exceeds_the_clip_norm_in_brief(layer):
    kinds = KINDS["spread"] + KINDS["cancelling"]
    worst = search(layer, "joint", kinds, maps=random_maps)
    assert 0.99 < worst[0] <= LIMIT, worst


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["matrices", "scales"])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_mapped_example_exceeds_the_clip_norm(layer, kind):
    maps = functools.partial(random_maps, kind=kind)
    for inputs in KINDS.values():
        worst = search(layer, "joint", inputs, 4, maps=maps)
        assert 0.99 < worst[0] <= LIMIT, worst


def total(clipped: Any) -> list[np.ndarray]:
    """The exact sum, in float64."""
    pairs = zip(
        *map(jax.tree.leaves, (clipped.gradients, clipped.remainder)), strict=True
    )
    return [np.asarray(a, np.float64) + np.asarray(b, np.float64) for a, b in pairs]


def test_sums_of_neighbouring_batches_are_at_most_c_apart():
    params, maps = mlp_params(), random_maps(mlp_params(), "matrices")
    weights = jnp.array([0.5, 2.0])
    geometry = dp_ilg.Geometry(weights, dp_ilg.layers.group(params), maps)
    run = jax.jit(dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=0.3, microbatch_size=5))
    largest = 0.0
    for seed in range(30):
        batch = mlp_batch(12, seed)
        all_but = [jnp.arange(12) < 0, jnp.arange(12) == seed % 12]
        sums = [
            run(params, batch, geometry=geometry, is_padding_example=m) for m in all_but
        ]
        gaps = [a - b for a, b in zip(*map(total, sums), strict=True)]
        tree = jax.tree.unflatten(jax.tree.structure(params), gaps)
        moved = dataclasses.replace(sums[0], gradients=tree)
        largest = max(largest, weighted_norm(moved, geometry) / 0.3)
    assert 0.9999 < largest <= LIMIT


def test_the_search_would_find_sums_of_other_terms(monkeypatch):
    """A map that acts on the sum but not, by a thousandth, on the norm."""
    right = factors.squares_of_factors

    def short(part: Any, own: Any) -> Any:
        return [s._replace(value=s.value * 0.998) for s in right(part, own)]

    monkeypatch.setattr(factors, "squares_of_factors", short)
    worst = search("short sequence", "joint", KINDS["spread"], maps=random_maps)
    assert worst[0] > LIMIT


def drawn(whitened: bool) -> tuple[np.ndarray, np.ndarray]:
    """A release of nothing but noise, whitened, and as it is."""
    own = plan(score_budget=0.0)
    params = {"w": jnp.zeros((200, 200))}
    axes = random_axes(params, "matrices")
    maps = AxisMaps.of(params, axes, whitened=whitened)
    geometry = dp_ilg.Geometry(jnp.array([0.7]), dp_ilg.layers.group(params), maps)
    tx = dp_ilg.chain(
        dp_ilg.clip_per_example(own.l2_clip_norm),
        fixed(geometry),
        dp_ilg.add_importance_noise(own, key=jax.random.key(3)),
        *([dp_ilg.unwhiten_updates()] if whitened else []),
    )
    nothing = {"w": jnp.zeros((2, 200, 200))}
    update = jax.jit(tx.update)(nothing, tx.init(params), params)[0]["w"]
    unit = own.gradient_noise_multipliers[0] * own.l2_clip_norm * 0.7 / own.batch_size
    value = np.asarray(update, np.float64) / unit
    one, two = (np.asarray(m, np.float64) for m in axes["w"])
    if whitened:  # L^-T of the noise
        return one @ value @ two, value
    return np.linalg.solve(one, np.linalg.solve(two, value.T).T), value


def spread_p(sample: np.ndarray) -> float:
    """Two-sided p of the sum of squares of standard normal draws."""
    square = float(np.sum(sample**2))
    tails = [f(square, sample.size) for f in (stats.chi2.cdf, stats.chi2.sf)]
    return float(2 * min(tails))


@pytest.mark.parametrize("whitened", [False, True])
def test_the_noise_is_standard_normal_in_mapped_coordinates(whitened):
    white, raw = drawn(whitened)
    assert white.size == 40_000
    assert spread_p(white) > LEVEL
    assert spread_p(0.97 * white) < LEVEL and spread_p(1.03 * white) < LEVEL
    assert stats.kstest(white.ravel(), "norm").pvalue > LEVEL
    assert spread_p(raw) < LEVEL, "the maps change nothing"
    for along in (white, white.T):  # rows and columns are independent
        gram = along @ along.T / along.shape[1] - np.eye(200)
        off = gram[np.triu_indices(200, 1)] * np.sqrt(200)
        assert abs(np.mean(off**2) - 1) < 0.1
