"""The table before training: what is wrong is found, and what is right passes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.geometry.layers import by_module
from dp_ilg.training.loop.checking import plan_warnings
from tests.training.loop import scene


def model():
    return {
        "read": {"w": jnp.ones(scene.WIDTH)},
        "unread": {"w": jnp.ones(2)},
        "still": {"w": jnp.ones(scene.WIDTH)},
    }


def loss_fn(params, example):
    x, y = example
    return jnp.square((params["read"]["w"] + params["still"]["w"]) @ x - y)


def check(**facts):
    layers = by_module(frozen=("still",))
    train = dp_ilg.private_training(
        loss_fn, optax.sgd(0.1), scene.made_plan(), layers=layers, seed=0
    )
    x, y = scene.data()
    return train, train.check(model(), (x[:12], y[:12]), **facts)


def test_layers_without_gradient_and_frozen_ones_are_named():
    train, found = check()
    rows = {row.layer: row for row in found.layers}
    assert rows["read"].trouble == "" and rows["read"].paths != "none"
    assert "no gradient for unread/w" in rows["unread"].trouble
    assert rows["still/w"].trouble == "frozen" and rows["still/w"].parameters == 0
    assert found.memory_mib > 0 and found.microbatch == 12 and found.warnings == ()
    assert "signal, at most" in str(found) and "unread/w" in str(found)
    x, y = scene.data()
    assert len(train.explain(model(), (x, y))) == 3


def test_noise_and_signal_are_those_of_a_step():
    _, found = check(public=True)
    plan, row = scene.made_plan(), found.layers[0]
    sigma = plan.gradient_noise_multipliers[0]
    assert row.noise == pytest.approx(sigma * np.sqrt(3) / plan.batch_size)
    x, y = scene.data()
    grads = jax.vmap(jax.grad(loss_fn), (None, 0))(model(), (x[:12], y[:12]))
    g = np.asarray(grads["read"]["w"])
    clipped = g / np.maximum(1, np.linalg.norm(g, axis=1))[:, None]
    want = np.linalg.norm(clipped.mean(axis=0))
    assert row.signal == pytest.approx(want, rel=1e-4)
    assert found.measured and "signal, at most" not in str(found)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (dict(noise_multiplier=0.0), "epsilon is infinite"),
        (dict(noise_multiplier=0.3), "a weak promise"),
        (dict(noise_multiplier=1.0), None),
    ],
)
def test_a_plan_that_promises_little_is_warned_of(facts, words):
    found = plan_warnings(scene.made_plan(score_budget=0, **facts), 10)
    assert not found if words is None else words in found[0]


def test_a_batch_far_too_small_is_warned_of_with_the_size_that_would_do():
    plan = dp_ilg.plan_privacy(
        noise_multiplier=2.0, delta=1e-7, num_examples=10**6, batch_size=4, num_steps=9
    )
    assert plan_warnings(plan, 30) == []
    (found,) = plan_warnings(plan, 10_000)
    assert "batch_size=68 or more" in found  # 2.01 * 100 / 3
    (found,) = plan_warnings(plan, 10**15)
    assert "more examples, or a larger epsilon" in found


def test_a_large_delta_is_warned_of():
    with pytest.warns(UserWarning, match="above 1 / num_examples"):
        plan = dp_ilg.plan_privacy(
            noise_multiplier=1.0, delta=0.1, num_examples=60, batch_size=12, num_steps=2
        )
    assert "delta is 0.1" in plan_warnings(plan, 10)[0]
