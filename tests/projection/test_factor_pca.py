"""Factor PCA: sensitivity of the three sums, noise, absent rows, and the price."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

import dp_ilg
from dp_ilg.projection import factor_pca, pca
from dp_ilg.projection.factor_pca import FactorPca, factor_releases, private_factor_pca

KEY = jax.random.key(11)
MAPS = {
    "random": np.random.default_rng(0).normal(size=(5, 7)),
    "one entry": np.eye(35)[3].reshape(5, 7),
    "one channel": np.outer(np.eye(5)[2], np.ones(7)),
    "huge": np.full((5, 7), 1e37),
    "tiny": np.full((5, 7), 1e-37),
    "mixed": np.geomspace(1e-30, 1e30, 35).reshape(5, 7),
}


def sums(x, mean):
    """The three sums before noise, as the release forms them."""
    shape = x.shape[1:]
    units = np.concatenate(list(factor_pca._unit_chunks(x, shape)))
    first, second = factor_pca._moments(units, mean.astype(np.float32))
    return units.sum(0, dtype=np.float64), first, second


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("offset", [0.0, 0.1, -0.1])
def test_one_example_moves_each_sum_by_at_most_one(name, offset):
    others = np.random.default_rng(1).normal(size=(6, 5, 7))
    mean = np.full((5, 7), offset)
    more = sums(np.concatenate([others, MAPS[name][None]]), mean)
    for with_it, without in zip(more, sums(others, mean), strict=True):
        assert np.linalg.norm(with_it - without) <= 1


def test_the_bounds_are_reached_so_the_search_can_fail():
    others = np.random.default_rng(1).normal(size=(6, 5, 7))
    mean, one = np.zeros((5, 7)), MAPS["one entry"][None]
    more, less = sums(np.concatenate([others, one]), mean), sums(others, mean)
    for with_it, without in zip(more, less, strict=True):
        assert np.linalg.norm(with_it - without) > 0.999


def frobenius_coordinates(matrix):
    upper = matrix[np.triu_indices(len(matrix), 1)]
    return np.concatenate([np.diag(matrix), np.sqrt(2) * upper])


def draws():
    keys = jax.random.split(KEY, 25)
    return np.concatenate(
        [
            frobenius_coordinates(
                pca.with_symmetric_noise(np.zeros((56, 56)), 1.0, key)
            )
            for key in keys
        ]
    )


@pytest.mark.parametrize(
    "factor, accepted", [(1.0, True), (0.97, False), (1.03, False)]
)
def test_noise_of_moments_is_isotropic_and_three_percent_are_seen(factor, accepted):
    """Chi-square over 39,900 draws at level 1e-4."""
    x = draws() * factor
    p = 2 * min(stats.chi2.cdf(x @ x, x.size), stats.chi2.sf(x @ x, x.size))
    assert (p > 1e-4) == accepted


@pytest.mark.parametrize(
    "factor, accepted", [(1.0, True), (0.97, False), (1.03, False)]
)
def test_the_released_mean_carries_the_stated_noise(factor, accepted):
    """Rows of zeros: what is released is the noise; chi-square at level 1e-4."""
    nothing = np.zeros((40, 100, 400), np.float32)
    sigma = 3.0 * factor
    found = private_factor_pca(nothing, 1, 1, noise_multiplier=sigma, key=KEY).mean
    x = np.asarray(found, np.float64).ravel() * 40 / 3.0
    p = 2 * min(stats.chi2.cdf(x @ x, x.size), stats.chi2.sf(x @ x, x.size))
    assert (p > 1e-4) == accepted


def factored(count=4000):
    """Maps with strong directions in both axes, away from zero."""
    r = np.random.default_rng(2)
    z = r.normal(size=(count, 6, 8)) * np.geomspace(1, 0.02, 6)[:, None]
    z = z * np.geomspace(1, 0.05, 8)
    turn = (
        np.linalg.qr(r.normal(size=(6, 6)))[0],
        np.linalg.qr(r.normal(size=(8, 8)))[0],
    )
    return (turn[0] @ z @ turn[1] + 0.3).astype(np.float32), turn


def test_strong_directions_are_found_and_coordinates_are_even():
    x, (across, _) = factored()
    pca = private_factor_pca(x, 3, 4, noise_multiplier=2.0, key=KEY, whitening=0.5)
    overlap = np.linalg.norm(np.asarray(pca.channels) @ across[:, :3], 2)
    assert overlap > 0.99
    z = pca.project(x)
    assert z.shape == (4000, 12) and abs(z.mean(0)).max() < 0.1
    spread = z.std(0)
    assert spread.max() / spread.min() < 3, "whitening 0.5 makes variances alike"
    bare = private_factor_pca(x, 3, 4, noise_multiplier=2.0, key=KEY, whitening=0.0)
    uneven = bare.project(x).std(0)
    assert uneven.max() / uneven.min() > 10, "and 0 does not"
    assert 0.5 < np.mean(z**2) < 2 and 0.5 < np.mean(bare.project(x) ** 2) < 2


def test_rows_are_projected_alone_and_by_the_formula():
    x, _ = factored(40)
    pca = private_factor_pca(x, 2, 3, noise_multiplier=0.5, key=KEY)
    one = x[7].astype(np.float64)
    centred = one / np.linalg.norm(one) - pca.mean
    wanted = (pca.channels @ centred @ pca.positions.T * pca.scales).ravel()
    np.testing.assert_allclose(pca.project(x)[7], wanted, rtol=2e-4, atol=1e-4)
    np.testing.assert_array_equal(pca.project(x[7:8])[0], pca.project(x)[7])
    flat = pca.project(x.reshape(40, -1))
    np.testing.assert_array_equal(flat, pca.project(x))


def test_pieces_do_not_matter(monkeypatch):
    x, _ = factored(300)
    whole = private_factor_pca(x, 3, 3, noise_multiplier=1.0, key=KEY)
    monkeypatch.setattr(factor_pca, "_CHUNK_BYTES", 4 * 48 * 7)
    pieces = private_factor_pca(x, 3, 3, noise_multiplier=1.0, key=KEY)
    np.testing.assert_allclose(
        whole.project(x[:20]), pieces.project(x[:20]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_absent(poison):
    x, _ = factored(50)
    bad = x[:1].copy()
    bad[0, 2, 3] = poison
    mean = np.full(x.shape[1:], 0.1)
    for with_it, without in zip(
        sums(np.concatenate([x, bad]), mean), sums(x, mean), strict=True
    ):
        np.testing.assert_allclose(with_it, without, rtol=0, atol=1e-12)
    found = private_factor_pca(
        np.concatenate([x, bad]), 2, 2, noise_multiplier=1.0, key=KEY
    )
    assert all(np.isfinite(part).all() for part in found)
    projected = found.project(np.concatenate([bad, x[:2]]))
    assert np.isnan(projected[0]).all() and np.isfinite(projected[1:]).all()


def test_half_precision_is_taken():
    x, _ = factored(60)
    pca = private_factor_pca(x.astype(np.float16), 2, 2, noise_multiplier=1.0, key=KEY)
    assert isinstance(pca, FactorPca) and pca.project(x).dtype == np.float32


def test_the_price_is_three_gaussians_in_the_plan():
    facts: dict[str, Any] = dict(delta=1e-5, num_examples=1000, batch_size=100)
    facts["num_steps"] = 10
    plan = dp_ilg.plan_privacy(
        epsilon=1.0, prior_releases=factor_releases(20.0), **facts
    )
    assert plan.epsilon() <= 1.0
    alone = dp_ilg.plan_privacy(epsilon=1.0, **facts)
    assert plan.noise_multipliers[0] > alone.noise_multipliers[0]
    assert [z for _, z in plan.prior_releases] == [20.0] * 3


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=np.zeros((3, 4))), r"\(3, 4\).*reshape"),
        (dict(x=np.zeros((0, 4, 4))), r"\(0, 4, 4\)"),
        (dict(num_channels=6), "num_channels is 6.*at most 5"),
        (dict(num_positions=8), "num_positions is 8.*at most 7"),
        (dict(num_channels=0), "num_channels"),
        (dict(noise_multiplier=0.0), "noise_multiplier"),
        (dict(noise_multiplier=float("nan")), "noise_multiplier"),
        (dict(whitening=0.6), r"whitening is 0.6.*\[0, 0.5\]"),
        (dict(whitening=float("nan")), "whitening is nan"),
    ],
)
def test_mistakes_are_one_sentence(change, words):
    given = dict(x=np.ones((3, 5, 7)), num_channels=2, num_positions=2)
    given |= dict(noise_multiplier=1.0, key=KEY) | change
    with pytest.raises(ValueError, match=words):
        private_factor_pca(
            given.pop("x"),
            given.pop("num_channels"),
            given.pop("num_positions"),
            **given,
        )


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match="key"):
        private_factor_pca(np.ones((3, 5, 7)), 1, 1, noise_multiplier=1.0, key=3)
