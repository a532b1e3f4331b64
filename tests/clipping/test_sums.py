"""Sums with and without one example are that example apart, and nothing else."""

import dataclasses
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.adding import sum_error, sums
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.clipping.row_check import rows_are_independent
from dp_ilg.geometry import grid

WIDTH = 24
BOUND = 0.7
NAMES = "gradients", "remainder", "fine"


def exact(clipped):
    """The sum on the grid in float64, which holds it for lots as small as these."""
    return [
        np.asarray(x.high, np.float64) + np.asarray(x.low, np.float64)
        for x in grid.of_clipped(clipped)
    ]


def distance(one, two):
    """How far two sums are apart in the geometry's norm, as a part of C."""
    weights = np.asarray(one.geometry.weights, np.float64)
    owner = [leaf.groups[0] for leaf in one.geometry.groups.leaves]
    gaps = zip(exact(one), exact(two), owner, strict=True)
    square = sum(np.sum(((a - b) / weights[k]) ** 2) for a, b, k in gaps)
    return np.sqrt(square) / float(one.l2_clip_norm)


def same_bits(one, two):
    fields = [(getattr(one, n), getattr(two, n)) for n in (*NAMES, "layer_shares")]
    pairs = [jax.tree.leaves(x) for x in zip(*fields, strict=True)]
    return all(np.array_equal(a, b) for a, b in zip(*pairs, strict=True))


PARAMS = {
    "one": jnp.asarray(np.random.default_rng(1).normal(size=(WIDTH, 8)), jnp.float32),
    "terms": jnp.asarray(np.random.default_rng(2).normal(size=(8, 40)), jnp.float32),
    "table": jnp.asarray(np.random.default_rng(3).normal(size=(9, WIDTH)), jnp.float32),
    "bias": jnp.zeros(8),
}


def loss(p, e):
    """A leaf for every way of adding: one term, terms, looked-up rows, formed."""
    ids, x, y = e
    hidden = jnp.tanh((x + jnp.sum(p["table"][ids], 0)) @ p["one"] + p["bias"])
    words = hidden[None] * y[:, None]
    return jnp.sum(jnp.sin(words @ p["terms"]))


def examples(count, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 9, (count, 5))
    x = rng.normal(size=(count, WIDTH)).astype(np.float32)
    return ids, x, rng.normal(size=(count, 6)).astype(np.float32)


def summed(engine="auto", microbatch=32, clip_mode="normalize"):
    grad_fn = dp_ilg.clipped_grad(
        loss,
        l2_clip_norm=BOUND,
        clip_mode=clip_mode,
        engine=engine,
        microbatch_size=microbatch,
    )
    geometry = dp_ilg.Geometry.of(PARAMS, [0.5, 1.0, 2.0, 3.0], "leaf")
    run = jax.jit(
        lambda b, m: grad_fn(PARAMS, b, geometry=geometry, is_padding_example=m)
    )
    return run, grad_fn


def test_every_way_of_adding_is_tried():
    found = summed()[1].sum_error(PARAMS, examples(4), "leaf")
    ways = {leaf.leaf.strip("['] "): leaf.argument for leaf in found.leaves}
    assert set(ways.values()) == {"formed", "one term", "rows", "terms"}
    assert found.total < 1e-5 and found.largest_lot > 30_000


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_neighbours_are_one_example_apart(engine):
    run, grad_fn = summed(engine)
    count = 256
    batch, nobody = examples(count), np.zeros(count, bool)
    whole = run(batch, nobody)
    slack = grad_fn.sum_error(PARAMS, batch, "leaf").total
    for place in (0, 100, count - 1):
        without = run(batch, np.arange(count) == place)
        shifted = [np.concatenate([np.delete(x, place, 0), x[:1] * 0]) for x in batch]
        moved = run(tuple(shifted), np.arange(count) == count - 1)
        for other in (without, moved):
            assert 0.9 < distance(whole, other) <= 1.0
            alone = run(batch, np.arange(count) != place)
            back = distance(other + alone, whole)
            assert back <= slack
        assert same_bits(without, moved) or engine != "exact"


