"""Clip norms as a tree: against a clip of every part by hand, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.geometry.clip_norms import from_clip_norms

PARAMS = {"body": {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}, "head": jnp.zeros(4)}
RNG = np.random.default_rng(0)
ROWS = jax.tree.map(
    lambda x: jnp.asarray(3 * RNG.normal(size=(7, *x.shape)), jnp.float32), PARAMS
)
FULL = {"body": {"w": 0.5, "b": 2.0}, "head": 1.5}


def loss(params, example):
    parts = jax.tree.map(lambda p, x: jnp.sum(p * x), params, example)
    return sum(jax.tree.leaves(parts))


def clipped(tree, bound):
    """Every example of a subtree brought to a length of at most the bound."""
    square = sum(jnp.sum(x.reshape(7, -1) ** 2, 1) for x in jax.tree.leaves(tree))
    factor = jnp.minimum(1, bound / jnp.sqrt(square))
    return jax.tree.map(lambda x: jnp.tensordot(factor, x, 1), tree)


CASES = {
    "a number a leaf": (
        FULL,
        jax.tree.map(clipped, ROWS, FULL),
    ),
    "a number a subtree": (
        {"body": 0.7, "head": 1.5},
        {"body": clipped(ROWS["body"], 0.7), "head": clipped(ROWS["head"], 1.5)},
    ),
    "one number": (2.5, clipped(ROWS, 2.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_are_clipped_to_their_own_norms(case):
    norms, wanted = CASES[case]
    geometry, bound = from_clip_norms(PARAMS, norms)
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=bound, clip_mode="per_layer")
    found = jax.jit(lambda p, x: grad_fn(p, x, geometry=geometry))(PARAMS, ROWS)
    assert bound == pytest.approx(np.linalg.norm(jax.tree.leaves(norms)))
    for one, other in zip(
        *map(jax.tree.leaves, (found.gradients, wanted)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_box_touches_the_ellipsoid():
    geometry, bound = from_clip_norms(PARAMS, FULL)
    corner = jnp.array([FULL["body"]["b"], FULL["body"]["w"], FULL["head"]])
    assert geometry.groups.names == ("body/b", "body/w", "head")
    assert float(geometry.norm(corner)) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(
    "norms",
    [
        {"body": 1.0},
        {"body": 1.0, "tail": 1.0},
        [1.0, 2.0],
        {"body": None, "head": 1.0},
    ],
)
def test_a_tree_that_is_no_prefix_is_refused(norms):
    with pytest.raises(ValueError, match="no prefix of the parameters' tree; give one"):
        from_clip_norms(PARAMS, norms)


def test_two_places_of_one_name_are_refused():
    params = {"a": {"b": jnp.zeros(2)}, "a/b": jnp.zeros(2)}
    with pytest.raises(ValueError, match="clip_norms names 'a/b' twice"):
        from_clip_norms(params, {"a": {"b": 1.0}, "a/b": 2.0})


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_norm_that_bounds_nothing_is_refused_with_its_place(norm):
    with pytest.raises(ValueError, match="clip_norms of head"):
        from_clip_norms(PARAMS, {"body": 1.0, "head": norm})
