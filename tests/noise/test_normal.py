"""Our normal draws are JAX's, bit for bit, and normal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dp_ilg.noise.normal import _normal, standard_normal, standard_normals

SHAPES = [(), (1,), (0,), (3, 0), (65,), (10, 3, 7), (128, 256), (784, 100), (40_001,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(2**31 + 5)])
def test_one_draw_is_jaxs(shape, key):
    expected = jax.random.normal(key, shape)
    np.testing.assert_array_equal(standard_normal(key, shape), expected)


def leaves_by_jax(key, leaves):
    return [
        jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        for i, x in enumerate(leaves)
        if x is not None
    ]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_every_leafs_draw_is_jaxs_for_its_own_key(impl):
    """Small leaves, large ones alone and of one size, and one left out."""
    key = jax.random.fold_in(jax.random.key(1, impl=impl), 7)
    shapes = [*SHAPES, (256, 128), (33_000,), (512,), (513,)]
    leaves: list = [jnp.zeros(s) for s in shapes]
    leaves.insert(3, None)
    for draw in (standard_normals, jax.jit(standard_normals)):
        drawn = draw(key, leaves)
        assert drawn[3] is None
        found = [x for x in drawn if x is not None]
        for got, expected in zip(found, leaves_by_jax(key, leaves), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_double_precision_leaves_are_drawn_in_double_precision():
    with jax.enable_x64(True):
        leaves = [jnp.zeros(5, "float64"), jnp.zeros(5, "float32")]
        key = jax.random.key(0)
        drawn = standard_normals(key, leaves)
        for got, expected in zip(drawn, leaves_by_jax(key, leaves), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


def test_what_is_not_wanted_is_nan():
    leaves = [jnp.zeros(3), jnp.zeros((200, 200))]
    draw = jax.jit(lambda wanted: standard_normals(jax.random.key(0), leaves, wanted))
    assert all(bool(jnp.isfinite(x).all()) for x in draw(True))
    assert all(bool(jnp.isnan(x).all()) for x in draw(False))


def test_under_vmap_every_key_draws_its_own():
    keys = jax.random.split(jax.random.key(0), 3)
    leaves = [jnp.zeros(7), jnp.zeros((200, 200))]
    drawn = jax.vmap(lambda key: standard_normals(key, leaves))(keys)
    for i, key in enumerate(keys):
        expected = leaves_by_jax(key, leaves)
        for got, one in zip(drawn, expected, strict=True):
            np.testing.assert_array_equal(got[i], one)


def test_all_uniform_numbers_become_the_normal_ones():
    """All 2^23 of them against SciPy; one wrong coefficient would be seen."""
    bits = np.arange(2**23, dtype=np.uint32) << 9
    drawn = np.asarray(jax.jit(_normal)(bits), np.float64)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = np.arange(2**23, dtype=np.float32) / np.float32(2**23) * (1 - low) + low
    assert uniform.dtype == np.float32
    expected = scipy.special.erfinv(uniform.astype(np.float64)) * np.sqrt(2)
    error = np.abs(drawn - expected) / np.maximum(np.abs(expected), 1e-6)
    assert np.max(error) < 1e-5 and np.median(error) < 2e-7
    assert abs(np.mean(drawn**2) - 1) < 1e-5 and abs(np.mean(drawn)) < 1e-5


def test_a_key_used_twice_is_still_seen():
    key = jax.random.key(0)
    with jax.debug_key_reuse(True):
        standard_normal(key, (3,))
        with pytest.raises(jax.errors.KeyReuseError):
            standard_normal(key, (3,))
