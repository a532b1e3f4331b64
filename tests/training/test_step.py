"""One private step: compiled once, in chunks, and through both Flaxes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import dp_ilg
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.training import mesh as meshes
from dp_ilg.training.step import (
    make_train_step,
    nnx_step,
    train_state_step,
)


def small_problem():
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=100, batch_size=10, num_steps=9
    )
    facts = Facts(jnp.zeros((2, 2)), num_classes=3)
    rng = np.random.default_rng(0)
    batch = rng.normal(size=(6, 2, 2)).astype(np.float32), np.arange(6) % 3
    mask = np.array([False] * 5 + [True])
    return plan, facts, (batch, mask)


def optimizer_for(plan):
    return dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(3))


def test_the_second_step_does_not_trace_again_and_calls_no_host():
    plan, facts, (batch, mask) = small_problem()
    model, tx = build_model("mlp", facts, hidden=()), optimizer_for(plan)
    traced = []

    def loss_fn(params, example):
        traced.append(1)
        return model.loss_fn(params, example)

    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0)
    step = make_train_step(grad_fn, tx)
    params = model.init(jax.random.key(0))
    state = tx.init(params)
    params, state = step(params, state, [(batch, mask)])
    first = len(traced)
    assert first > 0
    kept = jax.tree.leaves((params, state))
    for _ in range(3):
        params, state = step(params, state, [(batch, mask)])
    assert len(traced) == first
    assert all(leaf.is_deleted() for leaf in kept)  # donated

    def plain(params, state):
        clipped: Any = grad_fn(params, batch, geometry=tx.geometry(state))
        return tx.update(clipped, state, params)

    assert "callback" not in str(jax.make_jaxpr(plain)(params, state))


def test_a_draw_in_two_chunks_is_one_step_with_one_noise():
    plan, facts, (batch, mask) = small_problem()
    model, tx = build_model("mlp", facts, hidden=()), optimizer_for(plan)
    grad_fn = dp_ilg.clipped_grad(model.loss_fn, l2_clip_norm=1.0)
    step = make_train_step(grad_fn, tx)
    whole = [(batch, mask)]
    halves = [
        (jax.tree.map(lambda a, s=s: a[s], batch), mask[s])
        for s in (slice(0, 3), slice(3, 6))
    ]
    ends = []
    for chunks in (whole, halves, halves[:1]):
        params = model.init(jax.random.key(0))
        state = tx.init(params)
        for _ in range(2):
            params, state = step(params, state, chunks)
        ends.append(params)
    close = lambda a, b: all(  # noqa: E731
        np.allclose(x, y, atol=1e-5)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert close(ends[0], ends[1])
    assert not close(ends[0], ends[2])  # the control: half the draw is another step


def test_a_clipped_gradient_goes_through_linens_train_state():
    plan, facts, (batch, mask) = small_problem()
    model, tx = build_model("mlp", facts, hidden=()), optimizer_for(plan)
    grad_fn = dp_ilg.clipped_grad(model.loss_fn, l2_clip_norm=1.0)
    params = model.init(jax.random.key(0))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    jitted = jax.jit(lambda s, b, m: train_state_step(grad_fn, s, b, m))
    for _ in range(2):
        state = jitted(state, batch, mask)
    plain, opt = make_train_step(grad_fn, tx), tx.init(params)
    for _ in range(2):
        params, opt = plain(params, opt, [(batch, mask)])
    assert state.step == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5), state.params, params
    )


def test_a_clipped_gradient_goes_through_nnx_optimizer():
    plan, facts, (batch, mask) = small_problem()
    tx = optimizer_for(plan)
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module, nnx.Param)
    params = jax.tree.map(jnp.copy, params)

    def loss_fn(params, example):
        x, y = example
        logits = nnx.merge(graph, params)(x.reshape(4))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    jitted = nnx.jit(lambda m, o, b, k: nnx_step(grad_fn, m, o, b, k))
    for _ in range(2):
        jitted(module, optimizer, batch, jnp.asarray(mask))
    plain, opt = make_train_step(grad_fn, tx), tx.init(params)
    for _ in range(2):
        params, opt = plain(params, opt, [(batch, mask)])
    trained = nnx.state(module, nnx.Param)
    assert int(optimizer.step[...]) == 2
    for one, other in zip(
        jax.tree.leaves(trained), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_a_step_on_a_mesh_of_one_device_is_the_plain_one_with_scores_too():
    plan, _, (batch, mask) = small_problem()
    assert plan.score_budget > 0
    params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    rows = batch[0], mask
    loss = lambda p, x: jnp.sum(jnp.square(x @ p["w"] + p["b"]))  # noqa: E731
    found = []
    for mesh in (None, meshes.make_mesh(1, 1)):
        tx, grad_fn = optimizer_for(plan), dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        state, at = tx.init(params), None
        if mesh is not None:
            at = meshes.Shardings.of(params, state, mesh)
            grad_fn = meshes.spread(grad_fn, mesh)
        step = make_train_step(grad_fn, tx, at)
        found.append(step(jax.tree.map(jnp.copy, params), state, [rows])[0])
    jax.tree.map(np.testing.assert_array_equal, *found)
