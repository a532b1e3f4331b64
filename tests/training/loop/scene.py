"""A small private run for the tests of the front door."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg

N, WIDTH = 60, 3


@functools.cache
def made_plan(num_steps=4, **facts):
    """A plan without calibration, so that it costs nothing."""
    told: dict[str, Any] = dict(
        noise_multiplier=1.0, delta=1e-5, num_examples=N, batch_size=12
    )
    told |= {"num_steps": num_steps}
    told |= facts
    return dp_ilg.plan_privacy(**told)


def data():
    """Inputs and labels of all examples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, WIDTH)).astype(np.float32)
    return x, (x.sum(axis=1) > 0).astype(np.int32)


def loss_fn(params, example):
    """Of one example."""
    x, y = example
    return jax.nn.softplus((1 - 2 * y) * (params["w"] @ x + params["b"]))


def noisy_loss(params, example, key):
    """Of one example, with dropout on the inputs."""
    x, y = example
    return loss_fn(params, (x * jax.random.bernoulli(key, 0.5, x.shape), y))


def start():
    """Parameters before the first step."""
    return {"w": jnp.zeros(WIDTH), "b": jnp.zeros(())}


def training(
    loss: Any = loss_fn,
    optimizer: Any = None,
    plan: Any = None,
    seed: Any = 0,
    **facts: Any,
) -> Any:
    """A run with a fixed seed."""
    optimizer = optax.adam(0.1) if optimizer is None else optimizer
    plan = made_plan() if plan is None else plan
    return dp_ilg.private_training(loss, optimizer, plan, seed=seed, **facts)


def trained(train: Any, rows=None, ledger=None, until=None, **facts) -> Any:
    """The state after the steps of a run, or after some."""
    state = train.init(start())
    for lot in train.batches(data() if rows is None else rows, ledger=ledger, **facts):
        state = train.step(state, lot)
        if until is not None and lot.step + 1 == until:
            break
    return state


def bits(tree):
    """All bits of a tree of arrays."""
    leaves = jax.tree.leaves(tree)
    return [np.asarray(x).tobytes() for x in leaves]


def bound(train: Any, rows=None) -> Any:
    """What a run has made of its data, before any step: nothing is compiled."""
    train.init(start())
    train.batches(data() if rows is None else rows, ledger=None).close()
    return train._binding
