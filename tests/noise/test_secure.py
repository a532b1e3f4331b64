"""Noise from a cryptographic generator: repeatable, tied to its step."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.noise.secure import NoiseDraws, SecureNoise
from dp_ilg.noise.steps import in_stddevs, steps_of
from tests.helpers.models import plan, trees_close

SECRET = bytes(range(32))
PARAMS = {"a": jnp.zeros((3, 4)), "b": jnp.zeros(5, jnp.bfloat16)}
GRADS = {"a": jnp.ones((6, 3, 4)), "b": jnp.ones((6, 5), jnp.bfloat16)}


def optimizer(method=dp_ilg.dp_adam_ilg, **options):
    return method(0.1, plan(score_budget=0.2), key=jax.random.key(0), **options)


def draws(step=0, secret=SECRET, tx=None):
    tx = tx or optimizer()
    return SecureNoise(secret=secret).draws(step, PARAMS, tx.geometry(tx.init(PARAMS)))


def test_draws_are_a_function_of_secret_and_step():
    one, again = draws(3), draws(3)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(again)))
    others = [draws(4), draws(3, bytes(32)), draws(3, SECRET + b"x")]
    for other in others:
        assert not np.array_equal(one.gradient["a"], other.gradient["a"])
        assert not np.array_equal(one.scores, other.scores)


def test_bits_are_those_of_the_standard_library():
    """The documented function: 192 bits a draw, by the compiled step's own law."""
    words = b"".join(n.to_bytes(16, "little") for n in (2, 0, 0))
    message = b"dp_ilg.secure_noise.2" + (32).to_bytes(8, "little") + SECRET + words
    stream = hashlib.shake_256(message).digest(4 * 6 * 12)
    bits = np.frombuffer(stream, "<u4").reshape(6, 12)
    found = np.asarray(draws(2).gradient["a"]).ravel()
    np.testing.assert_array_equal(found, steps_of(tuple(bits), np))


def test_leaves_longer_than_a_block_go_on(monkeypatch):
    from dp_ilg.noise import secure

    whole = np.asarray(draws(1).gradient["a"]).ravel()
    monkeypatch.setattr(secure, "_BLOCK", 5)
    cut = np.asarray(draws(1).gradient["a"]).ravel()
    assert len(np.unique(cut)) == len(np.unique(whole)) == 12
    monkeypatch.setattr(secure, "_BLOCK", 12)
    assert np.array_equal(whole, np.asarray(draws(1).gradient["a"]).ravel())


def test_the_release_is_the_sum_plus_these_draws():
    the_plan = plan(score_budget=0.0)
    noise = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0))
    geometry = dp_ilg.Geometry.of(PARAMS, [0.5, 2.0])
    zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), PARAMS)
    clipped = dp_ilg.ClippedGrad(zero, jnp.zeros(2), geometry, jnp.float32(3.0))
    given = SecureNoise(secret=SECRET).draws(0, PARAMS, geometry)
    release, _ = noise.update(clipped, noise.init(PARAMS), noise=given)
    sigma = the_plan.gradient_noise_multipliers[0] * 3.0 / the_plan.batch_size
    for name, weight in (("a", 0.5), ("b", 2.0)):
        expected = np.asarray(in_stddevs(given.gradient[name])) * sigma * weight
        tolerance = 6e-4 if name == "a" else 1e-2
        np.testing.assert_allclose(
            np.asarray(release[name], np.float32), expected, rtol=tolerance
        )


@pytest.mark.parametrize("method", ["dp_adam_ilg", "quantile_clipping_per_layer"])
def test_the_key_has_no_part_in_it(method):
    row = dp_ilg.baselines.BASELINES[method]
    results = []
    for seed in (0, 1):
        key = jax.random.key(seed)
        tx = row(0.1, plan(score_budget=0.2), key=key)
        update, state, params = jax.jit(tx.update), tx.init(PARAMS), PARAMS
        for step in range(3):
            given = draws(step, tx=tx)
            updates, state = update(GRADS, state, params, noise=given)
            params = optax.apply_updates(params, updates)
        results.append((params, tx.geometry(state).weights))
    trees_close(*results, rtol=0, atol=0)
    assert not np.array_equal(results[0][0]["a"], PARAMS["a"])


def test_noise_of_another_step_releases_nothing_but_nan():
    tx = optimizer()
    state = tx.init(PARAMS)
    updates, after = jax.jit(tx.update)(GRADS, state, PARAMS, noise=draws(1))
    for leaf in jax.tree.leaves(updates):
        assert np.isnan(np.asarray(leaf, np.float32)).all()
    right, _ = jax.jit(tx.update)(GRADS, state, PARAMS, noise=draws(0))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in right.values())


def test_without_it_nothing_changes():
    tx, given = optimizer(), draws(0)
    state = tx.init(PARAMS)
    plain, _ = tx.update(GRADS, state, PARAMS)
    none, _ = tx.update(GRADS, state, PARAMS, noise=None)
    other, _ = tx.update(GRADS, state, PARAMS, noise=given)
    assert np.array_equal(plain["a"], none["a"])
    assert not np.array_equal(plain["a"], other["a"])


def test_the_secret_is_not_shown():
    source = SecureNoise(secret=SECRET)
    assert SECRET.hex() not in repr(source) and "\\x" not in repr(source)
    assert repr(source) == "SecureNoise(secret=<hidden>)"


@pytest.mark.parametrize(
    ("secret", "kind", "words"),
    [
        ("a" * 32, TypeError, "secret is str, but must be bytes"),
        (7, TypeError, "secret is int"),
        (bytes(16), ValueError, "secret has 16 bytes"),
    ],
)
def test_bad_secrets_are_refused(secret, kind, words):
    with pytest.raises(kind, match=words) as caught:
        SecureNoise(secret=secret)
    assert "token_bytes(32)" in str(caught.value)


def test_misfits_are_refused_in_a_sentence():
    tx, given = optimizer(), draws(0)
    state = tx.init(PARAMS)

    def update(noise):
        return tx.update(GRADS, state, PARAMS, noise=noise)

    with pytest.raises(ValueError, match="step is -1"):
        draws(-1)
    with pytest.raises(ValueError, match="The noise has shapes"):
        update(given._replace(gradient={"a": jnp.zeros((3, 4), jnp.int32)}))
    with pytest.raises(ValueError, match=r"numbers for scores, but 2 are needed"):
        update(given._replace(scores=jnp.zeros(1, jnp.int32)))
    with pytest.raises(TypeError, match="must be NoiseDraws"):
        update(given.gradient)
    with pytest.raises(TypeError, match="float32, int32, but draws are int32"):
        update(given._replace(scores=jnp.zeros(2)))
    assert isinstance(given, NoiseDraws)
