"""A clip norm by slack: one Gaussian for gradient and slack, and how it moves."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.baselines.slack import adapt_by_slack, slack_clipping
from dp_ilg.clipping.clip import CLIP_MODES, as_clip_mode, clip_sum
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.clipping.scores.slack import MARGIN, SLACK
from dp_ilg.geometry.facts import ClipFacts
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params, per_example, plan

PAIRS = 400
SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
STATE: dict[str, Any] = dict(key=jax.random.key(1))


def tree(make):
    return {name: make(shape) for name, shape in SHAPES.items()}


@functools.cache
def clipper(mode):
    """Compiled: sums with and without the last example, for PAIRS batches of four."""
    groups = dp_ilg.layers.group(tree(jnp.zeros), "leaf")

    def both(gradients, weights, bound):
        facts = ClipFacts(score=SLACK)
        geometry = dp_ilg.Geometry(weights, groups, facts=facts)
        engine, mask = from_gradients(gradients, groups), jnp.zeros(4, bool)
        return [
            clip_sum(engine, geometry, bound, as_clip_mode(mode), m)
            for m in (mask, mask.at[-1].set(True))
        ]

    return jax.jit(jax.vmap(both))


def exact(clipped):
    """Gradient leaves and slack in float64, with what float32 left of them."""
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    leaves = zip(
        jax.tree.leaves(clipped.gradients),
        jax.tree.leaves(clipped.remainder),
        jax.tree.leaves(clipped.fine),
        strict=True,
    )
    slack = wide(clipped.layer_shares) + wide(clipped.shares_remainder)
    return [np.sum([wide(x) for x in parts], 0) for parts in leaves], slack


def moved_by(mode, seed, spread):
    """By how much one example moves gradient and slack, in units of C."""
    rng = np.random.default_rng(seed)
    size = lambda: 10.0 ** rng.uniform(-spread, spread, (PAIRS, 4))  # noqa: E731
    length = size()

    def leaf(shape):
        ones = (1,) * len(shape)
        draw = rng.normal(size=(PAIRS, 4, *shape)) * size().reshape(PAIRS, 4, *ones)
        return jnp.asarray(draw * length.reshape(PAIRS, 4, *ones), jnp.float32)

    weights = jnp.asarray(10.0 ** rng.uniform(-1, 1, (PAIRS, 3)), jnp.float32)
    bound = jnp.asarray(10.0 ** rng.uniform(-2, 2, PAIRS), jnp.float32)
    (one, slack), (other, less) = map(exact, clipper(mode)(tree(leaf), weights, bound))
    squares = 0
    for k, (a, b) in enumerate(zip(one, other, strict=True)):
        gap = (a - b).reshape(PAIRS, -1) / np.asarray(weights, np.float64)[:, k, None]
        squares = squares + np.sum(gap**2, 1)
    return np.sqrt(squares) / np.asarray(bound, np.float64), slack - less


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_gradient_and_slack_of_one_example_are_within_the_bound(mode):
    """Searched over sizes; found close below it, and an honest s is not 0 or small."""
    largest = 0.0
    for seed, spread in enumerate((0.05, 0.3, 1.0, 3.0)):
        gradient, slack = moved_by(mode, seed, spread)
        assert not np.any(slack[:, 1:])
        free = slack[:, 0] > 0
        together = np.hypot(gradient, slack[:, 0])
        assert np.all(together[free] <= 1 - MARGIN)
        assert np.all(gradient[~free] <= 1)
        largest = max(largest, float(np.max(together[free], initial=0)))
    if mode == "joint":
        assert largest > 1 - 2e-4  # the vector is used up, whatever the norm
        assert np.max(gradient[free], initial=0) > 0.2


def test_a_slack_that_forgets_the_gradient_would_be_found():
    """Planted fault: 1 - r^2 / 4 in place of the root of 1 - r^2."""
    gradient, slack = moved_by("joint", 1, 0.3)
    free = slack[:, 0] > 0.1
    wrong = 1 - gradient**2 / 4
    assert np.max(np.hypot(gradient, wrong)[free]) > 1.05


def test_absent_examples_have_no_slack_and_chunks_add_up():
    params = mlp_params()
    tx = slack_clipping(1e-2, plan(score_budget=0.0), key=jax.random.key(0))
    geometry = tx.geometry(tx.init(params))
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    x, y = mlp_batch()
    run = functools.partial(grad_fn, params, geometry=geometry)
    whole = run((x, y))
    norms = np.asarray(
        from_gradients(per_example(params, (x, y)), geometry.groups).norms, np.float64
    )
    used = np.minimum(np.linalg.norm(norms, axis=1), 1)
    want = np.sum(np.sqrt(1 - used**2))
    assert float(whole.layer_shares[0]) == pytest.approx(want, abs=0.05)
    halves = run((x[:6], y[:6])) + run((x[6:], y[6:]))
    np.testing.assert_allclose(halves.layer_shares, whole.layer_shares, rtol=1e-5)
    gone = run((x.at[0].set(jnp.nan), y))
    padded = run((x, y), is_padding_example=jnp.arange(12) == 0)
    np.testing.assert_allclose(gone.layer_shares, padded.layer_shares, rtol=1e-6)
    assert float(run((x * jnp.nan, y)).layer_shares[0]) == 0


def released(the_plan, count=4000):
    """The slack that many runs release of nobody."""
    adapt = adapt_by_slack(the_plan, **STATE)
    params = tree(jnp.zeros)
    geometry = adapt.geometry(adapt.init(params)).saying(ClipFacts(score=SLACK))
    nobody = dp_ilg.ClippedGrad(params, jnp.zeros(3), geometry, 1.0)

    def one(key):
        state = adapt.init(params)._replace(key=key)
        return adapt.update(nobody, state)[1].slack

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(STATE["key"], count)))


def test_the_noise_of_the_slack_is_the_gradients():
    """Chi-square of 40,000 draws, level 1e-4; 3 % either way is refused."""
    the_plan = plan(score_budget=0.0, noise_multiplier=1.3)
    sample = released(the_plan, 40_000) * the_plan.batch_size / 1.3

    def p_value(scale):
        found = scipy.stats.chi2.cdf(np.sum((sample * scale) ** 2), sample.size)
        return 2 * min(found, 1 - found)

    assert p_value(1.0) > 1e-4
    assert max(p_value(0.97), p_value(1.03)) < 1e-4


@pytest.mark.parametrize("start", [0.01, 30.0])
def test_the_threshold_settles_where_the_mean_slack_is_the_target(start):
    """Norms of 0.5 to 2: with 0.3 asked for, it ends where theory says, from afar."""
    the_plan = plan(
        score_budget=0.0, batch_size=400, num_steps=120, noise_multiplier=0.5,
        l2_clip_norm=start,
    )  # fmt: skip
    adapt = dp_ilg.chain(
        dp_ilg.clip_per_example(start),
        adapt_by_slack(the_plan, target=0.3, step_size=0.4, **STATE),
        dp_ilg.add_importance_noise(the_plan, key=jax.random.key(0)),
    )
    norms = np.exp(np.linspace(np.log(0.5), np.log(2), 400))
    grads = {"w": jnp.asarray(norms[:, None] * np.array([0.6, 0.8]), jnp.float32)}
    params = {"w": jnp.zeros(2)}

    def body(state, _):
        return adapt.update(grads, state, params)[1], adapt.geometry(state).weights[0]

    _, path = jax.jit(lambda s: jax.lax.scan(body, s, None, 100))(adapt.init(params))
    threshold = start * float(path[-20:].mean())
    slack = np.mean(np.sqrt(1 - np.minimum(norms / threshold, 1) ** 2))
    assert slack == pytest.approx(0.3, abs=0.02)


def test_other_sums_and_settings_are_refused():
    params = tree(jnp.zeros)
    adapt = adapt_by_slack(plan(score_budget=0.0), **STATE)
    state = adapt.init(params)
    shares = dp_ilg.ClippedGrad(params, jnp.zeros(3), adapt.geometry(state), 1.0)
    with pytest.raises(ValueError, match="holds no slack"):
        adapt.update(shares, state)
    with pytest.raises(TypeError, match="got dict, not a ClippedGrad"):
        adapt.update(params, state)
    with pytest.raises(ValueError, match="up to 500; plan with less noise"):
        adapt_by_slack(plan(score_budget=0.0, noise_multiplier=600.0), **STATE)
    for options in ({"target": 1.0}, {"step_size": 0.0}):
        with pytest.raises(ValueError):
            adapt_by_slack(plan(score_budget=0.0), **STATE, **options)
