"""Dropped groups: absent from norm, sum, noise and step, and scored all the same."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.clipping.clip import CLIP_MODES, as_clip_mode, clip_sum
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.geometry.layers import by_leaf
from dp_ilg.geometry.rules import as_rule, drops, inner_name, top_k
from dp_ilg.noise.add_noise import gaussian_noise, noise_stddev
from dp_ilg.optimizers.behind_noise import behind_noise
from dp_ilg.optimizers.dropped.adam import scale_by_adam_of_kept
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params, per_example, plan

LAYERS = by_leaf(dp_ilg.layers.blocks("d1/kernel", axis=0, edges=[2, 3]))
BOUND = 0.5
AT_ONCE: dict[str, Any] = dict(key=jax.random.key(0), layers="leaf")


def dropped_geometry(params=None, layers=LAYERS):
    params = mlp_params() if params is None else params
    groups = dp_ilg.layers.group(params, layers)
    weights = 0.5 + jnp.arange(len(groups.names), dtype=jnp.float32)
    weights = weights.at[jnp.array([1, 3])].set(0)
    return dp_ilg.Geometry(weights, groups, drops=True)


def by_hand(gradients, geometry, mode):
    """Float64, example by example, without the dropped groups."""
    weights = np.asarray(geometry.weights, np.float64)
    kept, count = weights > 0, np.sum(weights > 0)
    numbers = geometry.groups.expand(jnp.arange(len(weights)) * 1.0)
    owners = [np.asarray(x).astype(int) for x in numbers]
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
    total = [np.zeros(x.shape[1:]) for x in leaves]
    for i in range(len(leaves[0])):
        rows = [
            np.broadcast_to(o, x[i].shape) for o, x in zip(owners, leaves, strict=True)
        ]
        norms = np.array(
            [
                np.sqrt(
                    sum(
                        np.sum(x[i][o == j] ** 2)
                        for o, x in zip(rows, leaves, strict=True)
                    )
                )
                for j in range(len(weights))
            ]
        )
        length = np.sqrt(np.sum((norms[kept] / weights[kept]) ** 2))
        factor = {
            "joint": np.full(len(weights), min(1, BOUND / length)),
            "normalize": np.full(len(weights), BOUND / (length + 1e-4)),
            "per_layer": np.minimum(1, BOUND * weights / np.sqrt(count) / norms),
        }[mode]
        factor = np.where(kept, factor, 0)
        for out, o, x in zip(total, rows, leaves, strict=True):
            out += factor[o] * x[i]
    return jax.tree.unflatten(jax.tree.structure(gradients), total)


@pytest.mark.parametrize("engine", ["bookkeeping", "vmap", "exact"])
@pytest.mark.parametrize("mode", CLIP_MODES)
def test_the_clipped_sum_is_that_of_the_kept_groups(engine, mode):
    params, batch, geometry = mlp_params(), mlp_batch(), dropped_geometry()
    grad_fn = dp_ilg.clipped_grad(
        mlp_loss, l2_clip_norm=BOUND, clip_mode=mode, engine=engine, microbatch_size=5
    )
    run = functools.partial(grad_fn, params, batch)
    want = by_hand(per_example(params, batch), geometry, mode)
    scores = run(geometry=dp_ilg.Geometry.uniform(params, LAYERS)).layer_shares
    for found in (run(geometry=geometry), jax.jit(run)(geometry=geometry)):
        close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)
        jax.tree.map(close, found.gradients, want)
        close(found.layer_shares, scores, rtol=1e-6)
        sums = [found.gradients, found.remainder, found.fine]
        for leaves in map(jax.tree.leaves, sums):
            there = geometry.groups.expand(geometry.weights)
            for x, w in zip(leaves, there, strict=True):
                assert not np.any(np.where(np.asarray(w) == 0, x, 0))


def test_what_is_in_a_dropped_group_can_be_huge_but_must_be_finite():
    """It moves no bit of the sum; NaN still removes the example (law 4)."""
    geometry, grads = dropped_geometry(), per_example(mlp_params(), mlp_batch())
    groups, mode = geometry.groups, as_clip_mode("joint")
    there = groups.expand(geometry.weights)

    def with_last(value):
        leaves, treedef = jax.tree.flatten(grads)
        new = [
            x.at[-1].set(jnp.where(w == 0, value, x[-1]))
            for x, w in zip(leaves, there, strict=True)
        ]
        engine = from_gradients(jax.tree.unflatten(treedef, new), groups)
        return clip_sum(engine, geometry, BOUND, mode)

    plain, huge, broken = with_last(0.0), with_last(1e30), with_last(jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, plain.gradients, huge.gradients)
    gone = clip_sum(
        from_gradients(grads, groups),
        geometry,
        BOUND,
        mode,
        jnp.arange(12) == 11,
    )
    jax.tree.map(np.testing.assert_array_equal, broken.gradients, gone.gradients)


def test_chunks_add_up_and_zeros_without_the_word_are_no_geometry():
    params, geometry = mlp_params(), dropped_geometry()
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=BOUND)
    x, y = mlp_batch()
    halves = [
        grad_fn(params, (x[s], y[s]), geometry=geometry)
        for s in (slice(0, 6), slice(6, 12))
    ]
    whole = grad_fn(params, (x, y), geometry=geometry)
    both = halves[0] + halves[1]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, both.gradients, whole.gradients)
    bare = dp_ilg.Geometry(geometry.weights, geometry.groups)
    noised = gaussian_noise(
        grad_fn(params, (x, y), geometry=bare), 1.0, jax.random.key(0)
    )
    assert all(np.isnan(x).all() for x in jax.tree.leaves(noised))


def test_weights_of_zero_alone_drop_nothing_and_poison_the_release():
    """A state of zeros holds a key that everybody knows: it must release NaN."""
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), importance="top_k:2", **AT_ONCE)
    params = mlp_params()
    state = jax.tree.map(jnp.zeros_like, tx.init(params))
    grads = per_example(params, mlp_batch())
    updates, _ = jax.jit(tx.update)(grads, state, params)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))


def test_noise_has_its_law_in_kept_groups_and_is_absent_in_dropped_ones():
    """Chi-square of 40,000 whitened draws, level 1e-4; 0.97 and 1.03 are refused."""
    the_plan = plan(score_budget=0.0)
    params = {"a": jnp.zeros(20_000), "b": jnp.zeros(500), "c": jnp.zeros(20_000)}
    groups = dp_ilg.layers.group(params, "leaf")
    geometry = dp_ilg.Geometry(jnp.array([0.3, 0.0, 2.0]), groups, drops=True)
    loss = lambda p, x: sum(jnp.sum(v) for v in p.values()) * 0 * x  # noqa: E731
    clipped = dp_ilg.clipped_grad(loss, l2_clip_norm=BOUND)(
        params, jnp.ones(4), geometry=geometry
    )
    stage = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(3))
    release, _ = jax.jit(stage.update)(clipped, stage.init(params))
    assert release["b"].tolist() == [0.0] * 500
    stddev = np.asarray(noise_stddev(the_plan, jnp.int32(0), geometry, BOUND))
    assert stddev[1] == 0
    white = np.concatenate(
        [release[n] * the_plan.batch_size / stddev[k] for k, n in ((0, "a"), (2, "c"))]
    )

    def p_value(scale):
        found = scipy.stats.chi2.cdf(np.sum((white * scale) ** 2), white.size)
        return 2 * min(found, 1 - found)

    assert p_value(1.0) > 1e-4
    assert max(p_value(0.97), p_value(1.03)) < 1e-4


def test_a_group_takes_adams_steps_of_the_times_it_was_kept():
    """Against one optax.adam a group, run on its own steps; the rest stands still."""
    link = scale_by_adam_of_kept(layers="leaf")
    params = {"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(())}
    groups = dp_ilg.layers.group(params, "leaf")
    inner = optax.scale_by_adam()
    state, own = link.init(params), {n: inner.init(params[n]) for n in params}
    rng = np.random.default_rng(0)
    for step in range(30):
        kept = rng.random(3) < 0.5
        kept[step % 3] = True  # a rule keeps one at least
        weights = jnp.asarray(np.where(kept, 1.5, 0), jnp.float32)
        geometry = dp_ilg.Geometry(weights, groups, drops=True)
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        updates, state = jax.jit(link.update)(grads, state, geometry=geometry)
        for k, name in enumerate(params):
            if kept[k]:
                want, own[name] = inner.update(grads[name], own[name])
                np.testing.assert_allclose(updates[name], np.asarray(want), rtol=3e-5)
            else:
                assert not np.any(updates[name])
    assert len(set(state.counts.tolist())) > 1 and max(state.counts) < 30


def changed(one, other):
    """Which leaves differ, by name of the leaf."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    )
    return {jax.tree_util.keystr(path): bool(np.any(x != y)) for (path, x), y in pairs}


