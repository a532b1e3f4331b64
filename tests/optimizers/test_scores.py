"""Scores in a chain: the one that is asked for is released, averaged and used."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.clipping.scores.table import SCORES, Score
from dp_ilg.optimizers.kept_release import keep_release

PLAN = dp_ilg.plan_privacy(
    noise_multiplier=1.0,
    delta=1e-5,
    num_examples=1000,
    batch_size=100,
    num_steps=10,
    score_budget=0.1,
)
PARAMS = {"a": jnp.linspace(-1, 1, 6), "b": jnp.ones((2, 3)), "c": jnp.zeros(2)}
ROWS = np.random.default_rng(0).normal(size=(12, 2)).astype("float32")


def loss(params, x):
    return jnp.sum(
        jnp.tanh(params["a"].reshape(3, 2) @ x + params["b"].T @ x)
    ) + jnp.sum(params["c"] * x)


def run(score, steps=2, **options):
    tx = dp_ilg.dp_adam_ilg(
        0.1, PLAN, key=jax.random.key(3), layers="leaf", score=score, **options
    )
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=PLAN.l2_clip_norm)

    @jax.jit
    def step(params, state):
        total = grad_fn(params, ROWS, geometry=tx.geometry(state))
        updates, state = tx.update(total, state, params)
        return optax.apply_updates(params, updates), state, total.layer_shares

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state, shares = step(params, state)
    return tx, params, state, np.asarray(shares)


@pytest.mark.parametrize("score", SCORES)
def test_every_row_runs_and_says_itself(score):
    tx, params, state, shares = run(score)
    assert tx.geometry(state).facts.score is SCORES[score]
    assert (tx.geometry(state).release is not None) == (score == "signal")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, shares)))
    assert np.linalg.norm(shares) <= len(ROWS)


def test_uniform_weights_do_not_care_about_the_score():
    _, one, _, _ = run("l2", importance="uniform")
    _, other, _, _ = run("weight", importance="uniform")
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-5)


def test_the_release_of_the_last_step_is_read():
    """After one step the signal score is that of the gradient across the release."""
    tx, params, state, _ = run("signal", steps=1)
    release = tx.geometry(state).release
    assert any(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(release))
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, ROWS)
    rest = []
    for name in sorted(PARAMS):
        g = np.float64(grads[name]).reshape(len(ROWS), -1)
        d = np.float64(release[name]).ravel()
        rest.append(np.linalg.norm(g - np.outer(g @ d, d) / (d @ d), axis=1))
    norms = [
        np.linalg.norm(np.float64(grads[k]).reshape(12, -1), axis=1) for k in PARAMS
    ]
    expected = np.sum(rest / np.sqrt(np.sum(np.square(norms), 0)), 1)
    _, _, _, shares = run("signal", steps=2)
    np.testing.assert_allclose(shares, expected, rtol=1e-4)


def test_a_chain_of_ones_own_keeps_the_release_if_asked_to():
    k1, k2 = jax.random.split(jax.random.key(0))
    reading = Score(lambda one: one.lengths(one.release) / 1e3, reads_release=True)
    links = [
        dp_ilg.clip_per_example(PLAN.l2_clip_norm),
        dp_ilg.score_layer_importance("paper", PLAN, key=k1, score=reading),
        dp_ilg.add_importance_noise(PLAN, key=k2),
    ]
    with pytest.raises(
        ValueError, match="a function reads the last release, which the"
    ):
        dp_ilg.chain(*links)
    tx = dp_ilg.chain(*links, keep_release(), optax.sgd(0.1))
    assert tx.geometry(tx.init(PARAMS)).release["a"].shape == (6,)


def test_sums_of_another_score_are_refused():
    tx = dp_ilg.dp_adam_ilg(0.1, PLAN, key=jax.random.key(3), layers="leaf", score="l1")
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=PLAN.l2_clip_norm, engine="vmap")
    other = dp_ilg.Geometry.uniform(PARAMS, "leaf")
    total = grad_fn(PARAMS, ROWS, geometry=other)
    with pytest.raises(ValueError, match="score is 'l2' in clipped_grad, but 'l1' in"):
        tx.update(total, tx.init(PARAMS), PARAMS)


def test_a_score_without_a_release_of_scores_is_refused():
    with pytest.raises(ValueError, match="score is 'l1', but source is 'public'"):
        dp_ilg.dp_adam_ilg(
            0.1, PLAN, key=jax.random.key(3), source="public", score="l1"
        )
    with pytest.raises(ValueError, match="score is 3, but must be one of"):
        dp_ilg.dp_adam_ilg(0.1, PLAN, key=jax.random.key(3), score=3)


MEANS = np.array([0.5, 0.1, -0.3], np.float32)


def test_importance_is_the_mean_score_rid_of_noise():
    """Squares of the averaged release, less the noise's variance, are unbiased.

    For scores that are no shares of a norm, and for one below zero, which counts as
    unimportant.
    """
    geometry = dp_ilg.Geometry.uniform(PARAMS, "leaf")
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    total = dp_ilg.ClippedGrad(zeros, PLAN.batch_size * MEANS, geometry, 1.0)

    @jax.jit
    @jax.vmap
    def shares(key):
        scorer = dp_ilg.score_layer_importance(
            "paper", PLAN, key=key, layers="leaf", ema_decay=0.5, floor=1e-4, score="l1"
        )
        state = scorer.init(PARAMS)
        for _ in range(4):
            _, state = scorer.update(total, state)
        return scorer.importance(state)

    found = np.asarray(shares(jax.random.split(jax.random.key(0), 400)))
    squares = np.square(np.maximum(MEANS, 0))
    expected = squares / squares.sum()
    error = found.std(0) / 20
    assert np.all(np.abs(found.mean(0) - expected) < 5 * error + 2e-3)
    assert not np.all(np.abs(found.mean(0) - MEANS / MEANS.sum()) < 0.05)
    assert found[:, 2].max() < 0.01


def test_an_average_example_keeps_its_norm_where_importance_is_the_norm():
    tx, _, state, _ = run("l2", steps=6, floor=0.001)
    weights, shares = tx.geometry(state).weights, tx.importance(state)
    assert float(jnp.sum(shares / weights**2)) == pytest.approx(1, abs=1e-5)
