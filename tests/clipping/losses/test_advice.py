"""Losses of other arguments and losses of a batch: one sentence, not a traceback."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import dp_ilg

W = {"w": jnp.ones((3, 2))}
X, Y = jnp.ones((4, 3)), jnp.zeros(4, int)
GEOMETRY = dp_ilg.Geometry.uniform(W)


def sums(loss, batch=(X, Y)):
    return dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)(W, batch, geometry=GEOMETRY)


def logits(params, x):
    return x @ params["w"]


ARGUMENTS = [
    (lambda p, x, key: 0.0, r"\(p, x, key\).*private_training"),
    (lambda p, x, y, key: 0.0, r"\(p, x, y, key\)"),
    (lambda p, e, *, key: 0.0, r"\(p, e, key\)"),
    (lambda p: 0.0, r"\(p\)"),
    (functools.partial(lambda s, p, x, y: 0.0, 1.0), r"\(p, x, y\)"),
    (jax.jit(lambda p, x, y: 0.0), r"\(p, x, y\)"),
]


@pytest.mark.parametrize("loss, names", ARGUMENTS)
def test_other_arguments_are_named(loss, names):
    with pytest.raises(TypeError, match=f"loss_fn takes the arguments {names}"):
        dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, e, scale=1.0: scale * jnp.sum(logits(p, e[0])),
        lambda *args: jnp.sum(logits(args[0], args[1][0])),
        functools.partial(lambda s, p, e: s * jnp.sum(logits(p, e[0])), 2.0),
        jax.checkpoint(lambda p, e: jnp.sum(logits(p, e[0]))),
        lambda p, e=(), *, deterministic=True: jnp.sum(logits(p, e[0])),
    ],
)
def test_two_arguments_are_two_however_they_are_written(loss):
    assert jnp.isfinite(sums(loss).gradients["w"]).all()


BATCHED = [
    lambda p, e: jnp.mean(jnp.sum(logits(p, e[0]) ** 2, axis=1)),
    lambda p, e: logits(p, e[0])[jnp.arange(len(e[0])), e[1]].mean(),
    lambda p, e: jnp.mean(jax.vmap(lambda x: (x @ p["w"]).sum())(e[0])),
    lambda p, e: jnp.mean(jnp.take_along_axis(logits(p, e[0]), e[1][:, None], axis=1)),
]


@pytest.mark.parametrize("loss", BATCHED)
def test_a_loss_of_a_batch_is_told_so(loss):
    sentence = r"fails on one example, of shapes \[\(3,\), \(\)\].*for ONE example"
    with pytest.raises(ValueError, match=sentence) as caught:
        sums(loss)
    assert caught.value.__cause__ is not None


def test_what_fails_for_another_reason_says_its_own():
    with pytest.raises(KeyError, match="typo"):
        sums(lambda p, e: jnp.sum(p["typo"] * e[0]))
    with pytest.raises(TypeError, match="dot_general|contracting"):
        sums(lambda p, e: jnp.sum(e[0] @ p["w"].T))


def test_a_mean_that_does_no_harm_to_one_example_is_welcome():
    def loss(params, example):
        x, y = example
        found = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return found.mean()

    assert jnp.isfinite(sums(loss).gradients["w"]).all()


def test_a_module_with_streams_says_who_takes_it_whole():
    from flax import nnx

    layers = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="nnx.split.*dp_ilg.private_training"):
        dp_ilg.Geometry.uniform(nnx.Sequential(*layers))
