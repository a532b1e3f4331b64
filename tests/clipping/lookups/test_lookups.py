"""Lookups found in traced losses, the loss of few rows, and counts bounded by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dp_ilg
from dp_ilg.clipping.lookups.counts import RowCounts, count_rows, steps_each
from dp_ilg.clipping.lookups.tables import Table, check_asked, find_tables
from dp_ilg.clipping.lookups.traced import compact_loss, looked_up

ROWS, MOST = 20, 6
PARAMS = {
    "user": jax.random.normal(jax.random.key(0), (ROWS, 3)),
    "item": {"table": jax.random.normal(jax.random.key(1), (11, 3))},
    "w": jnp.ones(3),
}
RNG = np.random.default_rng(0)


def fill(table, ids):
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=0)


LOOKUPS = {
    "index": lambda table, ids: table[ids],
    "take": lambda table, ids: jnp.take(table, ids, axis=0),
    "clip": lambda table, ids: jnp.take(table, ids, axis=0, mode="clip"),
    "fill": fill,
    "grid of ids": lambda table, ids: table[ids.reshape(2, 2)].sum(0),
    "cast": lambda table, ids: table.astype(jnp.bfloat16)[ids].astype(jnp.float32),
    "one row": lambda table, ids: table[ids[0]][None],
    "slice": lambda table, ids: lax.dynamic_slice(table, (ids[1], 0), (1, 3)),
    "twice": lambda table, ids: table[ids[:2]] * table[ids[2:]],
    "computed ids": lambda table, ids: table[(ids * 7 + 3) % 20],
}


def loss_with(look):
    def loss(params, ids):
        rows = jnp.tanh(look(params["user"], ids)) @ params["w"]
        return jnp.sum(jnp.square(rows - params["item"]["table"][ids[0] % 11, 0]))

    return loss


def few_of(loss, kept, params=PARAMS, most=MOST):
    tables = find_tables(params, (("user", most),))
    slots = [jnp.full(ROWS, most).at[kept].set(jnp.arange(most), mode="drop")]
    return compact_loss(loss, params, tables, slots), tables


@pytest.mark.parametrize("name", LOOKUPS)
def test_few_rows_have_the_derivatives_of_all(name):
    """Against per-example gradients of the loss itself, some ids outside of it."""
    loss = loss_with(LOOKUPS[name])
    kept = jnp.array([0, 3, 4, 11, 19, 27])  # the last place is empty
    few, _ = few_of(loss, kept)
    small = PARAMS | {"user": fill(PARAMS["user"], kept)}
    ids = jnp.asarray(RNG.integers(-3 if name != "fill" else -25, 24, (30, 4)))
    value, found = jax.vmap(jax.value_and_grad(few), (None, 0))(small, ids)
    right, whole = jax.vmap(jax.value_and_grad(loss), (None, 0))(PARAMS, ids)
    np.testing.assert_array_equal(value, right)
    np.testing.assert_array_equal(found["user"][:, :5], whole["user"][:, kept[:5]])
    assert not np.nan_to_num(found["user"][:, 5]).any()
    np.testing.assert_array_equal(found["w"], whole["w"])
    rows = np.nan_to_num(np.abs(whole["user"]).sum((1, 2))) > 0
    assert rows.any()


@pytest.mark.parametrize("name", LOOKUPS)
def test_what_is_looked_up_is_what_has_a_derivative(name):
    loss = loss_with(LOOKUPS[name])
    ids = jnp.asarray(RNG.integers(-3, 24, (30, 4)))
    _, tables = few_of(loss, jnp.arange(MOST))
    numbers = np.asarray(jax.jit(lambda x: looked_up(loss, PARAMS, x, tables))(ids))
    whole = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, ids)["user"]
    for row, gradient in zip(numbers, np.asarray(whole), strict=True):
        if np.isfinite(gradient).all():
            moved = set(np.flatnonzero(np.abs(gradient).sum(1)))
            assert moved == set(row[row < ROWS])


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_engines_agree_on_few_rows(engine):
    """The clipped sum of the rows kept, against clipping by hand."""
    loss = loss_with(LOOKUPS["index"])
    kept = jnp.array([0, 3, 4, 11, 13, 19])
    few, _ = few_of(loss, kept)
    small = PARAMS | {"user": PARAMS["user"][kept]}
    ids = jnp.asarray(RNG.integers(0, ROWS, (30, 4)))
    grad_fn = dp_ilg.clipped_grad(few, l2_clip_norm=0.5, engine=engine)
    found = grad_fn(small, ids, geometry=dp_ilg.Geometry.uniform(small)).gradients
    whole = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, ids)
    own = whole | {"user": whole["user"][:, kept]}
    squares = [np.square(x).reshape(30, -1).sum(1) for x in jax.tree.leaves(own)]
    scale = np.minimum(1, 0.5 / np.sqrt(sum(squares)))
    right = jax.tree.map(lambda x: np.einsum("i,i...->...", scale, x), own)
    for one, other in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    path = grad_fn.explain(small, ids) if engine == "bookkeeping" else None
    assert path is None or {row.leaf: row.path for row in path}["user"] == "gram"


def looped(params, ids):
    return lax.scan(lambda c, i: (c + params["user"][i].sum(), 0), 0.0, ids)[0]


REFUSED = {
    "tied": (lambda p, ids: jnp.sum(p["user"] @ p["user"][ids[0]]), "by dot_general"),
    "regulariser": (lambda p, ids: jnp.sum(p["user"] ** 2) + ids[0], "by .*, but rows"),
    "columns": (lambda p, ids: p["user"][:, ids[0] % 3].sum(), "by .*, but rows"),
    "loop": (looped, "by scan, but rows are kept only"),
    "absent": (
        lambda p, ids: jnp.sum(p["w"]) * ids[0],
        "does not look up rows of user",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_read_a_table_otherwise_are_refused(name):
    loss, words = REFUSED[name]
    few, tables = few_of(loss, jnp.arange(MOST))
    ids = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=words):
        looked_up(loss, PARAMS, ids, tables)
    with pytest.raises(ValueError, match=words):
        few(PARAMS | {"user": PARAMS["user"][:MOST]}, ids[0])


TABLES = (Table("a", 0, 9, 4, 0), Table("b", 1, 7, 4, 9))


def in_steps(counts):
    """Counts as whole steps of 2^-24, Python integers."""
    parts = [np.asarray(x, np.float64) for x in (counts.total, counts.remainder)]
    return [int(x) for x in (parts[0] + parts[1]) * 2.0**24]


def test_counts_are_those_of_sets():
    numbers = RNG.integers(-2, 18, (40, 6))
    present = RNG.random(40) < 0.7
    found = jax.jit(count_rows, static_argnums=2)(numbers, present, TABLES)
    right = np.zeros(16)
    for row, there in zip(numbers, present, strict=True):
        own = {i for i in row if 0 <= i < 16}
        right[sorted(own)] += there / np.sqrt(max(len(own), 1))
    np.testing.assert_allclose(found.total, right, atol=1e-5)


def test_one_example_moves_the_counts_by_at_most_one_exactly():
    """In whole numbers, beside any others, for any number of rows; and comes near 1."""
    lengths = [1, 2, 3, 5, 7, 16]
    others = RNG.integers(-3, 20, (50, 16))
    worst = 0
    for length in lengths:
        row = np.resize(RNG.permutation(16)[:length], 16)
        both = np.concatenate([others, row[None]])
        many = in_steps(count_rows(jnp.asarray(both), jnp.ones(51, bool), TABLES))
        fewer = in_steps(count_rows(jnp.asarray(others), jnp.ones(50, bool), TABLES))
        moved = sum((a - b) ** 2 for a, b in zip(many, fewer, strict=True))
        assert moved <= 2**48
        worst = max(worst, moved)
    assert worst > 0.9999 * 2**48
    assert all(k * int(x) ** 2 <= 2**48 for k, x in enumerate(steps_each(3000)))


def test_chunks_add_up_to_the_whole_to_the_bit():
    numbers, present = RNG.integers(0, 16, (600, 5)), RNG.random(600) < 0.9
    whole = count_rows(jnp.asarray(numbers), jnp.asarray(present), TABLES)
    parts = [
        count_rows(jnp.asarray(numbers[i::3]), jnp.asarray(present[i::3]), TABLES)
        for i in range(3)
    ]
    assert in_steps(parts[2] + parts[0] + parts[1]) == in_steps(whole)
    assert bool((parts[0] + parts[1]).sound())


def test_counts_of_other_tables_and_arithmetic_are_found_out():
    one = count_rows(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, bool), TABLES)
    with pytest.raises(ValueError, match="Two chunks count rows of"):
        _ = one + RowCounts(one.total, one.remainder, TABLES[:1])
    assert bool(one.sound())
    for change in (lambda x: x * 2, lambda x: x / 2, lambda x: x.astype(jnp.bfloat16)):
        changed = [change(jnp.asarray(x)) for x in jax.tree.leaves(one)]
        found: RowCounts = jax.tree.unflatten(jax.tree.structure(one), changed)
        assert not bool(found.sound())


@pytest.mark.parametrize(
    ("asked", "kind", "words"),
    [
        ({}, ValueError, "tables is empty"),
        (["user"], TypeError, "must be a mapping"),
        ({"user": 0}, ValueError, "the most rows of 'user' is 0"),
        ({"nobody": 3}, ValueError, "the path of 0 leaves"),
        ({"user": 3, "/user": 3}, ValueError, "the path of"),
        ({"w": 3}, ValueError, r"shape \(3,\), but a table needs"),
    ],
)
def test_tables_that_cannot_be(asked, kind, words):
    with pytest.raises(kind, match=words):
        find_tables(PARAMS, check_asked(asked))
