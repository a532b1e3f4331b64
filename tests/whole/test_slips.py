"""What one does by accident in Optax, Flax, Orbax and Equinox, and what comes of it.

Each row of `ARITHMETIC` (done to a clipped sum) and of `SLIPS` (done around it) is a
row of docs/slips.md: refused in words, released as NaN, or harmless, which is proven.
"""

import copy
import dataclasses
import functools
import gc
import pathlib
import pickle
import re
import tempfile
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

import dp_ilg
from dp_ilg.baselines.table import BASELINES
from dp_ilg.sampling.batch import UNREAD
from tests.helpers.mapped import fixed
from tests.helpers.models import plan
from tests.training.loop import scene

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "slips.md"
PARAMS = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
RNG = np.random.default_rng(0)
ROWS = {
    "a": jnp.asarray(RNG.normal(size=(6, 3, 2)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(6, 2)), jnp.float32),
}
PLAN = plan(score_budget=0.1, num_steps=3)


def loss(params, example):
    return jnp.vdot(params["a"], example["a"]) + params["b"] @ example["b"]


def optimizer(key=0, the_plan=PLAN, **options):
    return dp_ilg.dp_adam_ilg(0.1, the_plan, key=jax.random.key(key), **options)


def plain():
    """The least of a private chain, which compiles fast."""
    still = plan(score_budget=0.0, num_steps=3)
    return dp_ilg.chain(
        dp_ilg.clip_per_example(1.0),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(still, key=jax.random.key(0)),
    )


GRAD_FN = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
TX = plain()
STATE = TX.init(PARAMS)


@functools.cache
def clipped(rows=6):
    examples = jax.tree.map(lambda x: x[:rows], ROWS)
    return GRAD_FN(PARAMS, examples, geometry=TX.geometry(STATE))


def release(total):
    return TX.update(total, STATE, PARAMS)[0]


RELEASE = jax.jit(release)
UPDATE = jax.jit(TX.update)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def is_nan(tree):
    return all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(tree))


# --- arithmetic on a clipped sum ----------------------------------------------


def through(transformation):
    """What an Optax transformation in front of the chain makes of the sum."""

    def change(total):
        return transformation.update(total, transformation.init(total), total)[0]

    return change


def on_floats(function):
    """As on filtered trees: whole numbers and bools are left alone."""

    def change(*totals):
        own = lambda *xs: (  # noqa: E731
            function(*xs) if jnp.issubdtype(jnp.result_type(xs[0]), jnp.floating)
            else xs[0]
        )  # fmt: skip
        return jax.tree.map(own, *totals)

    return change


def by_equinox(total):
    floats, rest = eqx.partition(total, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda x: x / 4, floats), rest)


def traced(total):
    return isinstance(total.l2_clip_norm, Tracer)


def scaled_vector(total):
    vector, back = ravel_pytree(total)
    return back(vector * 2)


def summed_rows(total):
    """Each example clipped by itself, and all fields added up by hand."""
    del total
    one = lambda row: GRAD_FN(  # noqa: E731
        PARAMS, jax.tree.map(lambda x: x[None], row), geometry=TX.geometry(STATE)
    )
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(one)(ROWS))