TAILS = {
    "dp_adam_ilg": lambda the_plan: dp_ilg.dp_adam_ilg(
        1e-2, the_plan, importance="top_k:2", weight_decay=0.1, **AT_ONCE
    ),
    "adamw": lambda the_plan: behind_noise(
        optax.adamw(1e-2, weight_decay=0.1), the_plan, importance=top_k(2), **AT_ONCE
    ),
    "momentum": lambda the_plan: behind_noise(
        optax.sgd(0.1, momentum=0.9), the_plan, importance=top_k(2, "paper"), **AT_ONCE
    ),
}


@pytest.mark.parametrize("name", TAILS)
def test_parameters_and_moments_of_dropped_groups_stand_still(name):
    """And the choice follows released scores alone: it is there before the batch."""
    tx, params = TAILS[name](plan(noise_multiplier=0.3)), mlp_params()
    state, step = tx.init(params), jax.jit(tx.update)
    assert tx.geometry(state).weights.tolist() == [1.0] * 4  # nothing released yet
    dropped_ever = 0
    for seed in range(4):
        kept = np.asarray(tx.geometry(state).weights) > 0
        grads = per_example(params, mlp_batch(seed=seed))
        updates, after = step(grads, state, params)
        new = optax.apply_updates(params, updates)
        moved = list(changed(new, params).values())
        assert moved == kept.tolist()
        for leaf, before in zip(
            jax.tree.leaves(after), jax.tree.leaves(state), strict=True
        ):
            shapes = [x.shape for x in jax.tree.leaves(params)]
            if before.shape in shapes and before.dtype == jnp.float32:
                same = {
                    bool(np.all(leaf == before))
                    for k, shape in enumerate(shapes)
                    if shape == before.shape and not kept[k]
                }
                if not any(kept[k] for k, s in enumerate(shapes) if s == before.shape):
                    assert False not in same
        params, state, dropped_ever = new, after, dropped_ever + np.sum(~kept)
        weights = np.asarray(tx.geometry(state).weights)
        assert np.sum(weights > 0) == 2
        assert float(tx.importance(state).sum()) == pytest.approx(1)
    assert dropped_ever >= 4