def test_exact_sums_differ_by_exactly_the_example():
    run, _ = summed("exact")
    batch = examples(64)
    whole, place = run(batch, np.zeros(64, bool)), 17
    alone = run(batch, np.arange(64) != place)
    without = run(batch, np.arange(64) == place)
    assert same_bits(without + alone, whole)
    for leaf, step in zip(exact(alone), steps_of(whole), strict=True):
        assert (leaf / step % 1 == 0).all()
    assert distance(without, whole) <= 1.0


def steps_of(clipped):
    steps = grid.leaf_steps(clipped.geometry, clipped.l2_clip_norm)
    return [np.asarray(x, np.float64) for x in steps]


@pytest.mark.parametrize("engine", ["auto", "exact"])
def test_no_order_of_chunks_changes_a_bit(engine):
    run, _ = summed(engine, 16)
    batch = examples(96)
    pieces = [tuple(x[k : k + 16] for x in batch) for k in range(0, 96, 16)]
    parts = [run(piece, np.zeros(16, bool)) for piece in pieces]
    whole = run(batch, np.zeros(96, bool))
    add = jax.jit(lambda a, b: a + b)
    for order in (range(6), [5, 3, 1, 0, 2, 4]):
        total = parts[order[0]]
        for k in order[1:]:
            total = add(total, parts[k])
        assert same_bits(total, whole)
        lot = dp_ilg.sum_lot([parts[k] for k in order])
        assert equal(on_the_grid(total), on_the_grid(lot))
        assert equal(on_the_grid(total), leaves_of(lot))
        others = ("fine", "layer_shares", "shares_remainder", "fits")
        for name in others:
            assert equal(getattr(total, name), getattr(lot, name))