REFUSED = {
    "`jax.tree.map(lambda g: g / B, clipped)`": lambda c: jax.tree.map(
        lambda x: x / 6, c
    ),
    "`jax.tree.map(jnp.add, c1, c2)`": lambda c: jax.tree.map(jnp.add, c, c),
    "`optax.scale` in front": through(optax.scale(0.5)),
    "`optax.clip` in front": through(optax.clip(5.0)),
    "`optax.clip_by_global_norm` in front": through(optax.clip_by_global_norm(1.0)),
    "`optax.clip_by_block_rms` in front": through(optax.clip_by_block_rms(1.0)),
    "`optax.normalize_by_update_norm` in front": through(
        optax.normalize_by_update_norm()
    ),
    "`optax.centralize` in front": through(optax.centralize()),
    "`optax.ema` in front": through(optax.ema(0.9)),
    "`optax.trace` in front": through(optax.trace(0.9)),
    "`optax.scale_by_adam` in front": through(optax.scale_by_adam()),
    "`optax.tree.scale(2.0, clipped)`": lambda c: optax.tree.scale(2.0, c),
    "`optax.tree.cast(clipped, jnp.bfloat16)`": lambda c: optax.tree.cast(
        c, jnp.bfloat16
    ),
    "`x.astype(jnp.bfloat16)` and back": lambda c: jax.tree.map(
        lambda x: jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.result_type(x)), c
    ),
    "`optax.incremental_update(c1, c2, 0.5)`": lambda c: optax.incremental_update(
        c, c, 0.5
    ),
    "`optax.apply_updates(c1, c2)`": optax.apply_updates,
    "`jax.tree.map(jnp.zeros_like, clipped)`": lambda c: jax.tree.map(
        jnp.zeros_like, c
    ),
    "`ravel_pytree`, scaled and back": scaled_vector,
    "`eqx.partition`, floats divided, `eqx.combine`": by_equinox,
    "`eqx.tree_at(lambda c: c.l2_clip_norm, ...)`": lambda c: eqx.tree_at(
        lambda t: t.l2_clip_norm, c, jnp.float32(0.1)
    ),
    "`dataclasses.replace(clipped, geometry=...)`": lambda c: dataclasses.replace(
        c, geometry=dp_ilg.Geometry.of(PARAMS, [0.1, 0.1])
    ),
    "`jax.vmap` of `grad_fn` over rows, summed by `tree.map`": summed_rows,
    "`flax.serialization.to_bytes(clipped)`": lambda c: serialization.to_bytes(c),
}
SAME = {
    "`jax.device_put`, `jax.device_get`": lambda c: jax.device_put(
        c if traced(c) else jax.device_get(c)
    ),
    "`copy.deepcopy`, `pickle`": lambda c: (
        c if traced(c) else pickle.loads(pickle.dumps(copy.deepcopy(c)))
    ),
    "`jax.lax.stop_gradient(clipped)`": jax.lax.stop_gradient,
    "`optax.zero_nans` in front": through(optax.zero_nans()),
    "`optax.tree.where(True, clipped, other)`": lambda c: optax.tree.where(True, c, c),
    "`ravel_pytree` and back": lambda c: ravel_pytree(c)[1](ravel_pytree(c)[0]),
}
BOUNDED = {
    "`jax.tree.map(jnp.maximum, c1, c2)`": lambda c: jax.tree.map(
        jnp.maximum, c, clipped()
    ),
    "the mean of two sums, floats alone": lambda c: on_floats(lambda x, y: (x + y) / 2)(
        c, clipped()
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arithmetic_on_a_sum_is_refused_and_under_jit_never_released(name):
    change = REFUSED[name]
    with pytest.raises((ValueError, TypeError)):
        release(change(clipped()))
    try:
        found = jax.jit(lambda c: release(change(c)))(clipped())
    except (ValueError, TypeError):
        return
    assert is_nan(found)


@pytest.mark.parametrize("name", SAME)
def test_what_moves_a_sum_changes_no_bit_of_the_release(name):
    want = RELEASE(clipped())
    assert bits(RELEASE(SAME[name](clipped()))) == bits(want)
    assert bits(jax.jit(lambda c: release(SAME[name](c)))(clipped())) == bits(want)


@pytest.mark.parametrize("name", BOUNDED)
def test_what_cannot_lengthen_an_example_keeps_the_bound(name):
    """One example more moves what is noised by C at most: the noise is enough."""
    geometry = clipped().geometry
    for rows in range(1, 6):
        one, two = (BOUNDED[name](clipped(n)) for n in (rows, rows + 1))
        apart = jax.tree.map(jnp.subtract, one.gradients, two.gradients)
        norm = geometry.norm(geometry.groups.norms(jax.tree.leaves(apart)))
        assert float(norm) <= 1 + 1e-6
        assert not is_nan(RELEASE(two))


# --- around it ----------------------------------------------------------------


def ledger_again(tmp_path):
    path, key = tmp_path / "ledger.jsonl", jax.random.key(1)
    with dp_ilg.PrivacyLedger(path, PLAN, key=key) as ledger:
        ledger.record(0, released_from=dp_ilg.release_digest(PARAMS, "rate 0.1"))
    dp_ilg.PrivacyLedger(path, PLAN, key=key)


def other_rate(tmp_path):
    path, key = tmp_path / "ledger.jsonl", jax.random.key(1)
    for resume, program in ((False, "rate 0.1"), (True, "rate 0.2")):
        with dp_ilg.PrivacyLedger(path, PLAN, key=key, resume=resume) as ledger:
            ledger.record(0, released_from=dp_ilg.release_digest(PARAMS, program))


def silent_repeat(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for resume in (False, True):
        with dp_ilg.PrivacyLedger(path, PLAN, resume=resume) as ledger:
            ledger.record(0)


def ledger_twice(tmp_path):
    with dp_ilg.PrivacyLedger(tmp_path / "ledger.jsonl", PLAN):
        dp_ilg.PrivacyLedger(tmp_path / "ledger.jsonl", PLAN)


def chunk_of(rows):
    gc.collect()
    UNREAD.clear()
    sampler = dp_ilg.PoissonSampler(6, 0.4, key=1, chunk_size=rows)
    return sampler, sampler.chunks(0)[0]


def forgotten_mask(tmp_path):
    sampler, chunk = chunk_of(6)
    batch = jax.tree.map(lambda x: x[chunk.indices], ROWS)
    GRAD_FN(PARAMS, batch, geometry=TX.geometry(STATE))


def cut_batch(tmp_path):
    batch = chunk_of(6)[1].take(ROWS)
    cut = jax.tree.map(lambda x: x[:3], batch)
    GRAD_FN(PARAMS, cut, geometry=TX.geometry(STATE))


def two_modes(tmp_path):
    loud = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0, clip_mode="normalize")
    loud(PARAMS, ROWS, geometry=TX.geometry(STATE))


def other_plan(tmp_path):
    other = optimizer(1, plan(l2_clip_norm=9.0, num_steps=3))
    geometry = other.geometry(other.init(PARAMS))
    theirs = dp_ilg.clipped_grad(loss, l2_clip_norm=9.0)(
        PARAMS, ROWS, geometry=geometry
    )
    assert is_nan(RELEASE(theirs))
    release(theirs)


def old_geometry(tmp_path):
    tx = optimizer(importance="paper")
    start = tx.init(PARAMS)
    _, later = tx.update(jax.tree.map(lambda x: x * 5, ROWS), start, PARAMS)
    old = GRAD_FN(PARAMS, ROWS, geometry=tx.geometry(start))
    assert is_nan(jax.jit(tx.update)(old, later, PARAMS)[0])
    tx.update(old, later, PARAMS)


def slack_for_scores(tmp_path):
    free = plan(score_budget=0.0, num_steps=3)
    other = BASELINES["slack_clipping"](0.1, free, key=jax.random.key(1))
    theirs = GRAD_FN(PARAMS, ROWS, geometry=other.geometry(other.init(PARAMS)))
    tx = optimizer()
    tx.update(theirs, tx.init(PARAMS), PARAMS)


def zeros_of_a_dropping_rule(tmp_path):
    tx = optimizer(importance="top_k:1", layers="leaf")
    state = jax.tree.map(jnp.zeros_like, tx.init(PARAMS))
    if is_nan(tx.update(ROWS, state, PARAMS)[0]):
        raise ArithmeticError("NaN was released")


def mapped(*scales, whitened=False):
    """A chain for each scale of all entries, and gradients clipped by the first."""
    shapes = {"/".join(path): x.shape for path, x in dp_ilg.layers.paths(PARAMS)}
    groups = dp_ilg.layers.group(PARAMS)
    chains = []
    for scale in scales:
        axes = {n: [np.full(k, scale) for k in s] for n, s in shapes.items()}
        maps = dp_ilg.AxisMaps.of(PARAMS, axes, whitened=whitened)
        there = dp_ilg.Geometry(jnp.ones(len(groups.names)), groups, maps)
        noise = dp_ilg.add_importance_noise(PLAN, key=jax.random.key(1))
        clip = dp_ilg.clip_per_example(1.0)
        chains.append(dp_ilg.chain(clip, fixed(there), noise, optax.sgd(0.1)))
    first = chains[0].geometry(chains[0].init(PARAMS))
    return chains, GRAD_FN(PARAMS, ROWS, geometry=first)


def old_maps(tmp_path):
    (_, other), theirs = mapped(1.0, 2.0)
    start = other.init(PARAMS)
    assert is_nan(jax.jit(other.update)(theirs, start, PARAMS)[0])
    other.update(theirs, start, PARAMS)


def cast_memory(tmp_path):
    noise = dp_ilg.add_importance_noise(plan(bands=2), key=jax.random.key(0))
    state = noise.init(PARAMS)
    cast = state._replace(memory=optax.tree.cast(state.memory, jnp.bfloat16))
    geometry = dp_ilg.Geometry.uniform(PARAMS)
    noise.update(GRAD_FN(PARAMS, ROWS, geometry=geometry), cast)


def forgotten_link(tmp_path):
    (tx,), own = mapped(2.0, whitened=True)
    tx.update(own, tx.init(PARAMS), PARAMS)


def mixing_matrix(tmp_path):
    params = {"w": jnp.zeros((4, 2))}
    groups = dp_ilg.layers.group(params, dp_ilg.layers.blocks("w", edges=[2]))
    maps = dp_ilg.AxisMaps.of(params, {"w": (np.eye(4) + 0.1, None)})
    there = dp_ilg.Geometry(jnp.ones(2), groups, maps)
    own = dp_ilg.clipped_grad(lambda p, x: jnp.sum(p["w"] * x), l2_clip_norm=1.0)
    own(params, jnp.ones((3, 4, 2)), geometry=there)


def past_the_plan(tmp_path):
    state = STATE
    for _ in range(4):
        updates, state = UPDATE(clipped(), state, PARAMS)
    assert is_nan(updates)
    jax.block_until_ready(state)
    TX.geometry(state)


def second_release(tmp_path):
    TX.update(release(clipped()), STATE, PARAMS)


def two_optimizers(tmp_path):
    dp_ilg.chain(optimizer(0), optimizer(1))


def around(wrap):
    def slip(tmp_path):
        tx = wrap(plain())
        tx.update(ROWS, tx.init(PARAMS), PARAMS)

    return slip


def given(make):
    def slip(tmp_path):
        TX.update(make(), STATE, PARAMS)

    return slip


def from_state(change):
    def slip(tmp_path):
        tx = plain()
        state = tx.init(PARAMS)
        found = tx.update(ROWS, change(state), PARAMS)[0]
        if is_nan(found):
            raise ArithmeticError("NaN was released")

    return slip


joined_by_optax: Any = optax.per_example_global_norm_clip


def plain_dicts(state):
    """As Orbax gives a state back where it is told no target."""
    return [part._asdict() if hasattr(part, "_asdict") else {} for part in state]


def ensemble(tmp_path):
    jax.vmap(plain().init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))


def injected_key(tmp_path):
    inject = optax.inject_hyperparams(dp_ilg.dp_adam_ilg)
    inject(0.1, PLAN, key=jax.random.key(0)).init(PARAMS)


def batch_norm(tmp_path):
    def normed(params, example):
        hidden = (params["a"] @ example["b"])[None]  # a batch of one row
        return jnp.sum((hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5))

    call = dp_ilg.clipped_grad(normed, l2_clip_norm=1.0)
    call(PARAMS, ROWS, geometry=TX.geometry(STATE))


@functools.cache
def front_door():
    """A run of `private_training` that has taken a step: itself, its state and lot."""
    train = scene.training()
    state = train.init(scene.start())
    lots = list(train.batches(scene.data(), ledger=None))
    return train, train.step(state, lots[0]), lots[1]


def stepped(change):
    def slip(tmp_path):
        train, state, lot = front_door()
        train.step(change(state), lot)

    return slip


def pulled_to_the_start(state):
    """As a target network or an average of weights is kept by hand."""
    slow = optax.incremental_update(state.params, scene.start(), 0.5)
    return dataclasses.replace(state, params=slow)


def halved_moments(state):
    moments = on_floats(lambda x: x / 2)(state.opt_state)
    return eqx.tree_at(lambda s: s.opt_state, state, moments)


def lot_as_array(tmp_path):
    np.asarray(front_door()[2]).tolist()


def jitted_step(tmp_path):
    train, state, lot = front_door()
    jax.jit(train.step)(state, lot)


def door_behind_door(tmp_path):
    scene.training(optimizer=optimizer(the_plan=scene.made_plan()))


DOOR = {
    "`train.step` of a state of zeros": (
        stepped(lambda s: jax.tree.map(jnp.zeros_like, s)),
        "The state is not the one the run stands at",
    ),
    "`train.step` after `optax.incremental_update` of the parameters": (
        stepped(pulled_to_the_start),
        "The state is not the one the run stands at",
    ),
    "`train.step` after `eqx.tree_at` on the optimizer's state": (
        stepped(halved_moments),
        "The state is not the one the run stands at",
    ),
    "`np.asarray(lot)`": (lot_as_array, "goes into train.step whole"),
    "`jax.jit(train.step)`": (jitted_step, "Error interpreting argument"),
    "a private optimizer given to `private_training`": (
        door_behind_door,
        "The optimizer is private already",
    ),
}


def of_rows(slip):
    """A slip with `keep_rows`, on a table of parameters."""

    def run(tmp_path):
        key = jax.random.key(0)
        params, ids = {"t": jnp.zeros((9, 2))}, jnp.zeros((3, 2), jnp.int32)
        own = plan(row_budget=0.2, score_budget=0.0)
        rows = dp_ilg.keep_rows(optimizer(the_plan=own), {"t": 4}, key=key)
        slip(rows, params, rows.init(params), ids)

    return run


def halved_rows(rows, params, state, ids):
    grad_fn = dp_ilg.clipped_grad(lambda p, i: p["t"][i].sum(), l2_clip_norm=1.0)
    kept = rows.kept(rows.counts(grad_fn, params, ids), state)
    found = rows.gradient(grad_fn, params, state, kept, ids)
    rows.update(params, state, jax.tree.map(lambda x: x / 2, found))


def unpaid_rows(rows, params, state, ids):
    dp_ilg.keep_rows(optimizer(), {"t": 4}, key=jax.random.key(0))


def unused_rows(rows, params, state, ids):
    loss = lambda p, i: p["t"][i].sum()  # noqa: E731
    dp_ilg.private_training(loss, optax.sgd(0.1), rows.plan, seed=0)


def rows_of_a_whole_table(rows, params, state, ids):
    loss = lambda p, i: p["t"][i].sum() + jnp.sum(p["t"] ** 2)  # noqa: E731
    rows.counts(dp_ilg.clipped_grad(loss, l2_clip_norm=1.0), params, ids)


ROW_SLIPS = {
    "arithmetic on a `RowGradient`": (of_rows(halved_rows), "Arithmetic was done on a"),
    "`keep_rows` with a plan that pays for no rows": (
        of_rows(unpaid_rows),
        "make the plan with row_budget=0.1",
    ),
    "`private_training` without `rows`, its plan pays for rows": (
        of_rows(unused_rows),
        "but rows names no table",
    ),
    "a table that the loss also reads whole, in `keep_rows`": (
        of_rows(rows_of_a_whole_table),
        "rows are kept only of a table that is looked up in",
    ),
}


def shaped(vector):
    """A chain whose noise follows a prior over the rows of `a`."""
    still = plan(score_budget=0.0, num_steps=3)
    prior = dp_ilg.Prior({"a": vector})
    return dp_ilg.dp_adam_ilg(0.1, still, key=jax.random.key(0), source=prior)


def other_vocabulary(tmp_path):
    shaped(dp_ilg.priors.zipf(4)).init(PARAMS)


def counted_rows(tmp_path):
    shaped(dp_ilg.priors.private_counts([[0, 1], [2, 2]], 3)).init(PARAMS)


def other_prior(tmp_path):
    one, other = shaped([1.0, 2.0, 3.0]), shaped([3.0, 2.0, 1.0])
    total = GRAD_FN(PARAMS, ROWS, geometry=one.geometry(one.init(PARAMS)))
    other.update(total, other.init(PARAMS), PARAMS)


SLIPS = {
    "a prior for another vocabulary": (other_vocabulary, "has 4 entries, but axis 0"),
    "counts of the private rows as a prior": (counted_rows, "made from the training"),
    "gradients clipped in another prior": (
        other_prior,
        "other weights than this chain",
    ),
    "a ledger opened again": (ledger_again, "pass resume=True to go on"),
    "a repeated step at another learning rate": (other_rate, "the same noise on"),
    "a repeated step that does not say what it is": (silent_repeat, "nobody can tell"),
    "one ledger opened twice": (ledger_twice, "this process holds it"),
    "`a[chunk.indices]` without the mask": (forgotten_mask, "came without a mask"),
    "rows cut from a sealed batch": (cut_batch, "was drawn with 6 rows, but arrives"),
    "two clip modes": (two_modes, "clip_mode is 'normalize' in clipped_grad, but"),
    "another plan's gradients": (other_plan, "l2_clip_norm is 9 in clipped_grad, bu"),
    "the geometry of an earlier step": (old_geometry, "other weights than this chain"),
    "maps of an earlier step, or of another chain": (old_maps, "other weights than"),
    "a matrix across the bands of a leaf": (mixing_matrix, "would mix the groups"),
    "whitened maps without `unwhiten_updates`": (
        forgotten_link,
        "put unwhiten_updates() behind it",
    ),
    "a sum of slack given to a chain that scores": (
        slack_for_scores,
        "score is 'slack' in clipped_grad, but 'l2' in the chain",
    ),
    "the memory of correlated noise cast to bfloat16": (cast_memory, "must be int32"),
    "one step past the plan": (past_the_plan, "has taken 4 steps, but its plan has 3"),
    "a release handed to a second private optimizer": (
        second_release,
        "give what a private optimizer released to optax.apply_updates",
    ),
    "two private optimizers in one chain": (two_optimizers, "beside 2 private optim"),
    "`optax.MultiSteps(tx, k)`": (
        around(lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()),
        "averages before clipping",
    ),
    "`optax.apply_if_finite(tx, n)`": (
        around(lambda tx: optax.apply_if_finite(tx, 2)),
        "would choose by raw gradients",
    ),
    "`optax.masked(tx, mask)`": (
        around(lambda tx: optax.masked(tx, {"a": True, "b": False})),
        "masked out by optax.masked",
    ),
    "`optax.partition({'private': tx, 'rest': sgd}, ...)`": (
        around(
            lambda tx: optax.partition(
                {"private": tx, "rest": optax.sgd(0.1)}, {"a": "private", "b": "rest"}
            )
        ),
        "masked out by optax.masked",
    ),
    "`optax.flatten(tx)`": (around(optax.flatten), "do not fit the geometry"),
    "the mean of per-example gradients": (
        given(lambda: jax.tree.map(lambda x: x.mean(0), ROWS)),
        "no batch axis",
    ),
    "`optax.per_example_global_norm_clip` in front": (
        given(
            lambda: jax.tree.unflatten(
                jax.tree.structure(ROWS),
                joined_by_optax(jax.tree.leaves(ROWS), 1.0)[0],
            )
        ),
        "no batch axis",
    ),
    "`clipped.gradients` alone": (given(lambda: clipped().gradients), "no batch axis"),
    "`jax.vmap(tx.init)` for an ensemble": (ensemble, "all members one noise key"),
    "`jax.tree.map(jnp.zeros_like, state)`": (
        from_state(lambda s: jax.tree.map(jnp.zeros_like, s)),
        "NaN was released",
    ),
    "the same of a rule that drops groups": (
        zeros_of_a_dropping_rule,
        "NaN was released",
    ),
    "`optax.incremental_update` of two states": (
        from_state(lambda s: optax.incremental_update(s, s, 0.5)),
        "does not accept dtypes",
    ),
    "a state cast to half precision": (
        from_state(lambda s: jax.tree.map(lambda x: x.astype(jnp.float16), s)),
        "abstract method astype",
    ),
    "a checkpoint restored without a target": (
        from_state(plain_dicts),
        "restore it with the target tx.init",
    ),
    "`flax.serialization.to_state_dict(state)` as a state": (
        from_state(serialization.to_state_dict),
        "call init of the same chain",
    ),
    "`optax.inject_hyperparams` with the key inside": (
        injected_key,
        "would show the secret key",
    ),
    "batch norm on a batch of one row": (batch_norm, "replace BatchNorm by Group"),
    **DOOR,
    **ROW_SLIPS,
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_refused(name, tmp_path):
    slip, words = SLIPS[name]
    errors = (ValueError, TypeError, OSError, ArithmeticError, NotImplementedError)
    with pytest.raises(errors, match=re.escape(words)) as caught:
        slip(tmp_path)
    if "dp_ilg" in str(caught.traceback[-1].path):
        text = getattr(caught.value, "strerror", None) or str(caught.value)
        assert "\n" not in text and text.endswith("."), text


def steps_in_a_scan():
    def step(state, _):
        updates, state = TX.update(clipped(), state, PARAMS)
        return state, updates

    _, scanned = jax.jit(lambda s: jax.lax.scan(step, s, None, 2))(STATE)
    state, found = STATE, []
    for _ in range(2):
        updates, state = UPDATE(clipped(), state, PARAMS)
        found.append(updates)
    want = jax.tree.map(lambda *x: jnp.stack(x), *found)
    return scanned, want


def through_the_step():
    """What a meta-learner asks for: how the release follows the parameters."""

    def total(params):
        sums = GRAD_FN(params, ROWS, geometry=TX.geometry(STATE))
        return sum(map(jnp.sum, jax.tree.leaves(TX.update(sums, STATE, params)[0])))

    return jax.jit(jax.grad(total))(PARAMS), PARAMS


def round_trip():
    back = serialization.from_state_dict(STATE, serialization.to_state_dict(STATE))
    return UPDATE(clipped(), back, PARAMS)[0], UPDATE(clipped(), STATE, PARAMS)[0]


def looked_ahead():
    tx = optax.lookahead(TX, 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    found = jax.jit(tx.update)(clipped(), tx.init(params), params)[0].fast
    return found, RELEASE(clipped())


def saved_by_orbax():
    import orbax.checkpoint as ocp

    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as saver:
        whole = jax.tree.map(jnp.asarray, clipped())
        saver.save(f"{folder}/sum", whole)
        saver.wait_until_finished()
        back = saver.restore(f"{folder}/sum", whole)
    return RELEASE(back), RELEASE(clipped())


def donated():
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), clipped())
    update = jax.jit(release, donate_argnums=0, keep_unused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not all of it can be used again
        return update(own), RELEASE(clipped())


HARMLESS = {
    "a `ClippedGrad` saved and restored by Orbax": saved_by_orbax,
    "a `ClippedGrad` that is donated": donated,
    "steps in `jax.lax.scan`": steps_in_a_scan,
    "`jax.grad` through a private step": through_the_step,
    "`flax.serialization.from_state_dict`": round_trip,
    "`optax.lookahead(tx, ...)`": looked_ahead,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_gives_the_same_bits(name):
    found, want = HARMLESS[name]()
    assert bits(found) == bits(want)


WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, optax.scale(1.0)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(1.0),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_that_hides_the_geometry_is_named_before_it_is_missed(name, caplog):
    """`wrapped.geometry` is Python's own error, which no library can word."""
    wrapped = WRAPPERS[name](plain())
    wrapped.init(PARAMS)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"optax.{name} around a private chain has no geometry(state)" in line
    assert f"dp_ilg.chain(tx, optax.{name}(...))" in line and line.endswith(".")
    caplog.clear()
    dp_ilg.chain(plain(), optax.scale(1.0)).init(PARAMS)
    assert not caplog.records


def test_the_page_lists_every_slip_and_what_happens():
    rows = re.findall(r"^\| (.+?) \| (refused|harmless)\b", PAGE.read_text(), re.M)
    listed = dict(rows)
    assert len(listed) == len(rows)
    refused = dict.fromkeys([*REFUSED, *SLIPS], "refused")
    harmless = dict.fromkeys([*SAME, *BOUNDED, *HARMLESS], "harmless")
    assert listed == refused | harmless
