"""Every framework through the front door: the steps that its own gradients make."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dp_ilg

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
RATE, STEPS = 0.1, 2
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def plan():
    """Everybody in every step, almost no noise, nothing clipped: plain descent."""
    return dp_ilg.plan_privacy(
        noise_multiplier=1e-4,
        delta=1e-5,
        num_examples=len(X),
        batch_size=len(X),
        num_steps=STEPS,
        l2_clip_norm=20.0,
        score_budget=0,
    )


def linen():
    net = nn.Dense(1)
    params = net.init(jax.random.key(0), X[0])["params"]
    made = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(RATE))
    loss = lambda params, x: made.apply_fn({"params": params}, x)[0] ** 2  # noqa: E731
    return made, None, loss, lambda s: jax.vmap(loss, (None, 0))(s.params, X).mean()


def haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)[0]))
    loss = lambda params, x: net.apply(params, x) ** 2  # noqa: E731
    params = net.init(jax.random.key(0), X[0])
    mean = lambda params: jax.vmap(loss, (None, 0))(params, X).mean()  # noqa: E731
    return params, optax.sgd(RATE), loss, mean


def module():
    net = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.sgd(RATE), wrt=nnx.Param)
    mean = lambda net: jnp.mean(net(X)[:, 0] ** 2)  # noqa: E731
    return net, optimizer, lambda net, x: net(x)[0] ** 2, mean


def equinox():
    net = eqx.nn.Linear(3, "scalar", key=jax.random.key(0))
    mean = lambda net: jnp.mean(jax.vmap(net)(X) ** 2)  # noqa: E731
    return net, optax.sgd(RATE), lambda net, x: net(x) ** 2, mean


def descended(model, mean):
    """Plain descent by the framework's own gradient, to a list of arrays."""
    for _ in range(STEPS):
        if isinstance(model, TrainState):
            params = model.params
            own = jax.grad(lambda p: mean(model.replace(params=p)))(params)  # noqa: B023
            model = model.apply_gradients(grads=own)
        elif isinstance(model, nnx.Module):
            own = nnx.grad(mean)(model)
            nnx.update(
                model, jax.tree.map(lambda p, g: p - RATE * g, nnx.state(model), own)
            )
        else:
            own = eqx.filter_grad(mean)(model)
            model = eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, own))
    return model


def arrays(model):
    model = getattr(model, "params", model)
    return jax.tree.leaves(nnx.state(model) if isinstance(model, nnx.Module) else model)


CASES = [linen, pytest.param(haiku, marks=SLOW), module, equinox]


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_the_steps_of_the_framework(case, plan, tmp_path):
    model, optimizer, loss, mean = case()
    facts: dict[str, Any] = dict(source="public", importance="uniform", seed=1)
    train = dp_ilg.private_training(loss, optimizer, plan, **facts)
    state = train.init(model)
    before = [np.array(leaf) for leaf in arrays(model)]
    for lot in train.batches(X, ledger=tmp_path / "ledger.jsonl"):
        state = train.step(state, lot)
    assert type(state.model) is type(model)
    for leaf, kept in zip(arrays(model), before, strict=True):
        np.testing.assert_array_equal(leaf, kept)  # the user's own is as it was
    found, own = arrays(state.model), arrays(descended(model, mean))
    for a, b, start in zip(found, own, before, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-4)
        assert np.abs(np.asarray(b) - start).max() > 0.005


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.contrib.muon(0.1),
        optax.contrib.schedule_free_adamw(0.1),
        optax.lookahead(optax.adam(0.1), 2, 0.5),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.contrib.prodigy(0.1),
        optax.inject_hyperparams(optax.lion)(learning_rate=0.1),
        optax.partition(
            {"w": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}
        ),
    ],
)
def test_the_loop_takes_any_optimizer(optimizer, plan):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    loss = lambda p, x: jnp.sum((x @ p["w"] + p["b"]) ** 2)  # noqa: E731
    train = dp_ilg.private_training(loss, optimizer, plan, seed=1)
    state = train.init(params)
    for lot in train.batches(X, ledger=None):
        state = train.step(state, lot)
    before, after = (
        jax.vmap(loss, (None, 0))(p, X).mean() for p in (params, state.params)
    )
    assert after < before


def test_what_cannot_be_trained_is_refused_at_the_door(plan):
    class Normed(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    net = Normed()
    loss = lambda net, x: jnp.sum(net.norm(x))  # noqa: E731
    train = dp_ilg.private_training(loss, optax.sgd(0.1), plan, seed=1)
    with pytest.raises(ValueError, match="BatchNorm.*GroupNorm"):
        train.init(net)
    plateau = optax.contrib.reduce_on_plateau()
    with pytest.raises(ValueError, match="`value`, the loss of the batch"):
        dp_ilg.private_training(loss, plateau, plan, seed=1).init({"w": jnp.ones(3)})
