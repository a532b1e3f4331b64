"""Laws of the randomness: Gaussian in the tails, independent, right in bfloat16.

Every test states its level and refuses a wrong answer as well.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.experiments.audits.subject import release_of, tapped
from dp_ilg.noise.normal import normal_steps
from dp_ilg.noise.secure import SecureNoise
from dp_ilg.noise.steps import in_stddevs
from tests.helpers.models import plan

LEVEL = 1e-4  # of every test, after correction for what it looks at
SECRET = bytes(range(32))


def threefry(shape, dtype=jnp.float32, seed=0):
    leaf = jax.ShapeDtypeStruct(shape, dtype)
    drawn = normal_steps(jax.random.key(seed), [leaf])[0]
    return np.asarray(in_stddevs(drawn), np.float64)


def shake(shape, dtype=jnp.float32, seed=0):
    params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    geometry = dp_ilg.Geometry.uniform({"w": jnp.zeros(1)})
    draws = SecureNoise(secret=SECRET).draws(seed, params, geometry)
    return np.asarray(in_stddevs(draws.gradient["w"]), np.float64)


SOURCES = {"threefry": threefry, "secure": shake}


# --- tails ---------------------------------------------------------------------------


def tail_p(sample):
    """The least corrected p of counts beyond 2, 3, 3.5, 4, and of the tail's shape."""
    found = []
    for cut in (2.0, 3.0, 3.5, 4.0):
        for tail in (sample > cut, sample < -cut):
            rate = float(stats.norm.sf(cut))
            count = int(np.sum(tail))
            found.append(stats.binomtest(count, sample.size, rate).pvalue)
    beyond = np.abs(sample[np.abs(sample) > 2.5])
    uniform = stats.norm.sf(beyond) / stats.norm.sf(2.5)
    found.append(stats.kstest(uniform, "uniform").pvalue)
    return min(found) * len(found)


@pytest.mark.parametrize("source", SOURCES)
def test_gaussian_in_the_tails_to_four_sigma(source):
    sample = SOURCES[source]((1000, 1500)).ravel()
    assert tail_p(sample) > LEVEL
    assert np.max(np.abs(sample)) > 4.4  # 16 beyond it are expected
    assert tail_p(sample * 1.01) < LEVEL
    assert tail_p(np.clip(sample, -3.9, 3.9)) < LEVEL
    heavy = np.random.default_rng(0).standard_t(60, sample.size)
    assert tail_p(heavy / np.std(heavy)) < LEVEL


# --- independence --------------------------------------------------------------------


def holm_rejects(values, level=LEVEL):
    """Whether Holm's procedure rejects any of several p values: the least decides."""
    return min(values) * len(values) < level


def correlations(rows):
    """p values of all pairs of equally long samples."""
    unit = [(r - r.mean()) / r.std() for r in map(np.ravel, rows)]
    return [
        2 * stats.norm.sf(abs(float(np.mean(a * b))) * np.sqrt(a.size))
        for a, b in itertools.combinations(unit, 2)
    ]


PARAMS = {"a": jnp.zeros((48, 64)), "b": jnp.zeros((48, 64)), "c": jnp.zeros((3072, 1))}
LAYERS = dp_ilg.layers.by_leaf(dp_ilg.layers.blocks("c", edges=range(64, 3072, 64)))


@functools.cache
def releases(steps, secret=None):
    """Noise of some steps, leaf by leaf, and the score's."""
    the_plan = plan(score_budget=0.3, num_steps=steps)
    options: Any = dict(key=jax.random.key(5), layers=LAYERS, ema_decay=0.0)
    tx = tapped(dp_ilg.dp_adam_ilg(0.1, the_plan, importance="paper", **options))
    state, rows = tx.init(PARAMS), []
    nothing = jax.tree.map(lambda p: jnp.zeros((1, *p.shape)), PARAMS)
    update = jax.jit(tx.update)
    for step in range(steps):
        geometry, extra = tx.geometry(state), {}
        if secret is not None:
            source = SecureNoise(secret=secret)
            extra["noise"] = source.draws(step, PARAMS, geometry)
        _, state = update(nothing, state, PARAMS, **extra)
        weights = geometry.groups.expand(geometry.weights)
        leaves = jax.tree.leaves(release_of(state))
        whitened = [np.asarray(x / w) for x, w in zip(leaves, weights, strict=True)]
        rows.append((*whitened, np.asarray(state[1].average)))
    return [list(kind) for kind in zip(*rows, strict=True)]


def all_pairs(found):
    """p values over steps and leaves, score and gradient, and blocks of a leaf."""
    *leaves, scores = found
    values = correlations([x for leaf in leaves for x in leaf])
    values += correlations(scores)
    count = scores[0].size
    starts = [x.ravel()[:count] for leaf in leaves for x in leaf]
    for score, start in itertools.product(scores, starts):
        values += correlations([score, start])
    layers = np.stack([x.reshape(-1, 64) for x in leaves[2]])
    return values + correlations([layers[:, 0::2], layers[:, 1::2]])


