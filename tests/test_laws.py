"""The twelve laws that docs/laws.md explains, each under its name."""

import dataclasses
import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.noise.add_noise import noise_stddev
from tests.helpers.agreement import QUICK
from tests.helpers.models import (
    CLIP_MODES,
    mlp_batch,
    mlp_loss,
    mlp_params,
    noiseless,
    per_example,
    plan,
    trees_close,
)

quick = functools.partial(jax.jit, compiler_options=QUICK)


def optimizer(the_plan=None, **options):
    the_plan = the_plan or plan()
    return dp_ilg.dp_adam_ilg(1e-2, the_plan, key=jax.random.key(0), **options)


def run(tx, steps, start=None, batches=mlp_batch):
    params, state = start or (mlp_params(), tx.init(mlp_params()))
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(per_example(params, batches(seed=step)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_law_1_one_geometry():
    """Noise is drawn in the geometry and norm the sum carries, whatever else says."""
    the_plan = plan(l2_clip_norm=5.0, score_budget=0.0)
    params = mlp_params(sizes=(100, 100, 100))
    zero = jax.tree.map(jnp.zeros_like, params)
    noise = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0))
    for bound, weights in ((1.0, [1.0, 2.0]), (2.5, [0.3, 1.0])):
        geometry = dp_ilg.Geometry.of(params, weights)
        clipped = dp_ilg.ClippedGrad(zero, jnp.zeros(2), geometry, jnp.float32(bound))
        release, _ = noise.update(clipped, noise.init(params))
        scale = the_plan.noise_multipliers[0] * bound / the_plan.batch_size
        for layer, weight in zip(("d1", "d2"), weights, strict=True):
            ratio = np.std(release[layer]["kernel"]) / (scale * weight)
            assert 0.97 < ratio < 1.03
    with pytest.raises(TypeError, match="not a ClippedGrad"):
        noise.update(zero, noise.init(params))


def test_law_1_a_geometry_of_other_groups_is_refused():
    tx = optimizer(layers="leaf")
    params = mlp_params()
    other = dp_ilg.Geometry.uniform(params, "module")
    grad_fn = jax.jit(dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0))
    clipped = grad_fn(params, mlp_batch(), geometry=other)
    with pytest.raises(ValueError, match="the chain.s groups are"):
        tx.update(clipped, tx.init(params), params)


def test_law_2_past_releases_only():
    """The clip of a step does not depend on its batch, only on the state before it."""
    assert list(inspect.signature(optimizer().geometry).parameters) == ["state"]
    tx = optimizer()
    params, state = run(tx, 3)
    before = tx.geometry(state)
    for seed in (50, 51):
        gradients = per_example(params, mlp_batch(seed=seed))
        clipped, _ = dp_ilg.clip_per_example(1.0).update(
            gradients, optax.EmptyState(), geometry=before
        )
        a, _ = tx.update(clipped, state, params)
        b, _ = tx.update(gradients, state, params)
        trees_close(a, b)


def test_law_2_nothing_may_touch_gradients_before_the_noise():
    the_plan = plan()
    k1, k2 = jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match="before the noise"):
        dp_ilg.chain(
            dp_ilg.clip_per_example(1.0),
            optax.scale(3.0),
            dp_ilg.score_layer_importance("paper", the_plan, key=k1),
            dp_ilg.add_importance_noise(the_plan, key=k2),
        )


def test_law_3_keyed_by_step():
    """A run resumed at step 3 repeats the releases bit for bit."""
    tx = optimizer()
    whole, _ = run(tx, 6)
    middle = run(tx, 3)
    rest, _ = run(
        optimizer(), 3, start=middle, batches=lambda seed: mlp_batch(seed=seed + 3)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, rest)


def test_law_3_all_draws_are_distinct_over_steps_leaves_and_restarts():
    the_plan = plan(score_budget=0.0)
    params = {"a": jnp.zeros(50), "b": jnp.zeros(50)}
    seen = []
    for seed in (0, 1):
        noise = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(seed))
        state = noise.init(params)
        clipped = dp_ilg.ClippedGrad(
            params, jnp.zeros(2), dp_ilg.Geometry.uniform(params), jnp.float32(1.0)
        )
        for _ in range(4):
            release, state = noise.update(clipped, state)
            seen += [np.asarray(v) for v in release.values()]
    flat = np.concatenate(seen)
    # float32 normals collide by chance about once in 10^5 pairs of this size
    assert flat.size - len(np.unique(flat)) <= 2
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.75 for a, b in itertools.pairwise(seen))


