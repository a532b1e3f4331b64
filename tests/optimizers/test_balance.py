"""Adam balanced by coherence: against plain Adam, and against NumPy spelt out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.geometry.layers import blocks, by_leaf, by_module
from tests.helpers.models import mlp_batch, mlp_params, per_example, plan

PARAMS = {"a": {"w": jnp.zeros((40, 3))}, "b": {"w": jnp.zeros(50)}}


def geometry(params: Any = PARAMS, layers: Any = "module") -> dp_ilg.Geometry:
    return dp_ilg.Geometry.uniform(params, layers)


def releases(count, seed=0, signal=(0.3, 0.02), noise=0.1):
    """Noisy gradients of which layer a has more signal than layer b."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            "a": {"w": jnp.asarray(signal[0] + noise * rng.normal(size=(40, 3)))},
            "b": {"w": jnp.asarray(signal[1] + noise * rng.normal(size=50))},
        }


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def run(tx, given, params: Any = PARAMS, layers: Any = "module", clip=1.0) -> Any:
    """Updates of every step, and the last state."""
    shared = dict(geometry=geometry(params, layers), l2_clip_norm=clip)
    state, out = tx.init(params), []
    update = jax.jit(lambda u, s: tx.update(u, s, params, **shared))
    for release in given:
        updates, state = update(release, state)
        out.append(updates)
    return out, state


def plain(given, params=PARAMS):
    adam = optax.scale_by_adam()
    state, out = adam.init(params), []
    for release in given:
        updates, state = adam.update(release, state, params)
        out.append(updates)
    return out


def ratios(ours, theirs):
    """By which factor each leaf of an update differs; one number a leaf."""
    found = jax.tree.map(
        lambda x, y: np.asarray(x, float) / np.asarray(y, float), ours, theirs
    )
    for leaf in jax.tree.leaves(found):
        assert np.allclose(leaf, leaf.reshape(-1)[0], rtol=1e-4)
    return [float(leaf.reshape(-1)[0]) for leaf in jax.tree.leaves(found)]


def spelt_out(given, power=0.3, decay=0.9, floor=1e-4, b1=0.9):
    """The factors of every step, in float64 and with a plain loop."""
    mean = [np.zeros((40, 3)), np.zeros(50)]
    product, energy = np.zeros(2), np.zeros(2)
    out = []
    for t, release in enumerate(given):
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(release)]
        if t > 0:
            for k, leaf in enumerate(leaves):
                there = float(np.sum(leaf * mean[k])) / (1 - b1**t)
                product[k] = decay * product[k] + (1 - decay) * there
                energy[k] = decay * energy[k] + (1 - decay) * float(np.sum(leaf**2))
        mean = [b1 * m + (1 - b1) * x for m, x in zip(mean, leaves, strict=True)]
        if t < 5:
            out.append(np.ones(2))
            continue
        logs = -power * np.log(np.clip(product / energy, floor, 1))
        out.append(np.exp(logs - logs.mean()))
    return out


def test_the_factors_are_those_spelt_out():
    given = list(releases(20))
    ours, state = run(dp_ilg.scale_by_balanced_adam(), given)
    wanted = spelt_out(given)
    for mine, adams, factors in zip(ours, plain(given), wanted, strict=True):
        assert np.allclose(ratios(mine, adams), factors, rtol=1e-4)
    assert ratios(ours[-1], plain(given)[-1])[1] > 1.2  # less signal, larger steps
    wrong = spelt_out(given, power=0.29)[-1]
    assert not np.allclose(ratios(ours[-1], plain(given)[-1]), wrong, rtol=1e-3)


def test_coherence_is_the_share_of_signal():
    """For known signal and noise; the noise alone is told from a signal as long."""
    sizes, signal, noise = np.array([120, 50]), np.array([0.05, 0.02]), 0.1
    tx = dp_ilg.scale_by_balanced_adam(decay=0.98)
    shared = dict(geometry=geometry(), l2_clip_norm=1.0)

    @jax.jit
    @jax.vmap
    def coherence(given: Any) -> Any:
        def step(state, release):
            return tx.update(release, state, PARAMS, **shared)[1], None

        state, _ = jax.lax.scan(step, tx.init(PARAMS), given)
        return state.product / state.energy

    runs = [stacked(releases(60, k, tuple(signal), noise)) for k in range(40)]
    found = np.asarray(coherence(stacked(runs)))
    share = signal**2 / (signal**2 + noise**2)
    error = np.std(found, axis=0, ddof=1) / np.sqrt(len(found))
    assert np.all(np.abs(np.mean(found, axis=0) - share) < 4 * error)
    assert np.all(error < share / 5)
    assert np.all(sizes > 1 / share / 10)  # or nothing could be seen of it


def test_of_pure_noise_there_is_nothing_below_the_floor():
    given = list(releases(30, signal=(0.5, 0.0)))
    tx = dp_ilg.scale_by_balanced_adam(floor=0.01)
    ours, _ = run(tx, given)
    factors = np.array([ratios(a, b) for a, b in zip(ours, plain(given), strict=True)])
    assert factors[:, 1].max() / factors[:, 0].min() <= 0.01**-0.3 * 1.001
    assert np.allclose(np.prod(factors, axis=1), 1, rtol=1e-3)