def test_a_dropped_group_comes_back_with_its_score():
    """Loud in a first, in b later: b is dropped, scored, and kept again."""
    the_plan = plan(noise_multiplier=1e-3, num_steps=12)
    tx = dp_ilg.dp_adam_ilg(
        1e-2, the_plan, importance="top_k:1", ema_decay=0.5, **AT_ONCE
    )
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    state, step, seen = tx.init(params), jax.jit(tx.update), []
    for t in range(6):
        loud = ("a", "b")[t >= 2]
        grads = {n: jnp.full((12, 3), 1.0 if n == loud else 0.1) for n in params}
        _, state = step(grads, state, params)
        seen.append((np.asarray(tx.geometry(state).weights) > 0).tolist())
    assert seen[:2] == [[True, False]] * 2 and seen[-1] == [False, True]


@pytest.mark.parametrize("rule", ["min_noise_energy", "paper"])
def test_all_groups_kept_is_the_rule_itself(rule):
    params = mlp_params()
    results = []
    for importance in (rule, f"top_k:4:{rule}"):
        tx = behind_noise(optax.sgd(0.1), plan(), importance=importance, **AT_ONCE)
        state = tx.init(params)
        for seed in range(3):
            grads = per_example(params, mlp_batch(seed=seed))
            updates, state = tx.update(grads, state, params)
        results.append((updates, tx.geometry(state).weights))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), *results
    )


