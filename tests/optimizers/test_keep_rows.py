"""Rows kept by a noisy count: exact steps, one Gaussian, its law, refusals."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.clipping.lookups.counts import RowCounts
from dp_ilg.clipping.lookups.tables import Table
from dp_ilg.noise.exact import ExactNoise
from dp_ilg.noise.secure import SecureNoise
from dp_ilg.optimizers.behind_noise import behind_noise
from dp_ilg.optimizers.kept_rows.gradient import check_kept
from dp_ilg.optimizers.kept_rows.release import noisy_counts, released_rows, row_key
from tests.helpers.models import plan
from tests.noise.test_add_noise import chi_square_accepts

KEY = jax.random.key(0)
ROWS, WIDTH = 40, 3
PARAMS = {
    "table": 0.3 * jax.random.normal(jax.random.key(1), (ROWS, WIDTH)),
    "head": jnp.ones(WIDTH),
}
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, ROWS, (12, 4)))
make_plan = functools.partial(plan, row_budget=0.2, score_budget=0.0)


def loss_fn(params, ids):
    return jnp.square(jnp.tanh(params["table"][ids]).sum(0) @ params["head"] - 1)


GRAD_FN = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0)


def kept_by(the_plan=None, most=16, threshold=0.0, inner=None, key=KEY, **options):
    tx = behind_noise(
        inner or optax.sgd(0.5, momentum=0.9),
        the_plan or make_plan(),
        key=key,
        importance="uniform",
        source="public",
    )
    return dp_ilg.keep_rows(
        tx, {"table": most}, key=key, threshold=threshold, **options
    )


def without_noise(**changes):
    return make_plan(noise_multiplier=0.0, **changes)


def trained(rows, steps=3, ids=IDS, **given):
    step = jax.jit(rows.step(GRAD_FN))
    params, state = PARAMS, rows.init(PARAMS)
    for _ in range(steps):
        params, state = step(params, state, ids, **given)
    return params, state


# --- exact --------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [optax.sgd(0.3), optax.adagrad(0.1), optax.adam(0.1)])
def test_without_noise_it_is_the_dense_step_where_that_is_sparse(inner):
    """All rows that are read fit; adam agrees at its first step, momentum lags."""
    steps = 1 if inner.init({"w": jnp.ones(1)})[0] != optax.EmptyState() else 3
    params, _ = trained(kept_by(without_noise(), 40, inner=inner), steps)
    dense = behind_noise(
        inner,
        plan(noise_multiplier=0.0, score_budget=0.0),
        key=KEY,
        importance="uniform",
        source="public",
    )
    right, state = PARAMS, dense.init(PARAMS)
    for _ in range(steps):
        total = GRAD_FN(right, IDS, geometry=dense.geometry(state))
        updates, state = dense.update(total, state, right)
        right = optax.apply_updates(right, updates)
    for one, other in zip(*map(jax.tree.leaves, (params, right)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert np.abs(params["table"] - PARAMS["table"]).max() > 0.01


def test_rows_that_are_not_kept_stay_to_the_bit_with_their_moments():
    rows = kept_by(most=8, inner=optax.adam(0.1))
    params, state = trained(rows, 2)
    counts = rows.counts(GRAD_FN, params, IDS)
    kept = rows.kept(counts, state)
    after, new = jax.jit(rows.step(GRAD_FN))(params, state, IDS)
    own = np.asarray(kept.ids[0])
    out = np.setdiff1d(np.arange(ROWS), own)
    assert len(own[own < ROWS]) == 8
    assert np.array_equal(after["table"][out], params["table"][out])
    assert (np.asarray(after["table"] != params["table"])[own]).all()
    moved = 0
    for one, other in zip(*map(jax.tree.leaves, (state.inner, new.inner)), strict=True):
        if one.shape == (ROWS, WIDTH):
            assert np.array_equal(one[out], other[out])
            assert (np.asarray(one != other)[own]).all()
            moved += 1
    assert moved == 2


def test_the_largest_counts_are_kept_where_there_are_too_many():
    counts = RowCounts(
        jnp.asarray(RNG.permutation(30).astype("float32")) * 10,
        jnp.zeros(30),
        (Table("a", 0, 20, 5, 0), Table("b", 1, 10, 10, 20)),
    )
    quiet = make_plan(noise_multiplier=1e-3)
    kept = released_rows(counts, quiet, KEY, 0, 15 * 500.0 * 0.9)
    first, second = (np.asarray(x) for x in kept.ids)
    total = np.asarray(counts.total)
    assert first.tolist() == sorted(np.argsort(total[:20])[-5:])
    assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
    above = np.flatnonzero(total[20:] > 15 * 500 * 0.9 * 1e-3 / np.sqrt(0.2))
    assert second[second < 10].tolist() == above.tolist()
    assert [int(x) for x in kept.counts().values()] == [5, len(above)]


def test_chunks_are_one_step():
    """Counts to the bit; a sum of other chunks differs by what one batch rounds."""
    rows = kept_by()
    state = rows.init(PARAMS)
    padding = jnp.arange(12) % 5 == 4
    whole, _ = jax.jit(rows.step(GRAD_FN))(PARAMS, state, IDS, padding)

    @jax.jit
    def step(params, state):
        places = [slice(0, 6), slice(6, 12)]
        counts = [rows.counts(GRAD_FN, params, IDS[s], padding[s]) for s in places]
        kept = rows.kept(counts[1] + counts[0], state)
        parts = [
            rows.gradient(GRAD_FN, params, state, kept, IDS[s], padding[s])
            for s in places
        ]
        return rows.update(params, state, parts[0] + parts[1])

    params, after = step(PARAMS, state)
    assert int(after.step) == 1
    for one, other in zip(*map(jax.tree.leaves, (params, whole)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_jit_it_is_the_same_step():
    rows = kept_by()
    state = rows.init(PARAMS)
    one, _ = rows.step(GRAD_FN)(PARAMS, state, IDS)
    other, _ = jax.jit(rows.step(GRAD_FN))(PARAMS, state, IDS)
    np.testing.assert_allclose(one["table"], other["table"], atol=1e-6)


def test_padding_and_examples_without_a_gradient_are_absent():
    bad = jnp.concatenate([IDS, jnp.full((3, 4), 7)])
    rows = kept_by(without_noise(), 40)
    padding = jnp.arange(15) >= 12
    one, _ = trained(rows, 1)
    other, _ = trained(rows, 1, bad, is_padding_example=padding)
    assert np.array_equal(one["table"], other["table"])


# --- privacy ------------------------------------------------------------------------


def test_choice_and_gradient_are_one_gaussian_of_the_plans_multiplier():
    """Squared shifts over variances of one example, the same rows kept for both worlds.

    At most z^-2 for examples of any size and any rows, which is reached.
    """
    the_plan = make_plan(score_budget=0.1)
    tx = dp_ilg.dp_adam_ilg(0.1, the_plan, key=KEY)
    rows = dp_ilg.keep_rows(tx, {"table": 10}, key=KEY)

    def scaled(params, example):
        return loss_fn(params, example[0]) * example[1]

    grad_fn = dp_ilg.clipped_grad(scaled, l2_clip_norm=1.0)
    state = rows.init(PARAMS)
    others = IDS, jnp.ones(12)

    @jax.jit
    def shifts(ids, size):
        pairs = zip(others, (ids, size), strict=True)
        both = [jnp.concatenate([a, b[None]]) for a, b in pairs]
        there = [jnp.arange(13) > 12, jnp.arange(13) > 11]
        counts = [rows.counts(grad_fn, PARAMS, tuple(both), m) for m in there]
        kept = rows.kept(counts[0], state)
        sums = [
            rows.gradient(grad_fn, PARAMS, state, kept, tuple(both), m).clipped
            for m in there
        ]
        return counts, [(s.gradients, s.remainder, s.layer_shares) for s in sums]

    sigma = [
        the_plan.row_noise_multipliers[0],
        the_plan.gradient_noise_multipliers[0],
        the_plan.score_noise_multipliers[0],
    ]
    worst = 0.0
    for trial in range(40):
        ids = jnp.asarray(
            RNG.integers(-2, ROWS + 2, 4) if trial % 2 else IDS[trial % 7]
        )
        size = jnp.float32(10.0 ** RNG.uniform(-3, 4))
        counts, sums = shifts(ids, size)
        apart = [np.float64(c.total) + np.float64(c.remainder) for c in counts]
        parts = [np.square(apart[0] - apart[1]).sum()]
        (a, rest_a, shares_a), (b, rest_b, shares_b) = sums
        whole = [
            jax.tree.map(lambda x, y: np.float64(x) + np.float64(y), *pair)
            for pair in ((a, rest_a), (b, rest_b))
        ]
        squares = jax.tree.map(lambda x, y: np.square(x - y).sum(), *whole)
        parts += [sum(jax.tree.leaves(squares)), np.square(shares_a - shares_b).sum()]
        assert parts[0] <= 1 and parts[1] <= 1 and parts[2] <= 1 + 1e-5
        known = sum(p / s**2 for p, s in zip(parts, sigma, strict=True))
        worst = max(worst, known * the_plan.noise_multipliers[0] ** 2)
    assert 0.999 < worst <= 1 + 1e-6


@pytest.mark.parametrize("said", [-7, 3, 10_000])
def test_the_bound_holds_whatever_rows_of_says(said):
    """Wrong rows cost accuracy alone: nothing outside of what is kept is touched."""
    rows = kept_by(
        without_noise(), 8, rows_of=lambda ids: {"table": jnp.full(5, said) + ids[0]}
    )
    params, _ = trained(rows, 1)
    state = rows.init(PARAMS)
    counts = rows.counts(GRAD_FN, PARAMS, IDS)
    one = rows.counts(GRAD_FN, PARAMS, IDS[:1])
    assert float(jnp.sum(one.total**2)) <= 1
    kept = np.asarray(rows.kept(counts, state).ids[0])
    out = np.setdiff1d(np.arange(ROWS), kept)
    assert np.array_equal(params["table"][out], PARAMS["table"][out])


def nobody(size):
    return RowCounts(jnp.zeros(size), jnp.zeros(size), (Table("t", 0, size, 4, 0),))


def test_counts_have_the_multiplier_of_the_plan():
    """At a level of 1e-6; it rejects 3 % more and less."""
    the_plan = make_plan(score_budget=0.1, row_budget=0.3)
    found, _ = noisy_counts(nobody(40_000), the_plan, KEY, 2)
    tau = the_plan.noise_multipliers[2] / np.sqrt(0.3)
    whitened = np.asarray(found, np.float64) / tau
    assert chi_square_accepts(whitened)
    assert not chi_square_accepts(whitened, 0.97)
    assert not chi_square_accepts(whitened, 1.03)


def test_kept_rows_have_the_gradients_noise():
    """At a level of 1e-6; it rejects 3 % more and less, and is none of the counts'."""
    the_plan = make_plan(row_budget=0.5)
    tx = behind_noise(
        optax.sgd(1.0), the_plan, key=KEY, importance="uniform", source="public"
    )
    params = {"table": jnp.zeros((400, 200))}
    rows = dp_ilg.keep_rows(tx, {"table": 300}, key=KEY, threshold=0.0)
    grad_fn = dp_ilg.clipped_grad(lambda p, i: p["table"][i].sum(), l2_clip_norm=1.0)
    state, padding = rows.init(params), jnp.ones(2, bool)
    ids = jnp.zeros((2, 1), jnp.int32)
    after, _ = jax.jit(rows.step(grad_fn))(params, state, ids, padding)
    table = np.asarray(after["table"], np.float64)
    moved = np.flatnonzero(table.any(1))
    counts, _ = noisy_counts(
        rows.counts(grad_fn, params, ids, padding), the_plan, state.key, 0
    )
    assert moved.tolist() == np.flatnonzero(np.asarray(counts) > 0).tolist()
    assert 150 < len(moved) < 250
    sigma = the_plan.noise_multipliers[0] / np.sqrt(0.5)
    whitened = table[moved].ravel() * the_plan.batch_size / sigma
    assert chi_square_accepts(whitened)
    assert not chi_square_accepts(whitened, 0.97)
    assert not chi_square_accepts(whitened, 1.03)
    chosen = np.asarray(counts, np.float64)[moved]
    apart = np.abs([np.corrcoef(chosen, column)[0, 1] for column in table[moved].T])
    assert apart.max() * np.sqrt(len(moved)) < 5.5