@pytest.mark.parametrize("facts", [{"power": 0}, {"layers": lambda path: "all"}])
def test_it_is_adam(facts):
    given = list(releases(12))
    layers = facts.get("layers", "module")
    ours, _ = run(dp_ilg.scale_by_balanced_adam(**facts), given, layers=layers)
    for mine, adams in zip(ours, plain(given), strict=True):
        assert np.allclose(ratios(mine, adams), 1, rtol=1e-6)


def test_the_unit_of_the_clip_norm_does_not_matter():
    given = list(releases(12))
    small = [jax.tree.map(lambda x: 1e-12 * x, release) for release in given]
    ours, _ = run(dp_ilg.scale_by_balanced_adam(eps=0.0), given)
    theirs, _ = run(dp_ilg.scale_by_balanced_adam(eps=0.0), small, clip=1e-12)
    assert np.allclose(ratios(ours[-1], theirs[-1]), 1, rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_in_a_chain_with_bands_and_frozen_leaves(dtype):
    params: Any = mlp_params(dtype=dtype)
    name = "d1/kernel"
    layers = by_leaf(blocks(name, axis=0, num_blocks=2), frozen=("d2/bias",))
    the_plan = plan(num_steps=8)
    tx = dp_ilg.dp_adam_ilg(
        0.01, the_plan, key=jax.random.key(0), layers=layers, adam="balanced"
    )
    state, start = tx.init(params), params
    updates: Any
    for seed in range(8):
        grads = per_example(params, mlp_batch(seed=seed))
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert params["d1"]["kernel"].dtype == dtype
    assert jnp.array_equal(params["d2"]["bias"], start["d2"]["bias"])
    assert not jnp.array_equal(params["d1"]["kernel"], start["d1"]["kernel"])
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))
    updates, _ = tx.update(grads, state, params)  # no budget is left
    assert bool(jnp.all(jnp.isnan(updates["d1"]["kernel"])))


def test_a_layer_without_a_release_has_no_say():
    """Neither a frozen layer nor one whose gradient is zero moves the others."""
    given = [{**r, "b": {"w": jnp.zeros(50)}} for r in releases(12)]
    ours, _ = run(dp_ilg.scale_by_balanced_adam(), given)
    assert np.allclose(ours[-1]["a"]["w"], plain(given)[-1]["a"]["w"], rtol=1e-5)
    assert not jnp.any(ours[-1]["b"]["w"])
    frozen = by_module(frozen=("b",))
    tx = dp_ilg.scale_by_balanced_adam(layers=frozen)
    ours, _ = run(tx, given, layers=frozen)
    assert np.allclose(ours[-1]["a"]["w"], plain(given)[-1]["a"]["w"], rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan, 1e25])
def test_a_release_that_is_not_finite_stays_where_it_is(bad):
    """Its layer keeps its factor and the others theirs."""
    given = list(releases(14))
    spoiled = [dict(release) for release in given]
    w = jnp.asarray(given[7]["b"]["w"])
    spoiled[7]["b"] = {"w": w.at[3].set(bad)}
    ours, state = run(dp_ilg.scale_by_balanced_adam(), spoiled)
    assert bool(jnp.all(jnp.isfinite(state.product) & jnp.isfinite(state.energy)))
    whole = np.isfinite(plain(spoiled)[-1]["b"]["w"])
    assert np.array_equal(np.isfinite(ours[-1]["b"]["w"]), whole)
    assert bool(jnp.all(jnp.isfinite(ours[-1]["a"]["w"])))


def test_traced_settings():
    def last(power):
        tx = dp_ilg.scale_by_balanced_adam(power=power)
        return run(tx, list(releases(8)))[0][-1]["b"]["w"]

    assert np.allclose(jax.jit(last)(0.3), last(0.3), rtol=1e-5)
    assert not np.allclose(jax.jit(last)(0.3), last(0.2), rtol=1e-3)


def test_what_is_refused():
    for power in (-1, 1, float("nan"), "much"):
        with pytest.raises(ValueError, match="power is"):
            dp_ilg.scale_by_balanced_adam(power=power)
    with pytest.raises(ValueError, match="decay is 1"):
        dp_ilg.scale_by_balanced_adam(decay=1)
    with pytest.raises(ValueError, match="floor is 0"):
        dp_ilg.scale_by_balanced_adam(floor=0)
    tx = dp_ilg.scale_by_balanced_adam()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="behind add_importance_noise"):
        tx.update(PARAMS, state, PARAMS)
    other = geometry(layers="leaf", params={"a": jnp.zeros(2)})
    with pytest.raises(ValueError, match="made for 2 layers, but the geometry has 1"):
        tx.update(PARAMS, state, PARAMS, geometry=other, l2_clip_norm=1.0)
