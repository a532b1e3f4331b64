"""What the rounding of a sum over examples is in proportion to, by path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.geometry.layers import blocks, by_leaf, group
from tests.helpers.agreement import ENGINE

TERMS, WIDE = [1, 3, 12], 24


def product(p, e):
    return jnp.sum((e[0] @ p["w"]) * e[1])


def sizes_of(loss, params, batch, layers: Any = "leaf"):
    groups = group(params, layers)

    def both(p, b):
        found = ENGINES[ENGINE](loss, p, b, groups)
        return found.norms, found.sizes

    return [np.asarray(x, np.float64) for x in jax.jit(both)(params, batch)]


def example(terms, cancelling):
    rng = np.random.default_rng(terms)
    x = rng.normal(size=(5, terms, WIDE)).astype(np.float32)
    y = rng.normal(size=(5, terms, WIDE)).astype(np.float32)
    if cancelling and terms > 1:
        x[:, 1:] = x[:, :1]
        y[:, 1] -= y.sum(axis=1)
    return x, y


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("cut", [False, True])
def test_factors_have_the_sum_of_the_norms_of_their_terms(terms, cut):
    params = {"w": jnp.zeros((WIDE, WIDE))}
    layers = by_leaf(blocks("w", axis=1, edges=[10])) if cut else "leaf"
    x, y = example(terms, True)
    norms, sizes = sizes_of(product, params, (x, y), layers)
    parts = [y[..., :10], y[..., 10:]] if cut else [y]
    for place, own in enumerate(parts):
        ends = [np.linalg.norm(np.float64(a), axis=2) for a in (x, own)]
        right = np.sum(ends[0] * ends[1], axis=1)
        assert (sizes[:, place] >= right).all()
        assert (sizes[:, place] <= 1.002 * right).all()
    assert (sizes >= norms).all()


def test_formed_gradients_and_single_rows_have_their_norm():
    params = {"w": jnp.zeros((WIDE, WIDE)), "b": jnp.zeros(WIDE)}

    def looked_up(p, e):
        return jnp.sum(p["w"][e[0]] * e[1]) + jnp.sum(p["b"] * e[1])

    _, y = example(12, True)
    ids = np.arange(60).reshape(5, 12) % WIDE
    norms, sizes = sizes_of(looked_up, params, (ids, y))
    assert (sizes >= norms).all() and (sizes <= 1.001 * norms).all()
    assert (norms > 0).all()


def test_rows_that_repeat_have_the_norm_of_the_sizes_in_each():
    params, (_, y) = {"w": jnp.zeros((WIDE, WIDE))}, example(12, True)
    ids = np.arange(60).reshape(5, 12) % 3

    def looked_up(p, e):
        return jnp.sum(p["w"][e[0]] * e[1])

    _, sizes = sizes_of(looked_up, params, (ids, y))
    lengths = np.linalg.norm(np.float64(y), axis=2)
    each = [np.where(ids == row, lengths, 0).sum(axis=1) for row in range(3)]
    right = np.linalg.norm(each, axis=0)
    assert (sizes[:, 0] >= (1 - 1e-6) * right).all()
    assert (sizes[:, 0] <= 1.001 * right).all()
