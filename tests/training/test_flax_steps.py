"""Steps of several chunks in Flax's own objects are those of plain parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dp_ilg
from dp_ilg.training.flax_steps import make_nnx_step, make_train_state_step
from dp_ilg.training.step import make_train_step

X = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)
MASK = np.arange(6) == 5
CHUNKS = [(X[0], MASK), (X[1], MASK)]


def loss(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])[0]


@pytest.fixture(scope="module")
def made():
    plan = dp_ilg.plan_privacy(
        epsilon=2.0, delta=1e-5, num_examples=1000, batch_size=100, num_steps=10
    )
    tx = dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
    params, step = fresh(), make_train_step(grad_fn, tx)
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state, CHUNKS)
    return tx, grad_fn, params


def fresh():
    return {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}


def assert_same(found, expected):
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_train_state(made):
    tx, grad_fn, expected = made
    state = TrainState.create(apply_fn=None, params=fresh(), tx=tx)
    step = make_train_state_step(grad_fn, tx)
    for _ in range(2):
        state = step(state, CHUNKS)
    assert_same(state.params, expected)
    assert state.step == 2
    other = TrainState.create(apply_fn=None, params=fresh(), tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="another optimizer"):
        step(other, CHUNKS)


def test_nnx(made):
    tx, grad_fn, expected = made
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    nnx.update(model, fresh())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = make_nnx_step(grad_fn, model, optimizer)
    for _ in range(2):
        step(CHUNKS)
    assert_same(nnx.to_pure_dict(nnx.state(model)), expected)
    assert optimizer.step[...] == 2