def test_the_average_of_counts_has_the_noise_it_says():
    """At a level of 1e-6; it rejects 3 % more and less. A decay of 0 forgets."""
    the_plan = make_plan()
    past: Any = None
    for step in range(6):
        kept = released_rows(
            nobody(40_000), the_plan, KEY, step, 2.0, past=past, decay=0.7
        )
        past = kept.past
    whitened = np.asarray(past.average, np.float64) / np.sqrt(float(past.variance))
    assert chi_square_accepts(whitened)
    assert not chi_square_accepts(whitened, 0.97)
    assert not chi_square_accepts(whitened, 1.03)
    sigma = the_plan.row_noise_multipliers[0]
    assert float(past.variance) < 0.2 * sigma**2
    last = released_rows(nobody(40_000), the_plan, KEY, 5, 2.0, past=past)
    alone = noisy_counts(nobody(40_000), the_plan, KEY, 5)[0]
    assert np.array_equal(last.past.average, alone)


def test_noise_that_is_charged_nothing_would_be_seen():
    paid, unpaid = make_plan(row_budget=0.3), make_plan(row_budget=0.0)
    own = paid.row_noise_multipliers[0] ** -2
    accounted = paid.noise_multipliers[0] ** -2
    left = [p.gradient_noise_multipliers[0] ** -2 for p in (paid, unpaid)]
    assert left[0] + own == pytest.approx(accounted, rel=1e-12)
    assert left[1] + own > 1.2 * accounted