@pytest.mark.parametrize("secret", [None, SECRET], ids=["threefry", "secure"])
def test_noise_is_independent_over_steps_leaves_layers_and_score(secret):
    """Holm at level 1e-4 over all pairs."""
    assert not holm_rejects(all_pairs(releases(4, secret)))


def test_draws_used_twice_are_refused():
    """In two steps, in two leaves, in two layers, in score and gradient."""
    a, b, c, scores = releases(4)
    shared = [leaf.ravel()[: scores[0].size] for leaf in a]
    layers = [np.repeat(x.reshape(-1, 2, 64)[:, :1], 2, axis=1) for x in c]
    for wrong in (
        [[*a[:3], a[0]], b, c, scores],
        [a, a, c, scores],
        [a, b, layers, scores],
        [a, b, c, [*scores[:3], scores[0]]],
        [a, b, c, shared],
    ):
        assert holm_rejects(all_pairs(wrong))


# --- bfloat16 ------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["threefry", "secure"])
def test_noise_of_bfloat16_parameters_keeps_variance_and_tails(source):
    """The draw is made in float32 and only the release rounded, to 8 bits."""
    params = {"w": jnp.zeros((500, 800), jnp.bfloat16)}
    the_plan, geometry = plan(score_budget=0.0), dp_ilg.Geometry.uniform(params)
    noise = dp_ilg.add_importance_noise(the_plan, key=jax.random.key(2))
    zero = {"w": jnp.zeros((500, 800), jnp.float32)}
    clipped = dp_ilg.ClippedGrad(zero, jnp.zeros(1), geometry, jnp.float32(1.0))
    extra = {}
    if source == "secure":
        extra["noise"] = SecureNoise(secret=SECRET).draws(0, params, geometry)
    release, _ = noise.update(clipped, noise.init(params), **extra)
    assert release["w"].dtype == jnp.bfloat16
    stddev = the_plan.gradient_noise_multipliers[0] / the_plan.batch_size
    sample = np.asarray(release["w"], np.float64).ravel() / stddev
    low, high = stats.chi2.ppf([LEVEL / 2, 1 - LEVEL / 2], sample.size)
    accepts = lambda s: low <= np.sum((sample / s) ** 2) <= high  # noqa: E731
    assert accepts(1.0) and not accepts(0.97) and not accepts(1.03)
    far = int(np.sum(np.abs(sample) > 4))
    assert stats.binomtest(far, sample.size, float(2 * stats.norm.sf(4))).pvalue > LEVEL
    distance = stats.kstest(sample, "norm").statistic
    assert distance < 2**-8  # what rounding to 8 bits alone may do, and no more
    assert stats.kstest(sample * 1.03, "norm").statistic > 2**-8


# --- sampler -------------------------------------------------------------------------


def taken(draw, steps, count):
    found = np.zeros((steps, count), bool)
    for step, row in enumerate(found):
        row[draw(step)] = True
    return found


def pairs_p(found, rate):
    """Whether examples take part together as often as by chance: chi-square of pairs.

    The statistic is a sum over pairs of squared standard scores; its law is taken from
    matrices of independent coins.
    """

    def statistic(who):
        centred = who - rate
        together = centred.T @ centred / (rate * (1 - rate) * np.sqrt(len(who)))
        return np.sum(np.triu(together, 1) ** 2)

    rng = np.random.default_rng(0)
    coins = [statistic(rng.random(found.shape) < rate) for _ in range(60)]
    score = (statistic(found) - np.mean(coins)) / np.std(coins)
    return 2 * stats.norm.sf(abs(score))


def test_examples_are_drawn_independently_of_each_other():
    rate, count, steps = 0.1, 60, 600
    sampler = dp_ilg.PoissonSampler(count, rate, key=jax.random.key(4))
    assert pairs_p(taken(sampler.indices, steps, count), rate) > LEVEL

    def couples(step):
        rng = np.random.default_rng(step)
        chosen = np.flatnonzero(rng.random(count // 2) < rate)
        return np.concatenate([2 * chosen, 2 * chosen + 1])

    assert pairs_p(taken(couples, steps, count), rate) < LEVEL


def test_batch_sizes_follow_the_binomial_law():
    """Chi-square over size classes; fixed sizes and another rate are refused."""
    rate, count, steps = 0.1, 200, 2000
    sampler = dp_ilg.PoissonSampler(count, rate, key=jax.random.key(6))
    sizes = np.array([len(sampler.indices(t)) for t in range(steps)])

    def p_value(sizes):
        edges = [-1, 13, 15, 17, 18, 19, 20, 21, 22, 24, 26, count]
        expected = np.diff(stats.binom.cdf(edges, count, rate)) * steps
        observed, _ = np.histogram(sizes, np.array(edges) + 0.5)
        return stats.chisquare(observed, expected).pvalue

    assert p_value(sizes) > LEVEL
    assert p_value(np.full(steps, 20)) < LEVEL
    other = dp_ilg.PoissonSampler(count, 0.11, key=jax.random.key(6))
    assert p_value([len(other.indices(t)) for t in range(steps)]) < LEVEL
