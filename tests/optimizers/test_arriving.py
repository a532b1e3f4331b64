"""Clip mode, clip norm and weights travel with the geometry, and are compared."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.clip import normalize
from tests.helpers.models import plan, trees_close

PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
ROWS = {
    "a": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32),
    "b": jnp.asarray(np.random.default_rng(1).normal(size=(6, 2)), jnp.float32),
}
PLAN = plan(l2_clip_norm=1.0, score_budget=0.1)


def loss(params, example):
    return sum(jnp.vdot(params[name], example[name]) for name in params)


def optimizer(the_plan=PLAN, key=0, **options):
    return dp_ilg.dp_adam_ilg(0.1, the_plan, key=jax.random.key(key), **options)


def grad_fn(bound=1.0, **options):
    return dp_ilg.clipped_grad(loss, l2_clip_norm=bound, **options)


def nan(updates):
    return all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("mode", ["joint", "normalize", "per_layer", normalize(0.5)])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_mode_said_in_the_chain_is_the_one_that_clips(mode, microbatch):
    tx = optimizer(clip_mode=mode)
    geometry = tx.geometry(tx.init(PARAMS))
    found = grad_fn(microbatch_size=microbatch)(PARAMS, ROWS, geometry=geometry)
    bare = dataclasses.replace(geometry, facts=None)
    want = grad_fn(clip_mode=mode)(PARAMS, ROWS, geometry=bare)
    trees_close(found.gradients, want.gradients)
    assert found.geometry.facts.clip_mode is geometry.facts.clip_mode
    same = grad_fn(clip_mode=mode)(PARAMS, ROWS, geometry=geometry)
    updates, _ = tx.update(same, tx.init(PARAMS), PARAMS)
    assert not nan(updates)


def test_two_modes_are_named_and_refused():
    tx = optimizer()
    state = tx.init(PARAMS)
    call = grad_fn(clip_mode=normalize(0.25))
    with pytest.raises(ValueError, match="clip_mode is normalize.gamma=0.25.*'joint'"):
        call(PARAMS, ROWS, geometry=tx.geometry(state))
    clipped = call(PARAMS, ROWS, geometry=dp_ilg.Geometry.uniform(PARAMS))
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match="clip_mode is normalize.*in the chain"):
            update(clipped, state, PARAMS)


def test_another_plans_clip_norm_is_named_and_refused():
    other = optimizer(plan(l2_clip_norm=4.0, score_budget=0.1), key=1)
    tx = optimizer()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="l2_clip_norm is 1 in clipped_grad, but 4"):
        grad_fn()(PARAMS, ROWS, geometry=other.geometry(other.init(PARAMS)))
    theirs = grad_fn(4.0)(PARAMS, ROWS, geometry=other.geometry(other.init(PARAMS)))
    with pytest.raises(ValueError, match="l2_clip_norm is 4 in clipped_grad, but 1"):
        tx.update(theirs, state, PARAMS)
    updates, after = jax.jit(tx.update)(theirs, state, PARAMS)
    assert nan(updates)
    norms: list[Any] = [1.0, np.float32(1.0), jnp.float32(1.0)]
    for norm in norms:
        fine = grad_fn(norm)(PARAMS, ROWS, geometry=tx.geometry(state))
        assert not nan(tx.update(fine, state, PARAMS)[0])


def test_weights_of_another_state_are_refused_and_under_jit_poison():
    tx = optimizer()
    start = tx.init(PARAMS)
    per_example = jax.tree.map(lambda x: 3 * x, ROWS)
    _, later = jax.jit(tx.update)(per_example, start, PARAMS)
    old = grad_fn()(PARAMS, ROWS, geometry=tx.geometry(start))
    assert not bool(jnp.allclose(*[tx.geometry(s).weights for s in (start, later)]))
    with pytest.raises(ValueError, match="other weights than this chain's state"):
        tx.update(old, later, PARAMS)
    with pytest.raises(ValueError, match="other weights than this chain's state"):
        tx.update(PARAMS, later, PARAMS, clipped_grad=old)
    assert nan(jax.jit(tx.update)(old, later, PARAMS)[0])
    assert not nan(jax.jit(tx.update)(old, start, PARAMS)[0])


def test_public_weights_said_to_both_are_a_public_override():
    tx = optimizer()
    state = tx.init(PARAMS)
    public = dp_ilg.Geometry.of(PARAMS, [1.0, 2.0])
    clipped = grad_fn()(PARAMS, ROWS, geometry=public)
    with pytest.raises(ValueError, match="or hand public weights to tx.update"):
        tx.update(clipped, state, PARAMS)
    updates, _ = jax.jit(tx.update)(clipped, state, PARAMS, geometry=public)
    assert not nan(updates)
    whole = clipped.geometry
    loud = grad_fn(1.0, clip_mode="normalize")(PARAMS, ROWS, geometry=public)
    with pytest.raises(ValueError, match="clip_mode is 'normalize'"):
        tx.update(loud, state, PARAMS, geometry=whole)
    assert not nan(tx.update(loud, state, PARAMS, geometry=loud.geometry)[0])


def test_a_scheduled_clip_norm_is_that_of_the_step():
    def schedule(step):
        return 1.0 / (1 + jnp.asarray(step, jnp.float32))

    tx = dp_ilg.chain(
        dp_ilg.clip_by_schedule(schedule, clip_mode="normalize"),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(plan(score_budget=0.0), key=jax.random.key(2)),
    )
    state = tx.init(PARAMS)

    def step(state, norm):
        clipped = grad_fn(norm)(PARAMS, ROWS, geometry=tx.geometry(state))
        return tx.update(clipped, state, PARAMS)

    for t in range(2):
        assert nan(jax.jit(step)(state, 3 * schedule(t))[0])
        updates, state = jax.jit(step)(state, schedule(t))
        assert not nan(updates)
    with pytest.raises(ValueError, match="l2_clip_norm is 1 in clipped_grad, but 0.33"):
        step(state, 1.0)


def test_chunks_of_two_modes_do_not_join():
    uniform = dp_ilg.Geometry.uniform(PARAMS)
    one, two = (
        grad_fn(clip_mode=mode)(PARAMS, ROWS, geometry=uniform)
        for mode in ("joint", "per_layer")
    )
    with pytest.raises(ValueError, match="clip_mode 'joint' and 'per_layer'"):
        _ = one + two
    made = dp_ilg.ClippedGrad(PARAMS, jnp.zeros(2), uniform, jnp.float32(1.0))
    assert (made + one).geometry.facts == one.geometry.facts


def test_the_facts_are_no_leaves_and_stay_out_of_the_state():
    tx = optimizer()
    state = tx.init(PARAMS)
    geometry = tx.geometry(state)
    bare = dataclasses.replace(geometry, facts=None)
    assert len(jax.tree.leaves(geometry)) == len(jax.tree.leaves(bare))
    assert "ClipFacts" not in str(jax.tree.structure(state))
    outer = dp_ilg.chain(tx)
    assert outer.geometry(outer.init(PARAMS)).facts == geometry.facts
    averaged = dp_ilg.average_iterates(tx)
    assert averaged.geometry(averaged.init(PARAMS)).facts == geometry.facts
