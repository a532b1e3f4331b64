"""The published algorithm: what it computes, what it claims, and what it leaks."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.baselines import claims, published
from dp_ilg.baselines.published import SETTINGS, PublishedSettings

FACTS = dict(noise_multiplier=10.0, decay=0.5, batch_size=5, num_examples=12)
SMALL = PublishedSettings(rho_total=0.06, **FACTS)  # pyright: ignore


def gradient(size=40_000):
    values = np.random.default_rng(0).standard_t(3, size)
    return {"w": jnp.asarray(values, jnp.float32)}


def releases(settings, reading, steps, updates):
    tx = published.add_published_noise_without_guarantee(
        settings, key=jax.random.key(0), reading=reading
    )
    state, out = tx.init(updates), []
    for _ in range(steps):
        noisy, state = tx.update(updates, state)
        out.append(noisy)
    return out


def by_definition(values, alpha=1.2):
    """Clipped gradient and alpha |g|, in NumPy."""
    norm = np.linalg.norm(np.asarray(values, np.float64))
    bound = alpha * norm / math.sqrt(values.size)
    return np.clip(np.asarray(values, np.float64), -bound, bound), alpha * norm


@pytest.mark.parametrize(("reading", "divisor"), [("printed", 1), ("divided", 5)])
def test_noise_law_of_both_readings(reading, divisor):
    """Chi-square at level 0.002 accepts sigma and rejects 0.97 and 1.03 of it."""
    updates = gradient()
    clipped, scale = by_definition(updates["w"])
    assert np.mean(np.abs(clipped) == np.abs(clipped).max()) > 0.1  # the clip binds
    noisy = np.asarray(releases(SMALL, reading, 1, updates)[0]["w"], np.float64)
    square = np.sum((noisy - clipped) ** 2) / (scale * 10.0 / divisor) ** 2
    low, high = stats.chi2.ppf([1e-3, 1 - 1e-3], noisy.size)
    assert low < square < high
    assert not low < square / 0.97**2 < high and not low < square / 1.03**2 < high


def test_noise_decays_by_epoch_to_its_floor_and_then_training_stops():
    floor = math.sqrt(2 * math.log(1.25e5))  # eps_lim is 1
    sigmas = claims.claimed_noise_multipliers(SMALL)
    expected = [max(10 / (1 + 0.5 * t), floor) for t in range(len(sigmas))]
    np.testing.assert_allclose(sigmas, expected)
    assert sigmas[-1] == pytest.approx(floor) and len(sigmas) == 4
    assert claims.claimed_rho(sigmas) <= 0.06 < claims.claimed_rho([*sigmas, floor])
    updates = gradient(4000)
    clipped, scale = by_definition(updates["w"])
    out = releases(SMALL, "printed", 10, updates)  # 2 steps an epoch
    spread = [np.std(np.asarray(r["w"]) - clipped) / scale for r in out[:8]]
    np.testing.assert_allclose(spread, np.repeat(sigmas, 2), rtol=0.05)
    assert not np.any([r["w"] for r in out[8:]])
    assert len({np.asarray(r["w"]).tobytes() for r in out[:8]}) == 8


def test_the_optimizer_is_that_noise_before_adam_and_stops_with_it():
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    key = jax.random.key(1)
    tx = published.dp_adam_ilg_without_guarantee(0.1, SMALL, key=key)
    noise = published.add_published_noise_without_guarantee(SMALL, key=key)
    adam = optax.adam(0.1)
    state, noise_state = tx.init(params), noise.init(params)
    adam_state = adam.init(params)
    for step in range(10):
        grads = {name: p * (step + 1.0) for name, p in params.items()}
        updates, state = tx.update(grads, state, params)
        noisy, noise_state = noise.update(grads, noise_state)
        expected, adam_state = adam.update(noisy, adam_state)
        kept = 1.0 if step < 8 else 0.0
        for got, want in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            np.testing.assert_allclose(got, kept * want, rtol=1e-5, atol=1e-7)


def test_a_jitted_step_in_half_precision_keeps_its_type():
    params = {"w": jnp.ones(6, jnp.bfloat16), "empty": jnp.zeros((0,))}
    tx = published.dp_adam_ilg_without_guarantee(0.1, SMALL, key=jax.random.key(0))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    whole, _ = jax.tree.flatten(updates)
    assert [leaf.dtype for leaf in whole] == [jnp.float32, jnp.bfloat16]
    assert bool(jnp.all(jnp.isfinite(whole[1].astype(jnp.float32))))


def test_the_spread_of_a_release_shows_the_norm_of_the_raw_gradient():
    """The leak: 60,000 coordinates show the secret norm to half a percent."""
    for size in (0.1, 1.0, 7.0):
        updates = {"w": size * gradient(60_000)["w"]}
        (release,) = releases(SMALL, "printed", 1, updates)
        _, scale = by_definition(updates["w"])
        seen = float(np.std(np.asarray(release["w"], np.float64))) / 10
        assert seen == pytest.approx(scale, rel=0.01)


@pytest.mark.parametrize(
    ("name", "epochs", "claim"), [("mnist", 46, 6.764), ("cifar10", 101, 9.990)]
)
def test_epochs_of_the_papers_budgets(name, epochs, claim):
    sigmas = claims.claimed_noise_multipliers(SETTINGS[name])
    assert len(sigmas) == epochs == claims.claimed_epochs(SETTINGS[name])
    found = claims.claimed_epsilon(claims.claimed_rho(sigmas), 1e-5)
    assert found == pytest.approx(claim, abs=5e-4)


def test_law_12_name_docstring_and_log_say_that_there_is_no_guarantee(caplog):
    assert "published" not in dp_ilg.__all__
    factories = [n for n in published.__all__ if "published_noise" in n or "adam" in n]
    assert len(factories) == 2
    for name in factories:
        assert "without_guarantee" in name
        text = getattr(published, name).__doc__
        assert "NO privacy guarantee" in text and "Privacy: none" in text
        caplog.clear()
        with caplog.at_level(logging.INFO, "dp_ilg.published"):
            rate = (0.1,) if "adam" in name else ()
            getattr(published, name)(*rate, SMALL, key=jax.random.key(0))
        assert "no privacy guarantee" in caplog.text and "epsilon" not in caplog.text
    assert "WITHOUT ANY PRIVACY GUARANTEE" in (published.__doc__ or "")
    epsilons = [name for name in vars(claims) if "epsilon" in name or "rho" in name]
    assert epsilons and all("claimed" in name for name in epsilons)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(rho_total=0.004), "the first epoch costs 0.005"),
        (dict(rho_total=0), "rho_total is 0"),
        (dict(rho_total=1e9), "more than 100000 epochs"),
        (dict(decay=-1), "decay is -1"),
        (dict(noise_multiplier=math.inf), "noise_multiplier is inf"),
        (dict(batch_size=13), "batch_size is 13, but there are only 12"),
        (dict(delta=1), "delta is 1"),
        (dict(eps_lim=0), "eps_lim is 0"),
    ],
)
def test_settings_that_make_no_run_are_one_sentence(change, words):
    facts = dict(rho_total=0.06) | FACTS | change
    with pytest.raises(ValueError, match=words) as caught:
        PublishedSettings(**facts)  # pyright: ignore
    assert ". " not in str(caught.value)


def test_mistakes_are_one_sentence():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="reading is 'both', but must be one of"):
        published.add_published_noise_without_guarantee(SMALL, key=key, reading="both")
    with pytest.raises(ValueError, match="learning_rate is -1"):
        published.dp_adam_ilg_without_guarantee(-1, SMALL, key=key)
    with pytest.raises(TypeError, match="make it with jax.random.key"):
        published.dp_adam_ilg_without_guarantee(1, SMALL, key=0)
    with pytest.raises(ValueError, match="empty"):
        claims.claimed_rho([])
