"""Dropout, augmentation and views: keys of (run, step, example), one clip for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.training.frameworks.keys import example_key, row_words
from dp_ilg.training.loop.losses import over_views, view_axes
from tests.training.loop import scene
from tests.training.loop.test_front import by_hand


def with_keys(train):
    """Rows of a step beside the key that each example should have, by hand."""
    words = jnp.asarray(train._binding.rows.words)
    base = jax.random.wrap_key_data(words, impl="threefry2x32")

    def make(t, rows, indices):
        numbers = row_words(indices)
        keys = [example_key(base, t, numbers[i]) for i in range(len(indices))]
        return (*rows, jnp.stack(keys))

    return make


def test_dropout_is_a_loop_with_explicit_keys():
    train = scene.training(loss=scene.noisy_loss)
    state = scene.trained(train)
    explicit = lambda p, e: scene.noisy_loss(p, e[:2], e[2])  # noqa: E731
    params = by_hand(train, optax.adam(0.1), explicit, with_keys(train))
    close = lambda a, b: np.allclose(a, b, atol=1e-6)  # noqa: E731
    assert all(map(close, jax.tree.leaves(state.params), jax.tree.leaves(params)))
    other = lambda t, rows, i: with_keys(train)(t + 1, rows, i)  # noqa: E731
    wrong = by_hand(train, optax.adam(0.1), explicit, other)
    assert not close(state.params["w"], wrong["w"])  # the control


def test_row_numbers_are_of_the_data_and_not_of_the_batch():
    small = scene.trained(scene.training(loss=scene.noisy_loss, chunk_size=5))
    train = scene.training(loss=scene.noisy_loss, chunk_size=5)
    scene.trained(train)
    params = by_hand(
        train,
        optax.adam(0.1),
        lambda p, e: scene.noisy_loss(p, e[:2], e[2]),
        with_keys(train),
    )
    assert np.allclose(small.params["w"], params["w"], atol=1e-6)


def shifted(example, key):
    """An augmentation: noise on the inputs."""
    x, y = example
    return x + 0.1 * jax.random.uniform(key, x.shape), y


def mean_by_hand(params, example, key, views=3):
    """The mean over views as one writes it oneself."""
    total = 0.0
    for k in range(views):
        first, second = jax.random.split(jax.random.fold_in(key, k))
        total += scene.noisy_loss(params, shifted(example, first), second)
    return total / views


def test_views_are_averaged_before_the_clip():
    loss = over_views(scene.noisy_loss, 3, shifted)
    params, key = {"w": jnp.ones(3), "b": jnp.zeros(())}, jax.random.key(5)
    x, y = scene.data()
    grad_fns = [
        dp_ilg.clipped_grad(lambda p, e, f=f: f(p, e, key), l2_clip_norm=0.3)
        for f in (loss, mean_by_hand)
    ]
    geometry = dp_ilg.Geometry.uniform(params)
    one, other = (f(params, (x[:9], y[:9]), geometry=geometry) for f in grad_fns)
    for a, b in zip(
        jax.tree.leaves(one.gradients), jax.tree.leaves(other.gradients), strict=True
    ):
        assert np.allclose(a, b, atol=1e-5)


def test_views_may_be_a_part_of_the_data():
    """A label without views is shared by all of an example's."""
    x, y = scene.data()
    views = np.stack([x, x + 1, x - 1], axis=1)
    found = over_views(lambda p, e, key: scene.loss_fn(p, e), 3, None)
    params = {"w": jnp.ones(3), "b": jnp.zeros(())}
    mean = np.mean([scene.loss_fn(params, (v, y[0])) for v in views[0]])
    key = jax.random.key(0)
    assert np.allclose(found(params, (views[0], y[0]), key), mean, atol=1e-6)
    state = scene.trained(scene.training(views=3), (views, y))
    assert np.isfinite(state.params["w"]).all()
    with pytest.raises(ValueError, match="no leaf of an example has a first axis"):
        view_axes((np.zeros((4, 3)), np.zeros(())), 3)


def test_a_training_with_views_steps():
    state = scene.trained(scene.training(scene.noisy_loss, views=2, augment=shifted))
    again = scene.trained(scene.training(scene.noisy_loss, views=2, augment=shifted))
    assert scene.bits(state.params) == scene.bits(again.params)
