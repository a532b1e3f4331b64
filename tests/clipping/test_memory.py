"""Memory: flat in the batch, within a budget, in place; bfloat16 with wide sums."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.clipping.lots import lot_accumulator
from dp_ilg.clipping.memory import fit_microbatch, temporary_bytes
from dp_ilg.training.step import make_train_step

MIB = 2**20


def loss_fn(params, x):
    """A network whose per-example work is much larger than its parameters."""
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(24, 32)) / 5, dtype),
        "b": jnp.asarray(rng.normal(size=(32, 16)) / 6, dtype),
    }
    return params, rng.normal(size=(64, 40, 24)).astype(np.float32)


def clipped(**options):
    return dp_ilg.clipped_grad(loss_fn, l2_clip_norm=0.5, **options)


def test_memory_does_not_grow_with_the_batch():
    params, _ = problem()
    shape = lambda size: jax.ShapeDtypeStruct((size, 40, 24), jnp.float32)  # noqa: E731
    grad_fn = clipped(microbatch_size=8)
    few, many = (temporary_bytes(grad_fn, params, shape(b)) for b in (64, 4096))
    assert many <= few + 4096  # counters and padding masks at most
    whole = clipped(microbatch_size=64)
    assert temporary_bytes(whole, params, shape(64)) > 4 * few  # the control


@pytest.mark.parametrize("share", [0.6, 0.2])
def test_the_micro_batch_fits_the_budget_and_the_next_would_not(share):
    params, batch = problem()
    grad_fn = clipped()
    assert grad_fn.microbatch(params, batch) == 64
    budget = share * temporary_bytes(grad_fn, params, batch)
    size = fit_microbatch(grad_fn, params, batch, budget)
    took = [
        temporary_bytes(clipped(microbatch_size=s), params, batch)
        for s in (size, 2 * size)
    ]
    assert took[0] <= budget < took[1]


def test_a_large_budget_keeps_the_engines_choice_and_a_small_one_is_refused():
    params, batch = problem()
    assert fit_microbatch(clipped(), params, batch, 2**40) == 64
    chosen = clipped(microbatch_size=4)
    assert fit_microbatch(chosen, params, batch, 2**40) == 4
    with pytest.raises(ValueError, match="exceeded by a micro-batch of 1, which takes"):
        fit_microbatch(clipped(), params, batch, 100)
    with pytest.raises(ValueError, match="memory_bytes is 0"):
        fit_microbatch(clipped(), params, batch, 0)


def test_a_lot_asks_for_one_batch_at_a_time_and_sums_in_place():
    params, batch = problem()
    geometry = dp_ilg.Geometry.uniform(params)
    grad_fn, mask = clipped(), np.zeros(16, bool)
    accumulate = lot_accumulator(grad_fn)
    asked, ready = [], []

    def batches():
        for begin in range(0, 64, 16):
            asked.append(begin)
            yield batch[begin : begin + 16], mask

    total = accumulate(params, geometry, batches())
    assert asked == [0, 16, 32, 48]
    known = grad_fn(params, batch, geometry=geometry)
    for name in params:
        np.testing.assert_allclose(
            total.gradients[name], known.gradients[name], rtol=1e-4, atol=1e-6
        )
    np.testing.assert_allclose(total.layer_shares, known.layer_shares, rtol=1e-5)
    assert float(total.l2_clip_norm) == 0.5
    assert not ready and not geometry.weights.is_deleted()
    with pytest.raises(ValueError, match="has no batches"):
        accumulate(params, geometry, iter(()))


def steps(dtype):
    """A plan, an optimizer and a compiled step on some batch."""
    params, batch = problem(dtype)
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=640, batch_size=64, num_steps=4
    )
    tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
    return params, batch, plan, tx


def test_parameters_and_moments_are_updated_in_place():
    params, batch, plan, tx = steps(jnp.float32)
    state = tx.init(params)
    grad_fn = clipped()

    def step(params, state, batch):
        total = grad_fn(params, batch, geometry=tx.geometry(state))
        updates, state = tx.update(total, state, params)
        return optax.apply_updates(params, updates), state

    held = sum(
        x.nbytes
        for x in jax.tree.leaves((params, state))
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    found = lowered.compile().memory_analysis()
    assert found is not None
    assert held <= found.alias_size_in_bytes <= held + 64  # and the keys
    kept = jax.jit(step).lower(params, state, batch).compile().memory_analysis()
    assert kept is not None and kept.alias_size_in_bytes == 0  # the control


def test_a_draw_of_many_chunks_is_one_step_whatever_they_come_from():
    params, batch, _, tx = steps(jnp.float32)
    step, mask = make_train_step(clipped(), tx), np.zeros(16, bool)
    cut = [(batch[b : b + 16], mask) for b in range(0, 64, 16)]
    ends = []
    for chunks in (cut, iter(cut), itertools.islice(cut, 4)):
        own = jax.tree.map(jnp.copy, params)
        ends.append(step(own, tx.init(own), chunks)[0])
    for other in ends[1:]:
        jax.tree.map(np.testing.assert_array_equal, ends[0], other)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_bfloat16_parameters_have_wide_norms_sums_and_moments(engine):
    """The truth is computed in float64 from the per-example bfloat16 gradients."""
    params, batch, _, tx = steps(jnp.bfloat16)
    batch = jnp.asarray(batch[:32], jnp.bfloat16)
    geometry = dp_ilg.Geometry.uniform(params)
    found = jax.jit(clipped(engine=engine))(params, batch, geometry=geometry)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    each = jax.vmap(jax.grad(loss_fn), (None, 0))(wide, batch.astype(jnp.float32))
    each = jax.tree.map(lambda g: np.asarray(g, np.float64), each)
    squares = sum((g**2).sum((1, 2)) for g in jax.tree.leaves(each))
    factors = np.minimum(1, 0.5 / np.sqrt(squares))
    for name, own in each.items():
        truth = (factors[:, None, None] * own).sum(0)
        got = np.asarray(found.gradients[name], np.float64)
        assert found.gradients[name].dtype == jnp.float32
        error = np.linalg.norm(got - truth) / np.linalg.norm(truth)
        assert error < 0.02  # what bfloat16 activations cost
    norm = np.sqrt(sum(np.sum(np.asarray(g) ** 2.0) for g in found.gradients.values()))
    assert norm <= 32 * 0.5
    state = tx.init(params)
    updates, state = tx.update(found, state, params)
    moved = optax.apply_updates(params, updates)
    assert all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(moved))
    moments = [
        leaf
        for leaf in jax.tree.leaves(state)
        if getattr(leaf, "shape", ()) in ((24, 32), (32, 16))
    ]
    assert len(moments) == 4
    assert {str(m.dtype) for m in moments} == {"float32"}