def test_law_3_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        run(optimizer(), 3)


@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("microbatch", [None, 4])
def test_law_4_zero_is_absent(bad, mode, microbatch):
    """A bad example, or a bad padding row, leaves the sum of the others as it was."""
    params, (x, y) = mlp_params(), mlp_batch()
    loss = lambda p, e: jnp.sum(p["d1"]["kernel"][0] * e[0][0]) + mlp_loss(p, e)  # noqa: E731
    geometry = dp_ilg.Geometry.uniform(params, "leaf")
    grad_fn = jax.jit(
        dp_ilg.clipped_grad(
            loss, l2_clip_norm=0.5, clip_mode=mode, microbatch_size=microbatch
        )
    )
    spoiled = x.at[3].set(bad)
    mask = jnp.arange(12) == 3
    reference = grad_fn(params, (x, y), geometry=geometry, is_padding_example=mask)
    for padding in (mask, jnp.zeros(12, bool)):
        got = grad_fn(
            params, (spoiled, y), geometry=geometry, is_padding_example=padding
        )
        trees_close(got.gradients, reference.gradients)
        trees_close(got.layer_shares, reference.layer_shares)


def test_law_4_one_nan_entry_removes_its_example_and_no_other():
    gradients = {"w": jnp.array([[jnp.nan, 1e6], [3.0, 4.0]])}
    params = {"w": jnp.zeros(2)}
    clip = dp_ilg.clip_per_example(1.0)
    clipped, _ = clip.update(
        gradients, clip.init(params), geometry=dp_ilg.Geometry.uniform(params)
    )
    np.testing.assert_allclose(clipped.gradients["w"], [0.6, 0.8], rtol=1e-5)


def test_law_5_expected_size():
    """Sums are divided by q N whatever was drawn; an empty batch is a noise step."""
    tx = dp_ilg.dp_adam_ilg(1.0, noiseless(), key=jax.random.key(0))
    noise_only = dp_ilg.dp_adam_ilg(1.0, plan(), key=jax.random.key(0))
    first = dp_ilg.chain(
        dp_ilg.clip_per_example(1e6),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(noiseless(), key=jax.random.key(0)),
    )
    params = mlp_params()
    for size in (3, 40):
        gradients = per_example(params, mlp_batch(size))
        release, _ = quick(first.update)(gradients, first.init(params), params)
        trees_close(release, jax.tree.map(lambda g: g.sum(0) / 12, gradients))
    empty = jax.tree.map(lambda p: jnp.zeros((0, *p.shape)), params)
    started = noise_only.init(params)
    updates, state = quick(noise_only.update)(empty, started, params)
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves(updates))
    assert float(jnp.sum(jnp.abs(updates["d1"]["kernel"]))) > 0
    assert int(state[2].step) == 1
    still, _ = quick(tx.update)(empty, tx.init(params), params)
    assert all(float(jnp.max(jnp.abs(u))) == 0 for u in jax.tree.leaves(still))