def test_the_average_example_keeps_the_length_of_its_kept_groups():
    values = {"a": 3.0, "b": 1.0, "c": 2.0}
    params = {n: jnp.ones(k) for n, k in zip("abc", (2, 50, 7), strict=True)}
    for rule in ("paper", "min_noise_energy", "sqrt_share", "uniform"):
        fixed = dp_ilg.set_layer_importance(f"top_k:2:{rule}", values)
        geometry = fixed.geometry(fixed.init(params))
        assert geometry.weights.tolist()[1] == 0
        norms = jnp.array([3.0, 1.0, 2.0])
        assert float(geometry.norm(norms)) == pytest.approx(13**0.5, rel=1e-5)


REFUSED = {
    "top_k needs a whole number": dict(importance="top_k:0"),
    "top_k keeps 9 groups, but the model has 4": dict(importance="top_k:9"),
    "importance is 'steep', which is unknown": dict(importance="top_k:2:steep"),
    "a dropped layer releases nothing": dict(importance="top_k:2", source="released"),
    "scale_by_balanced_adam follows every layer": dict(adam="balanced"),
    "scale_by_noise_corrected_adam follows every": dict(adam="noise_corrected"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(words):
    options: dict[str, Any] = {"importance": top_k(2)} | REFUSED[words] | AT_ONCE
    params = mlp_params()
    with pytest.raises(ValueError) as caught:
        tx = dp_ilg.dp_adam_ilg(1e-2, plan(), **options)
        tx.update(per_example(params, mlp_batch()), tx.init(params), params)
    text = str(caught.value)
    assert words in text and "\n" not in text and text.endswith(".")


def test_names_say_what_they_stand_for():
    assert as_rule("top_k:3:paper") == top_k(3, "paper")
    assert drops(as_rule("top_k:3")) and not drops(as_rule("paper"))
    assert inner_name("top_k:3:./my.py:rule") == "./my.py:rule"
    with pytest.raises(ValueError, match="k of top_k"):
        top_k(0)


def test_a_run_with_dropped_layers_is_written_down(tmp_path):
    import json
    import math

    from dp_ilg.experiments.runs import runner
    from tests.experiments.runs.test_trainer import tiny

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_report", lambda path: path)
        config = tiny(optimizer__importance="top_k:1", optimizer__layers="leaf")
        summary = runner.run_training(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(lines[-1])["layers"]
    assert sum(w > 0 for w in found["weights"]) == 1
    zero = [w == 0 for w in found["weights"]]
    assert [x == 0 for x in found["noise_stddev"]] == zero
    assert all(math.isfinite(x) for x in found["noise_stddev"])
    assert summary["importance"] == "top_k:1"


def test_a_prior_over_entries_and_dropped_groups_go_together():
    """Entries follow the rule inside; groups are dropped by their scores."""
    prior = dp_ilg.Prior({"d1/kernel": (jnp.arange(1.0, 6.0), None)}, groups="scores")
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), importance="top_k:2", source=prior, **AT_ONCE)
    params = mlp_params()
    state, grad_fn = tx.init(params), dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    for seed in range(2):
        geometry = tx.geometry(state)
        clipped = grad_fn(params, mlp_batch(seed=seed), geometry=geometry)
        updates, state = tx.update(clipped, state, params)
    moved = [bool(np.any(x)) for x in jax.tree.leaves(updates)]
    assert moved == (np.asarray(geometry.weights) > 0).tolist() and sum(moved) == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_the_audit_of_a_trainer_wants_noise_in_every_layer():
    from dp_ilg.experiments.audits.residuals import observe
    from dp_ilg.experiments.audits.subject import audited_trainer
    from tests.experiments.runs.test_trainer import tiny

    config = tiny(optimizer__importance="top_k:1", optimizer__layers="leaf")
    with pytest.raises(ValueError, match="audit the rule inside it, such as"):
        observe(audited_trainer(config, max_steps=2))
