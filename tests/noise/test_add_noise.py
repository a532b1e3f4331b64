"""The noise is Gaussian with exactly the planned scale, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.noise.normal import standard_normal
from tests.helpers.models import plan

DRAWS = 40_000
LEVEL = 1e-4


def whitened(release, stddev):
    return np.asarray(release, np.float64).ravel() / stddev


def chi_square_accepts(sample, scale=1.0, level=LEVEL):
    """Two-sided chi-square test of the variance of a centred normal sample."""
    statistic = np.sum((sample / scale) ** 2)
    low, high = scipy.stats.chi2.ppf([level / 2, 1 - level / 2], sample.size)
    return low <= statistic <= high


def layered_release(dtype="float32", steps=(0,), the_plan=None):
    the_plan = the_plan or plan(l2_clip_norm=3.0, score_budget=0.05)
    sizes = {"a": 40_000, "b": 40_000, "c": 40_000}
    params = {n: jnp.zeros((s // 100, 100), dtype) for n, s in sizes.items()}
    geometry = dp_ilg.Geometry.of(params, {"a": 0.1, "b": 1.0, "c": 7.0})
    noise = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(7))
    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    clipped = dp_ilg.ClippedGrad(zero, jnp.zeros(3), geometry, jnp.float32(3.0))
    state = noise.init(params)
    update = jax.jit(noise.update)
    out = []
    for step in range(max(steps) + 1):
        release, state = update(clipped, state)
        if step in steps:
            out.append(release)
    return out, geometry, the_plan


def test_chi_square_of_every_layer_rejects_three_percent():
    (release,), geometry, the_plan = layered_release()
    sigma = the_plan.gradient_noise_multipliers[0]
    for name, weight in zip(geometry.groups.names, geometry.weights, strict=True):
        stddev = sigma * 3.0 * float(weight) / the_plan.batch_size
        sample = whitened(release[name], stddev)
        assert sample.size == DRAWS
        assert chi_square_accepts(sample)
        assert not chi_square_accepts(sample, 0.97)
        assert not chi_square_accepts(sample, 1.03)
        assert scipy.stats.kstest(sample, "norm").pvalue > LEVEL
        assert scipy.stats.kstest(sample * 1.10, "norm").pvalue < LEVEL


def test_noise_in_bfloat16_parameters_has_the_same_law():
    (release,), geometry, the_plan = layered_release("bfloat16")
    sigma = the_plan.gradient_noise_multipliers[0]
    for name, weight in zip(geometry.groups.names, geometry.weights, strict=True):
        assert release[name].dtype == jnp.bfloat16
        stddev = sigma * 3.0 * float(weight) / the_plan.batch_size
        sample = whitened(release[name], stddev)
        assert chi_square_accepts(sample)
        assert not chi_square_accepts(sample, 0.97)
        assert not chi_square_accepts(sample, 1.03)


def test_blocks_of_a_leaf_get_their_own_noise():
    the_plan = plan(score_budget=0.0)
    params = {"embedding": jnp.zeros((2000, 40))}
    layers = dp_ilg.layers.blocks("embedding", edges=[1000])
    geometry = dp_ilg.Geometry.of(params, [0.5, 4.0], layers)
    noise = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(1))
    clipped = dp_ilg.ClippedGrad(params, jnp.zeros(2), geometry, jnp.float32(1.0))
    release, _ = noise.update(clipped, noise.init(params))
    for rows, weight in ((slice(0, 1000), 0.5), (slice(1000, 2000), 4.0)):
        stddev = the_plan.noise_multipliers[0] * weight / the_plan.batch_size
        sample = whitened(release["embedding"][rows], stddev)
        assert chi_square_accepts(sample) and not chi_square_accepts(sample, 1.03)
        assert not chi_square_accepts(sample, 0.97)


def test_noise_is_independent_over_steps_and_layers():
    releases, geometry, _ = layered_release(steps=(0, 1, 2))
    rows = [np.asarray(r[n]).ravel() for r in releases for n in geometry.groups.names]
    correlation = np.corrcoef(np.stack(rows)) - np.eye(len(rows))
    pairs = len(rows) * (len(rows) - 1) / 2
    limit = scipy.stats.norm.ppf(1 - LEVEL / (2 * pairs)) / np.sqrt(DRAWS)
    assert np.max(np.abs(correlation)) < limit


def test_score_noise_has_its_planned_scale_and_is_not_the_gradient_noise():
    the_plan = plan(score_budget=0.3, num_steps=400, num_stages=1)
    count = 400
    params = {f"l{i:03d}": jnp.zeros(1) for i in range(count)}
    key = jax.random.key(3)
    score = dp_ilg.score_layer_importance(
        "uniform", the_plan, key=key, ema_decay=0.0, layers="leaf"
    )
    state = score.init(params)
    geometry = score.geometry(state)
    clipped = dp_ilg.ClippedGrad(params, jnp.zeros(count), geometry, jnp.float32(1.0))
    update = jax.jit(score.update)
    draws = []
    for _ in range(100):
        _, state = update(clipped, state)
        draws.append(np.asarray(state.average))
    stddev = the_plan.score_noise_multipliers[0] / the_plan.batch_size
    sample = whitened(np.stack(draws), stddev)
    assert sample.size == DRAWS and chi_square_accepts(sample)
    assert not chi_square_accepts(sample, 0.97)
    assert not chi_square_accepts(sample, 1.03)
    same_key = standard_normal(jax.random.fold_in(key, 0), (count,))
    assert abs(np.corrcoef(draws[0], same_key)[0, 1]) < 0.25


@pytest.mark.parametrize("shape", ["inverse_time", "linear", "cosine", "stages"])
def test_noise_follows_the_schedule(shape):
    schedule = {
        "inverse_time": dp_ilg.schedules.inverse_time(0.5),
        "linear": dp_ilg.schedules.linear(0.5),
        "cosine": dp_ilg.schedules.cosine(0.5),
        "stages": dp_ilg.schedules.stages([2.0, 1.0]),
    }[shape]
    the_plan = plan(schedule=schedule, num_steps=4, l2_clip_norm=3.0, batch_size=500)
    releases, geometry, _ = layered_release(steps=(0, 3), the_plan=the_plan)
    sigmas = the_plan.gradient_noise_multipliers
    assert sigmas[0] != sigmas[3]
    for step, release in zip((0, 3), releases, strict=True):
        stddev = sigmas[step] * 3.0 / the_plan.batch_size
        sample = whitened(release["b"], stddev)
        assert chi_square_accepts(sample) and not chi_square_accepts(sample, 1.03)