def test_steps_have_noise_of_their_own_and_a_resumed_one_repeats():
    rows = kept_by(most=40)
    step = jax.jit(rows.step(GRAD_FN))
    state = rows.init(PARAMS)
    one, after = step(PARAMS, state, IDS)
    again, _ = step(PARAMS, state, IDS)
    other, _ = step(PARAMS, after._replace(inner=state.inner), IDS)
    assert np.array_equal(one["table"], again["table"])
    assert not np.array_equal(one["table"], other["table"])
    found = [noisy_counts(nobody(9), make_plan(), state.key, t)[0] for t in (0, 1)]
    assert not (np.asarray(found[0]) == np.asarray(found[1])).any()


# --- poison and refusals ------------------------------------------------------------


def is_poisoned(params):
    return not np.isfinite(params["head"]).any()


def test_past_the_plan_rows_of_another_step_and_mixed_rows_release_nan():
    rows = kept_by(make_plan(num_steps=2), most=40)
    state = rows.init(PARAMS)
    counts = jax.jit(lambda p: rows.counts(GRAD_FN, p, IDS))(PARAMS)
    kept = jax.jit(rows.kept)
    own = kept(counts, state)
    gradient = jax.jit(lambda s, k: rows.gradient(GRAD_FN, PARAMS, s, k, IDS))
    update = jax.jit(rows.update)
    found = gradient(state, own)
    params, after = update(PARAMS, state, found)
    assert np.isfinite(params["table"]).all()
    assert is_poisoned(update(PARAMS, after, found)[0])
    mixed = dataclasses.replace(found, kept=kept(counts, after))
    assert is_poisoned(update(PARAMS, state, mixed + found)[0])
    spoiled = kept(jax.tree.map(lambda x: x * 2, counts), state)
    assert is_poisoned(update(PARAMS, state, gradient(state, spoiled))[0])
    with pytest.raises(ValueError, match="Arithmetic was done on a whole ClippedGrad"):
        rows.update(PARAMS, state, jax.tree.map(lambda x: x / 2, found))
    step = jax.jit(rows.step(GRAD_FN))
    params, state = step(*step(PARAMS, state, IDS), IDS)
    assert np.isfinite(params["table"]).all()
    beyond = step(params, state, IDS)[0]
    assert is_poisoned(beyond) and np.isnan(beyond["table"]).all(1).sum() == 40


