"""Kept rows through the front door: the step by hand, chunks, resuming, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.training.loop.binding import bound_keys
from dp_ilg.training.mesh import make_mesh
from tests.training.loop.scene import N, bits, made_plan, training

ROWS = 30
IDS = np.random.default_rng(0).integers(0, ROWS, (N, 4))
START = {
    "table": 0.3 * jax.random.normal(jax.random.key(1), (ROWS, 3)),
    "head": jnp.ones(3),
}
rows_plan = functools.partial(made_plan, row_budget=0.2)


def read(params, ids):
    return jnp.square(jnp.tanh(params["table"][ids]).sum(0) @ params["head"] - 1)


def run(most: Any = 4, plan=None, **facts):
    rows = None if most is None else {"table": most}
    plan = rows_plan() if plan is None else plan
    return training(read, optax.sgd(0.5, momentum=0.9), plan, rows=rows, **facts)


def steps(train, state, **facts):
    for lot in train.batches(IDS, ledger=None, **facts):
        state = train.step(state, lot)
    return state


def test_it_is_the_step_by_hand():
    train = run(most=4, plan=rows_plan(num_steps=1, noise_multiplier=0.1))
    state = train.init(START)
    train.batches(IDS, ledger=None).close()
    binding, tx = train._binding, train._tx
    ((indices, padding),) = binding.sampler.chunks(0)
    by_hand = bound_keys(tx.init(START), binding.noise_words)
    want, _ = jax.jit(tx.step(binding.program.grad_fn))(
        START, by_hand, IDS[indices], padding
    )
    after = steps(train, state)
    assert bits(after.params) == bits(want)
    moved = (after.params["table"] != START["table"]).any(axis=1)
    assert 0 < moved.sum() <= 4 and after.step == 1


@pytest.mark.parametrize("chunk_size", [None, 25])
def test_without_noise_all_rows_that_are_read_step_as_in_dense_training(chunk_size):
    facts = dict(noise_multiplier=0.0, batch_size=N, num_steps=2)
    kept = run(ROWS, rows_plan(**facts), chunk_size=chunk_size)
    dense = run(None, made_plan(**facts))
    ours, theirs = (steps(t, t.init(START)).params for t in (kept, dense))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_a_restored_run_goes_on_with_the_same_bits(tmp_path):
    whole = run()
    want = steps(whole, whole.init(START))
    train = run()
    state = train.init(START)
    for lot in train.batches(IDS, ledger=None):
        state = train.step(state, lot)
        if lot.step == 1:
            break
    train.save(tmp_path, state)
    again = run()
    again.init(START)
    after = steps(again, again.restore(tmp_path), resume=True)
    assert bits(after.params) == bits(want.params)


@pytest.mark.parametrize(
    "facts, message",
    [
        (dict(plan=made_plan()), "row_budget is 0"),
        (dict(most=None), "row_budget of 0.2 buys counts"),
        (dict(most=0), "most rows of 'table'"),
        (dict(noise="exact"), "exact noise was asked for"),
        (dict(mesh=make_mesh(1, 1)), "mesh was asked for"),
    ],
)
def test_what_cannot_keep_rows_is_refused_at_the_door(facts, message):
    with pytest.raises(ValueError, match=message):
        run(**facts)


def test_a_table_that_is_not_there_and_an_audit_are_refused():
    train = training(read, optax.sgd(0.1), rows_plan(), rows={"embedding": 3})
    with pytest.raises(ValueError, match="'embedding'"):
        train.init(START)
    with pytest.raises(ValueError, match="without rows"):
        dp_ilg.auditing.audit_step(run(), START, IDS[0], rows_plan())