def equal(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def leaves_of(clipped):
    return jax.tree.leaves(clipped.gradients)


def on_the_grid(clipped):
    """The sum that noise is added to, in float64: what gradients and remainder hold."""
    pairs = zip(
        grid.float32_view(clipped), jax.tree.leaves(clipped.remainder), strict=True
    )
    return [np.asarray(x, np.float64) + np.asarray(y, np.float64) for x, y in pairs]


def test_float32_sums_fail_the_same_test():
    """What was released before: float32, added chunk by chunk."""
    rng = np.random.default_rng(0)
    x = (rng.uniform(0.5, 1, 64) * rng.uniform(0.8, 1.2, (2**16, 64))).astype("f4")
    x /= np.linalg.norm(x, axis=1, keepdims=True)

    def total(rows):
        chunks = [rows[k : k + 1024].sum(0) for k in range(0, len(rows), 1024)]
        out = np.zeros(64, np.float32)
        for chunk in chunks:
            out += chunk
        return out.astype(np.float64)

    assert abs(np.linalg.norm(total(x) - total(x[1:])) - 1) > 1e-4


@pytest.mark.parametrize("lot", [4096, pytest.param(2**16, marks=pytest.mark.slow)])
def test_large_lots_stay_within_the_bound(lot):
    rng, size = np.random.default_rng(0), 64
    params = {"w": jnp.zeros(size)}
    rows = rng.uniform(0.5, 1, size) * rng.uniform(0.8, 1.2, (lot, size)) * 4
    rows = rows.astype(np.float32)
    grad_fn = dp_ilg.clipped_grad(lambda p, e: jnp.dot(p["w"], e), l2_clip_norm=1.0)
    geometry = dp_ilg.Geometry.uniform(params)
    one = jax.jit(
        lambda x, m: grad_fn(params, x, geometry=geometry, is_padding_example=m)
    )

    def total(batch, chunk):
        def pieces():
            for k in range(0, len(batch), chunk):
                own = batch[k : k + chunk]
                fill = np.zeros((chunk - len(own), size), np.float32)
                yield one(np.concatenate([own, fill]), np.arange(chunk) >= len(own))

        return dp_ilg.sum_lot(pieces())

    whole, without = total(rows, 1024), total(rows[1:], 1024)
    assert 1 - 1e-5 < distance(whole, without) <= 1.0
    assert distance(whole, total(rows[::-1], 512)) < 1e-6


def test_a_search_for_terms_that_add_up_badly_stays_within_the_bound():
    """Terms that are large and cancel, in blocks whose members change."""
    rng, worst = np.random.default_rng(5), 0.0
    for _ in range(40):
        terms, rows = int(rng.integers(2, 60)), int(rng.integers(2, 16))
        scale = 10.0 ** rng.uniform(0, 4)
        one = rng.normal(size=(1, rows * terms, 6)).astype(np.float32)
        two = rng.normal(size=(1, rows * terms, 7)) * rng.choice([1, scale])
        two[:, ::2] = -two[:, 1::2][:, : two[:, ::2].shape[1]][:, :1]
        two = two.astype(np.float32)
        with sums.wide():
            got = np.asarray(jax.jit(sums.outer)(one, sums.widened(jnp.asarray(two))))
        want = np.vectorize(fractions.Fraction)(one[0].astype(float)).T @ (
            np.vectorize(fractions.Fraction)(two[0].astype(float))
        )
        size = np.abs(one[0]).T.astype(float) @ np.abs(two[0]).astype(float)
        error = np.vectorize(float)(np.vectorize(fractions.Fraction)(got[0]) - want)
        worst = max(worst, float(np.max(np.abs(error) / size)) * 2**53 / (rows * terms))
    print(f"outer products: largest error, as a part of the bound: {worst:.3f}")
    assert 0 < worst < 1


def test_cancelling_examples_are_clipped_to_what_sums_can_hold():
    """Terms 10,000 times their sum: the coefficient is made smaller for the bound."""
    x = np.zeros((4, 12, 64), np.float32)
    x[:] = np.random.default_rng(0).normal(size=(1, 1, 64))
    y = np.ones((4, 12, 64), np.float32) * np.where(np.arange(12) % 2, 1, -1)[:, None]
    y[:, 0] += 1e-4
    params = {"w": jnp.zeros((64, 64))}
    loss = lambda p, e: jnp.sum((e[0] @ p["w"]) * e[1])  # noqa: E731
    geometry = dp_ilg.Geometry.uniform(params)
    found = ENGINES["bookkeeping"](loss, params, (x, y), geometry.groups)
    ratio = np.asarray(found.sizes / found.norms)
    assert (ratio > sums.CANCELLATION).all()
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    norm = np.linalg.norm(exact(grad_fn(params, (x, y), geometry=geometry))[0])
    assert norm < 4 * sums.CANCELLATION / ratio.min()


def test_what_is_charged_covers_every_shape():
    for terms, width, rows in [(200, 16, 256), (1024, 768, 32), (4096, 64, 64)]:
        assert sum_error.looked_up_error(terms, width, rows) < sum_error.LOOKED_UP_ERROR
    assert sum_error.SUM_ERROR + sum_error.coefficient_error(64) < 1e-5


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_rows_keep_their_bits_among_others(engine):
    run, grad_fn = summed(engine)
    found = rows_are_independent(grad_fn, PARAMS, examples(48), trials=6)
    assert found.independent and found.compared == 6 and found.largest == 0


def test_a_loss_that_sees_its_neighbours_is_found():
    geometry = dp_ilg.Geometry.uniform({"w": jnp.ones(3)})

    def leaky(params, batch, *, geometry, is_padding_example):
        own = dp_ilg.clipped_grad(lambda p, x: p["w"] @ x, l2_clip_norm=1.0)
        shifted = batch + 1e-3 * jnp.mean(batch)
        return own(
            params, shifted, geometry=geometry, is_padding_example=is_padding_example
        )

    batch = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    found = rows_are_independent(leaky, {"w": jnp.ones(3)}, batch, geometry=geometry)
    assert not found.independent and found.differing and found.largest > 0


def test_nan_in_a_remainder_poisons_the_sum():
    run, _ = summed()
    one = run(examples(16), np.zeros(16, bool))
    bad = dataclasses.replace(
        one, remainder=jax.tree.map(lambda x: x * jnp.nan, one.remainder)
    )
    assert all(np.isnan(x).all() for x in jax.tree.leaves((bad + one).gradients))
