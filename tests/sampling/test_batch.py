"""Sealed batches bring their mask; a mask that was forgotten is found out."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.lots import clipped_lot, lot_accumulator
from dp_ilg.sampling.batch import UNREAD, Draw, SealedBatch
from dp_ilg.training.step import make_train_step, train_state_step
from tests.helpers.models import plan, trees_close

PARAMS = {"w": jnp.zeros(3)}
GEOMETRY = dp_ilg.Geometry.uniform(PARAMS)
DATA = {"x": np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) + 2}
BOUND = 60.0


@pytest.fixture(autouse=True)
def nothing_remembered():
    gc.collect()
    UNREAD.clear()


def loss(params, example):
    return params["w"] @ example["x"]


GRAD_FN = dp_ilg.clipped_grad(loss, l2_clip_norm=BOUND)


def sampler(**changes):
    facts: Any = dict(num_examples=40, sampling_prob=0.3, key=3, chunk_size=25)
    facts |= changes
    return dp_ilg.PoissonSampler(**facts)


def right(step=0):
    """The sum over the examples that were drawn, from their numbers alone."""
    rows = DATA["x"][sampler().indices(step)]
    return rows.sum(0)


def total(clipped):
    return np.asarray(clipped.gradients["w"])


def test_a_sealed_batch_is_taken_whole_wherever_batches_are():
    (chunk,) = sampler().chunks(0)
    batch = chunk.take(DATA)
    assert np.all(batch.examples["x"][np.asarray(batch.is_padding_example)] == 0)
    found = {
        "eager": GRAD_FN(PARAMS, batch, geometry=GEOMETRY),
        "jit": jax.jit(lambda b: GRAD_FN(PARAMS, b, geometry=GEOMETRY))(batch),
        "placed": GRAD_FN(PARAMS, jax.device_put(batch), geometry=GEOMETRY),
        "lot": dp_ilg.sum_lot(GRAD_FN(PARAMS, b, geometry=GEOMETRY) for b in [batch]),
        "cut": clipped_lot(GRAD_FN, PARAMS, batch, 5, geometry=GEOMETRY),
        "stream": lot_accumulator(GRAD_FN)(PARAMS, GEOMETRY, iter([batch])),
        "by hand": GRAD_FN(PARAMS, batch.examples, geometry=GEOMETRY,
                           is_padding_example=batch.is_padding_example),
    }  # fmt: skip
    for name, clipped in found.items():
        np.testing.assert_allclose(total(clipped), right(), rtol=1e-4, err_msg=name)
    assert len(GRAD_FN.explain(PARAMS, batch)) == 1
    assert GRAD_FN.microbatch(PARAMS, batch) == 25


def test_chunks_of_one_draw_add_up_to_it():
    chunks = sampler(chunk_size=5).chunks(1)
    assert len(chunks) > 1
    parts = [GRAD_FN(PARAMS, c.take(DATA), geometry=GEOMETRY) for c in chunks]
    np.testing.assert_allclose(total(dp_ilg.sum_lot(parts)), right(1), rtol=1e-4)


def test_steps_take_sealed_batches():
    tx = dp_ilg.dp_adam_ilg(0.1, plan(l2_clip_norm=BOUND), key=jax.random.key(0))
    chunks = sampler(chunk_size=8).chunks(2)
    sealed = [chunk.take(DATA) for chunk in chunks]
    bare = [({"x": DATA["x"][c.indices]}, c.is_padding_example) for c in chunks]
    step = make_train_step(GRAD_FN, tx)
    start = lambda: ({"w": jnp.zeros(3)}, tx.init(PARAMS))  # noqa: E731
    for one, other in ((sealed, bare), (sealed[:1], bare[:1])):
        trees_close(step(*start(), one)[0], step(*start(), other)[0])


def test_a_linen_step_takes_a_sealed_batch():
    from flax.training.train_state import TrainState

    tx = dp_ilg.dp_adam_ilg(0.1, plan(l2_clip_norm=BOUND), key=jax.random.key(0))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    (chunk,) = sampler().chunks(0)
    assert train_state_step(GRAD_FN, state, chunk.take(DATA)).step == 1


CHANGES = {
    "cut": lambda b: jax.tree.map(lambda x: x[:10], b),
    "stacked": lambda b: jax.tree.map(lambda x: jnp.stack([x, x]), b),
    "joined twice": lambda b: jax.tree.map(lambda x: jnp.concatenate([x, x]), b),
    "scaled": lambda b: jax.tree.map(lambda x: x / 2, b),
    "cast": lambda b: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), b),
    "repeated": lambda b: jax.tree.map(lambda x: jnp.repeat(x, 2, 0), b),
    "one row": lambda b: jax.tree.map(lambda x: x[0], b),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_sealed_batch_that_was_changed_is_refused(name):
    (chunk,) = sampler().chunks(0)
    changed = CHANGES[name](chunk.take(DATA))
    for call in (GRAD_FN, jax.jit(GRAD_FN)):
        with pytest.raises(ValueError, match="was drawn with 25 rows, but arr") as e:
            call(PARAMS, changed, geometry=GEOMETRY)
        assert str(e.value).count(". ") == 0


def test_reordering_all_rows_alike_is_harmless():
    (chunk,) = sampler().chunks(0)
    order = np.random.default_rng(0).permutation(25)
    moved = jax.tree.map(lambda x: x[order], chunk.take(DATA))
    np.testing.assert_allclose(
        total(GRAD_FN(PARAMS, moved, geometry=GEOMETRY)), right(), rtol=1e-4
    )


def test_it_is_not_cut_by_index_and_has_one_mask():
    (chunk,) = sampler().chunks(0)
    batch = chunk.take(DATA)
    with pytest.raises(TypeError, match="is not cut by index"):
        batch[:3]
    with pytest.raises(ValueError, match="brings its own mask"):
        GRAD_FN(PARAMS, batch, geometry=GEOMETRY, is_padding_example=np.zeros(25, bool))


def forgotten(call, rows=25):
    with pytest.raises(ValueError, match=f"batch of {rows} rows came without") as e:
        call()
    assert "chunk.take(data)" in str(e.value) and "is_padding_example=" in str(e.value)


@pytest.mark.parametrize("jit", [False, True])
def test_a_forgotten_mask_is_found(jit):
    """The last row of the data would count as often as there is padding."""
    draws = sampler()
    grad_fn = jax.jit(GRAD_FN) if jit else GRAD_FN
    (chunk,) = draws.chunks(0)
    batch = {"x": DATA["x"][chunk.indices]}
    forgotten(lambda: grad_fn(PARAMS, batch, geometry=GEOMETRY))
    del chunk
    forgotten(lambda: grad_fn(PARAMS, batch, geometry=GEOMETRY))
    forgotten(lambda: clipped_lot(GRAD_FN, PARAMS, batch, 5, geometry=GEOMETRY))
    tx = dp_ilg.dp_adam_ilg(0.1, plan(), key=jax.random.key(0))
    rows = {"w": jnp.asarray(batch["x"])}
    forgotten(lambda: tx.update(rows, tx.init(PARAMS), PARAMS))


def test_whole_batches_need_no_mask():
    draws = sampler()
    (chunk,) = draws.chunks(0)
    whole = {"x": DATA["x"][:25]}
    told: Any = dict(geometry=GEOMETRY, is_padding_example=False)
    forgotten(lambda: GRAD_FN(PARAMS, whole, **told))  # a mask is waiting to be read
    assert chunk.is_padding_example.any()
    fine = GRAD_FN(PARAMS, whole, **told)
    np.testing.assert_allclose(total(fine), whole["x"].sum(0), rtol=1e-4)
    GRAD_FN(PARAMS, {"x": DATA["x"]}, geometry=GEOMETRY)  # of another size
    mask = chunk.indices == -1  # as jax_privacy has it
    batch = {"x": DATA["x"][chunk.indices]}
    found = GRAD_FN(PARAMS, batch, geometry=GEOMETRY, is_padding_example=mask)
    np.testing.assert_allclose(total(found), right(), rtol=1e-4)


@pytest.mark.parametrize(
    "read",
    [
        lambda c: c.is_padding_example,
        lambda c: list(c),
        lambda c: c[1],
        lambda c: c[-1],
    ],
)
def test_a_mask_that_was_looked_at_is_not_forgotten(read):
    draws = sampler()
    (chunk,) = draws.chunks(0)
    assert len(UNREAD) == 1
    read(chunk)
    assert not len(UNREAD)
    GRAD_FN(PARAMS, {"x": DATA["x"][:25]}, geometry=GEOMETRY)


def test_a_draw_without_padding_or_of_a_sampler_that_is_gone_is_not_remembered():
    everybody = dp_ilg.PoissonSampler(4, 1.0, key=0, chunk_size=2)
    assert [len(c) for c in everybody.chunks(0)] == [2, 2] and not len(UNREAD)
    chunks = sampler().chunks(0)
    assert len(UNREAD) == 1 and chunks
    del chunks
    assert not len(UNREAD)


def test_a_chunk_is_still_a_pair():
    (chunk,) = sampler().chunks(0)
    rows, mask = chunk
    assert chunk == (rows, mask) and chunk._fields == ("indices", "is_padding_example")
    assert chunk._replace(indices=rows)[0] is rows
    same = jax.tree.map(lambda x: x, chunk)
    assert type(same) is type(chunk)
    np.testing.assert_array_equal(same.is_padding_example, mask)
    assert "indices" in repr(chunk)


def test_the_structure_says_how_many_rows_there_were():
    batch = SealedBatch({"x": np.ones(2)}, np.zeros(2, bool), 2)
    assert jax.tree.structure(batch) != jax.tree.structure(
        SealedBatch({"x": np.ones(3)}, np.zeros(3, bool), 3)
    )
    draw = Draw(3)
    assert draw in UNREAD
