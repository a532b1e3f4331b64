"""Scattering against Kymatio's values, and what its definition says must hold."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.experiments.data.images import scattering
from dp_ilg.experiments.data.images.scattering import (
    group_norm,
    photo_features,
    scatter,
    scattering_features,
)

FIXTURE = np.load(Path(__file__).parents[2] / "fixtures" / "scattering.npz")
ORDERS = {"zero": slice(0, 1), "one": slice(1, 17), "two": slice(17, 81)}


def images(side=28):
    return jnp.asarray(FIXTURE[f"images_{side}"])


@pytest.mark.parametrize("side", [28, 32])
def test_values_are_those_of_kymatio(side):
    """Each order to 1e-4 of its own size: order 2 is 20 times smaller than order 0."""
    found, known = np.asarray(scatter(images(side))), FIXTURE[f"values_{side}"]
    assert found.shape == known.shape == (2, 81, side // 4, side // 4)
    for part in ORDERS.values():
        error = np.abs(found[:, part] - known[:, part])
        assert error.max() < 1e-4 * np.abs(known[:, part]).mean()
        np.testing.assert_allclose(found[:, part], known[:, part], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("_SIGMA", 0.81), ("_FREQUENCY", 2.33), ("_SLANT", 0.51)]
)
def test_a_filter_one_percent_off_is_noticed(name, value, monkeypatch):
    monkeypatch.setattr(scattering, name, value)
    wrong = scattering._filters.__wrapped__(36)
    found, known = scattering._scatter(images(), wrong), FIXTURE["values_28"]
    error = np.abs(np.asarray(found)[:, 1:] - known[:, 1:]).max()
    assert error > 1e-4 * np.abs(known[:, 1:]).mean()


def test_a_constant_has_nothing_but_its_mean():
    found = np.asarray(scatter(jnp.full((1, 28, 28), 0.5)))
    np.testing.assert_allclose(found[:, 0], 0.5, rtol=1e-4)
    np.testing.assert_allclose(found[:, 1:], 0.0, atol=1e-6)


def test_scaling_passes_through_and_a_shift_moves_the_mean_alone():
    plain, moved = scatter(images()), scatter(2.0 * images() + 1.0)
    expected = (2.0 * plain).at[:, 0].add(1.0)
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-4)


def test_a_half_turn_turns_the_features():
    """It conjugates a Morlet wavelet, which the modulus cannot see.

    Samples sit on pixels 0, 4, ..., 24; after turning and moving by one on 28 - those.
    """
    turned = jnp.roll(images()[:, ::-1, ::-1], (1, 1), (1, 2))
    found, plain = scatter(turned)[:, :, ::-1, ::-1], scatter(images())
    inner = (..., slice(2, 4), slice(2, 4))  # away from the mirrored border
    expected = plain[:, :, 1:, 1:][inner]
    error = jnp.abs(found[inner] - expected).max()
    assert error < 1e-3
    assert jnp.abs(plain[inner] - expected).max() > 50 * error  # not moved: wrong


def test_small_moves_matter_less_than_in_pixels():
    grey = images()[1:]
    moved = jnp.roll(grey, 1, axis=2)
    change = lambda f: jnp.linalg.norm(f(moved) - f(grey)) / jnp.linalg.norm(f(grey))  # noqa: E731
    assert change(scatter) < 0.6 * change(lambda x: x)


def test_rows_do_not_see_each_other():
    both = scattering_features(images()[..., None])
    alone = scattering_features(images()[1:, ..., None])
    np.testing.assert_allclose(both[1:], alone, rtol=1e-5, atol=1e-5)


def test_features_are_normalised_in_27_groups():
    x = jnp.stack([images(32)[0], images(32)[1], images(32)[0].T], -1)[None]
    found = np.asarray(scattering_features(x)).reshape(27, -1)
    assert found.size == 15_552
    np.testing.assert_allclose(found.mean(1), 0.0, atol=1e-5)
    assert (found.std(1) < 1.0 + 1e-4).all() and (found.std(1) > 0.3).all()


def test_colours_are_features_of_their_own():
    grey = images(32)
    colour = jnp.stack([grey[0], grey[1], grey[0]], -1)[None]
    maps = jnp.moveaxis(colour, -1, 1)[0]
    known = group_norm(scatter(maps).reshape(1, 243, 8, 8)).reshape(1, -1)
    np.testing.assert_allclose(scattering_features(colour), known, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 32), (1, 30, 30), (1, 4, 4)])
def test_other_shapes_are_refused_in_one_sentence(shape):
    with pytest.raises(ValueError, match="multiple of 4 and at least 8, not "):
        scatter(jnp.zeros(shape))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="27 groups do not divide 80 channels"):
        group_norm(jnp.zeros((1, 80, 2, 2)))


def test_photo_features_know_no_left_and_no_right():
    photo = jax.random.uniform(jax.random.key(5), (2, 16, 16, 3))
    found = photo_features(photo)
    np.testing.assert_allclose(found, photo_features(photo[:, :, ::-1]), atol=1e-5)
    upside_down = photo_features(photo[:, ::-1])
    assert np.abs(found - upside_down).max() > 0.1


def test_photo_features_are_those_of_opponent_colours():
    photo = jax.random.uniform(jax.random.key(6), (1, 16, 16, 3))
    red, green, blue = np.moveaxis(np.asarray(photo), -1, 0)
    colours = [red + green + blue, red - green, red + green - 2 * blue]
    lengths = np.sqrt([3, 2, 6])
    turned = np.stack([c / n for c, n in zip(colours, lengths, strict=True)], -1)
    sides = [
        scattering_features(jnp.asarray(turned[:, :, s]))
        for s in (slice(None), slice(None, None, -1))
    ]
    np.testing.assert_allclose(photo_features(photo), sum(sides) / 2, atol=2e-4)


def test_a_grey_photo_has_no_colour():
    grey = jax.random.uniform(jax.random.key(7), (1, 16, 16, 1))
    found = photo_features(jnp.repeat(grey, 3, axis=-1)).reshape(3, -1)
    assert np.abs(found[0]).max() > 1.0
    assert np.abs(found[1:]).max() < 0.01


def test_gradients_exist():
    slope = jax.grad(lambda x: scatter(x[None]).sum())(images()[0])
    assert np.isfinite(slope).all()
