"""Metrics of single examples: exact against vmap by hand, bounded, absent if bad."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping import eager
from dp_ilg.clipping.adding.metric_sums import as_metrics, facts_of, reach_of
from dp_ilg.clipping.lots import lot_accumulator, sum_over_axis
from dp_ilg.clipping.row_check import rows_are_independent
from dp_ilg.training import mesh

HIGH = 3.0
SIZE = 12


def loss_fn(params, example):
    x, y = example
    logits = jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]
    return -jax.nn.log_softmax(logits)[y], {"right": logits.argmax() == y}


def loss_alone(params, example):
    return loss_fn(params, example)[0]


METRICS = {
    "loss": dp_ilg.Metric(lambda loss, aux: loss, high=HIGH),
    "accuracy": dp_ilg.Metric(lambda loss, aux: aux["right"]),
}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "b": jnp.zeros(3),
    }


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(SIZE, 5)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, 3, SIZE))


def made(**options):
    options = {"has_aux": True, "metrics": METRICS} | options
    return dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0, **options)


def summed(grad_fn, params, batch, mask=None):
    geometry = dp_ilg.Geometry.uniform(params)
    call = functools.partial(grad_fn, geometry=geometry, is_padding_example=mask)
    return call(params, batch)


def by_hand(params, batch, keep=slice(None)):
    """The sum of vectors of norm at most 1, in float64, by plain vmap."""
    losses, aux = jax.vmap(loss_fn, (None, 0))(params, batch)
    accuracy = 2 * np.asarray(aux["right"], np.float64) - 1
    loss = np.clip(np.asarray(losses, np.float64), 0, HIGH) / (HIGH / 2) - 1
    return (np.stack([accuracy, loss], 1) / np.sqrt(2))[keep].sum(0)


def whole(clipped) -> Any:
    found = clipped.metrics
    return np.float64(found.total) + np.float64(found.remainder)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "exact"])
@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_sums_are_those_of_vmap_by_hand(engine, microbatch_size, params, batch):
    grad_fn = made(engine=engine, microbatch_size=microbatch_size)
    mask = jnp.arange(SIZE) >= SIZE - 3
    found = jax.jit(functools.partial(summed, grad_fn))(params, batch, mask)
    assert found.metrics.facts == (("accuracy", 0.0, 1.0), ("loss", 0.0, HIGH))
    expected = by_hand(params, batch, slice(SIZE - 3))
    np.testing.assert_allclose(whole(found), expected, atol=2e-6)


def test_gradients_are_those_without_metrics(params, batch):
    plain = dp_ilg.clipped_grad(loss_alone, l2_clip_norm=1.0)
    one, other = (summed(f, params, batch) for f in (plain, made()))
    assert one.metrics is None
    other = dataclasses.replace(other, metrics=None)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), one, other)
    assert all(jax.tree.leaves(same))


def test_without_metrics_the_program_is_the_one_of_a_plain_loss(params, batch):
    """An aux that feeds nothing costs nothing."""
    texts = {
        jax.jit(functools.partial(summed, grad_fn)).lower(params, batch).as_text()
        for grad_fn in (
            dp_ilg.clipped_grad(loss_alone, l2_clip_norm=1.0),
            dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0, has_aux=True),
        )
    }
    assert len(texts) == 1
    assert (
        jax.jit(functools.partial(summed, made())).lower(params, batch).as_text()
        not in texts
    )


def echo(microbatch_size=None, count=3):
    """Metrics that are what the example says, however it is batched."""
    metrics = {
        f"m{k}": dp_ilg.Metric(lambda loss, aux, k=k: aux[k], -1.0, 2.0)
        for k in range(count)
    }
    loss = lambda w, x: (w * x[0] * 0 + w, x)  # noqa: E731
    return dp_ilg.clipped_grad(
        loss,
        l2_clip_norm=1.0,
        has_aux=True,
        metrics=metrics,
        microbatch_size=microbatch_size,
    )


@functools.cache
def echoed(size, microbatch_size=None, count=3):
    """Compiled: the sum of the metrics of so many examples."""
    return jax.jit(
        lambda rows: summed(echo(microbatch_size, count), jnp.ones(()), rows)
    )


def values(rows):
    """A clipped sum of metrics that are whatever the rows say."""
    rows = jnp.asarray(rows, jnp.float32)
    return echoed(len(rows), count=rows.shape[1])(rows)


ROWS: Any = np.float32(np.random.default_rng(4).uniform(-1.5, 2.5, (SIZE, 3)))


def test_chunks_change_no_bit():
    """Nor does their order, wherever they are added."""
    params = jnp.ones(())
    geometry, halves = dp_ilg.Geometry.uniform(params), [ROWS[:5], ROWS[5:]]
    ways = [
        dp_ilg.sum_lot(map(values, halves)),
        dp_ilg.sum_lot(map(values, halves[::-1])),
        echoed(SIZE, 5)(jnp.asarray(ROWS)),
        dp_ilg.clipped_lot(echo(), params, jnp.asarray(ROWS), 4, geometry=geometry),
        lot_accumulator(echo())(
            params, geometry, [(half, np.zeros(len(half), bool)) for half in halves]
        ),
    ]
    reference = whole(values(ROWS))
    assert all((whole(way) == reference).all() for way in ways)
    assert reference.any() and (values(ROWS).metrics.remainder != 0).any()


def test_devices_change_no_bit():
    params, mask = jnp.ones(()), jnp.zeros(SIZE, bool)
    geometry = dp_ilg.Geometry.uniform(params)
    spread = mesh.spread(echo(), mesh.make_mesh(1, 1))
    found = jax.jit(
        lambda b: spread(params, b, geometry=geometry, is_padding_example=mask)
    )(ROWS)
    axis = jax.sharding.Mesh(jax.devices()[:1], ("rows",))
    one = lambda b: sum_over_axis(summed(echo(), params, b), "rows")  # noqa: E731
    spec = jax.sharding.PartitionSpec
    added = jax.shard_map(
        one, mesh=axis, in_specs=spec("rows"), out_specs=spec(), check_vma=False
    )
    reference = whole(values(ROWS))
    assert (whole(found) == reference).all()
    assert (whole(jax.jit(added)(ROWS)) == reference).all()


def test_metrics_that_see_their_neighbours_are_found():
    def leaky(params, batch, **facts):
        found = echo()(params, batch, **facts)
        total = found.metrics.total + 1e-3 * jnp.mean(batch)
        metrics = dataclasses.replace(found.metrics, total=total)
        return dataclasses.replace(found, metrics=metrics)

    for grad_fn, differing in ((echo(), ()), (leaky, ("metrics",))):
        found = rows_are_independent(grad_fn, jnp.ones(()), ROWS, trials=3)
        assert found.differing == differing and found.largest == 0


def test_a_program_is_not_shared_by_other_bounds(params, batch):
    """Outside of jit, programs are kept by what they read like."""
    eager.forget()
    wide = METRICS | {"loss": dp_ilg.Metric(lambda loss, aux: loss, high=2 * HIGH)}
    found = [
        summed(made(metrics=m, microbatch_size=4), params, batch)
        for m in (METRICS, wide)
    ]
    assert found[1].metrics.facts[1] == ("loss", 0.0, 2 * HIGH)
    assert whole(found[0])[1] != whole(found[1])[1]


HOSTILE = [
    [1e30, -1e30, 3.0],
    [np.finfo(np.float32).max] * 3,
    [-1.0, 2.0, 0.5],
    [2.0, 2.0, 2.0],
    [1.9999999, -0.9999999, 2.0000002],
]


@pytest.mark.parametrize("row", HOSTILE)
def test_one_example_moves_the_sum_by_at_most_one(row):
    """In exact arithmetic: entries are multiples of 2^-24 with squares up to 1."""
    others = np.random.default_rng(2).uniform(-3, 3, (4, 3))
    moved = whole(values([*others, row])) - whole(values(others))
    steps = moved * 2.0**24
    assert (steps == steps.round()).all()
    assert sum(int(s) ** 2 for s in steps) <= 2**48


@pytest.mark.slow
def test_no_search_finds_a_longer_vector():
    rng = np.random.default_rng(3)
    longest = 0.0
    for count in (1, 2, 3, 5, 32):
        rows = rng.normal(size=(60, count)) * 10 ** rng.uniform(-3, 30, (60, 1))
        rows = np.concatenate([rows, np.sign(rows) * 1e9])
        alone = jax.vmap(lambda r, n=count: echoed(1, None, n)(r[None]).metrics)(
            jnp.float32(rows)
        )
        total = np.float64(alone.total) + np.float64(alone.remainder)
        longest = max(longest, (total**2).sum(1).max())
    assert 0.999 < longest <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_removes_its_example_from_all(bad):
    others = [[0.5, 1.0], [0.0, -0.5]]
    with_bad = [others[0], [bad, 2.0], others[1]]
    assert (whole(values(with_bad)) == whole(values(others))).all()


def test_an_example_without_finite_gradient_is_absent(params, batch):
    x = batch[0].at[3].set(jnp.nan)
    keep = np.arange(SIZE) != 3
    found = summed(made(), params, (x, batch[1]))
    np.testing.assert_allclose(whole(found), by_hand(params, batch, keep), atol=2e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
def test_the_reach_of_all_metrics_together_is_one(count):
    steps = reach_of(count) * 2**24
    assert steps == int(steps) and count * int(steps) ** 2 <= 2**48
    assert reach_of(count) * np.sqrt(count) > 1 - 1e-6


BAD = {
    "no mapping": (["loss"], "must be a mapping"),
    "no Metric": ({"loss": lambda loss, aux: loss}, "must be a dp_ilg.Metric"),
    "no name": ({"": METRICS["loss"]}, "must have a name"),
    "too many": (dict.fromkeys(map(str, range(33)), METRICS["loss"]), "at most 32"),
}


@pytest.mark.parametrize("metrics, words", BAD.values(), ids=BAD)
def test_what_is_no_mapping_of_metrics_is_refused(metrics, words):
    with pytest.raises((TypeError, ValueError), match=words):
        as_metrics(metrics)


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (0, np.inf), (np.nan, 1)])
def test_bounds_are_finite_and_in_order(low, high):
    with pytest.raises(ValueError, match="must be finite, the first below"):
        dp_ilg.Metric(max, low, high)


FAULTS = {
    "vector": (lambda loss, aux: jnp.ones(3), "shapes \\[\\(3,\\)\\]"),
    "pair": (lambda loss, aux: (loss, loss), "must be one real number"),
    "prints": (
        lambda loss, aux: (jax.debug.print("{}", loss), loss)[1],
        "would show single examples",
    ),
    "calls the host": (
        lambda loss, aux: jax.pure_callback(
            lambda v: v, jax.ShapeDtypeStruct((), jnp.float32), loss
        ),
        "pure_callback",
    ),
}


@pytest.mark.parametrize("function, words", FAULTS.values(), ids=FAULTS)
def test_a_metric_that_shows_or_mixes_is_refused(function, words, params, batch):
    grad_fn = made(metrics={"m": dp_ilg.Metric(function)})
    with pytest.raises(ValueError, match=words):
        summed(grad_fn, params, batch)


def test_a_loss_must_return_what_it_says(params, batch):
    with pytest.raises(TypeError, match="must return a pair"):
        summed(
            dp_ilg.clipped_grad(loss_alone, l2_clip_norm=1.0, has_aux=True),
            params,
            batch,
        )
    with pytest.raises(ValueError, match="has_aux=True"):
        summed(made(has_aux=False), params, batch)


def test_chunks_of_other_metrics_do_not_join():
    one, other = values(ROWS), values(ROWS[:, :2])
    with pytest.raises(ValueError, match="same metrics"):
        _ = one + other
    with pytest.raises(ValueError, match="has metrics and the other has none"):
        _ = one + dataclasses.replace(one, metrics=None)


def test_facts_do_not_depend_on_the_order_of_the_mapping():
    one, other = (
        made(metrics=m).metrics for m in (METRICS, dict(reversed(METRICS.items())))
    )
    assert facts_of(one) == facts_of(other)