@pytest.mark.parametrize(
    ("source", "exact"), [(SecureNoise, False), (ExactNoise, True)]
)
def test_draws_from_outside(source, exact):
    rows = kept_by(make_plan(exact_noise=exact), most=40)
    own, state = source(secret=bytes(32)), rows.init(PARAMS)
    step = jax.jit(rows.step(GRAD_FN))
    draws = rows.draws(own, PARAMS, state)
    assert draws.rows.shape == (ROWS,) and draws.gradient["table"].shape == (40, WIDTH)
    one, after = step(PARAMS, state, IDS, noise=draws)
    again, _ = step(PARAMS, state, IDS, noise=draws)
    assert np.isfinite(one["table"]).all() and np.array_equal(
        *(x["table"] for x in (one, again))
    )
    assert is_poisoned(step(PARAMS, after, IDS, noise=draws)[0])
    bare = own.draws(0, jax.tree.map(lambda x: x, PARAMS), rows.geometry(state))
    with pytest.raises(ValueError, match="numbers for rows, but 40 are needed"):
        step(PARAMS, state, IDS, noise=bare)
    if exact:
        with pytest.raises(TypeError, match="exact noise needs ExactDraws"):
            step(PARAMS, state, IDS)


def made(**changes):
    facts: dict[str, Any] = dict(
        tx=dp_ilg.dp_adam_ilg(0.1, make_plan(), key=KEY), tables={"table": 4}, key=KEY
    )
    facts |= changes
    return dp_ilg.keep_rows(facts.pop("tx"), facts.pop("tables"), **facts)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "tx": (dict(tx=optax.adam(0.1)), "must be a whole private optimizer"),
    "plan": (
        dict(tx=dp_ilg.dp_adam_ilg(0.1, plan(), key=KEY)),
        "row_budget is 0, so that there is nothing to choose rows with",
    ),
    "threshold": (dict(threshold=-1.0), "threshold is -1"),
    "ema_decay": (dict(ema_decay=1.0), "ema_decay is 1"),
    "rows_of": (dict(rows_of=3), "rows_of is int"),
    "key": (dict(key=0), "key"),
    "tables": (dict(tables={}), "tables is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name):
    changes, words = BAD[name]
    with pytest.raises((TypeError, ValueError), match=words):
        made(**changes)


def test_frozen_tables_and_whole_table_optimizers_are_refused():
    layers = dp_ilg.layers.by_module(frozen=["table"])
    tx = dp_ilg.dp_adam_ilg(0.1, make_plan(), key=KEY, layers=layers)
    with pytest.raises(ValueError, match="table is frozen"):
        made(tx=tx).init(PARAMS)

    def turned(params: Any) -> Any:
        return params["table"].T

    whole: Any = optax.GradientTransformation(turned, optax.identity().update)
    with pytest.raises(ValueError, match="not one entry a row"):
        kept_by(inner=whole).init(PARAMS)
    with pytest.raises(ValueError, match="rows_of returned"):
        rows = kept_by(rows_of=lambda ids: ids)
        rows.counts(GRAD_FN, PARAMS, IDS)
    with pytest.raises(TypeError, match="counts is int"):
        rows.kept(3, rows.init(PARAMS))
    with pytest.raises(ValueError, match="is_padding_example has shape"):
        kept_by().counts(GRAD_FN, PARAMS, IDS, jnp.zeros(12))
    small = make_plan(num_parameters=30)
    with pytest.raises(ValueError, match="but the plan pays for 30"):
        trained(kept_by(small), 1)


def test_ids_outside_of_the_table_count_nowhere_and_are_not_told():
    ids = jnp.array([[0, 1, ROWS, 10_000], [-1, 2, 2, 2]])
    found = kept_by().counts(GRAD_FN, PARAMS, ids).total
    assert np.flatnonzero(found).tolist() == [0, 1, 2, ROWS - 1]


def test_the_key_is_secret_and_apart():
    rows = made()
    assert "key" not in repr(rows).replace("hidden", "")
    keys = [rows.key] + [
        t.key for t in rows.tx.links if getattr(t, "key", None) is not None
    ]
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == len(keys) == 3


def test_counts_of_two_plans_share_no_noise_and_rows_of_another_are_refused():
    """One key for both: a row's counts, rid of each other's noise, would show it."""
    one, two = make_plan(), make_plan(row_budget=0.3)
    draws = [noisy_counts(nobody(40_000), p, row_key(KEY, p), 0)[0] for p in (one, two)]
    assert abs(np.corrcoef(*np.asarray(draws))[0, 1]) < 5 / np.sqrt(40_000)
    kept = released_rows(nobody(40), two, row_key(KEY, two), 0, 2.0)
    check_kept(kept, two)
    with pytest.raises(ValueError, match="which accounts for other noise"):
        check_kept(kept, one)