def test_law_6_one_plan():
    """Noise, score, sampler, accountant and ledger read one object's numbers."""
    the_plan = plan(schedule=dp_ilg.schedules.linear(0.5), num_steps=4)
    z, s, t = (
        the_plan.noise_multipliers,
        the_plan.gradient_noise_multipliers,
        the_plan.score_noise_multipliers,
    )
    np.testing.assert_allclose(z, (s**-2 + t**-2) ** -0.5, rtol=1e-12)
    whole: Any = the_plan.event()
    events = [e.event if hasattr(e, "count") else e for e in whole.events]
    accounted = [e.event.noise_multiplier for e in events]
    np.testing.assert_allclose(accounted, z, rtol=1e-12)
    assert {e.sampling_probability for e in events} == {the_plan.sampling_prob}
    sampler = dp_ilg.PoissonSampler.for_plan(the_plan, key=jax.random.key(0))
    assert sampler.sampling_prob == the_plan.sampling_prob
    geometry = dp_ilg.Geometry.uniform({"w": jnp.zeros(1)})
    for step in range(4):
        applied = noise_stddev(the_plan, jnp.int32(step), geometry, jnp.float32(1.0))
        np.testing.assert_allclose(applied[0], s[step], rtol=1e-6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        the_plan.batch_size = 5  # pyright: ignore


def test_law_7_never_past_the_plan(tmp_path):
    the_plan = plan(num_steps=2)
    ledger = dp_ilg.PrivacyLedger(tmp_path / "ledger.jsonl", the_plan)
    ledger.record(0)
    ledger.record(1)
    with pytest.raises(dp_ilg.BudgetExhausted):
        ledger.record(2)
    ledger.close()
    params, _ = run(optimizer(the_plan), 2)
    assert all(bool(jnp.all(jnp.isfinite(p))) for p in jax.tree.leaves(params))
    params, _ = run(optimizer(the_plan), 3)
    assert all(bool(jnp.all(jnp.isnan(p))) for p in jax.tree.leaves(params))
    sampler = dp_ilg.PoissonSampler.for_plan(the_plan, key=jax.random.key(0))
    with pytest.raises(ValueError, match="2"):
        sampler.indices(2)


def test_law_8_whole_batch():
    """A draw in small chunks gives the sum of the whole draw: nothing is cut."""
    the_plan = plan(num_examples=200, batch_size=60)
    params = mlp_params()
    x, y = (np.asarray(a) for a in mlp_batch(200))
    geometry = dp_ilg.Geometry.uniform(params)
    grad_fn = jax.jit(dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=0.5))
    small = dp_ilg.PoissonSampler.for_plan(the_plan, key=1, chunk_size=7)
    indices = small.indices(0)
    chunks = small.chunks(0)
    assert len(chunks) > 5
    parts = [
        grad_fn(
            params,
            (jnp.asarray(x[c.indices]), jnp.asarray(y[c.indices])),
            geometry=geometry,
            is_padding_example=jnp.asarray(c.is_padding_example),
        )
        for c in chunks
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    whole = grad_fn(params, (x[indices], y[indices]), geometry=geometry)
    trees_close(total.gradients, whole.gradients, atol=1e-5)


def test_law_9_keys_are_given():
    """No key has a default; the state holds all randomness; nothing prints it."""
    for verb in (
        dp_ilg.dp_adam_ilg,
        dp_ilg.add_importance_noise,
        dp_ilg.score_layer_importance,
        dp_ilg.differentially_private_aggregate,
        dp_ilg.PoissonSampler,
    ):
        parameter = inspect.signature(verb).parameters["key"]
        assert parameter.default is inspect.Parameter.empty
    np.random.seed(0)
    a, _ = run(optimizer(), 1)
    np.random.seed(1)
    b, _ = run(optimizer(), 1)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert "12345" not in repr(dp_ilg.PoissonSampler(10, 0.5, key=12345))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_law_10_norms_in_float32(dtype):
    params = {"w": jnp.zeros(5000, dtype)}
    geometry = dp_ilg.Geometry.uniform(params)
    clip = dp_ilg.clip_per_example(1.0)
    for size in (1e-3, 1.0, 3e4):
        gradients = {"w": jnp.full((1, 5000), size, dtype)}
        clipped, _ = clip.update(gradients, clip.init(params), geometry=geometry)
        assert clipped.gradients["w"].dtype == jnp.float32
        norm = np.linalg.norm(np.asarray(clipped.gradients["w"], np.float64))
        true = np.linalg.norm(np.asarray(gradients["w"], np.float64))
        np.testing.assert_allclose(norm, min(1.0, true), rtol=1e-5)
        assert norm <= 1.0


def test_law_11_unknown_raises():
    params, the_plan = mlp_params(), plan()
    for options, words in (
        ({"importance": "best"}, "importance is 'best'"),
        ({"source": "guess"}, "source is 'guess'"),
        ({"clip_mode": "soft"}, "clip_mode is 'soft'"),
        ({"adam": "fast"}, "adam is 'fast'"),
        ({"layers": "rows"}, "layers is 'rows'"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            optimizer(the_plan, **options)
        assert str(caught.value).count(". ") == 0
    with pytest.raises(ValueError, match="batch statistic"):
        dp_ilg.layers.group({"params": params, "batch_stats": {"m": jnp.ones(2)}})
    with pytest.raises(ValueError, match="engine is 'ghost'"):
        dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0, engine="ghost")


def test_law_12_claims_are_labelled():
    """A plan without noise says that it has no privacy; every verb states its claim."""
    text = str(noiseless().statement())
    assert "no privacy" in text.lower()
    for name in (
        "dp_adam_ilg",
        "chain",
        "add_importance_noise",
        "score_layer_importance",
        "score_released_gradients",
        "set_layer_importance",
        "clip_per_example",
        "clipped_grad",
        "differentially_private_aggregate",
        "scale_by_balanced_adam",
        "scale_by_noise_corrected_adam",
    ):
        assert "Privacy:" in (getattr(dp_ilg, name).__doc__ or ""), name
