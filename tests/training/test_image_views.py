"""Crops and mirror images: every view there is, and one clip for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.training.frameworks.images import crop_and_mirror
from dp_ilg.training.loop.losses import over_views


def every_view(image, crop):
    """All crops of the reflected image, mirrored and not."""
    padded = np.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
    height, width = image.shape[:2]
    for row in range(2 * crop + 1):
        for column in range(2 * crop + 1):
            moved = padded[row : row + height, column : column + width]
            yield from (moved, moved[:, ::-1])


def test_views_are_all_crops_and_mirror_images_equally_often():
    image = np.random.default_rng(0).random((5, 6, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 3600)
    views, labels = jax.jit(jax.vmap(lambda k: crop_and_mirror(1)((image, 3), k)))(keys)
    assert (labels == 3).all()
    known = np.stack(list(every_view(image, 1))).reshape(18, -1)
    apart = np.abs(np.asarray(views).reshape(3600, 1, -1) - known).max(-1)
    assert (apart.min(1) == 0).all()
    counts = np.bincount(apart.argmin(1), minlength=18)
    assert counts.min() > 200 - 5 * 14 and counts.max() < 200 + 5 * 14  # 5 deviations


def test_without_mirror_or_crop_nothing_is_mirrored_or_moved():
    image = jnp.arange(18.0).reshape(3, 3, 2)
    keys = jax.random.split(jax.random.key(0), 40)
    still = jax.vmap(lambda k: crop_and_mirror(0, mirror=False)((image,), k)[0])(keys)
    assert (still == image).all()
    turned = jax.vmap(lambda k: crop_and_mirror(0)((image,), k)[0])(keys)
    same = (turned == image).all((1, 2, 3))
    assert 5 < same.sum() < 35 and (turned[~same] == image[:, ::-1]).all()


def loss_fn(params, example, key):
    x, y = example
    return jnp.square(jnp.sum(params["w"] * x) - y)


@pytest.mark.parametrize("views", [1, 4])
def test_the_mean_gradient_over_views_is_clipped_once(views):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 4, 4, 1)).astype(np.float32)
    y = rng.normal(size=6).astype(np.float32) * 5
    params = {"w": jnp.asarray(rng.normal(size=(4, 4, 1)), jnp.float32)}
    keys, augment = jax.random.split(jax.random.key(3), 6), crop_and_mirror(1)
    seen = over_views(loss_fn, views, augment)
    clip = 0.5

    def by_hand(i):
        total = np.zeros((4, 4, 1))
        for k in range(views):
            first, second = jax.random.split(jax.random.fold_in(keys[i], k))
            view = augment((x[i], y[i]), first)
            total += np.asarray(jax.grad(loss_fn)(params, view, second)["w"]) / views
        return total * min(1, clip / np.linalg.norm(total))

    of_row = lambda params, row: seen(params, row[0], row[1])  # noqa: E731
    grad_fn = dp_ilg.clipped_grad(of_row, l2_clip_norm=clip)
    flat = dp_ilg.Geometry.uniform(params)
    whole = jax.jit(grad_fn)(params, ((x, y), keys), geometry=flat).gradients["w"]
    np.testing.assert_allclose(whole, sum(by_hand(i) for i in range(6)), atol=2e-5)
    for i in range(6):  # neighbouring batches are C apart at most, not C a view
        mask = jnp.arange(6) == i
        found = grad_fn(params, ((x, y), keys), geometry=flat, is_padding_example=mask)
        rest = found.gradients["w"]
        assert np.linalg.norm(whole - rest) <= clip * (1 + 1e-5)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 9, 3))])
def test_images_that_do_not_fit_are_refused(image):
    with pytest.raises(ValueError, match="both sides longer than that"):
        crop_and_mirror(4)((image, 0), jax.random.key(0))


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match="not of dict"):
        crop_and_mirror(1)({"image": np.zeros((4, 4, 3))}, jax.random.key(0))
    with pytest.raises(ValueError, match="crop is -1"):
        crop_and_mirror(-1)
